"""Steps that are CUDA graphs learn what steps that Accelerate takes do."""

import contextlib
import copy
import functools
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from gpu_packages import FLASH_2, FLASH_4
from repeated_steps import repeated
from small_models import mesh_rows, small_model

from iflame_cli.errors import CommandError
from iflame_hf.layout_iflame import RowLayout
from training.arguments import parse_arguments
from training.optim.groups import create_optimizer
from training.run import learner
from training.run.captured import FLASH_PACKAGES, CapturedLearner, kind_of, why_not_captured, with_rounded_room
from training.run.create import compile_blocks, create_model, enable_activation_checkpointing, flash_attention_4_serves
from training.run.learner import AcceleratedLearner

ROWS, FACES, STRIDES = 3, 12, (1, 3, 9)
CLIP = 0.5


def batch_of(seed, packed=True):
    """Rows of a few meshes each, as a packer makes them."""
    random = torch.Generator().manual_seed(seed)
    begins = (torch.rand(ROWS, FACES, generator=random) < 0.2) & torch.tensor(packed)
    ids = mesh_rows(ROWS, faces=FACES - 1, seed=seed)
    layout = RowLayout.of_begins(begins, ids.shape[1], STRIDES)
    labels = ids.masked_fill(layout.positions() < 9, -100)
    return {"input_ids": ids, "labels": labels, "layout": layout}


def learnt(make, optim, device="cpu", steps=5, packed=True, dtype=torch.float32, **sizes):
    """What each step of a learner found, and the weights after them. A step is poisoned, another has two batches."""
    model = small_model(**sizes).to(device).train()
    optimizer = create_optimizer(model, optim, 0.0, 0.1, fused=True)
    accelerator = Accelerator(cpu=device == "cpu")
    autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)
    if make is AcceleratedLearner:
        prepared = accelerator.prepare(model, optimizer)
        chosen = AcceleratedLearner(accelerator, *prepared, CLIP)
        accelerator.autocast = autocast
    else:
        chosen = make(model, optimizer, CLIP, autocast)
    found = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        batch = [batch_of(10 * step + each, packed) for each in range(1 + (step == 2))]
        labels = sum(int((rows["labels"] != -100).sum()) for rows in batch)
        if step == 3:
            labels = 0
        loss = chosen.backward(batch, labels).clone()
        found.append(torch.stack([loss, *chosen.update(loss)]).cpu())
    return torch.stack(found), {name: value.detach().cpu() for name, value in model.named_parameters()}, chosen


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_steps_on_one_buffer_of_gradients_learn_what_accelerates_do(optim):
    expected, weights, _ = learnt(AcceleratedLearner, optim)
    found, moved, _ = learnt(functools.partial(CapturedLearner, captures=False), optim)
    assert torch.allclose(found[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], rtol=1e-5)
    assert not found[3].isfinite().any() and not expected[3].isfinite().all()
    begun = dict(small_model().named_parameters())
    for name, weight in weights.items():
        assert (moved[name] - weight).norm() <= 1e-4 * (weight - begun[name]).norm(), name


def test_few_kinds_of_rows_serve_all_batches():
    kinds = {kind_of(with_rounded_room(batch_of(seed))) for seed in range(50)}
    assert kinds == {((ROWS, 9 * FACES), 32, True, ())}
    rows = batch_of(0)
    rounded = with_rounded_room(rows)["layout"]
    assert torch.equal(rounded.offsets[:, : rows["layout"].num_meshes + 1], rows["layout"].offsets)
    assert (rounded.offsets[:, rows["layout"].num_meshes :] == rows["layout"].offsets[:, -1:]).all()
    assert rounded.longest == (9 * FACES, 3 * FACES, FACES)
    single = batch_of(0, packed=False)
    assert kind_of(with_rounded_room(single)) == ((ROWS, 9 * FACES), ROWS, False, ())
    many = {**rows, "layout": RowLayout.of_begins(torch.ones(ROWS, FACES, dtype=torch.bool), 9 * FACES, STRIDES)}
    assert kind_of(with_rounded_room(many)) == ((ROWS, 9 * FACES), 64, True, ())
    with pytest.raises(ValueError, match="alone, got attention_mask"):
        with_rounded_room({**rows, "attention_mask": rows["input_ids"]})


