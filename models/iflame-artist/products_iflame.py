"""
Products of sizes that processors like: layers of one input as one, and inner units that are a multiple of 16.

A block's 1365 inner units (a third of 8 C, as published) make its products up to four times as slow on a GPU as 1376
would. Weights and biases are joined, and filled up with zeros, in the call: the names and sizes of the parameters, and
what belongs to each of them, such as its gradient, an adapter or an optimiser's state, stay as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from .block_kernels_iflame import has_block_kernels
from .fused_products_iflame import Norm, Weights, add_normed_silu_product_down, linear, silu_product_down
from .ops_iflame import in_autocasts_dtype

# With fewer items of input, copying weights costs more than the product gains.
LEAST_ITEMS = 1024
MULTIPLE = 16

# B batch, T items of a level, C channels, I inner units, P the same filled up to a multiple of 16


def may_join(hidden_states: torch.Tensor, *layers: nn.Module, bias: bool) -> bool:
    """
    Whether layers may be computed by their weights alone, and are worth it: each is a Linear, with a bias or without
    as said, and nothing else (no adapter, no quantised or sharded weight, no hook), and there are items enough. In an
    exported graph, which may be run with any number of them, they are not.
    """
    if is_exporting() or hidden_states.shape[:-1].numel() < LEAST_ITEMS:
        return False
    return all(is_plain(layer, nn.Linear) and (layer.bias is not None) == bias for layer in layers)


def may_fuse(hidden_states: torch.Tensor, norm: nn.Module, kind: type) -> bool:
    """
    Whether products of such items may normalise them by the way, as a module of class `kind` would: where there are
    kernels for it and the norm is nothing else. torch.compile makes one of a norm and what stands around it by itself.
    """
    if torch.compiler.is_compiling() or not has_block_kernels(hidden_states):
        return False
    return is_plain(norm, kind) and in_autocasts_dtype(hidden_states) is hidden_states


def is_exporting() -> bool:
    # Before torch 2.13 is_exporting() is True within torch.compile, and the flag is not; before 2.7 there is neither.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_compiling() if flag is None else flag


def is_plain(layer: nn.Module, kind: type) -> bool:
    """Whether a module of class `kind` is nothing but its weight and bias."""
    return type(layer) is kind and type(layer.weight) in (nn.Parameter, torch.Tensor) and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        _has_any_global_hook()
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def in_use(weights: Weights | None, x: torch.Tensor) -> bool:
    """Whether weights that a training loop keeps may take the place of the parameters in a product of x."""
    if weights is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return weights.matrix.dtype == in_autocasts_dtype(x).dtype


def joined(*layers: nn.Linear) -> Weights:
    """Of layers without bias: (B, T, C) -> what each gives for it, side by side."""
    return Weights(layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers]))


def inward(gate: nn.Linear, up: nn.Linear) -> Weights:
    """The matrices (2P, C) and biases (2P,) of both."""
    spare = filled(gate.out_features) - gate.out_features
    no_weights, no_biases = gate.weight.new_zeros(spare, gate.in_features), gate.bias.new_zeros(spare)
    matrix = torch.cat([gate.weight, no_weights, up.weight, no_weights])
    return Weights(matrix, torch.cat([gate.bias, no_biases, up.bias, no_biases]))


def outward(down: nn.Linear) -> Weights:
    """The matrix (C, P)."""
    spare = filled(down.in_features) - down.in_features
    return Weights(F.pad(down.weight, (0, spare)) if spare else down.weight, down.bias)


def filled(units: int) -> int:
    """P of so many inner units."""
    return -(-units // MULTIPLE) * MULTIPLE


def of_type(weights: Weights, dtype: torch.dtype) -> Weights:
    """Weights whose matrix is of a type, as fused products want it."""
    return weights._replace(matrix=weights.matrix.to(dtype))


def swiglu(x: torch.Tensor, inward: Weights, down: Weights) -> torch.Tensor:
    """
    down(silu(gate(x)) * up(x)) of (B, T, C), in two products over P inner units. Those that are not there have weights
    and biases of zero, and silu(0) * 0 = 0.
    """
    if has_block_kernels(x):
        units = linear(x, inward._replace(bias=None, to_bias=None))
        return silu_product_down(units, inward.bias, inward.to_bias, of_type(down, units.dtype))
    gates, ups = linear(x, inward).chunk(2, dim=-1)
    return linear(F.silu(gates) * ups, down)


def add_normed_swiglu(
    residual: torch.Tensor, added: torch.Tensor, norm: Norm, inward: Weights, down: Weights, keeps: bool = True
) -> torch.Tensor:
    """
    h + swiglu(norm(h)), h = residual + added; only where the norm may be fused.

    Args:
        keeps: gates and ups for the backward pass, which otherwise computes their product again.
    """
    weights = of_type(inward, residual.dtype), of_type(down, residual.dtype)
    output, residual = add_normed_silu_product_down(residual, added, norm, *weights, keeps)
    return residual + output
