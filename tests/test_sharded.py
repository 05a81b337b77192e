"""Steps that are CUDA graphs learn what others do where weights are shared by rows (FSDP2)."""

import contextlib
import copy
import functools
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from repeated_steps import repeated
from sharing_processes import found_by
from small_models import mesh_rows, small_model
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from training_processes import SHARDED, Trainer, log_of

from iflame_hf.layout_iflame import RowLayout
from training.arguments import parse_arguments
from training.optim.exchange import Exchange
from training.optim.groups import create_optimizer
from training.run import learner
from training.run.captured import CapturedLearner, why_not_captured
from training.run.create import compile_blocks, is_compiled
from training.run.learner import AcceleratedLearner
from training.run.sharded import ShardedCapturedLearner

PROCESSES = 3  # each of which has one row
SHAPES = [(7, 3), (5,), (24, 8), (1,), (4, 2, 2), (2, 8)]  # some processes have fewer rows than others, or none
FROZEN = 2
FACES, STRIDES, CLIP, STEPS = 12, (1, 3, 9), 0.5, 5


def drawn(seed):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random) for shape in SHAPES]


def exchanged(bucket_bytes, share):
    sharded = [nn.Parameter(share(each)) for each in drawn(seed=9)]
    whole = [nn.Parameter(torch.full(shape, torch.nan)) for shape in SHAPES]
    for index, gradient in enumerate(drawn(torch.distributed.get_rank())):
        whole[index].grad = None if index == FROZEN else gradient
    exchange = Exchange(sharded, whole, bucket_bytes)
    exchange.gather()
    first = [each.detach().numpy().copy() for each in whole]
    with torch.no_grad():
        for each in sharded:
            each.to_local().mul_(2)
    exchange.gather()
    exchange.reduce()
    sums = [None if each is None else each.full_tensor().numpy() for each in exchange.gradients]
    return first, [each.detach().numpy() for each in whole], sums, len(exchange._buckets)


@pytest.mark.parametrize(
    ("processes", "bucket_bytes", "buckets"), [(3, 1, 6), (3, 2000, 2), (3, 1 << 20, 1), (1, 1000, 2)]
)
def test_whole_weights_and_sums_of_gradients_are_those_of_all_processes(processes, bucket_bytes, buckets, tmp_path):
    first, second, sums, count = found_by(functools.partial(exchanged, bucket_bytes), processes, tmp_path)
    assert count == buckets and len(sums) == len(SHAPES)
    for index, weight in enumerate(drawn(seed=9)):
        assert torch.equal(torch.from_numpy(first[index]), weight)
        assert torch.equal(torch.from_numpy(second[index]), 2 * weight)
    assert sums[FROZEN] is None
    for index, gradients in enumerate(zip(*map(drawn, range(processes)), strict=True)):
        if index != FROZEN:
            torch.testing.assert_close(torch.from_numpy(sums[index]), sum(gradients))


def batches_of(step, packed, rows=slice(None)):
    """One batch of rows, or in one of the steps two."""
    batches = []
    for seed in range(10 * step, 10 * step + 1 + (step == 2)):
        random = torch.Generator().manual_seed(seed)
        begins = (torch.rand(PROCESSES, FACES, generator=random) < 0.2) & torch.tensor(packed)
        ids = mesh_rows(PROCESSES, faces=FACES - 1, seed=seed)[rows]
        layout = RowLayout.of_begins(begins[rows], ids.shape[1], STRIDES)
        labels = ids.masked_fill(layout.positions() < 9, -100)
        batches.append({"input_ids": ids, "labels": labels, "layout": layout})
    return batches


def learnt(chosen, model, optimizer, packed, rows=slice(None)):
    """What each step found, one of which is to be left out, what evaluations between them did, weights, states."""
    found, evaluations, ids = [], [], mesh_rows(2, faces=4)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1)
        labels = sum(int((batch["labels"] != -100).sum()) for batch in batches_of(step, packed))
        loss = chosen.backward(batches_of(step, packed, rows), 0 if step == 3 else labels)
        found.append(chosen.update(loss).tolist())
        with torch.no_grad():
            evaluations.append(float(model.eval()(ids, labels=ids, use_cache=False).loss))
        model.train()
    tensors = {}
    for (name, _), parameter in zip(small_model().named_parameters(), parameters_of(model), strict=True):
        tensors[name] = parameter.detach()
        for key, state in optimizer.state[parameter].items():
            tensors[f"{name} {key}"] = state
    whole = {key: each.full_tensor() if isinstance(each, DTensor) else each for key, each in tensors.items()}
    return found, evaluations, {key: each.numpy() for key, each in whole.items()}


