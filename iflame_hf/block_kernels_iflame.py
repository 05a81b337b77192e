"""
What stands between the products of a block, in Triton: rotary embedding, SwiGLU and RMSNorm, forward and backward.

Each reads and writes what it must once, computes in float32 and keeps nothing that can be had again in passing. Sums
over all items, for the gradients of biases and of a norm's weights, are taken in stripes of items that are then added
up: results are the same in every run.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import functional as F

from .kernels_iflame import launch, why_no_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

# B batch, T items, C channels, H heads, D head size, P inner units, R stripes of items

# With fewer items a step waits for launches anyway.
LEAST_ITEMS = 1024
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STRIPES = 96
# Every copy of this code, installed or from the Hub, has operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__)


def has_block_kernels(x: torch.Tensor) -> bool:
    """Whether what stands between products of such (B, T, C) items is computed here."""
    if x.device.type != "cuda" or x.dtype not in DTYPES or x.shape[:-1].numel() < LEAST_ITEMS:
        return False
    return why_no_kernels() is None


def _jit(function):
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["rows", "length"])


@_jit
def _add(x, y):
    return x + y


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


@_jit
def silu_product(
    x_ptr,  # (rows, 2P): gate and up, without their biases
    bias_ptr,  # (2P,) float32
    out_ptr,  # (rows, P)
    rows,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    unit = tl.program_id(1) * BN + tl.arange(0, BN)
    is_unit = unit < P
    live = (row < rows)[:, None] & is_unit
    at = row.to(tl.int64)[:, None] * (2 * P) + unit
    gate = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + tl.load(bias_ptr + unit, mask=is_unit, other=0.0)
    up = tl.load(x_ptr + at + P, mask=live, other=0.0).to(tl.float32)
    up += tl.load(bias_ptr + P + unit, mask=is_unit, other=0.0)
    to = row.to(tl.int64)[:, None] * P + unit
    tl.store(out_ptr + to, gate / (1 + tl.exp(-gate)) * up, mask=live)


@_jit
def silu_product_backward(
    grad_ptr,  # (rows, P)
    x_ptr,
    bias_ptr,
    out_ptr,  # (rows, P): the product, once more
    to_x_ptr,  # (rows, 2P)
    to_bias_ptr,  # (R, 2P) float32: of each stripe
    rows,
    P: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    unit = tl.program_id(0) * BN + tl.arange(0, BN)
    is_unit = unit < P
    gate_bias = tl.load(bias_ptr + unit, mask=is_unit, other=0.0)
    up_bias = tl.load(bias_ptr + P + unit, mask=is_unit, other=0.0)
    of_gate = tl.full((BM, BN), 0.0, tl.float32)
    of_up = tl.full((BM, BN), 0.0, tl.float32)
    for first in range(tl.program_id(1) * BM, rows, tl.num_programs(1) * BM):
        row = first + tl.arange(0, BM)
        live = (row < rows)[:, None] & is_unit
        at = row.to(tl.int64)[:, None] * (2 * P) + unit
        to = row.to(tl.int64)[:, None] * P + unit
        gate = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + gate_bias
        up = tl.load(x_ptr + at + P, mask=live, other=0.0).to(tl.float32) + up_bias
        grad = tl.load(grad_ptr + to, mask=live, other=0.0).to(tl.float32)
        share = 1 / (1 + tl.exp(-gate))
        silu = gate * share
        tl.store(out_ptr + to, silu * up, mask=live)
        to_gate = grad * up * (share + silu * (1 - share))
        to_up = grad * silu
        tl.store(to_x_ptr + at, to_gate, mask=live)
        tl.store(to_x_ptr + at + P, to_up, mask=live)
        of_gate += to_gate
        of_up += to_up
    stripe = to_bias_ptr + tl.program_id(1) * (2 * P) + unit
    tl.store(stripe, tl.reduce(of_gate, 0, _add), mask=is_unit)
    tl.store(stripe + P, tl.reduce(of_up, 0, _add), mask=is_unit)


@_jit
def normalise(
    x_ptr,  # (rows, C)
    other_ptr,  # what is added to x before, if ADDS
    total_ptr,  # receives the sum
    weight_ptr,  # (C,) float32
    out_ptr,
    scale_ptr,  # (rows,) float32: one over the root of the mean square
    rows,
    eps,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    ADDS: tl.constexpr,
):
    row, channel = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BC)
    live = (row < rows)[:, None] & (channel < C)
    at = row.to(tl.int64)[:, None] * C + channel
    x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(other_ptr + at, mask=live, other=0.0).to(tl.float32)
        # What follows is of the sum as it is kept.
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=live)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.reduce(x * x, 1, _add) / C + eps)
    tl.store(scale_ptr + row, scale, mask=row < rows)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0)
    tl.store(out_ptr + at, x * scale[:, None] * weight, mask=live)


@_jit
def normalise_backward(
    grad_ptr,
    to_total_ptr,  # the gradient of x from elsewhere, if ADDS
    x_ptr,
    weight_ptr,
    scale_ptr,
    out_ptr,  # x normalised, once more
    to_x_ptr,
    to_weight_ptr,  # (R, C) float32: of each stripe
    rows,
    C: tl.constexpr,
    BC: tl.constexpr,
    BM: tl.constexpr,
    ADDS: tl.constexpr,
):
    channel = tl.arange(0, BC)
    weight = tl.load(weight_ptr + channel, mask=channel < C, other=0.0)
    of_weight = tl.full((BM, BC), 0.0, tl.float32)
    for first in range(tl.program_id(0) * BM, rows, tl.num_programs(0) * BM):
        row = first + tl.arange(0, BM)
        live = (row < rows)[:, None] & (channel < C)
        at = row.to(tl.int64)[:, None] * C + channel
        scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
        x = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) * scale
        grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, x * weight, mask=live)
        of_weight += grad * x
        grad *= weight
        to_x = scale * (grad - x * (tl.reduce(grad * x, 1, _add) / C)[:, None])
        if ADDS:
            to_x += tl.load(to_total_ptr + at, mask=live, other=0.0).to(tl.float32)
        tl.store(to_x_ptr + at, to_x, mask=live)
    tl.store(to_weight_ptr + tl.program_id(0) * C + channel, tl.reduce(of_weight, 0, _add), mask=channel < C)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


@torch.library.custom_op(f"{NAMESPACE}::turn", mutates_args=())
def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rows, channels, half = _rows(x), x.shape[-1] // 3, cos.shape[-1]
    output = torch.empty_like(x)
    with torch.cuda.device_of(x):
        launch(
            turn,
            (_blocks(rows, 4), _blocks(3 * channels // 2, 256)),
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
            (_blocks(batch * length, 4), _blocks(heads * size // 2, 256), 3),
            *(q, k, v, cos, sin, output, batch * length, length, 0 if len(cos) == 1 else length),
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            C=heads * size, HALF=size // 2, BM=4, BP=256, num_warps=4,
        )  # fmt: skip
    return output


@_turn_back.register_fake
def _(q, k, v, cos, sin):
    return q.new_empty(*q.shape[:2], 3 * q.shape[2] * q.shape[3])


@torch.library.custom_op(f"{NAMESPACE}::silu_product", mutates_args=())
def _silu_product(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows, units = _rows(x), x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], units)
    with torch.cuda.device_of(x):
        launch(
            silu_product, (_blocks(rows, 16), _blocks(units, 128)), x, bias, output, rows,
            P=units, BM=16, BN=128, num_warps=4,
        )  # fmt: skip
    return output


@_silu_product.register_fake
def _(x, bias):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op(f"{NAMESPACE}::silu_product_backward", mutates_args=())
def _silu_product_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product once more, (rows, P), and the gradients of x and of the bias."""
    rows, units = _rows(x), x.shape[-1] // 2
    output, to_x = torch.empty_like(grad), torch.empty_like(x)
    stripes = min(STRIPES, _blocks(rows, 16))
    to_bias = bias.new_empty(stripes, 2 * units)
    with torch.cuda.device_of(x):
        launch(
            silu_product_backward, (_blocks(units, 128), stripes), grad, x, bias, output, to_x, to_bias, rows,
            P=units, BM=16, BN=128, num_warps=4,
        )  # fmt: skip
    return output, to_x, to_bias.sum(dim=0)


