"""torch's Muon, made fast on GPUs, on CPUs, and where weights are sharded."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.optim import Muon

from training.optim.muon_kernels import MULTIPLE, Table, Tables, has_muon_kernels, move_momenta, step_parameters
from training.optim.shards import gather_rows, own_part, own_rows


class BatchedMuon(Muon):
    """
    `torch.optim.Muon`, whose step takes all matrices of one shape in one product of batches, where torch takes one
    matrix after the other. On a CPU the products are in float32, where torch's are in bfloat16. Matrices that are
    sharded (DTensors) are gathered by shape once a step, not one by one in each product. What stands before and after
    the products on a GPU is in Triton where it can be; `_step_together` is its plain twin.

    A step holds all matrices of one shape some four times in the type of the products.

    Attributes:
        found_inf: as of torch's fused optimisers, a tensor () that is 1 where a step is to be left out whole, else 0,
            so that nobody has to wait for what the device finds; None takes every step.
    """

    found_inf: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = self.found_inf
        if found_inf is not None and _is_read_at_once(found_inf):
            if found_inf:
                return loss
            found_inf = None
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            shapes: dict[torch.Size, list[int]] = {}
            for index, parameter in enumerate(parameters):
                shapes.setdefault(parameter.shape, []).append(index)
            for indices in shapes.values():
                of_shape = [[each[i] for i in indices] for each in (parameters, gradients, buffers)]
                table = self._tables.of(*of_shape) if has_muon_kernels(*of_shape) else None
                if table is None:
                    self._step_together(group, *of_shape, found_inf)
                else:
                    self._step_by_kernels(group, table, found_inf)
                    # What autograd kept of them is known to be gone, as after torch's own operators.
                    torch.autograd.graph.increment_version(of_shape[0])
        return loss

    @functools.cached_property
    def _tables(self) -> Tables:
        return Tables()  # made when it is asked for, as copies of an optimiser are made without its __init__

    @staticmethod
    def _step_by_kernels(group: dict[str, Any], table: Table, found_inf: torch.Tensor | None) -> None:
        x = move_momenta(table, group["momentum"], group["nesterov"], group["eps"], found_inf)
        x = newton_schulz(x, group["ns_coefficients"], group["ns_steps"])
        step_parameters(table, x, group["lr"], group["weight_decay"], _ratio(group, table.shape), found_inf)

    @staticmethod
    def _step_together(group, parameters, gradients, buffers, found_inf) -> None:
        """The step of matrices of one shape; names and order are those of torch's `_single_tensor_muon`."""
        lr, momentum = group["lr"], group["momentum"]
        own, gradients, buffers = ([own_part(x) for x in each] for each in (parameters, gradients, buffers))
        taken = 1.0
        if found_inf is not None:
            taken = 1 - found_inf
            # A buffer that moves towards itself stays what it is.
            gradients = torch.where(taken > 0, torch.stack(gradients), torch.stack(buffers)).unbind()
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        updates = torch.stack(updates)
        whole = gather_rows(updates.to(_type_of_products(updates.device)), parameters[0])
        whole = orthogonalise(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        # One copy in the order of the parameters: of others torch takes them one by one.
        whole = own_rows(whole, parameters[0])
        updates = list(torch.empty(whole.shape, dtype=own[0].dtype, device=whole.device).copy_(whole).unbind())
        torch._foreach_mul_(own, 1 - lr * group["weight_decay"] * taken)
        scale = -lr * _ratio(group, parameters[0].shape) * taken
        if isinstance(scale, torch.Tensor):
            torch._foreach_mul_(updates, scale)
            torch._foreach_add_(own, updates)
        else:
            torch._foreach_add_(own, updates, alpha=scale)


def orthogonalise(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """
    Newton-Schulz iterations towards the nearest matrices with orthogonal rows or columns, as those of
    torch.optim.Muon (arXiv 2502.16982, section 2.1).

    They are in bfloat16 as torch's are, but on any CPU in float32. Most CPUs emulate products in bfloat16, at ten to
    forty times the time of float32; those with AVX512_BF16 gain nothing by it. Only AMX makes it faster, by less than
    what a step of training takes, and processes that train together must all compute the same.

    On a GPU matrices are filled up with columns of zeros, which stay zeros: an odd number of them makes products up to
    four times as slow.

    Args:
        matrices: (N, R, C), each taken by itself.
        coefficients: a, b, c of X <- a X + (b A + c A A) X with A = X X^T.

    Returns:
        (N, R, C), float32 on a CPU, else bfloat16
    """
    on_cpu = matrices.device.type == "cpu"
    x = matrices.to(_type_of_products(matrices.device))
    tall = matrices.shape[1] > matrices.shape[2]
    if tall:
        x = x.mT
    columns = x.shape[2]
    spare = 0 if on_cpu else -columns % MULTIPLE
    norm = x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    if spare:
        x = F.pad(x, (0, spare))
    elif tall and not on_cpu:
        x = x.contiguous()
    x = newton_schulz(x / norm, coefficients, steps)[..., :columns]
    return x.mT if tall else x


def newton_schulz(x: torch.Tensor, coefficients: tuple[float, float, float], steps: int) -> torch.Tensor:
    """The iterations alone, of matrices (N, r, c) that are divided by their norms and not tall."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


def _ratio(group: dict[str, Any], shape: torch.Size) -> float:
    """What the learning rate of matrices of a shape is multiplied by."""
    rows, columns = shape
    if group["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1, rows / columns) ** 0.5


def _type_of_products(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _is_read_at_once(tensor: torch.Tensor) -> bool:
    """Whether nobody has to wait for the value of a tensor."""
    return tensor.device.type == "cpu"