def test_the_model_computes_the_same_with_room_for_more_meshes():
    model, rows = small_model(), batch_of(1)
    expected = model(**rows, use_cache=False)
    found = model(**with_rounded_room(rows), use_cache=False)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)


@pytest.fixture
def repeats(monkeypatch):
    monkeypatch.setattr(CapturedLearner, "_captured", repeated)


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_what_is_repeated_learns_from_the_rows_and_rates_of_now(optim, repeats):
    expected, weights, _ = learnt(functools.partial(CapturedLearner, captures=False), optim, packed=False)
    found, moved, used = learnt(CapturedLearner, optim, packed=False)
    assert len(used._graphs) == 3 and torch.allclose(found, expected, rtol=1e-5, equal_nan=True)
    assert all(torch.allclose(moved[name], weight, atol=1e-6) for name, weight in weights.items())


def told(rows, seed):
    """The same rows, of whose meshes something is known."""
    random = torch.Generator().manual_seed(seed)
    names, count = ("num_faces", "category"), rows["layout"].num_meshes
    attributes = {name: torch.randint(0, 99, (count,), generator=random) for name in names}
    return {**rows, "layout": replace(rows["layout"], attributes=attributes)}


@pytest.mark.parametrize("captures", [True, False])
def test_what_is_known_of_meshes_is_that_of_now_in_every_step(captures, repeats):
    model, seen = small_model().train(), []

    def see(module, arguments, inputs):
        seen.append({name: values.clone() for name, values in inputs["layout"].attributes.items()})

    model.register_forward_pre_hook(see, with_kwargs=True)
    optimizer = create_optimizer(model, "adamw_torch", 0.0, 0.1, fused=True)
    chosen = CapturedLearner(model, optimizer, CLIP, contextlib.nullcontext, captures=captures)
    batches = [told(batch_of(seed, packed=False), seed) for seed in range(4)]
    for batch in batches:
        chosen.update(chosen.backward([batch], 100))
    assert len(chosen._graphs) == (3 if captures else 0) and len(seen) == 4
    for batch, attributes in zip(batches, seen, strict=True):
        expected = batch["layout"].attributes
        assert attributes.keys() == expected.keys()
        assert all(torch.equal(attributes[name], values) for name, values in expected.items())


def test_what_is_known_of_meshes_has_room_for_more_and_makes_rows_another_kind():
    rows = told(batch_of(1), 1)
    rounded = with_rounded_room(rows)
    for name, values in rows["layout"].attributes.items():
        expected = torch.cat([values, torch.full((32 - len(values),), -1)])
        assert torch.equal(rounded["layout"].attributes[name], expected)
    assert kind_of(rounded).attributes == ("category", "num_faces")
    assert kind_of(rounded) != kind_of(with_rounded_room(batch_of(1)))


def test_what_looks_at_one_batch_on_the_host_is_not_repeated_for_others(repeats):
    """As attention of packed rows does where there is no flash attention."""
    with pytest.raises(RuntimeError, match="split_sizes"):
        learnt(CapturedLearner, "muon")


def test_gradients_that_were_taken_away_are_an_error():
    model = small_model()
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1, fused=True)
    chosen = CapturedLearner(model, optimizer, CLIP, torch.no_grad, captures=False)
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="taken away"):
        chosen.backward([batch_of(0)], 100)


def test_weights_that_moved_are_an_error():
    model = small_model()
    chosen = CapturedLearner(model, create_optimizer(model, "muon", 1e-3, 0.1), CLIP, torch.no_grad, captures=False)
    model.lm_head.bias.data = model.lm_head.bias.data.clone()
    with pytest.raises(RuntimeError, match="not move to other memory"):
        chosen.backward([batch_of(0)], 100)