@_silu_product_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(grad), torch.empty_like(x), torch.empty_like(bias)


@torch.library.custom_op(f"{NAMESPACE}::normalise", mutates_args=())
def _normalise(
    x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, or its sum with `other`, normalised; the scales (rows,); and the sum (empty if there is none)."""
    rows, channels = _rows(x), x.shape[-1]
    output, scale = torch.empty_like(x), weight.new_empty(rows)
    total = x.new_empty(0) if other is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        launch(
            normalise, (_blocks(rows, 4),), x, other, total, weight, output, scale, rows, eps,
            C=channels, BC=triton.next_power_of_2(channels), BM=4, ADDS=other is not None, num_warps=4,
        )  # fmt: skip
    return output, scale, total


@_normalise.register_fake
def _(x, other, weight, eps):
    return torch.empty_like(x), weight.new_empty(_rows(x)), x.new_empty(0) if other is None else torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::normalise_backward", mutates_args=())
def _normalise_backward(
    grad: torch.Tensor, to_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x normalised once more, and the gradients of x, to which `to_total` is added, and of the weight."""
    rows, channels = _rows(x), x.shape[-1]
    output, to_x = torch.empty_like(x), torch.empty_like(x)
    stripes = min(8 * STRIPES, _blocks(rows, 4))
    to_weight = weight.new_empty(stripes, channels)
    with torch.cuda.device_of(x):
        launch(
            normalise_backward, (stripes,), grad, to_total, x, weight, scale, output, to_x, to_weight, rows,
            C=channels, BC=triton.next_power_of_2(channels), BM=4, ADDS=to_total is not None, num_warps=4,
        )  # fmt: skip
    return output, to_x, to_weight.sum(dim=0)


@_normalise_backward.register_fake
def _(grad, to_total, x, weight, scale):
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)


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


