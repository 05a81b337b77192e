"""
The blocks of the network: RMSNorm, both kinds of attention, SwiGLU, and what hands outputs up to a finer level. One
body of code serves training, prefill and single steps; what differs between them is data.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .block_kernels_iflame import has_block_kernels
from .cache_iflame import IFlameCache
from .configuration_iflame import IFlameConfig
from .fused_products_iflame import Norm, Weights, linear, normed_linear
from .implementations_iflame import linear_attention, linear_attention_step
from .levels_iflame import LevelInputs
from .ops_iflame import apply_rotary
from .packed_attention_iflame import packed_attention
from .products_iflame import (
    add_normed_swiglu,
    has_hooks,
    in_use,
    inward,
    is_exporting,
    joined,
    may_fuse,
    may_join,
    of_type,
    outward,
    swiglu,
)
from .rotary_kernels_iflame import turned_heads
from .states_iflame import is_writable
from .upsample_kernels_iflame import has_upsample_kernels, upsampled

# B batch, T items of a level, H heads, D head size, C channels


class IFlameRMSNorm(nn.Module):
    """
    RMSNorm (arXiv 1910.07467); the mean square is taken in float32.

    Attributes:
        to_weight: as of `Norm`, where a training loop adds up gradients.
    """

    to_weight: torch.Tensor | None = None

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype), self.eps)


class IFlameMLP(nn.Module):
    """
    SwiGLU (arXiv 2002.05202) with biases.

    Attributes:
        keeps_units: in eager training on a GPU gates and ups, half of what a block keeps for the backward pass, are
            kept and not computed again.
        inward, outward: weights that a training loop keeps for the products, else None.
    """

    keeps_units = True
    inward: Weights | None = None
    outward: Weights | None = None

    def __init__(self, config: IFlameConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)
        self.down_proj.writes_residual = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.joins(hidden_states):
            return swiglu(hidden_states, *self.weights(hidden_states))
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))

    def joins(self, hidden_states: torch.Tensor) -> bool:
        """Whether such items are taken in two products."""
        return may_join(hidden_states, self.gate_proj, self.up_proj, self.down_proj, bias=True)

    def weights(self, hidden_states: torch.Tensor) -> tuple[Weights, Weights]:
        """Of both products."""
        if in_use(self.inward, hidden_states):
            return self.inward, self.outward
        return inward(self.gate_proj, self.up_proj), outward(self.down_proj)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Causal softmax attention spelled out.

    query, key, value (B, H, T or P + T, D) -> output (B, T, H, D), weights (B, H, T, P + T).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None:
        before = key.shape[2] - query.shape[2]
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(before)
    scores = scores.masked_fill(~attention_mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class IFlameAttention(nn.Module):
    """
    Projections and rotary embedding that both kinds of attention share.

    Attributes:
        inward, outward: weights that a training loop keeps for the products, else None.
    """

    is_causal = True
    inward: Weights | None = None
    outward: Weights | None = None

    def __init__(self, config: IFlameConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        # A mark for _init_weights, which transformers calls for modules with parameters of their own only.
        self.o_proj.writes_residual = True

    def forward(self, hidden_states: torch.Tensor, level: LevelInputs, cache: IFlameCache | None):
        """(B, T, C) -> (B, T, C), attention weights (B, H, T, P + T) or None."""
        return self.attend(self.project(hidden_states, level), level, cache, hidden_states.dtype)

    def joins(self, hidden_states: torch.Tensor) -> bool:
        """Whether query, key and value of such items are one product."""
        return may_join(hidden_states, self.q_proj, self.k_proj, self.v_proj, bias=False)

    def project(self, hidden_states: torch.Tensor, level: LevelInputs) -> tuple[torch.Tensor, ...]:
        """(B, T, C) -> query, key, value, each (B, T, H, D)."""
        if self.joins(hidden_states):
            width = 2 * self.q_proj.out_features
            projected = linear(hidden_states, self._weights(hidden_states))
            if has_block_kernels(projected):
                return turned_heads(projected, level.cos, level.sin)
            # A copy, or all three would be kept for the backward pass as long as the values.
            turning, value = projected[..., :width], projected[..., width:].contiguous()
        else:
            turning = torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states)], dim=-1)
            value = self.v_proj(hidden_states)
        heads = (-1, self.head_dim)
        turned = apply_rotary(turning.unflatten(-1, heads), level.cos, level.sin)
        return *turned.chunk(2, dim=-2), value.unflatten(-1, heads)

    def project_normed(self, hidden_states: torch.Tensor, level: LevelInputs, norm: Norm):
        """What `project` gives for normalised items, if norms may be fused; and the items, for who reads them next."""
        weights = of_type(self._weights(hidden_states), hidden_states.dtype)
        projected, hidden_states = normed_linear(hidden_states, norm, weights)
        return turned_heads(projected, level.cos, level.sin), hidden_states

    def _weights(self, hidden_states: torch.Tensor) -> Weights:
        """Of the product of query, key and value."""
        return self.inward if in_use(self.inward, hidden_states) else joined(self.q_proj, self.k_proj, self.v_proj)

    def _project_out(self, output: torch.Tensor) -> torch.Tensor:
        if in_use(self.outward, output) and may_join(output, self.o_proj, bias=False):
            return linear(output, self.outward)
        return self.o_proj(output)


class IFlameFullAttention(IFlameAttention):
    """Causal softmax attention, through transformers' attention interface."""

    def attend(self, heads, level: LevelInputs, cache: IFlameCache | None, dtype: torch.dtype):
        """Query, key and value, (B, T, H, D) each, to what `forward` gives."""
        query, key, value = (x.transpose(1, 2) for x in heads)
        if cache is not None:
            key, value = cache.layers[self.layer_idx].update(key, value, level.slots)
        if level.packing is not None:
            items = (x.transpose(1, 2) for x in (query, key, value))
            output = packed_attention(*items, level.packing, self.head_dim**-0.5)
            return self._project_out(output.flatten(-2)), None
        implementation = level.attention_implementation
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            level.attention_mask,
            scaling=self.head_dim**-0.5,
            dropout=0.0,
            **level.attention_kwargs,
        )
        return self._project_out(output.flatten(-2)), weights if implementation == "eager" else None


