"""
Steps on tensors that processes share by rows, as FSDP2's DTensors: plain operators on what lies on each process, and
plain collectives. Those that DTensor makes of an operator take the host several times as long.

Of R rows each process has ceil(R / processes), the last ones fewer or none.
"""

from collections.abc import Iterable

import torch
import torch.distributed
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What lies on this process of a tensor that may be sharded; the same memory. Within torch.no_grad()."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def group_of(sharded: DTensor) -> ProcessGroup:
    """
    The processes that share a tensor.

    Raises:
        ValueError: they share it in another way than by rows, or some have copies of what others have.
    """
    if tuple(sharded.placements) != (Shard(0),):
        raise ValueError(f"weights must be sharded by rows over all processes, got placements {sharded.placements}")
    return sharded.device_mesh.get_group()


def gather_rows(parts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, r, C) this process's rows of N matrices that are sharded as another is -> (N, R, C), on every process."""
    if not isinstance(like, DTensor):
        return parts
    group, rows = group_of(like), like.shape[0]
    most = -(-rows // group.size())
    parts = F.pad(parts, (0, 0, 0, most - parts.shape[1])).contiguous()
    gathered = [torch.empty_like(parts) for _ in range(group.size())]
    torch.distributed.all_gather(gathered, parts, group=group)
    return torch.cat(gathered, 1)[:, :rows]


def own_rows(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `gather_rows`."""
    if not isinstance(like, DTensor):
        return whole
    group, rows = group_of(like), like.shape[0]
    most = -(-rows // group.size())
    start = most * group.rank()
    return whole[:, start : start + most]


@torch.no_grad()
def clip_sharded(parameters: Iterable[torch.Tensor], max_norm: float, loss: torch.Tensor) -> torch.Tensor:
    """
    What `torch.nn.utils.clip_grad_norm_` does, to the gradients of parameters that are all sharded, in one collective.

    Args:
        loss: () this process's part.

    Returns:
        (2,) the norm of the gradient before, and the loss of all processes, on the device of the loss

    Raises:
        ValueError: as `group_of`.
    """
    sharded = [parameter.grad for parameter in parameters if parameter.grad is not None]
    gradients = [own_part(gradient) for gradient in sharded]
    squares = torch.nn.utils.get_total_norm(gradients).square()
    found = torch.stack([squares.to(loss.device), loss])
    torch.distributed.all_reduce(found, group=group_of(sharded[0]))
    norm = found[0].sqrt_()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale.to(gradients[0].device))
    return found
