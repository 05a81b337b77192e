"""The weights of a model as a decoding step reads them: what is multiplied together lies together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .ops_iflame import alibi_slopes

# C channels, H heads, D head size, I hidden units, V token ids

HIDDEN_MULTIPLE = 16  # rows whose length in bytes is odd are read slowly


class BlockWeights(NamedTuple):
    """Of one block."""

    level: int
    is_full: bool
    attention_norm: torch.Tensor  # (C,)
    heads: torch.Tensor  # (2, 3C / 2, C): the first halves of all heads of query, key and value, then the second ones
    read_norm: torch.Tensor | None  # (C,), of linear attention
    out: torch.Tensor  # (C, C)
    mlp_norm: torch.Tensor  # (C,)
    gate_up: torch.Tensor  # (2, I, C), I filled up with zeros
    gate_up_bias: torch.Tensor  # (2, I)
    down: torch.Tensor  # (C, I)
    down_bias: torch.Tensor  # (C,)


class PackedWeights(NamedTuple):
    """Of a model."""

    embedding: torch.Tensor  # (V, C) float32 or float64, normalised
    blocks: list[BlockWeights]
    scales: list[torch.Tensor]  # (1,) each, of what is handed up to coordinates and to vertices
    head: torch.Tensor  # (V, C)
    head_bias: torch.Tensor  # (V,)
    slopes: torch.Tensor  # (H,) float32


@torch.no_grad()
def pack_weights(model: nn.Module, dtype: torch.dtype) -> PackedWeights:
    """A copy of the weights of an `IFlameForCausalLM` in `dtype`; the model's own stay as they are."""
    config, network = model.config, model.model

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(dtype, copy=True).contiguous()

    blocks = []
    for layer, level, kind in zip(network.layers, config.layer_levels(), config.layer_types, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        spare = -mlp.gate_proj.out_features % HIDDEN_MULTIPLE
        gate_up = torch.stack([F.pad(each.weight, (0, 0, 0, spare)) for each in (mlp.gate_proj, mlp.up_proj)])
        bias = torch.stack([F.pad(each.bias, (0, spare)) for each in (mlp.gate_proj, mlp.up_proj)])
        blocks.append(
            BlockWeights(
                level,
                kind == "full_attention",
                taken(layer.input_layernorm.weight),
                taken(_by_halves(attention)),
                taken(attention.norm.weight) if kind != "full_attention" else None,
                taken(attention.o_proj.weight),
                taken(layer.post_attention_layernorm.weight),
                taken(gate_up),
                taken(bias),
                taken(F.pad(mlp.down_proj.weight, (0, spare))),
                taken(mlp.down_proj.bias),
            )
        )
    return PackedWeights(
        _wide(network.embed_norm(network.embed_tokens.weight)),
        blocks,
        [taken(each.scale) for each in network.upsamplers],
        taken(model.lm_head.weight),
        taken(model.lm_head.bias),
        alibi_slopes(config.num_attention_heads, model.lm_head.weight.device),
    )


def copy_weights(to: PackedWeights, new: PackedWeights) -> None:
    """Writes packed weights into the memory of others of the same sizes."""

    def tensors(packed: PackedWeights) -> list[torch.Tensor]:
        blocks = [each for block in packed.blocks for each in block if isinstance(each, torch.Tensor)]
        return [packed.embedding, packed.head, packed.head_bias, *packed.scales, *blocks]

    for old, fresh in zip(tensors(to), tensors(new), strict=True):
        old.copy_(fresh)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _by_halves(attention: nn.Module) -> torch.Tensor:
    """(2, 3C / 2, C): rotary embedding turns the first half of a head's channels against the second one."""
    weights = torch.stack([each.weight for each in (attention.q_proj, attention.k_proj, attention.v_proj)])
    channels = weights.shape[-1]
    return weights.view(3, -1, 2, attention.head_dim // 2, channels).movedim(2, 0).reshape(2, -1, channels)


def what_cannot_be_packed(model: nn.Module) -> str | None:
    """Why a model's step is not that of its plain weights, in words, or None: adapters, hooks, quantised weights."""
    network = model.model
    if 0 in model.config.stage_layers:
        return "a stage without blocks"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"a hook of {name or 'the model'}"
        if "forward" in vars(module):
            return f"a forward of its own of {name or 'the model'}"
        if nn.utils.parametrize.is_parametrized(module):
            return f"the parametrisation of {name}"
    linear = [model.lm_head]
    for layer in network.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linear += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    for module in linear:
        if type(module) is not nn.Linear or not module.weight.is_floating_point():
            return f"a {type(module).__name__} in the place of a plain linear layer"
    if type(network.embed_tokens) is not nn.Embedding:
        return f"a {type(network.embed_tokens).__name__} in the place of the embedding"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return "parameters on several devices"
    return None
