"""
Products and what stands around them as one step of autograd, on a GPU: norm, product, SwiGLU and the residual addition
keep nothing for the backward pass that can be had again in passing.

A training loop may keep weights in the type of the products, and add up their gradients in float32 itself: then a
backward pass adds to these sums, in the product where it can, and autograd is given none.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .block_kernels_iflame import add_rows_to, gated, gated_backward, normed, normed_backward, sum_of_rows
from .ops_iflame import in_autocasts_dtype

# B batch, T items, C channels, N outputs, P inner units

# Before torch 2.8 products of bfloat16 are in bfloat16.
HAS_WIDE_PRODUCTS = "dtype_out" in torch.ops.aten.addmm.overloads()


class Norm(NamedTuple):
    """An RMSNorm."""

    weight: torch.Tensor  # (C,)
    eps: float
    to_weight: torch.Tensor | None = None  # (C,) float32: what its gradient is added to; None: it is autograd's

    @classmethod
    def of(cls, module: nn.Module) -> "Norm":
        return cls(module.weight, module.eps, module.to_weight)


class Weights(NamedTuple):
    """What a product multiplies with and adds, and what their gradients are added to; None: they are autograd's."""

    matrix: torch.Tensor  # (N, C)
    bias: torch.Tensor | None = None  # (N,)
    to_matrix: torch.Tensor | None = None  # (N, up to C) float32: columns that are not there have weights of zero
    to_bias: torch.Tensor | None = None  # (N,) float32


