"""
One token of every row through the network on a CPU, where a small product costs less than the call that asks for it:
as few calls as can be, into memory that stays where it is.

It computes what `KernelSteps` computes, and can stand in its place. Tensors and the arrays named beside them are the
same memory. Products and small sums are numpy's: they cost a third of the time of torch's call, and its matrix library
multiplies few rows about twice as fast; what torch does in one call where numpy takes several is torch's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .cache_iflame import StaticIFlameCache
from .ops_iflame import rotary_tables
from .packing_iflame import BlockWeights, PackedWeights
from .step_memory_iflame import StepMemory

# B rows, C channels, H heads, D head size, I hidden units, V token ids


class _Block:
    """The weights of a block, with what stands before and after a product taken into it; as a row is multiplied."""

    def __init__(self, block: BlockWeights, size: int):
        channels = block.out.shape[0]
        self.level, self.is_full = block.level, block.is_full
        first, second = (half.view(3, -1, size // 2, channels) for half in block.heads)
        # Pairs of channels that turn together lie side by side: they are complex numbers then.
        turning = torch.stack([first[:2], second[:2]], dim=3).flatten(2, 3)
        straight = torch.cat([first[2:], second[2:]], dim=2)
        heads = torch.cat([turning, straight]).reshape(3 * channels, channels) * block.attention_norm
        if self.is_full:
            heads[:channels] *= size**-0.5
        self.heads = _transposed(heads)  # (C, 3C)
        self.out = _transposed(block.out if self.is_full else block.out * block.read_norm)  # (C, C)
        self.gate_up = _transposed(block.gate_up.flatten(0, 1) * block.mlp_norm)  # (C, 2I)
        self.gate_up_bias = block.gate_up_bias.flatten().numpy()
        # The last hidden unit is one.
        self.down = _transposed(torch.cat([block.down, block.down_bias[:, None]], dim=1))  # (I + 1, C)


def _transposed(weight: torch.Tensor) -> np.ndarray:
    return weight.t().contiguous().numpy()


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
        # A configuration of transformers looks a name up in Python, which costs as much as a small sum.
        self.group, self.face, self.eps = config.group_sizes[0], config.tokens_per_face, config.rms_norm_eps
        self.strides, self.stages = config.level_strides, config.stage_slices()
        self.last_slots = [cache.room(level) - 1 for level in range(len(self.strides))]
        self.x_arrays, self.middle_array = [each.numpy() for each in self.x], self.middle.numpy()
        self.member_arrays = [list(each.numpy()) for each in self.members]
        self.handed_arrays, self.logits_array = [each.numpy() for each in self.handed], self.logits.numpy()
        self.token_array = self.tokens.numpy()
        qkv = buffer(rows, 3, heads, size)
        self.qkv = qkv.view(rows, -1).numpy()
        self.turning = torch.view_as_complex(qkv[:, :2].view(rows, 2, heads, size // 2, 2))
        self.key_column, self.value = qkv[:, 1, :, :, None], qkv[:, 2, :, None]
        self.query_array, self.key_array, self.value_array = (
            qkv[:, kind, :, None].numpy() for kind in range(3)
        )  # (B, H, 1, D)
        self.read = buffer(rows, heads, 1, size).numpy()
        self.flat_read = self.read.reshape(rows, channels)
        self.scaled, self.squares = buffer(rows, channels).numpy(), buffer(rows, channels).numpy()
        self.mean, self.scale = np.full((channels, 1), 1 / channels, self.scaled.dtype), buffer(rows, 1).numpy()
        hidden, gate_up = torch.ones(rows, units + 1, dtype=dtype), buffer(rows, 2 * units)
        self.hidden, self.product = hidden.numpy(), hidden[:, :units].numpy()
        self.gate_up, self.gate, self.up = gate_up.numpy(), gate_up[:, :units], gate_up[:, units:].numpy()
        self.gate_array = self.gate.numpy()
        # One memory a block: its state, or its keys and values.
        self.memories: list[Any] = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            if block.is_full:
                self.memories.append((layer.keys.numpy(), layer.values.numpy()))
            else:
                state = buffer(rows, heads, size, size)
                self.memories.append((state, state.numpy()))
        self.rotations = []
        for level in range(len(self.strides)):
            cos, sin = rotary_tables(torch.arange(cache.room(level))[None], size, config.rope_base)
            self.rotations.append(torch.complex(cos[0, :, 0].to(dtype), -sin[0, :, 0].to(dtype)))

    def load(self, weights: PackedWeights) -> None:
        """Takes other weights of the same sizes."""
        self.decay = torch.exp(-weights.slopes)[:, None, None].to(weights.head.dtype)
        self.blocks = [_Block(block, self.config.head_dim) for block in weights.blocks]
        self.embedding, self.head, self.head_bias = (
            weights.embedding.numpy(),
            _transposed(weights.head),
            weights.head_bias.numpy(),
        )
        self.scales = [float(scale) for scale in weights.scales]

    def begin(self) -> None:
        super().begin()
        order = self._order()
        for block, layer, memory in zip(self.blocks, self.cache.layers, self.memories, strict=True):
            if block.is_full:
                layer.keys.copy_(layer.keys[..., order])
            else:
                memory[0].copy_(layer.state[:, :, order])

    def settle(self) -> None:
        """All levels are where they were before a face, after one that was not run as a whole: always."""

    def begin_rows(self, rows: torch.Tensor, prompt: Any) -> None:
        """`rows` (R,) hold what comes after a `Prompt` of whole faces."""
        super().begin_rows(rows, prompt.handed)
        order = self._order()
        for block, layer, memory, given in zip(
            self.blocks, self.cache.layers, self.memories, prompt.memories, strict=True
        ):
            if block.is_full:
                items = given[0].shape[2]
                layer.keys[rows, :, :items] = given[0][..., order].to(layer.keys)
                layer.values[rows, :, :items] = given[1].to(layer.values)
            else:
                memory[0][rows] = given[0][:, :, order].to(memory[0])

    def _order(self) -> torch.Tensor:
        """The channels of query and key in the order in which they lie here."""
        size = self.config.head_dim
        return torch.arange(size).view(2, size // 2).t().flatten()

    def step(self, place: int) -> None:
        """`tokens` at that place in their faces -> `logits` of the next ones. Positions are those of the cache."""
        group = self.group
        is_vertex, is_face = place % group == group - 1, place == self.face - 1
        corner, vertex = place % group, place // group
        members, handed, x = self.member_arrays, self.handed_arrays, self.x_arrays
        positions = self.cache.positions.tolist()
        self.same = min(positions) == max(positions)
        x[0][...] = self.embedding[self.token_array]
        self._stage(0, 0, positions, members[0][corner])
        if is_vertex:
            self._pool(members[0], x[1])
            self._stage(1, 1, positions, members[1][vertex])
            if is_face:
                self._pool(members[1], x[2])
                self._stage(2, 2, positions, handed[1])
            self._upsample(members[1][vertex], handed[1], self.scales[1], x[1])
            self._stage(3, 1, positions, handed[0])
        self._upsample(members[0][corner], handed[0], self.scales[0], x[0])
        self._stage(4, 0, positions, x[0])
        np.dot(x[0], self.head, out=self.logits_array)
        np.add(self.logits_array, self.head_bias, out=self.logits_array)

    def _pool(self, members: list[np.ndarray], out: np.ndarray) -> None:
        np.add(members[0], members[1], out=out)
        for member in members[2:]:
            np.add(out, member, out=out)
        np.multiply(out, 1 / len(members), out=out)

    def _upsample(self, own: np.ndarray, handed: np.ndarray, scale: float, out: np.ndarray) -> None:
        np.multiply(handed, scale, out=out)
        np.add(out, own, out=out)

    def _stage(self, stage: int, level: int, positions: list[int], out: np.ndarray) -> None:
        stride, most = self.strides[level], self.last_slots[level]
        table = self.rotations[level]
        if self.same:
            slots: Any = min(positions[0] // stride, most)
            rotation = table[slots]
        else:
            slots = np.minimum(np.array(positions) // stride, most)
            rotation = table[torch.from_numpy(slots)][:, None, None]
        part, x = self.stages[stage], self.x_arrays[level]
        for index in range(part.start, part.stop):
            self._block(index, slots, rotation, x, out if index == part.stop - 1 else x)

    def _block(self, index: int, slots: Any, rotation: torch.Tensor, x: np.ndarray, out: np.ndarray) -> None:
        block, middle, read = self.blocks[index], self.middle_array, self.flat_read
        np.dot(self._norm(x), block.heads, out=self.qkv)
        self.turning.mul_(rotation)
        if block.is_full:
            self._attend(self.memories[index], slots)
        else:
            state, array = self.memories[index]
            state.mul_(self.decay).addcmul_(self.key_column, self.value)
            np.matmul(self.query_array, array, out=self.read)
            read = self._norm(read)
        np.dot(read, block.out, out=middle)
        np.add(middle, x, out=middle)
        np.dot(self._norm(middle), block.gate_up, out=self.gate_up)
        np.add(self.gate_up, block.gate_up_bias, out=self.gate_up)
        F.silu(self.gate, inplace=True)
        np.multiply(self.gate_array, self.up, out=self.product)
        np.dot(self.hidden, block.down, out=out)
        np.add(out, middle, out=out)

    def _norm(self, x: np.ndarray) -> np.ndarray:
        """RMSNorm of x (B, C) without its weights."""
        if self.rows == 1:
            flat = x[0]
            return np.multiply(x, 1 / math.sqrt(flat.dot(flat) / len(flat) + self.eps), out=self.scaled)
        np.multiply(x, x, out=self.squares)
        np.dot(self.squares, self.mean, out=self.scale)
        np.add(self.scale, self.eps, out=self.scale)
        np.sqrt(self.scale, out=self.scale)
        return np.divide(x, self.scale, out=self.scaled)

    def _attend(self, memory: tuple[np.ndarray, np.ndarray], slots: Any) -> None:
        keys, values = memory  # (B, H, room, D)
        if self.same:
            self._attend_rows(slice(None), keys, values, slots)
            return
        # Each row looks at its own keys alone: some may have many times as many as others.
        for row, slot in enumerate(slots):
            self._attend_rows(slice(row, row + 1), keys, values, slot)

    def _attend_rows(self, rows: slice, keys: np.ndarray, values: np.ndarray, slot: int) -> None:
        """Rows that have the same number of keys."""
        keys, values, read = keys[rows, :, : slot + 1], values[rows, :, : slot + 1], self.read[rows]
        keys[:, :, slot] = self.key_array[rows, :, 0]
        values[:, :, slot] = self.value_array[rows, :, 0]
        scores = np.matmul(self.query_array[rows], keys.swapaxes(2, 3))  # (R, H, 1, slot + 1)
        scores -= scores.max(axis=3, keepdims=True)
        np.exp(scores, out=scores)
        total = scores.sum(axis=3, keepdims=True)
        np.matmul(scores, values, out=read)
        np.divide(read, total, out=read)
