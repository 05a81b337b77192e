"""
What stands between the products of a block, in Triton: SwiGLU and RMSNorm, forward and backward;
rotary_kernels_iflame.py has rotary embedding.

Each reads and writes what it must once, computes in float32 and keeps nothing that can be had again in passing. Sums
over all items, for the gradients of biases and of a norm's weights, are taken in stripes of items that are then added
up: results are the same in every run.
"""

from __future__ import annotations

import re

import torch

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
    ADDS: tl.constexpr,  # to what is there
):
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.full((BM, BN), 0.0, tl.float32)
    for first in range(tl.program_id(1) * BM, rows, tl.num_programs(1) * BM):
        row = first + tl.arange(0, BM)
        live = (row < rows)[:, None] & (column < C)
        total += tl.load(x_ptr + row.to(tl.int64)[:, None] * C + column, mask=live, other=0.0).to(tl.float32)
    to = out_ptr + tl.program_id(1) * C + column
    total = tl.reduce(total, 0, _add)
    if ADDS:
        total += tl.load(to, mask=column < C, other=0.0)
    tl.store(to, total, mask=column < C)


def blocks(count: int, size: int) -> int:
    return -(-count // size)


def count_rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def add_rows_to(total: torch.Tensor, x: torch.Tensor, adds: bool = True) -> None:
    """Writes the sum of rows (N, C) into a total (C,), in float32; `adds` it to what is there."""
    rows, columns = x.shape
    with torch.cuda.device_of(x):
        if rows > LEAST_ITEMS:
            stripes = x.new_empty(STRIPES, columns, dtype=torch.float32)
            grid = blocks(columns, 64), STRIPES
            launch(add_rows, grid, x, stripes, rows, C=columns, BM=32, BN=64, ADDS=False, num_warps=4)
            x, rows = stripes, STRIPES
        launch(add_rows, (blocks(columns, 16), 1), x, total, rows, C=columns, BM=128, BN=16, ADDS=adds, num_warps=4)


@torch.library.custom_op(f"{NAMESPACE}::sum_of_rows", mutates_args=())
def sum_of_rows(x: torch.Tensor) -> torch.Tensor:
    """The sum (C,) of rows (N, C), in float32."""
    total = x.new_empty(x.shape[1], dtype=torch.float32)
    add_rows_to(total, x, adds=False)
    return total


@sum_of_rows.register_fake
def _(x):
    return x.new_empty(x.shape[1], dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::silu_product", mutates_args=())
def gated(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows, units = count_rows(x), x.shape[-1] // 2
    output = x.new_empty(*x.shape[:-1], units)
    with torch.cuda.device_of(x):
        launch(
            silu_product, (blocks(rows, 16), blocks(units, 128)), x, bias, output, rows,
            P=units, BM=16, BN=128, num_warps=4,
        )  # fmt: skip
    return output


@gated.register_fake
def _(x, bias):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op(f"{NAMESPACE}::silu_product_backward", mutates_args=())
def gated_backward(
    grad: torch.Tensor, x: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product once more, (rows, P), and the gradients of x and of the bias, in stripes (R, 2P) to be added up."""
    rows, units = count_rows(x), x.shape[-1] // 2
    output, to_x = torch.empty_like(grad), torch.empty_like(x)
    stripes = min(STRIPES, blocks(rows, 16))
    to_bias = bias.new_empty(stripes, 2 * units)
    with torch.cuda.device_of(x):
        launch(
            silu_product_backward, (blocks(units, 128), stripes), grad, x, bias, output, to_x, to_bias, rows,
            P=units, BM=16, BN=128, num_warps=4,
        )  # fmt: skip
    return output, to_x, to_bias


@gated_backward.register_fake
def _(grad, x, bias):
    stripes = min(STRIPES, blocks(count_rows(x), 16))
    return torch.empty_like(grad), torch.empty_like(x), bias.new_empty(stripes, x.shape[-1])


@torch.library.custom_op(f"{NAMESPACE}::normalise", mutates_args=())
def normed(
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


@normed.register_fake
def _(x, other, weight, eps):
    return (
        torch.empty_like(x),
        weight.new_empty(count_rows(x)),
        x.new_empty(0) if other is None else torch.empty_like(x),
    )


@torch.library.custom_op(f"{NAMESPACE}::normalise_backward", mutates_args=())
def normed_backward(
    grad: torch.Tensor, to_total: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    x normalised once more, and the gradients of x, to which `to_total` is added, and of the weight, in stripes (R, C)
    to be added up.
    """
    rows, channels = count_rows(x), x.shape[-1]
    output, to_x = torch.empty_like(x), torch.empty_like(x)
    stripes = min(8 * STRIPES, blocks(rows, 4))
    to_weight = weight.new_empty(stripes, channels)
    with torch.cuda.device_of(x):
        launch(
            normalise_backward, (stripes,), grad, to_total, x, weight, scale, output, to_x, to_weight, rows,
            C=channels, BC=triton.next_power_of_2(channels), BM=4, ADDS=to_total is not None, num_warps=4,
        )  # fmt: skip
    return output, to_x, to_weight


@normed_backward.register_fake
def _(grad, to_total, x, weight, scale):
    stripes = min(8 * STRIPES, blocks(count_rows(x), 4))
    return torch.empty_like(x), torch.empty_like(x), weight.new_empty(stripes, x.shape[-1])
