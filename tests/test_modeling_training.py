"""Training: the loss, gradients by every road, number formats, compilation, sharding."""

import copy
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.distributed
from small_models import PAD, mesh_rows, relative_error, small_model, switch_checkpointing
from torch.nn import functional as F

from iflame_hf import blocks_iflame
from iflame_hf.implementations_iflame import linear_attention
from iflame_hf.ops_iflame import alibi_slopes

PACKED = ["one mesh a row", "packed"]


def rows_and_labels():
    rows = mesh_rows(2, faces=7, end=True)
    labels = rows.clone()
    labels[:, :9] = -100
    labels[1, 60:] = -100
    return rows, labels


def inputs_of(kind):
    rows, labels = rows_and_labels()
    inputs = {"input_ids": rows, "labels": labels}
    if kind == "packed":
        # meshes of 27 and 54 tokens in the first row, of 45, 18 and 18 in the second
        starts = [[0, 27], [0, 45, 63]]
        inputs["position_ids"] = torch.stack([positions_from(items, rows.shape[1]) for items in starts])
    return inputs


def positions_from(starts, length):
    positions = torch.arange(length)
    for start in starts:
        positions[start:] = torch.arange(length - start)
    return positions


def gradients(model, loss):
    loss.backward()
    collected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return collected


def assert_same_gradients(value, expected, tolerance):
    assert value.keys() == expected.keys() and len(expected) > 25
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert relative_error(value[name], gradient) < tolerance, name


@torch.no_grad()
def test_the_loss_is_the_mean_cross_entropy_of_the_next_token():
    model = small_model()
    rows, labels = rows_and_labels()
    output = model(rows, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].reshape(-1, 132), labels[:, 1:].reshape(-1))
    assert torch.equal(output.logits, model(rows).logits) and model(rows).loss is None
    assert float(output.loss) == pytest.approx(float(expected), rel=1e-6)
    assert abs(float(output.loss) - float(F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))) > 1e-3


@pytest.mark.parametrize("count", [500, torch.tensor(500)])
@torch.no_grad()
def test_the_loss_is_the_sum_over_labels_by_the_number_of_items_if_that_is_given(count):
    model = small_model()
    rows, labels = rows_and_labels()
    output = model(rows, labels=labels, num_items_in_batch=count)
    total = F.cross_entropy(output.logits[:, :-1].reshape(-1, 132), labels[:, 1:].reshape(-1), reduction="sum")
    assert float(output.loss) == pytest.approx(float(total) / 500, rel=1e-6)


@torch.no_grad()
def test_labels_that_are_already_shifted_are_not_shifted_again():
    model = small_model()
    rows, labels = rows_and_labels()
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = model(rows, labels=labels, shift_labels=shifted).loss
    assert float(loss) == pytest.approx(float(model(rows, labels=labels).loss), rel=1e-6)
    other = model(rows, labels=labels, shift_labels=labels).loss
    assert abs(float(other) - float(loss)) > 1e-3


def test_a_mean_over_rows_of_different_lengths_equals_the_sum_of_its_parts():
    model = small_model()
    rows, labels = rows_and_labels()
    count = int((labels[:, 1:] != -100).sum())
    together = gradients(model, model(rows, labels=labels).loss)
    for row in range(2):
        part = slice(row, row + 1)
        model(rows[part], labels=labels[part], num_items_in_batch=count).loss.backward()
    apart = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(apart, together, 1e-5)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_gradient_checkpointing_changes_no_gradient(kind, use_reentrant):
    model = small_model().train()
    inputs = inputs_of(kind)
    expected = model(**inputs)
    expected_gradients = gradients(model, expected.loss)
    switch_checkpointing(model, use_reentrant=use_reentrant)
    passes = count_passes(model.model.layers[0].self_attn)
    for use_cache in (None, True):
        output = model(**inputs, use_cache=use_cache)
        assert output.past_key_values is None
        assert torch.equal(output.loss, expected.loss)
        assert_same_gradients(gradients(model, output.loss), expected_gradients, 1e-6)
    assert len(passes) == 4, "every block runs once more in the backward pass"
    assert model.eval()(**inputs, use_cache=True).past_key_values.get_seq_length() == 81


def count_passes(module):
    passes = []
    module.register_forward_pre_hook(lambda _, inputs: passes.append(inputs[0].shape))
    return passes


def test_a_cache_is_refused_under_gradient_checkpointing():
    model = small_model().train()
    cache = model(mesh_rows(1, faces=1), use_cache=True).past_key_values
    switch_checkpointing(model)
    with pytest.raises(ValueError, match="gradient checkpointing computes every block twice"):
        model(mesh_rows(1, faces=1), past_key_values=cache)
    assert cache.get_seq_length() == 18
    switch_checkpointing(model, on=False)
    model(mesh_rows(1, faces=1), past_key_values=cache)
    assert cache.get_seq_length() == 36


