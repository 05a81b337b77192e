"""
One token of every row through the network on a CPU, where a small product costs less than the call that asks for it:
as few calls as can be, into memory that stays where it is.

It computes what `KernelSteps` computes, and can stand in its place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from .cache_iflame import StaticIFlameCache
from .ops_iflame import rotary_tables
from .packing_iflame import BlockWeights, PackedWeights
from .step_memory_iflame import StepMemory

# B rows, C channels, H heads, D head size, I hidden units, V token ids


class _Block:
    """The weights of a block, with what stands before and after a product taken into it."""

    def __init__(self, block: BlockWeights, size: int, decay: torch.Tensor):
        channels = block.out.shape[0]
        self.level, self.is_full = block.level, block.is_full
        first, second = (half.view(3, -1, size // 2, channels) for half in block.heads)
        # Pairs of channels that turn together lie side by side: they are complex numbers then.
        turning = torch.stack([first[:2], second[:2]], dim=3).flatten(2, 3)
        straight = torch.cat([first[2:], second[2:]], dim=2)
        heads = torch.cat([turning, straight]).reshape(3 * channels, channels) * block.attention_norm
        if self.is_full:
            heads[:channels] *= size**-0.5
        self.heads = heads
        self.out = block.out if self.is_full else block.out * block.read_norm
        # Many more outputs than inputs: a row-major copy of the transpose is read faster.
        self.gate_up = (block.gate_up.flatten(0, 1) * block.mlp_norm).t().contiguous()
        self.gate_up_bias = block.gate_up_bias.flatten()
        # The last hidden unit is one.
        self.down = torch.cat([block.down, block.down_bias[:, None]], dim=1)
        self.decay = decay


class HostSteps(StepMemory):
    """
    A network that takes a token of every row at a time, all at the same place of their faces.

    Args:
        config: an `IFlameConfig`.
        weights: of the model, in float32 or float64, on a CPU.
        cache: the decoding state, whose tensors are read and written where they are.
    """

    def __init__(self, config: Any, weights: PackedWeights, cache: StaticIFlameCache):
        super().__init__(config, cache, weights.head.device, weights.head.dtype)
        rows, channels, size, heads = self.rows, config.hidden_size, config.head_dim, config.num_attention_heads
        units = weights.blocks[0].down.shape[1]
        dtype = weights.head.dtype

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype)

        self.load(weights)
        self.qkv = buffer(3, rows, heads, size)
        self.flat_qkv = buffer(rows, 3 * channels) if rows > 1 else self.qkv.view(1, -1)
        self.by_row = self.flat_qkv.view(rows, 3, heads, size).transpose(0, 1)
        self.turning = torch.view_as_complex(self.qkv[:2].view(2, rows, heads, size // 2, 2))
        self.query, self.key, self.value = (each.view(rows * heads, 1, size) for each in self.qkv)
        self.key_column = self.key.transpose(1, 2)
        self.read = buffer(rows * heads, 1, size)
        self.flat_read = self.read.view(rows, channels)
        self.hidden = torch.ones(rows, units + 1, dtype=dtype)
        self.gate_up = buffer(rows, 2 * units)
        self.gate, self.up, self.product = self.gate_up[:, :units], self.gate_up[:, units:], self.hidden[:, :units]
        # One memory a block: its state, or its keys and values.
        self.memories: list[Any] = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            if block.is_full:
                both = (each.view(rows * heads, -1, size) for each in (layer.keys, layer.values))
                self.memories.append(tuple(both))
            else:
                self.memories.append(buffer(rows * heads, size, size))
        self.rotations = []
        for level in range(len(config.level_strides)):
            cos, sin = rotary_tables(torch.arange(cache.room(level))[None], size, config.rope_base)
            self.rotations.append(torch.complex(cos[0, :, 0].to(dtype), -sin[0, :, 0].to(dtype)))

    def load(self, weights: PackedWeights) -> None:
        """Takes other weights of the same sizes."""
        decay = torch.exp(-weights.slopes).repeat(self.rows)[:, None, None].to(weights.head.dtype)
        self.blocks = [_Block(block, self.config.head_dim, decay) for block in weights.blocks]
        self.embedding, self.head, self.head_bias = weights.embedding, weights.head, weights.head_bias
        self.scales = [float(scale) for scale in weights.scales]

    @property
    def weights(self) -> tuple[Any, ...]:
        """All that steps read of the model."""
        return self.blocks, self.embedding, self.head, self.head_bias

    def begin(self) -> None:
        super().begin()
        order = self._order()
        for block, layer, memory in zip(self.blocks, self.cache.layers, self.memories, strict=True):
            if block.is_full:
                layer.keys.copy_(layer.keys[..., order])
            else:
                memory.copy_(layer.state[:, :, order].view(memory.shape))

    def settle(self) -> None:
        """All levels are where they were before a face, after one that was not run as a whole: always."""

    def begin_rows(self, rows: torch.Tensor, prompt: Any) -> None:
        """`rows` (R,) hold what comes after a `Prompt` of whole faces."""
        super().begin_rows(rows, prompt.handed)
        order, config = self._order(), self.config
        by_row = (self.rows, config.num_attention_heads)
        for block, memory, given in zip(self.blocks, self.memories, prompt.memories, strict=True):
            if block.is_full:
                keys, values = (each.view(*by_row, *each.shape[1:]) for each in memory)
                items = given[0].shape[2]
                keys[rows, :, :items], values[rows, :, :items] = given[0][..., order].to(keys), given[1].to(values)
            else:
                memory.view(*by_row, *memory.shape[1:])[rows] = given[0][:, :, order].to(memory)

    def _order(self) -> torch.Tensor:
        """The channels of query and key in the order in which they lie here."""
        size = self.config.head_dim
        return torch.arange(size).view(2, size // 2).t().flatten()

    def step(self, place: int) -> None:
        """`tokens` at that place in their faces -> `logits` of the next ones. Positions are those of the cache."""
        group = self.config.group_sizes[0]
        is_vertex, is_face = place % group == group - 1, place == self.config.tokens_per_face - 1
        corner, vertex, members = place % group, place // group, self.members
        positions = self.cache.positions.tolist()
        self.same = min(positions) == max(positions)
        torch.index_select(self.embedding, 0, self.tokens, out=self.x[0])
        self._stage(0, 0, positions, members[0][corner])
        if is_vertex:
            self._pool(members[0], self.x[1])
            self._stage(1, 1, positions, members[1][vertex])
            if is_face:
                self._pool(members[1], self.x[2])
                self._stage(2, 2, positions, self.handed[1])
            torch.add(members[1][vertex], self.handed[1], alpha=self.scales[1], out=self.x[1])
            self._stage(3, 1, positions, self.handed[0])
        torch.add(members[0][corner], self.handed[0], alpha=self.scales[0], out=self.x[0])
        self._stage(4, 0, positions, self.x[0])
        self._add(self.head_bias, self.x[0], self.head, 1.0, self.logits)

    def _pool(self, members: torch.Tensor, out: torch.Tensor) -> None:
        torch.sum(members, dim=0, out=out)
        out.mul_(1 / len(members))

    def _stage(self, stage: int, level: int, positions: list[int], out: torch.Tensor) -> None:
        stride, most = self.config.level_strides[level], self.cache.room(level) - 1
        slots = [min(position // stride, most) for position in positions]
        table = self.rotations[level]
        if self.same:
            rotation = table[slots[0]]
        else:
            slots = torch.tensor(slots)
            rotation = table[slots][:, None]
        part = self.config.stage_slices()[stage]
        for index in range(part.start, part.stop):
            self._block(index, slots, rotation, self.x[level], out if index == part.stop - 1 else self.x[level])

    def _block(self, index: int, slots: Any, rotation: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
        block, middle = self.blocks[index], self.middle
        scaled, scale = self._norm(x)
        self._multiply(scaled, block.heads, scale, self.flat_qkv)
        if self.rows > 1:
            self.qkv.copy_(self.by_row)
        self.turning.mul_(rotation)
        if block.is_full:
            self._attend(self.memories[index], slots)
            self._add(x, self.flat_read, block.out, 1.0, middle)
        else:
            state = self.memories[index]
            state.mul_(block.decay).baddbmm_(self.key_column, self.value)
            torch.bmm(self.query, state, out=self.read)
            scaled, scale = self._norm(self.flat_read)
            self._add(x, scaled, block.out, scale, middle)
        scaled, scale = self._norm(middle)
        torch.addmm(block.gate_up_bias, scaled, block.gate_up, alpha=scale, out=self.gate_up)
        F.silu(self.gate, inplace=True)
        torch.mul(self.gate, self.up, out=self.product)
        self._add(middle, self.hidden, block.down, 1.0, out)

    def _norm(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        """RMSNorm of x (B, C) without its weights, as a product of a tensor and a number."""
        eps = self.config.rms_norm_eps
        if self.rows == 1:
            flat = x[0]
            return x, 1 / math.sqrt(float(torch.dot(flat, flat)) / len(flat) + eps)
        return F.rms_norm(x, x.shape[1:], None, eps), 1.0

    def _multiply(self, x: torch.Tensor, w: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """out = scale * x w^T"""
        if self.rows == 1:
            torch.addmv(out[0], w, x[0], beta=0, alpha=scale, out=out[0])
        else:
            torch.mm(x, w.t(), out=out)

    def _add(self, to: torch.Tensor, x: torch.Tensor, w: torch.Tensor, scale: float, out: torch.Tensor) -> None:
        """out = to + scale * x w^T"""
        if self.rows == 1:
            torch.addmv(to.view(-1), w, x[0], alpha=scale, out=out[0])
        else:
            torch.addmm(to, x, w.t(), alpha=scale, out=out)

    def _attend(self, memory: tuple[torch.Tensor, torch.Tensor], slots: Any) -> None:
        keys, values = memory
        if self.same:
            slot = slots[0]
            keys[:, slot] = self.key[:, 0]
            values[:, slot] = self.value[:, 0]
            length, mask = slot + 1, None
        else:
            heads = self.config.num_attention_heads
            each = slots.repeat_interleave(heads)
            index = torch.arange(len(each))
            keys[index, each] = self.key[:, 0]
            values[index, each] = self.value[:, 0]
            length = int(slots.max()) + 1
            mask = torch.arange(length) > each[:, None, None]
        scores = torch.bmm(self.query, keys[:, :length].transpose(1, 2))
        if mask is not None:
            scores.masked_fill_(mask, -torch.inf)
        torch.bmm(scores.softmax(dim=-1), values[:, :length], out=self.read)
