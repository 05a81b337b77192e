"""
Products of sizes that processors like: layers of one input as one, and inner units that are a multiple of 16.

A block's 1365 inner units (a third of 8 C, as published) make its products up to four times as slow on a GPU as 1376
would. Weights and biases are joined, and filled up with zeros, in the call: the names and sizes of the parameters, and
what belongs to each of them, such as its gradient, an adapter or an optimiser's state, stay as they are.
"""

import torch
from torch import nn
from torch.nn import functional as F

from .block_kernels_iflame import has_block_kernels, silu_product_down

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
    if _is_exporting() or hidden_states.shape[:-1].numel() < LEAST_ITEMS:
        return False
    return all(_is_plain(layer) and (layer.bias is not None) == bias for layer in layers)


def _is_exporting() -> bool:
    # Before torch 2.13 is_exporting() is True within torch.compile, and the flag is not; before 2.7 there is neither.
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_compiling() if flag is None else flag


def _is_plain(layer: nn.Module) -> bool:
    return (
        type(layer) is nn.Linear
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and "forward" not in layer.__dict__
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks)
        and not layer._backward_pre_hooks
    )


def joined_linear(hidden_states: torch.Tensor, *layers: nn.Linear) -> torch.Tensor:
    """(B, T, C) -> what each of the layers, without bias, gives for it, side by side, in one product."""
    return F.linear(hidden_states, torch.cat([layer.weight for layer in layers]))


def swiglu(hidden_states: torch.Tensor, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> torch.Tensor:
    """
    down(silu(gate(x)) * up(x)) of (B, T, C), in two products over P inner units. Those that are not there have weights
    and biases of zero, and silu(0) * 0 = 0.
    """
    spare = -gate.out_features % MULTIPLE
    no_weights, no_biases = gate.weight.new_zeros(spare, gate.in_features), gate.bias.new_zeros(spare)
    weights = torch.cat([gate.weight, no_weights, up.weight, no_weights])
    biases = torch.cat([gate.bias, no_biases, up.bias, no_biases])
    outward = F.pad(down.weight, (0, spare)) if spare else down.weight
    if has_block_kernels(hidden_states):
        projected = F.linear(hidden_states, weights)
        return silu_product_down(projected, biases, outward.to(projected.dtype), down.bias)
    gates, ups = F.linear(hidden_states, weights, biases).chunk(2, dim=-1)
    return F.linear(F.silu(gates) * ups, outward, down.bias)