class _SiluProductDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, down_bias: torch.Tensor):
        ctx.save_for_backward(x, bias, weight)
        return F.linear(_silu_product(x, bias), weight, down_bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, bias, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        product, to_x, to_bias = _silu_product_backward(grad @ weight, x, bias)
        return to_x, to_bias, grad.mT @ product, grad.sum(dim=0, dtype=torch.float32)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, other: torch.Tensor | None, norm: torch.Tensor, eps: float, weight):
        normed, scale, total = _normalise(x, other, norm, eps)
        ctx.save_for_backward(x if other is None else total, norm, scale, weight)
        ctx.set_materialize_grads(False)
        ctx.adds = other is not None
        return F.linear(normed, weight), total if ctx.adds else None

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, to_total: torch.Tensor | None):
        x, norm, scale, weight = ctx.saved_tensors
        if grad is None:  # nobody asks for the product
            return to_total, to_total if ctx.adds else None, None, None, None
        grad = grad.reshape(-1, grad.shape[-1])
        to_total = None if to_total is None else to_total.contiguous()
        normed, to_x, to_norm = _normalise_backward(grad @ weight, to_total, x, norm, scale)
        to_weight = grad.mT @ normed.view(-1, normed.shape[-1])
        return to_x, to_x if ctx.adds else None, to_norm, None, to_weight


def turned_heads(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """
    Query, key and value (B, T, 3C), side by side, to heads (B, T, H, D) each, the former two turned as `apply_rotary`
    turns them by tables (B or 1, T, 1, D / 2); views of one tensor.
    """
    return _Heads.apply(x.contiguous(), cos.squeeze(2).contiguous(), sin.squeeze(2).contiguous())


def silu_product_down(
    x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, down_bias: torch.Tensor
) -> torch.Tensor:
    """
    (silu(gate) * up) W^T + b of gates and ups (B, T, 2P), side by side, whose `bias` (2P,) is added here; `weight`
    (C, P) in x's type. Of what is between it keeps nothing for the backward pass.
    """
    return _SiluProductDown.apply(x.contiguous(), bias.float(), weight, down_bias.float())


def normed_linear(x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
    """W n of (B, T, C) items, n their RMSNorm; `weight` (N, C) in x's type. What is normalised is not kept."""
    return _NormedLinear.apply(x.contiguous(), None, norm.float(), eps, weight)[0]


def add_normed_linear(
    x: torch.Tensor, other: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of x + `other`, and that sum."""
    return _NormedLinear.apply(x.contiguous(), other.contiguous(), norm.float(), eps, weight)
