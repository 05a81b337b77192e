"""
What stands between the levels of the hourglass, in Triton, forward and backward: means of groups, and what is handed
up to their members.

Two kernels do it all: the gradient of handing a group's output up to its items is a sum over them, and the gradient of
a mean is handed out to its members. Both compute in float32 and round once.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from .block_kernels_iflame import blocks, has_block_kernels
from .kernels_iflame import jit, launch

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

# B batch, T items of a level, G groups, C channels

# Every copy of this code, installed or from the Hub, has operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__)


def has_upsample_kernels(hidden_states: torch.Tensor, coarse: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether such (B, 1 + G, C) outputs of the level below are handed up to such (B, T, C) items here."""
    if type(scale) not in (torch.nn.Parameter, torch.Tensor) or coarse.dtype != hidden_states.dtype:
        return False
    return has_block_kernels(hidden_states)


def has_pool_kernels(hidden_states: torch.Tensor) -> bool:
    """
    Whether means of groups of such (B, T, C) items are taken here. torch.compile makes one of a mean's gradient and
    what it is added to by itself.
    """
    return not torch.compiler.is_compiling() and has_block_kernels(hidden_states)


_jit = jit("rows", "length", "groups", "first")


@_jit
def _add(x, y):
    return x + y


@_jit
def spread(
    own_ptr,  # (rows, C): what is added, if ADDS
    coarse_ptr,  # (B, groups, C)
    scale_ptr,  # (1,) float32, if SCALES; else one over the size of a group
    positions_ptr,  # (rows,) if MASKS: items before the end of the first group of a mesh get nothing
    out_ptr,
    rows,  # B T
    length,  # T
    groups,
    first,  # items of the first group before the first of a row
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ADDS: tl.constexpr,
    SCALES: tl.constexpr,
    MASKS: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    is_channel = channel < C
    live = (row < rows)[:, None] & is_channel
    at = row.to(tl.int64)[:, None] * C + channel
    group = (row % length + first) // SIZE
    reads = (row < rows) & (group < groups)
    if MASKS:
        reads = reads & (tl.load(positions_ptr + row, mask=row < rows, other=0) >= SIZE - 1)
    source = (row // length).to(tl.int64) * groups + group
    handed = tl.load(coarse_ptr + source[:, None] * C + channel, mask=reads[:, None] & is_channel, other=0.0)
    if SCALES:
        scale = tl.load(scale_ptr)
    else:
        scale = 1 / SIZE
    result = scale * handed.to(tl.float32)
    if ADDS:
        result += tl.load(own_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, result, mask=live)


@_jit
def gather(
    x_ptr,  # (B, T, C)
    coarse_ptr,  # (rows, C), if SUMS
    scale_ptr,  # as above
    positions_ptr,  # (B, T), as above
    out_ptr,  # (rows, C): scaled sums over the members of each group
    products_ptr,  # (blocks of rows, of channels) float32, if SUMS: sums of what is not scaled times `coarse`
    rows,  # B groups
    length,  # T
    groups,
    first,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SUMS: tl.constexpr,
    SCALES: tl.constexpr,
    MASKS: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    is_channel = channel < C
    live = (row < rows)[:, None] & is_channel
    at = row.to(tl.int64)[:, None] * C + channel
    total = tl.full((BM, BN), 0.0, tl.float32)
    for member in tl.static_range(SIZE):
        item = (row % groups) * SIZE + member - first
        reads = (row < rows) & (item >= 0) & (item < length)
        source = (row // groups).to(tl.int64) * length + item
        if MASKS:
            reads = reads & (tl.load(positions_ptr + source, mask=reads, other=0) >= SIZE - 1)
        x = tl.load(x_ptr + source[:, None] * C + channel, mask=reads[:, None] & is_channel, other=0.0)
        total += x.to(tl.float32)
    if SCALES:
        scale = tl.load(scale_ptr)
    else:
        scale = 1 / SIZE
    tl.store(out_ptr + at, scale * total, mask=live)
    if SUMS:
        product = total * tl.load(coarse_ptr + at, mask=live, other=0.0).to(tl.float32)
        to = products_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(to, tl.reduce(tl.reduce(product, 1, _add), 0, _add))


def _tiling(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """A grid, and the sizes of a block."""
    size = min(512, triton.next_power_of_2(channels))
    return (blocks(rows, 4), blocks(channels, size)), {"BM": 4, "BN": size, "num_warps": 4}


@torch.library.custom_op(f"{NAMESPACE}::spread", mutates_args=())
def _spread(
    own: torch.Tensor | None,
    coarse: torch.Tensor,
    scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    first: int,
    size: int,
    length: int,
) -> torch.Tensor:
    """`own` (B, T, C), or zero, and `scale` times row (t + first) // size of `coarse` (B, G, C), or zero."""
    batch, groups, channels = coarse.shape
    output = coarse.new_empty(batch, length, channels)
    rows = batch * length
    grid, block = _tiling(rows, channels)
    with torch.cuda.device_of(coarse):
        launch(
            spread, grid, own, coarse, scale, positions, output, rows, length, groups, first, C=channels, SIZE=size,
            ADDS=own is not None, SCALES=scale is not None, MASKS=positions is not None, **block,
        )  # fmt: skip
    return output


@_spread.register_fake
def _(own, coarse, scale, positions, first, size, length):
    return coarse.new_empty(coarse.shape[0], length, coarse.shape[2])


@torch.library.custom_op(f"{NAMESPACE}::gather", mutates_args=())
def _gather(
    x: torch.Tensor,
    coarse: torch.Tensor | None,
    scale: torch.Tensor | None,
    positions: torch.Tensor | None,
    first: int,
    size: int,
    groups: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Backwards: scaled sums (B, G, C) of x (B, T, C); and x times what of `coarse` is handed up, all in one sum."""
    batch, length, channels = x.shape
    output = x.new_empty(batch, groups, channels)
    rows = batch * groups
    grid, block = _tiling(rows, channels)
    products = x.new_empty(0 if coarse is None else grid, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(
            gather, grid, x, coarse, scale, positions, output, products, rows, length, groups, first, C=channels,
            SIZE=size, SUMS=coarse is not None, SCALES=scale is not None, MASKS=positions is not None, **block,
        )  # fmt: skip
    return output, products if coarse is None else products.sum().view(1)


@_gather.register_fake
def _(x, coarse, scale, positions, first, size, groups):
    products = x.new_empty(0 if coarse is None else 1, dtype=torch.float32)
    return x.new_empty(x.shape[0], groups, x.shape[2]), products


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states, coarse, scale, positions, first, size):
        ctx.save_for_backward(coarse, scale, positions)
        ctx.first, ctx.size = first, size
        return _spread(hidden_states, coarse, scale, positions, first, size, hidden_states.shape[1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs_own, needs_coarse, needs_scale = ctx.needs_input_grad[:3]
        to_coarse = to_scale = None
        if needs_coarse or needs_scale:
            coarse, scale, positions = ctx.saved_tensors
            to_coarse, to_scale = _gather(
                grad.contiguous(),
                coarse if needs_scale else None,
                scale,
                positions,
                ctx.first,
                ctx.size,
                coarse.shape[1],
            )
        return (
            grad if needs_own else None,
            to_coarse if needs_coarse else None,
            to_scale if needs_scale else None,
            *(None,) * 3,
        )


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.size, ctx.length = size, x.shape[1]
        ctx.set_materialize_grads(False)
        return x, _gather(x, None, None, None, 0, size, x.shape[1] // size)[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, to_means: torch.Tensor | None):
        if to_means is None:
            return grad, None
        grad = None if grad is None else grad.contiguous()
        return _spread(grad, to_means.contiguous(), None, None, 0, ctx.size, ctx.length), None


def upsampled(
    hidden_states: torch.Tensor,
    coarse: torch.Tensor,
    scale: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    size: int,
) -> torch.Tensor:
    """What `IFlameUpsample` computes of groups of `size` items and its `scale` (1,)."""
    if positions is not None:
        positions = positions.expand(hidden_states.shape[:2]).contiguous()
    return _Upsample.apply(hidden_states.contiguous(), coarse.contiguous(), scale.float(), positions, offset + 1, size)


def with_means(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    (B, T, C) items, and the means (B, G, C) of the groups of `size` that they fill, the first beginning with the
    first item. What goes on with both has its gradients added up in one pass.
    """
    return _Pool.apply(x.contiguous(), size)
