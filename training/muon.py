"""torch's Muon, made fast where its many small products are launched one by one, and where weights are sharded."""

from collections.abc import Callable

import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Muon


class BatchedMuon(Muon):
    """
    `torch.optim.Muon`, whose step on a GPU takes all matrices of one shape in one product of batches, where torch
    takes one matrix after the other; on a CPU it is torch's own step. A matrix that is sharded (a DTensor) is gathered
    once a step, not in each product.

    A step holds all matrices of one shape in bfloat16 some four times.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        if all(_is_plain(parameter) for group in self.param_groups for parameter in group["params"]):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters, gradients, buffers = [], [], []
            self._init_group(group, parameters, gradients, buffers)
            shapes: dict[torch.Size, list[int]] = {}
            for index, parameter in enumerate(parameters):
                shapes.setdefault(parameter.shape, []).append(index)
            for indices in shapes.values():
                self._step_together(group, *([each[i] for i in indices] for each in (parameters, gradients, buffers)))
        return loss

    @staticmethod
    def _step_together(group, parameters, gradients, buffers) -> None:
        """The step of matrices of one shape; names and order are those of torch's `_single_tensor_muon`."""
        lr, momentum = float(group["lr"]), group["momentum"]
        own, gradients, buffers = ([_own_part(x) for x in each] for each in (parameters, gradients, buffers))
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum) if group["nesterov"] else buffers
        whole = torch.stack([_whole(update, like) for update, like in zip(updates, parameters, strict=True)])
        whole = orthogonalise(whole, group["ns_coefficients"], group["ns_steps"], group["eps"])
        updates = [_part(update, like) for update, like in zip(whole.to(own[0].dtype), parameters, strict=True)]
        rows, columns = parameters[0].shape
        ratio = max(1, rows / columns) ** 0.5
        if group["adjust_lr_fn"] == "match_rms_adamw":
            ratio = 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_(own, 1 - lr * group["weight_decay"])
        torch._foreach_add_(own, updates, alpha=-lr * ratio)


def orthogonalise(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """
    Newton-Schulz iterations in bfloat16 towards the nearest matrices with orthogonal rows or columns, as those of
    torch.optim.Muon (arXiv 2502.16982, section 2.1).

    Args:
        matrices: (N, R, C), each taken by itself.
        coefficients: a, b, c of X <- a X + (b A + c A A) X with A = X X^T.

    Returns:
        (N, R, C) bfloat16
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = matrices.shape[1] > matrices.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def _is_plain(parameter: torch.Tensor) -> bool:
    return parameter.device.type == "cpu" and not isinstance(parameter, DTensor)


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on this process of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor of which this is the own part, sharded as another is."""
    if not isinstance(like, DTensor):
        return part
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def _part(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The own part of a tensor that every process has, sharded as another is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()
