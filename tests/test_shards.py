"""Optimisers and clipping do to tensors shared by rows what they do to whole ones, by plain operators."""

import functools

import pytest
import torch
from sharing_processes import found_by
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from training.optim.groups import AdamW, MuonAdamW
from training.optim.shards import clip_sharded

MATRICES = [(24, 24), (40, 16), (24, 24), (2, 8)]
OTHERS = [(7, 3), (5,), (1,)]  # of the last two some processes have nothing
STEPS, LEFT_OUT = 4, 2
MAX_NORM, LOSS = 1.0, 0.25


class OnlyPlainTensors(TorchDispatchMode):
    """Within it an operator on a DTensor is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            raise AssertionError(f"{function} of a DTensor")
        return function(*args, **(kwargs or {}))


def optimizer_of(name, parameters, fused):
    matrices = {"params": parameters[: len(MATRICES)], "weight_decay": 0.3}
    others = {"params": parameters[len(MATRICES) :], "weight_decay": 0.0}
    if name == "muon":
        return MuonAdamW([matrices], [others], lr=0.02, betas=(0.9, 0.95), eps=1e-8, fused=fused)
    return AdamW([matrices, others], lr=0.02, betas=(0.9, 0.95), fused=fused)


def trained(name, fused, share):
    """Some steps, one of them left out if the optimiser can: whole weights and momenta, and what clipping finds."""
    random = torch.Generator().manual_seed(0)
    draw = [functools.partial(torch.randn, shape, generator=random) for shape in MATRICES + OTHERS]
    parameters = [torch.nn.Parameter(share(each())) for each in draw]
    optimizer = optimizer_of(name, parameters, fused)
    found = []
    for step in range(STEPS):
        for parameter, each in zip(parameters, draw, strict=True):
            parameter.grad = share(each())
        is_left_out = torch.tensor(float(step == LEFT_OUT)) if fused else None
        if not isinstance(parameters[0], DTensor):
            found.append([float(torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)), LOSS])
            optimizer.found_inf = is_left_out
            optimizer.step()
            continue
        if step == 0:  # which makes the states
            found.append(clip_sharded(parameters, MAX_NORM, part_of_loss()).tolist())
            optimizer.step()
            continue
        with OnlyPlainTensors():
            found.append(clip_sharded(parameters, MAX_NORM, part_of_loss()).tolist())
            optimizer.found_inf = is_left_out
            optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    momenta = [state["momentum_buffer" if "momentum_buffer" in state else "exp_avg"] for state in states]
    tensors = [*(parameter.detach() for parameter in parameters), *momenta]
    if isinstance(parameters[0], DTensor):
        tensors = [tensor.full_tensor() for tensor in tensors]  # checkpoints need states that are sharded as weights
    return found, [tensor.numpy() for tensor in tensors]


def part_of_loss():
    return torch.tensor(LOSS / torch.distributed.get_world_size())


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("name", ["muon", "adamw_torch"])
def test_steps_and_clipping_of_shared_tensors_are_those_of_whole_ones(name, fused, tmp_path):
    whole, expected = trained(name, fused, torch.Tensor.detach)
    assert all(norm > MAX_NORM for norm, _ in whole)
    found, tensors = found_by(functools.partial(trained, name, fused), 3, tmp_path)
    assert found == [pytest.approx(each, rel=1e-5) for each in whole]
    assert len(tensors) == 2 * len(MATRICES + OTHERS)
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(tensor), torch.from_numpy(other), rtol=1e-5, atol=1e-5)


def test_weights_that_are_copies_on_some_processes_are_refused(one_process_group):
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,)), [Replicate()]))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"sharded by rows.*Replicate"):
        clip_sharded([parameter], MAX_NORM, torch.tensor(LOSS))