def test_gradients_flow_through_a_cache():
    model = small_model()
    rows = mesh_rows(2, faces=4)
    expected = gradients(model, model(rows).logits.square().sum())
    cache, loss = None, 0
    for part in rows.split([13, 1, 1, 5, 25], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache, loss = output.past_key_values, loss + output.logits.square().sum()
    assert_same_gradients(gradients(model, loss), expected, 1e-5)


@pytest.mark.parametrize("linear_attention", ["eager", "chunked"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.007)])
@torch.no_grad()
def test_half_precision_is_close_to_float32_and_no_worse_late_in_a_row(linear_attention, dtype, bound):
    half = small_model(hidden_size=64, linear_attn_implementation=linear_attention).to(dtype)
    model = copy.deepcopy(half).float()
    rows = mesh_rows(2, faces=109)
    assert rows.shape[1] == 990
    expected = model(rows).logits
    errors = [
        relative_error(part, reference)
        for part, reference in zip(half(rows).logits.split(99, 1), expected.split(99, 1), strict=True)
    ]
    assert len(errors) == 10 and max(errors) < bound
    assert max(errors[5:]) < 1.3 * max(errors[:2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_steps_are_as_good_as_one_pass(dtype):
    half = small_model(hidden_size=64).to(dtype)
    rows = mesh_rows(1, faces=9)
    reference = copy.deepcopy(half).float()(rows).logits
    cache, logits = None, []
    for part in rows.split([40] + [1] * 50, dim=1):
        output = half(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    steps, whole = relative_error(torch.cat(logits, dim=1), reference), relative_error(half(rows).logits, reference)
    assert steps < 1.5 * whole
    assert all(layer.state.dtype == torch.float32 for layer in cache.layers if hasattr(layer, "state"))
    assert all(layer.keys.dtype == dtype for layer in cache.layers if hasattr(layer, "keys"))


@pytest.mark.parametrize("road", ["bfloat16", "float16", "autocast"])
@torch.no_grad()
def test_decay_rates_angles_and_states_are_float32_in_half_precision(monkeypatch, road):
    given = []

    def recorded(query, key, value, slopes, state, bounds, need_state, implementation):
        assert query.dtype == key.dtype == value.dtype == (torch.float16 if road == "float16" else torch.bfloat16)
        given.append((slopes, state))
        return linear_attention(query, key, value, slopes, state, bounds, need_state, implementation)

    monkeypatch.setattr(blocks_iflame, "linear_attention", recorded)
    # twelve heads have decay rates that half precision would round
    model = small_model(heads=12, hidden_size=48)
    rows = mesh_rows(1, faces=2)
    if road == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(rows, use_cache=True).past_key_values
            model(rows, past_key_values=cache)
    else:
        model = model.to(getattr(torch, road))
        cache = model(rows, use_cache=True).past_key_values
        model(rows, past_key_values=cache)
    assert len(given) == 6
    for slopes, state in given:
        assert slopes.dtype == torch.float32 and torch.equal(slopes, alibi_slopes(12))
        assert state is None or state.dtype == torch.float32
    assert all(state is not None for _, state in given[3:])


@pytest.mark.parametrize("kind", PACKED)
def test_autocast_trains_float32_weights_with_a_loss_close_to_float32(kind):
    model = small_model(hidden_size=64).train()
    inputs = inputs_of(kind)
    expected = model(**inputs).loss
    expected_gradients = gradients(model, expected)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, output_hidden_states=True)
    assert output.loss.dtype == torch.float32
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}
    assert float(output.loss.detach()) == pytest.approx(float(expected.detach()), rel=2e-2)
    assert_same_gradients(gradients(model, output.loss), expected_gradients, 0.2)


def test_autocast_leaves_a_model_in_float64_as_it_is():
    model, inputs = small_model().double(), inputs_of(PACKED[0])
    expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**inputs).logits
    assert found.dtype == torch.float64 and torch.equal(found, expected)


class CountingBackend:
    """A backend of torch.compile that counts the graphs it is given, and compiles them with another."""

    def __init__(self, name):
        self.name, self.graphs = name, []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.name)(graph, example_inputs)


def can_build_cpp():
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    return compiler is not None and (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


needs_compiler = pytest.mark.skipif(not can_build_cpp(), reason="needs a C++ compiler and Python.h")


@pytest.mark.parametrize(
    ("kind", "backend", "stage_layers"),
    [
        ("one mesh a row", "aot_eager", (1, 1, 1, 0, 0)),
        ("packed", "aot_eager", (1, 1, 1, 0, 0)),
        # the C++ compiler takes most of a minute for one block of each kind of attention
        pytest.param("packed", "inductor", (1, 1, 0, 0, 0), marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_a_training_step_compiles_whole_once_and_with_the_same_gradients(kind, backend, stage_layers):
    torch._dynamo.reset()
    model = small_model(stage_layers=stage_layers).train()
    counting = CountingBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counting)
    inputs = inputs_of(kind)
    for step in range(3):
        if step:
            inputs["input_ids"] = mesh_rows(2, faces=7, seed=step, end=True)
        if step == 2 and kind == "packed":
            inputs["position_ids"] = inputs["position_ids"].flip(0)
        expected = model(**inputs).loss
        expected_gradients = gradients(model, expected)
        loss = compiled(**inputs).loss
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert_same_gradients(gradients(model, loss), expected_gradients, 1e-4)
        assert len(counting.graphs) == 1, f"compiled again at step {step}"
    torch._dynamo.reset()


def test_a_compiled_model_masks_padding_on_the_left():
    torch._dynamo.reset()
    model = small_model(stage_layers=(1, 1, 1, 0, 0))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    row = mesh_rows(1, faces=3)
    ids, mask = F.pad(row, (18, 0), value=PAD), F.pad(torch.ones_like(row), (18, 0))
    with torch.no_grad():
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        assert relative_error(logits[:, 18:], model(row).logits) < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_blocks_sharded_by_fsdp_give_the_same_gradients(one_process_group, kind, checkpointing):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = small_model().train()
    inputs = inputs_of(kind)
    expected = model(**inputs).loss
    expected_gradients = gradients(model, expected)
    if checkpointing:
        switch_checkpointing(model)
    mesh = init_device_mesh("cpu", (1,))
    wrapped = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(wrapped) == 6
    for block in wrapped:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**inputs).loss
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    sharded = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
    assert_same_gradients(sharded, expected_gradients, 1e-5)
