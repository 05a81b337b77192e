"""
What stands between the products of a block, in Triton: SwiGLU and RMSNorm, forward and backward;
rotary_kernels_iflame.py has rotary embedding.

Each reads and writes what it must once, computes in float32 and keeps nothing that can be had again in passing. Sums
over all items, for the gradients of biases and of a norm's weights, are taken in stripes of items that are then added
up: results are the same in every run.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch.nn import functional as F

from .kernels_iflame import jit, launch, why_no_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

# B batch, T items, C channels, N outputs, P inner units, R stripes of items

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
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return False  # torch.func differentiates torch's own operators
    return why_no_kernels() is None


_jit = jit("rows")


@_jit
def _add(x, y):
    return x + y


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


@_jit
def add_rows(
    x_ptr,  # (rows, C)
    out_ptr,  # (R, C) float32: of each stripe
    rows,
    C: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.full((BM, BN), 0.0, tl.float32)
    for first in range(tl.program_id(1) * BM, rows, tl.num_programs(1) * BM):
        row = first + tl.arange(0, BM)
        live = (row < rows)[:, None] & (column < C)
        total += tl.load(x_ptr + row.to(tl.int64)[:, None] * C + column, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.program_id(1) * C + column, tl.reduce(total, 0, _add), mask=column < C)


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def count_rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _added_rows(x: torch.Tensor) -> torch.Tensor:
    """The sum (C,) of rows (N, C), in float32."""
    rows, columns = x.shape
    if rows > LEAST_ITEMS:
        stripes = x.new_empty(STRIPES, columns, dtype=torch.float32)
        launch(add_rows, (blocks(columns, 64), STRIPES), x, stripes, rows, C=columns, BM=32, BN=64, num_warps=4)
        x, rows = stripes, STRIPES
    total = x.new_empty(columns, dtype=torch.float32)
    launch(add_rows, (blocks(columns, 16), 1), x, total, rows, C=columns, BM=128, BN=16, num_warps=4)
    return total


@torch.library.custom_op(f"{NAMESPACE}::sum_of_rows", mutates_args=())
def _sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    with torch.cuda.device_of(x):
        return _added_rows(x)


@_sum_of_rows.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::silu_product", mutates_args=())
def _silu_product(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows, units = count_rows(x), x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], units)
    with torch.cuda.device_of(x):
        launch(
            silu_product, (blocks(rows, 16), blocks(units, 128)), x, bias, output, rows,
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
    rows, units = count_rows(x), x.shape[-1] // 2
    output, to_x = torch.empty_like(grad), torch.empty_like(x)
    stripes = min(STRIPES, blocks(rows, 16))
    to_bias = bias.new_empty(stripes, 2 * units)
    with torch.cuda.device_of(x):
        launch(
            silu_product_backward, (blocks(units, 128), stripes), grad, x, bias, output, to_x, to_bias, rows,
            P=units, BM=16, BN=128, num_warps=4,
        )  # fmt: skip
        return output, to_x, _added_rows(to_bias)


@_silu_product_backward.register_fake
def _(grad, x, bias):
    return torch.empty_like(grad), torch.empty_like(x), torch.empty_like(bias)


@torch.library.custom_op(f"{NAMESPACE}::normalise", mutates_args=())
def _normalise(
    x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, or its sum with `other`, normalised; the scales (rows,); and the sum (empty if there is none)."""
    rows, channels = count_rows(x), x.shape[-1]
    output, scale = torch.empty_like(x), weight.new_empty(rows)
    total = x.new_empty(0) if other is None else torch.empty_like(x)
    with torch.cuda.device_of(x):
        launch(
            normalise, (blocks(rows, 4),), x, other, total, weight, output, scale, rows, eps,
            C=channels, BC=triton.next_power_of_2(channels), BM=4, ADDS=other is not None, num_warps=4,
        )  # fmt: skip
    return output, scale, total


@_normalise.register_fake
def _(x, other, weight, eps):
    return (
        torch.empty_like(x),
        weight.new_empty(count_rows(x)),
        x.new_empty(0) if other is None else torch.empty_like(x),
    )