class IFlameLinearAttention(IFlameAttention):
    """Linear attention with a fixed decay for each head, then RMSNorm over all channels."""

    def __init__(self, config: IFlameConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.norm = IFlameRMSNorm(config.hidden_size, config.rms_norm_eps)

    def attend(self, heads, level: LevelInputs, cache: IFlameCache | None, dtype: torch.dtype):
        """Query, key and value, (B, T, H, D) each, to what `forward` gives, in the type of its input."""
        memory = None if cache is None else cache.layers[self.layer_idx]
        output = self._attend(*heads, level, memory).flatten(-2)
        fuses = output.dtype == dtype and may_join(output, self.o_proj, bias=False)
        if fuses and may_fuse(output, self.norm, IFlameRMSNorm):
            weights = self.outward if in_use(self.outward, output) else joined(self.o_proj)
            return normed_linear(output, Norm.of(self.norm), of_type(weights, dtype))[0], None
        return self._project_out(self.norm(output).to(dtype)), None

    def _attend(self, query, key, value, level, memory):
        """Linear attention of (B, T, H, D) items; the state is that of `memory`, if there is one."""
        state = memory.state if memory is not None and level.has_state else None
        if query.shape[1] == 1 and state is not None and level.bounds is None and not state.requires_grad:
            if not (torch.is_grad_enabled() and key.requires_grad):
                if not is_writable(state):
                    memory.state = state = state.clone()
                return linear_attention_step(query, key, value, level.slopes, state, level.linear_implementation)
        output, state = linear_attention(
            query,
            key,
            value,
            level.slopes,
            state,
            level.bounds,
            need_state=memory is not None,
            implementation=level.linear_implementation,
        )
        if memory is not None:
            memory.write(state)
            if level.has_begun is not None:
                memory.clear_rows(level.has_begun)
        return output


class IFlameBlock(GradientCheckpointingLayer):
    """A pre-norm block: attention, then SwiGLU."""

    def __init__(self, config: IFlameConfig, layer_idx: int):
        super().__init__()
        full = config.layer_types[layer_idx] == "full_attention"
        self.self_attn = (IFlameFullAttention if full else IFlameLinearAttention)(config, layer_idx)
        self.mlp = IFlameMLP(config)
        self.input_layernorm = IFlameRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = IFlameRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, level: LevelInputs, cache: IFlameCache | None = None):
        """(B, T, C) -> (B, T, C), attention weights (B, H, T, P + T) or None."""
        attn, mlp, norm = self.self_attn, self.mlp, self.input_layernorm
        dtype = hidden_states.dtype
        if may_fuse(hidden_states, norm, IFlameRMSNorm) and _joins(
            hidden_states, attn, IFlameFullAttention, IFlameLinearAttention
        ):
            heads, hidden_states = attn.project_normed(hidden_states, level, Norm.of(norm))
            attended, weights = attn.attend(heads, level, cache, dtype)
        else:
            attended, weights = attn(norm(hidden_states), level, cache)
        norm = self.post_attention_layernorm
        if may_fuse(hidden_states, norm, IFlameRMSNorm) and _joins(hidden_states, mlp, IFlameMLP):
            products = mlp.weights(hidden_states)
            return add_normed_swiglu(hidden_states, attended, Norm.of(norm), *products, mlp.keeps_units), weights
        hidden_states = hidden_states + attended
        return hidden_states + mlp(norm(hidden_states)), weights


def _joins(hidden_states: torch.Tensor, module: nn.Module, *kinds: type) -> bool:
    """Whether a module is of one of these classes, has no hooks, and takes such items in joined products."""
    return type(module) in kinds and not has_hooks(module) and module.joins(hidden_states)


class IFlameUpsample(nn.Module):
    """
    Hands the outputs of a level up to the finer level above: repeat for each item of a group, shift right by all of
    them but one, scale, add.

    Args:
        group_size: items of the finer level in a group: 3.
    """

    def __init__(self, group_size: int):
        super().__init__()
        self.group_size = group_size
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, hidden_states, coarse, offset: int, positions: torch.Tensor | None):
        """
        Args:
            hidden_states: (B, T, C) outputs of the encoder of the finer level.
            coarse: (B, 1 + G, C) the last output handed up before, then those of the G groups that are complete now.
            offset: members of the open group before the first of the T items.
            positions: (B, T) positions in the mesh, or None: those before the end of its first group get nothing.
        """
        if not is_exporting() and has_upsample_kernels(hidden_states, coarse, self.scale):
            return upsampled(hidden_states, coarse, self.scale, positions, offset, self.group_size)
        first = offset + 1
        handed = coarse.repeat_interleave(self.group_size, dim=1)[:, first : first + hidden_states.shape[1]]
        if positions is not None:
            handed = handed.masked_fill((positions < self.group_size - 1)[..., None], 0.0)
        return hidden_states + self.scale.to(handed.dtype) * handed