def test_compiled_blocks_have_no_copies_of_weights_that_they_would_not_read():
    model = small_model()
    for block in model.model.layers[1:2]:
        block.compile(backend="eager")
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1)
    assert not CapturedLearner(model, optimizer, CLIP, autocast, captures=False).working._attributes
    model = small_model()
    assert CapturedLearner(model, optimizer, CLIP, autocast, captures=False).working._attributes


def test_a_step_that_cannot_be_captured_ends_the_run_with_what_to_do(monkeypatch):
    @contextlib.contextmanager
    def graph(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing\nSearch for it")
        yield

    for name in ("synchronize", "empty_cache", "graph_pool_handle", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    with pytest.raises(CommandError, match="not permitted when stream is capturing; with --cuda_graphs False"):
        learnt(CapturedLearner, "muon", packed=False)


def options_of(**options):
    return parse_arguments([f"--{name}={value}" for name, value in options.items()]).train


class Cuda:
    """What is asked of an accelerator, as on a GPU."""

    device, scaler, distributed_type, mixed_precision = torch.device("cuda"), None, "NO", "bf16"


def test_who_trains_otherwise_than_in_graphs_is_told_why(monkeypatch):
    monkeypatch.setattr("training.run.captured.has_flash", lambda device, dtype, size: dtype == torch.bfloat16)
    monkeypatch.setattr("iflame_hf.implementations_iflame.why_no_kernels", lambda: None)
    model, accelerator = small_model(), Cuda()
    assert why_not_captured(model, options_of(), accelerator) is None
    assert "max-autotune" in why_not_captured(
        model, options_of(torch_compile=True, torch_compile_mode="max-autotune"), accelerator
    )
    accelerator.mixed_precision = "no"
    assert "--bf16" in why_not_captured(model, options_of(), accelerator)
    accelerator.mixed_precision, accelerator.scaler = "fp16", object()
    assert "scaler" in why_not_captured(model, options_of(), accelerator)
    accelerator.mixed_precision, accelerator.scaler = "bf16", None
    monkeypatch.setattr("training.run.captured.has_flash", lambda *_: False)
    assert "torch's flash attention" in why_not_captured(model, options_of(), accelerator)
    for package in FLASH_PACKAGES:
        model.config._attn_implementation = package
        assert why_not_captured(model, options_of(), accelerator) is None
    model.config.linear_attn_implementation = "fla"
    assert "'fla'" in why_not_captured(model, options_of(), accelerator)
    model.set_attn_implementation("eager")
    assert "'eager'" in why_not_captured(model, options_of(), accelerator)
    assert "cpu" in why_not_captured(model, options_of(), Accelerator(cpu=True))
    said = []
    prepared = learner.prepare(
        Accelerator(cpu=True), model, create_optimizer(model, "muon", 1e-3, 0.1), options_of(), said.append
    )
    assert type(prepared[2]) is AcceleratedLearner and said == []


FLASH = [
    pytest.param("flash_attention_2", marks=FLASH_2),
    pytest.param("flash_attention_4", marks=FLASH_4),
]


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointing", *FLASH])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_captured_steps_learn_what_steps_that_are_run_do(optim, packed, how, monkeypatch):
    torch.compiler.reset()
    prepare = {"eager": None, "compiled": compile_blocks, "checkpointing": enable_activation_checkpointing}
    prepare = prepare.get(how, lambda model: model.set_attn_implementation(how))
    if prepare is not None:
        monkeypatch.setattr(
            CapturedLearner, "_learn", functools.partialmethod(_prepared, CapturedLearner._learn, prepare)
        )
    options = {"device": "cuda", "steps": 9, "packed": packed, "dtype": torch.bfloat16}
    options |= {"hidden_size": 128, "heads": 4}
    expected, weights, _ = learnt(functools.partial(CapturedLearner, captures=False), optim, **options)
    found, moved, used = learnt(CapturedLearner, optim, **options)
    assert len(used._graphs) == 3 and used.captures
    finite = [step for step in range(9) if step != 3]
    assert torch.allclose(found[finite], expected[finite], rtol=2e-2)
    assert not found[3].isfinite().any()
    begun = dict(small_model(hidden_size=128, heads=4).named_parameters())
    for name, weight in weights.items():
        assert (moved[name] - weight).norm() <= 0.1 * (weight - begun[name]).norm() + 1e-6, name


def _prepared(self, learn, prepare, rows):
    if not hasattr(self, "is_prepared"):
        prepare(self.model)
        self.is_prepared = True
    return learn(self, rows)


def test_full_attention_is_left_to_a_package_where_it_serves(monkeypatch):
    serves, accelerator = flash_attention_4_serves, Cuda()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("training.run.create.is_flash_attn_4_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    assert serves(accelerator, 32, False) and serves(accelerator, 64, False)
    assert not any(serves(accelerator, size, False) for size in (4, 12, 20, 136)) and not serves(accelerator, 32, True)
    accelerator.mixed_precision = "no"
    assert not serves(accelerator, 32, False) and not serves(Accelerator(cpu=True), 32, False)
    accelerator.mixed_precision = "fp16"
    assert serves(accelerator, 32, False)
    for capability in ((8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert not serves(accelerator, 32, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)  # which makes importing it an error
    assert not serves(accelerator, 32, False)


def test_train_py_takes_what_serves_unless_it_is_told_otherwise(monkeypatch):
    monkeypatch.setattr("training.run.create.flash_attention_4_serves", lambda *arguments: asked.append(arguments[1:]))
    asked, accelerator = [], Accelerator(cpu=True)
    for options, expected in (([], [(32, False)]), (["--attn_implementation", "eager"], [])):
        asked.clear()
        _, model = create_model(parse_arguments(["--torch_compile", "False", *options]), accelerator)
        assert asked == expected and model.config._attn_implementation == (options[1:] or ["sdpa"])[0]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_new_kind_of_packed_rows_is_captured_at_once(compiled):
    torch.compiler.reset()

    def losses(captures):
        model = small_model(hidden_size=128, heads=4).to("cuda").train()
        if compiled:
            compile_blocks(model)
        optimizer = create_optimizer(model, "muon", 1e-3, 0.1, fused=True)
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        chosen = CapturedLearner(model, optimizer, CLIP, autocast, captures=captures)
        found = []
        for seed, packed in enumerate([True, True, "all", True, "all", True]):
            rows = batch_of(seed)
            if packed == "all":  # 36 meshes
                begins = torch.ones(ROWS, FACES, dtype=torch.bool)
                rows["layout"] = RowLayout.of_begins(begins, 9 * FACES, STRIDES)
            found.append(chosen.backward([rows], 200).clone())
            chosen.update(found[-1])
        return torch.stack(found).cpu(), chosen

    expected, _ = losses(False)
    found, used = losses(True)
    assert len(used._graphs) == 4 and torch.allclose(found, expected, rtol=2e-2)


@pytest.mark.gpu
def test_the_host_waits_for_nothing_in_a_captured_step():
    model = small_model(hidden_size=128, heads=4).to("cuda").train()
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1, fused=True)
    chosen = CapturedLearner(model, optimizer, CLIP, functools.partial(torch.autocast, "cuda", torch.bfloat16))
    batches = [copy.deepcopy(batch_of(seed)) for seed in range(5)]
    for batch in batches[:2]:
        chosen.update(chosen.backward([batch], 200))
    pinned = [
        {name: value.pin_memory() for name, value in {**batch, "layout": batch["layout"]}.items()} for batch in batches
    ]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in pinned[2:]:
            chosen.update(chosen.backward([batch], 200))
    finally:
        torch.cuda.set_sync_debug_mode("default")
