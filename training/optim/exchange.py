"""Whole weights and gradients, in memory that stays where it is, of parameters that processes share by rows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed
from torch import nn
from torch.distributed.tensor import DTensor

from training.optim.shards import group_of, own_part

# Bytes at which the part of each parameter begins.
ALIGNMENT = 256
# Bytes of whole parameters from which on a collective moves no more.
BUCKET_BYTES = 1 << 26

# As torch calls them from 2.13 on; before they are found by their older names.
_all_gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
_reduce_scatter = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor

Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]


class Bucket(NamedTuple):
    """Parameters that one collective moves, P processes, each with room for n numbers."""

    own: torch.Tensor  # (n,) of this process
    everyones: torch.Tensor  # (P * n,) which all buckets have in common
    weights: Pairs  # rows of the whole weights, and where they are among everyone's
    gradients: Pairs


class Exchange:
    """
    What FSDP2 does before a forward pass and after a backward pass, with the whole weights and gradients at one place
    for ever, as CUDA graphs need them. Its methods are called on all processes together; the host waits for nothing.

    It takes memory for this process's parts, and for all processes' parts of one bucket.

    Args:
        sharded: parameters in float32, sharded by rows over all processes, on one device.
        whole: for each a parameter of the same shape, contiguous, whose gradient stays at its place, too; those
            without a gradient are not trained.

    Attributes:
        gradients: for each parameter this process's part of the sum of all gradients, from `reduce` to the next
            `gather`; None if it is not trained.

    Raises:
        ValueError: as `group_of`.
    """

    def __init__(self, sharded: Sequence[DTensor], whole: Sequence[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self.sharded, self.group = list(sharded), group_of(sharded[0])
        count, device = self.group.size(), whole[0].device
        rooms = [_room(each, count) for each in whole]
        self.own = torch.zeros(sum(rooms), device=device)
        self._own_parts = [
            place[: local.numel()].view(local.shape)
            for place, local in zip(self.own.split(rooms), map(own_part, self.sharded), strict=True)
        ]
        self.gradients = [
            None
            if each.grad is None
            else DTensor.from_local(
                part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
            )
            for part, like, each in zip(self._own_parts, self.sharded, whole, strict=True)
        ]
        spans = list(_spans(rooms, bucket_bytes // (4 * count)))
        everyones = torch.zeros(count * max(sum(rooms[span]) for span in spans), device=device)
        self._buckets = []
        for span, own in zip(spans, self.own.split([sum(rooms[span]) for span in spans]), strict=True):
            places = everyones[: count * len(own)]
            weights = _pairs([each.detach() for each in whole[span]], rooms[span], places, count)
            gradients = _pairs([each.grad for each in whole[span]], rooms[span], places, count)
            self._buckets.append(Bucket(own, places, weights, gradients))

    @torch.no_grad()
    def gather(self) -> None:
        """The whole weights become what all processes have."""
        # Where each keeps its part is asked anew: torch may have moved it.
        torch._foreach_copy_(self._own_parts, [own_part(each) for each in self.sharded])
        for bucket in self._buckets:
            _all_gather(bucket.everyones, bucket.own, group=self.group)
            torch._foreach_copy_(*bucket.weights)

    @torch.no_grad()
    def reduce(self) -> None:
        """Adds up the whole gradients of all processes, each of which gets its part."""
        for bucket in self._buckets:
            of_whole, of_everyone = bucket.gradients
            if of_whole:
                torch._foreach_copy_(of_everyone, of_whole)
                _reduce_scatter(bucket.own, bucket.everyones, group=self.group)


def _room(tensor: torch.Tensor, count: int) -> int:
    """Of so many processes, what the first has of a tensor, and each has room for: numbers in float32."""
    numbers = -(-tensor.shape[0] // count) * tensor.shape[1:].numel()
    return -(-numbers * 4 // ALIGNMENT) * (ALIGNMENT // 4)


def _spans(rooms: list[int], most: int) -> Iterator[slice]:
    """Neighbours that together have at least so much room, but for the last."""
    start = filled = 0
    for index, room in enumerate(rooms):
        filled += room
        if filled >= most or index == len(rooms) - 1:
            yield slice(start, index + 1)
            start, filled = index + 1, 0


def _pairs(whole: Sequence[torch.Tensor | None], rooms: list[int], places: torch.Tensor, count: int) -> Pairs:
    """Rows of whole tensors, process by process, and their places among those of all processes."""
    of_whole, of_everyone = [], []
    of_tensors = zip(*(each.split(rooms) for each in places.chunk(count)), strict=True)
    for tensor, of_processes in zip(whole, of_tensors, strict=True):
        if tensor is None:
            continue
        for rows, place in zip(tensor.split(-(-tensor.shape[0] // count)), of_processes, strict=False):
            of_whole.append(rows)  # the last processes may have none
            of_everyone.append(place[: rows.numel()].view(rows.shape))
    return of_whole, of_everyone