def parameters_of(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return list(model.parameters())


def learnt_in_parts(optim, packed, captures, share):
    CapturedLearner._captured = repeated
    model = small_model().train()
    whole, mesh = copy.deepcopy(model), init_device_mesh("cpu", (PROCESSES,))
    fully_shard(model.lm_head, mesh=mesh, reshard_after_forward=False)  # as Accelerate does
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.zero_()  # what the parts say counts
    optimizer = create_optimizer(model, optim, 0.0, 0.1, fused=True)
    chosen = ShardedCapturedLearner(whole, model, optimizer, CLIP, contextlib.nullcontext, captures=captures)
    row = torch.distributed.get_rank()
    found = learnt(chosen, model, optimizer, packed, slice(row, row + 1))
    assert len(chosen._graphs) == (2 if captures else 0)
    return found


@pytest.mark.parametrize("how", ["packed", "captured"])
@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_steps_on_parts_learn_what_those_of_a_whole_model_do(optim, how, tmp_path):
    packed, captures = how == "packed", how == "captured"
    work = functools.partial(learnt_in_parts, optim, packed, captures)
    found, evaluations, tensors = found_by(work, PROCESSES, tmp_path, begins_anew=True)
    model = small_model().train()
    optimizer = create_optimizer(model, optim, 0.0, 0.1, fused=True)
    accelerator = Accelerator(cpu=True)
    chosen = AcceleratedLearner(accelerator, *accelerator.prepare(model, optimizer), CLIP)
    expected_found, expected_evaluations, expected = learnt(chosen, model, optimizer, packed)
    finite = [step for step in range(STEPS) if step != 3]
    for step in finite:
        assert found[step] == pytest.approx(expected_found[step], rel=1e-5)
    assert not torch.tensor(found[3]).isfinite().all()
    assert evaluations == pytest.approx(expected_evaluations, rel=1e-5)
    assert evaluations[3] == evaluations[2] and len(set(evaluations)) == STEPS - 1
    assert tensors.keys() == expected.keys() and any(" " in key for key in tensors)
    begun = dict(small_model().named_parameters())
    for key, value in tensors.items():
        other = torch.from_numpy(expected[key])
        moved = other - begun[key].detach() if key in begun else other
        assert (torch.from_numpy(value) - other).norm() <= 1e-4 * moved.norm(), key


def test_runs_in_graphs_and_others_go_on_from_each_others_checkpoints(tmp_path):
    trainer = Trainer(tmp_path)
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 1}
    options |= {"gradient_accumulation_steps": 2}
    kinds = {"plain": SHARDED, "graphs": {**SHARDED, "AS_IN_GRAPHS": "1"}}
    for name, environment in kinds.items():
        trainer.finish(*trainer.start_ranks(tmp_path / name, 2, environment, **options))
    begun = {name: found_in(tmp_path / name) for name in kinds}
    assert len(begun["plain"]) == 12 and begun["graphs"] == pytest.approx(begun["plain"], rel=1e-5)
    for name, other in zip(kinds, reversed(kinds), strict=True):
        shutil.rmtree(tmp_path / name / "checkpoint-4")
        again = trainer.start_ranks(tmp_path / name, 2, kinds[other], resume_from_checkpoint="latest", **options)
        trainer.finish(*again)
        assert found_in(tmp_path / name) == pytest.approx(begun[name], rel=1e-5)


def found_in(folder):
    """Losses and norms of steps, losses of evaluations."""
    return [line[key] for line in log_of(folder) for key in ("loss", "grad_norm", "eval_loss") if key in line]


class Sharded:
    """What is asked of an accelerator that shards weights, as on a GPU."""

    device, scaler, mixed_precision = torch.device("cuda"), None, "bf16"
    distributed_type, is_fsdp2 = DistributedType.FSDP, True

    def __init__(self, **options):
        plugin = {"auto_wrap_policy": None, "cpu_offload": OffloadPolicy(), "activation_checkpointing": False}
        self.state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**{**plugin, **options}))


def test_parts_that_cannot_be_whole_in_a_step_are_trained_otherwise(monkeypatch):
    monkeypatch.setattr("training.run.captured.why_no_graph", lambda *_: None)
    model, options = small_model(), parse_arguments([]).train
    assert why_not_captured(model, options, Sharded()) is None
    refused = {
        "fsdp_auto_wrap_policy": Sharded(auto_wrap_policy=print),
        "fsdp_offload_params": Sharded(cpu_offload=CPUOffloadPolicy()),
        "fsdp_activation_checkpointing": Sharded(activation_checkpointing=True),
        "first version": Sharded(),
        "scaler": Sharded(),
    }
    refused["first version"].is_fsdp2, refused["scaler"].scaler = False, object()
    for reason, accelerator in refused.items():
        assert reason in why_not_captured(model, options, accelerator)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_whole_model_is_a_copy_and_compiled_as_the_other(compiled, monkeypatch):
    made, accelerator, model = [], Sharded(), small_model()
    accelerator.device, accelerator.autocast = torch.device("cpu"), contextlib.nullcontext
    accelerator.prepare = lambda *prepared: prepared
    monkeypatch.setattr(learner, "why_not_captured", lambda *_: None)
    monkeypatch.setattr(learner, "ShardedCapturedLearner", lambda *arguments: made.append(arguments))
    if compiled:
        compile_blocks(model)
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1)
    options = parse_arguments([f"--torch_compile={compiled}", "--max_grad_norm=0"]).train
    assert learner.prepare(accelerator, model, optimizer, options, print)[:2] == (model, optimizer)
    ((whole, *others),) = made
    assert others == [model, optimizer, float("inf"), contextlib.nullcontext]
    assert {is_compiled(block) for block in whole.model.layers} == {compiled}
    assert not {each.data_ptr() for each in whole.parameters()} & {each.data_ptr() for each in model.parameters()}
