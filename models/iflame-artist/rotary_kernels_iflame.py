"""Rotary embedding in Triton, from the product of query, key and value to heads, forward and backward."""

from __future__ import annotations

import re
from typing import Any

import torch

from .block_kernels_iflame import blocks, count_rows
from .kernels_iflame import jit, launch

try:
    import triton.language as tl
except ImportError:  # optional
    tl = None

# B batch, T items, C channels, H heads, D head size

# Every copy of this code, installed or from the Hub, has operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__)


_jit = jit("rows", "length")


@_jit
def turn(
    x_ptr,  # (rows, 3C): query, key and value
    cos_ptr,  # (B or 1, T, D / 2) float32
    sin_ptr,
    out_ptr,  # as x
    rows,
    length,  # T
    table,  # items of the tables from one row of the batch to the next
    C: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.program_id(1) * BP + tl.arange(0, BP)
    live = (row < rows)[:, None] & (pair < 3 * C // 2)
    place = pair % HALF
    at = row.to(tl.int64)[:, None] * (3 * C) + (pair // HALF) * (2 * HALF) + place
    x1 = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + at + HALF, mask=live, other=0.0).to(tl.float32)
    turns = live & (pair < C)
    angle = ((row // length) * table + row % length)[:, None] * HALF + place
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    tl.store(out_ptr + at, x1 * cos + x2 * sin, mask=live)
    tl.store(out_ptr + at + HALF, x2 * cos - x1 * sin, mask=live)


@_jit
def turn_back(
    q_ptr,  # gradients, (B, T, H, D) of any strides but the last
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,  # (rows, 3C)
    rows,
    length,
    table,
    q_batch,
    q_item,
    q_head,
    k_batch,
    k_item,
    k_head,
    v_batch,
    v_item,
    v_head,
    C: tl.constexpr,
    HALF: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    pair = tl.program_id(1) * BP + tl.arange(0, BP)
    part = tl.program_id(2)
    live = (row < rows)[:, None] & (pair < C // 2)
    place, head = pair % HALF, pair // HALF
    batch, item = (row // length).to(tl.int64), row % length
    if part == 0:
        at = q_ptr + (batch * q_batch + item * q_item)[:, None] + head * q_head + place
        x1 = tl.load(at, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    elif part == 1:
        at = k_ptr + (batch * k_batch + item * k_item)[:, None] + head * k_head + place
        x1 = tl.load(at, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    else:
        at = v_ptr + (batch * v_batch + item * v_item)[:, None] + head * v_head + place
        x1 = tl.load(at, mask=live, other=0.0).to(tl.float32)
        x2 = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    turns = live & (part < 2)
    angle = ((row // length) * table + item)[:, None] * HALF + place
    cos = tl.load(cos_ptr + angle, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angle, mask=turns, other=0.0)
    to = out_ptr + row.to(tl.int64)[:, None] * (3 * C) + part * C + head * (2 * HALF) + place
    tl.store(to, x1 * cos - x2 * sin, mask=live)
    tl.store(to + HALF, x2 * cos + x1 * sin, mask=live)


@torch.library.custom_op(f"{NAMESPACE}::turn", mutates_args=())
def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rows, channels, half = count_rows(x), x.shape[-1] // 3, cos.shape[-1]
    output = torch.empty_like(x)
    with torch.cuda.device_of(x):
        launch(
            turn,
            (blocks(rows, 4), blocks(3 * channels // 2, 256)),
            *(x, cos, sin, output, rows, x.shape[1], 0 if len(cos) == 1 else x.shape[1]),
            C=channels, HALF=half, BM=4, BP=256, num_warps=4,
        )  # fmt: skip
    return output


@_turn.register_fake
def _(x, cos, sin):
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::turn_back", mutates_args=())
def _turn_back(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    batch, length, heads, size = q.shape
    output = q.new_empty(batch, length, 3 * heads * size)
    with torch.cuda.device_of(q):
        launch(
            turn_back,
            (blocks(batch * length, 4), blocks(heads * size // 2, 256), 3),
            *(q, k, v, cos, sin, output, batch * length, length, 0 if len(cos) == 1 else length),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            C=heads * size, HALF=size // 2, BM=4, BP=256, num_warps=4,
        )  # fmt: skip
    return output


@_turn_back.register_fake
def _(q, k, v, cos, sin):
    return q.new_empty(*q.shape[:2], 3 * q.shape[2] * q.shape[3])


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        size = 2 * cos.shape[-1]
        return _turn(x, cos, sin).unflatten(-1, (-1, size)).chunk(3, dim=-2)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [each if each.stride(-1) == 1 else each.contiguous() for each in grads]
        return _turn_back(*grads, *ctx.saved_tensors), None, None


def turned_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Query, key and value (B, T, 3C), side by side, to heads (B, T, H, D) each, the former two turned as `apply_rotary`
    turns them by tables (B or 1, T, 1, D / 2); views of one tensor.
    """
    return _Heads.apply(x.contiguous(), cos.squeeze(2).contiguous(), sin.squeeze(2).contiguous())