@torch.library.custom_op(f"{NAMESPACE}::normalise_backward", mutates_args=())
def _normalise_backward(
    grad: torch.Tensor, to_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x normalised once more, and the gradients of x, to which `to_total` is added, and of the weight."""
    rows, channels = count_rows(x), x.shape[-1]
    output, to_x = torch.empty_like(x), torch.empty_like(x)
    stripes = min(8 * STRIPES, blocks(rows, 4))
    to_weight = weight.new_empty(stripes, channels)
    with torch.cuda.device_of(x):
        launch(
            normalise_backward, (stripes,), grad, to_total, x, weight, scale, output, to_x, to_weight, rows,
            C=channels, BC=triton.next_power_of_2(channels), BM=4, ADDS=to_total is not None, num_warps=4,
        )  # fmt: skip
        return output, to_x, _added_rows(to_weight)


@_normalise_backward.register_fake
def _(grad, to_total, x, weight, scale):
    return torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)


def _down_backward(
    grad: torch.Tensor, units: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of gates and ups, their biases, and, where they are needed, of the weight (C, P) and its bias."""
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    product, to_units, to_bias = _silu_product_backward(grad @ weight, units, bias)
    to_weight = grad.mT @ product if needs[0] else None
    return to_units, to_bias, to_weight, _sum_of_rows(grad) if needs[1] else None


def _normed_backward(
    grad: torch.Tensor,
    to_total: torch.Tensor | None,
    x: torch.Tensor,
    norm: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    needs: bool,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of x, to which `to_total` is added, of the norm and, where it is needed, of the weight (N, C)."""
    grad = grad.reshape(-1, grad.shape[-1])
    normed, to_x, to_norm = _normalise_backward(grad @ weight, to_total, x, norm, scale)
    return to_x, to_norm, grad.mT @ normed.view(-1, normed.shape[-1]) if needs else None


class _SiluProductDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor, weight: torch.Tensor, down_bias: torch.Tensor):
        ctx.save_for_backward(x, bias, weight)
        return F.linear(_silu_product(x, bias), weight, down_bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _down_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[2:])


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: torch.Tensor, eps: float, weight: torch.Tensor) -> torch.Tensor:
        normed, scale, _ = _normalise(x, None, norm, eps)
        ctx.save_for_backward(x, norm, scale, weight)
        return F.linear(normed, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        to_x, to_norm, to_weight = _normed_backward(grad, None, *ctx.saved_tensors, ctx.needs_input_grad[3])
        return to_x, to_norm, None, to_weight


class _AddNormedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, other, norm, eps, inward, bias, outward, down_bias, keeps):
        normed, scale, total = _normalise(x, other, norm, eps)
        units = F.linear(normed, inward)
        ctx.save_for_backward(total, norm, scale, inward, bias, outward, units if keeps else None)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return F.linear(_silu_product(units, bias), outward, down_bias.to(x.dtype)), total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, to_total: torch.Tensor | None):
        if grad is None:  # nobody asks for the product
            return to_total, to_total, *(None,) * 7
        total, norm, scale, inward, bias, outward, units = ctx.saved_tensors
        if units is None:
            units = F.linear(_normalise(total, None, norm, ctx.eps)[0], inward)
        needs = ctx.needs_input_grad
        to_units, to_bias, to_outward, to_down_bias = _down_backward(grad, units, bias, outward, needs[6:8])
        to_total = None if to_total is None else to_total.contiguous()
        to_x, to_norm, to_inward = _normed_backward(to_units, to_total, total, norm, scale, inward, needs[4])
        return to_x, to_x, to_norm, None, to_inward, to_bias, to_outward, to_down_bias, None


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
    return _NormedLinear.apply(x.contiguous(), norm.float(), eps, weight)


def add_normed_silu_product_down(
    x: torch.Tensor,
    other: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    inward: torch.Tensor,
    bias: torch.Tensor,
    outward: torch.Tensor,
    down_bias: torch.Tensor,
    keeps: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `silu_product_down` of the product of `inward` (2P, C) and what is normalised of h = x + `other`; and h. Gates and
    ups are kept for the backward pass, or else made again in it.
    """
    return _AddNormedSwiGLU.apply(
        x.contiguous(), other.contiguous(), norm.float(), eps, inward, bias.float(), outward, down_bias.float(), keeps
    )