def linear(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """W x + b of (..., C) items; under autocast in its type."""
    if weights.to_matrix is None:
        return F.linear(x, weights.matrix, weights.bias)
    return _Linear.apply(in_autocasts_dtype(x), *weights)


def silu_product_down(x: torch.Tensor, bias: torch.Tensor, bias_sum: torch.Tensor | None, down: Weights):
    """
    (silu(gate) * up) W^T + b of gates and ups (B, T, 2P), side by side, whose `bias` (2P,) is added here; W and b are
    those of `down`, W in x's type. `bias_sum`: what the gradient of the bias is added to.
    """
    sums = bias_sum, down.to_matrix, down.to_bias
    return _SiluProductDown.apply(x.contiguous(), bias.float(), down.matrix, down.bias.float(), sums)


def normed_linear(x: torch.Tensor, norm: Norm, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """
    W n of (B, T, C) items, n their RMSNorm, W in x's type; and x, for who reads it next: so what comes back for it is
    added in the same pass. What is normalised is not kept.
    """
    sums = norm.to_weight, weights.to_matrix
    return _NormedLinear.apply(x.contiguous(), norm.weight.float(), norm.eps, weights.matrix, sums)


def add_normed_silu_product_down(
    x: torch.Tensor, other: torch.Tensor, norm: Norm, inward: Weights, down: Weights, keeps: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `silu_product_down` of the product of `inward` (2P, C) and what is normalised of h = x + `other`; and h. Gates and
    ups are kept for the backward pass, or else made again in it.
    """
    sums = norm.to_weight, inward.to_matrix, inward.to_bias, down.to_matrix, down.to_bias
    weights = inward.matrix, inward.bias.float(), down.matrix, down.bias.float()
    return _AddNormedSwiGLU.apply(
        x.contiguous(), other.contiguous(), norm.weight.float(), norm.eps, *weights, keeps, sums
    )


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds the first columns of left @ right, in float32, to a total."""
    if left.device.type == "cuda" and HAS_WIDE_PRODUCTS and total.shape[1] == right.shape[1]:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += (left @ right)[:, : total.shape[1]]


def _of_matrix(total: torch.Tensor | None, needs: bool, grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
    """The gradient grad^T x of a matrix, or None where it is not asked for or was added to a total."""
    x = x.view(-1, x.shape[-1])
    if total is None:
        return grad.mT @ x if needs else None
    add_product(total, grad.mT, x)
    return None


def _of_vector(total: torch.Tensor | None, needs: bool, rows: torch.Tensor) -> torch.Tensor | None:
    """The sum of rows, or None where it is not asked for or was added to a total."""
    if total is None:
        return sum_of_rows(rows) if needs else None
    add_rows_to(total, rows)
    return None


def _down_backward(grad, units, bias, matrix, needs, sums):
    """The gradients of gates and ups, their biases, and, of `needs`, of the matrix (C, P) and its bias."""
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    product, to_units, stripes = gated_backward(grad @ matrix, units, bias)
    to_bias = _of_vector(sums[0], needs[0], stripes)
    return to_units, to_bias, _of_matrix(sums[1], needs[1], grad, product), _of_vector(sums[2], needs[2], grad)


def _norm_backward(grad, to_total, x, norm, scale, matrix, needs, sums):
    """The gradients of x, to which `to_total` is added, of the norm and, of `needs`, of the matrix (N, C)."""
    grad = grad.reshape(-1, grad.shape[-1])
    values, to_x, stripes = normed_backward(grad @ matrix, to_total, x, norm, scale)
    return to_x, _of_vector(sums[0], needs[0], stripes), _of_matrix(sums[1], needs[1], grad, values)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, matrix, bias, to_matrix, to_bias):
        ctx.save_for_backward(x, matrix)
        ctx.sums = to_matrix, to_bias
        return F.linear(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        (x, matrix), (to_matrix, to_bias) = ctx.saved_tensors, ctx.sums
        flat = grad.reshape(-1, grad.shape[-1])
        _of_matrix(to_matrix, False, flat, x.contiguous())
        if to_bias is not None:
            to_bias += flat.sum(dim=0, dtype=to_bias.dtype)
        return grad @ matrix, None, None, None, None


class _SiluProductDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, bias, matrix, down_bias, sums):
        ctx.save_for_backward(x, bias, matrix)
        ctx.sums = sums
        return F.linear(gated(x, bias), matrix, down_bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        return *_down_backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[1:4], ctx.sums), None


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, norm, eps, matrix, sums):
        values, scale, _ = normed(x, None, norm, eps)
        ctx.save_for_backward(x, norm, scale, matrix)
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return F.linear(values, matrix), x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, to_total: torch.Tensor | None):
        if grad is None:  # nobody asks for the product
            return to_total, None, None, None, None
        needs = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        to_total = None if to_total is None else to_total.contiguous()
        to_x, to_norm, to_matrix = _norm_backward(grad, to_total, *ctx.saved_tensors, needs, ctx.sums)
        return to_x, to_norm, None, to_matrix, None


class _AddNormedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, other, norm, eps, inward, bias, outward, down_bias, keeps, sums):
        values, scale, total = normed(x, other, norm, eps)
        units = F.linear(values, inward)
        ctx.save_for_backward(total, norm, scale, inward, bias, outward, units if keeps else None)
        ctx.eps, ctx.sums = eps, sums
        ctx.set_materialize_grads(False)
        return F.linear(gated(units, bias), outward, down_bias.to(x.dtype)), total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, to_total: torch.Tensor | None):
        if grad is None:  # nobody asks for the product
            return to_total, to_total, *(None,) * 8
        total, norm, scale, inward, bias, outward, units = ctx.saved_tensors
        if units is None:
            units = F.linear(normed(total, None, norm, ctx.eps)[0], inward)
        needs, (norm_sum, inward_sum, *down_sums) = ctx.needs_input_grad, ctx.sums
        to_units, to_bias, to_outward, to_down_bias = _down_backward(grad, units, bias, outward, needs[5:8], down_sums)
        to_total = None if to_total is None else to_total.contiguous()
        to_x, to_norm, to_inward = _norm_backward(
            to_units, to_total, total, norm, scale, inward, (needs[2], needs[4]), (norm_sum, inward_sum)
        )
        return to_x, to_x, to_norm, None, to_inward, to_bias, to_outward, to_down_bias, None, None
