"""One token of every row through the network by the kernels: which of them runs when, and on which memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .attention_kernels_iflame import attend_keys, attend_linear, attend_linear_project, combine_project
from .cache_iflame import StaticIFlameCache
from .choosing_iflame import Places
from .kernels_iflame import EMBED, PLAIN, POOL, UPSAMPLE, gate_up, project, project_heads
from .ops_iflame import rotary_tables
from .packing_iflame import BlockWeights, PackedWeights
from .step_memory_iflame import StepMemory

# B rows, C channels, H heads, D head size, I hidden units, V token ids, G groups of heads, S splits of the keys


class Tiles(NamedTuple):
    """How work is cut into programs, and with how many warps each runs."""

    wide: bool  # many rows are multiplied in tiles
    rows: int  # of a tile
    heads: int  # outputs of project_heads, in pairs
    hidden: int  # hidden units of gate_up
    down: int  # outputs of the projection down
    out: int  # outputs of attention's projection
    group: int  # heads of a program of linear attention
    keys: int  # at a time
    splits: tuple[int, int, int]  # of the keys of each level: two or more if not wide, else one
    inner: int  # inputs at a time; 0: all
    heads_warps: int = 4
    hidden_warps: int = 4
    down_warps: int = 4
    out_warps: int = 4
    keys_warps: int = 4
    stages: int = 2


NARROW_ROWS = 16  # with up to so many, each is multiplied by itself


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def choose_tiles(rows: int, heads: int, dtype: torch.dtype = torch.bfloat16) -> Tiles:
    """Tiles for so many rows and heads, and weights of that type."""
    if rows <= NARROW_ROWS:
        return Tiles(False, 1, 4, 8, 4, 32, min(8, _power(heads)), 256, (32, 16, 8), 0)
    if dtype == torch.float32:  # which takes twice the memory of a multiprocessor
        return Tiles(True, 32, 32, 32, 16, 16, 1, 64, (1, 1, 1), 64, stages=2)
    if rows <= 128:
        return Tiles(True, 32, 32, 32, 32, 32, 1, 64, (1, 1, 1), 128, stages=4)
    return Tiles(True, 64, 32, 64, 64, 64, 1, 64, (1, 1, 1), 64, stages=4)


class KernelSteps(StepMemory):
    """
    A network that takes a token of every row at a time, all at the same place of their faces.

    Args:
        config: an `IFlameConfig`.
        weights: of the model.
        cache: the decoding state, whose tensors are read and written where they are.
        pdl: whether a kernel is launched before the one before it has ended: needs a GPU of compute capability 9.
    """

    def __init__(
        self, config: Any, weights: PackedWeights, cache: StaticIFlameCache, pdl: bool, tiles: Tiles | None = None
    ):
        device, dtype = weights.head.device, weights.head.dtype
        super().__init__(config, cache, device, torch.float32)
        self.weights, self.pdl = weights, pdl
        self.tiles = choose_tiles(self.rows, config.num_attention_heads, dtype) if tiles is None else tiles
        rows, channels, size = self.rows, config.hidden_size, config.head_dim
        heads = config.num_attention_heads

        def buffer(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        levels = range(len(config.level_strides))
        self.qkv = buffer(rows, 3 * channels)
        self.attended = buffer(rows, channels)
        self.hidden = buffer(rows, weights.blocks[0].down.shape[1], dtype=dtype)
        self.groups = -(-heads // self.tiles.group)
        self.partial = buffer(rows, self.groups, channels)
        self.square = buffer(rows, self.groups)
        splits = max(self.tiles.splits)
        self.most, self.sums = buffer(rows, heads, splits), buffer(rows, heads, splits)
        self.read = buffer(rows, heads, splits, size)
        rooms = [cache.room(level) for level in levels]
        cos, sin = rotary_tables(torch.arange(max(rooms), device=device)[None], size, config.rope_base)
        self.places = Places(rows, rooms, cos[0, :, 0], sin[0, :, 0])
        # Few rows: a step reads the state in one tensor and writes it to the other, which then change their parts.
        self.others = [
            torch.zeros_like(layer.state) if not weights.blocks[index].is_full and not self.tiles.wide else None
            for index, layer in enumerate(cache.layers)
        ]
        self.turns = [0] * len(levels)  # 1: the newest state of a level is in the other tensor
        self.phases = 0  # kernels launched so far

    def begin(self) -> None:
        super().begin()
        self.turns = [0] * len(self.turns)

    def settle(self) -> None:
        """All levels take the same turn again, after a face that was not run as a whole."""
        for block, layer, other in zip(self.weights.blocks, self.cache.layers, self.others, strict=True):
            if other is not None and self.turns[block.level]:
                layer.state.copy_(other)
        self.turns = [0] * len(self.turns)

    def begin_rows(self, rows: torch.Tensor, prompt: Any) -> None:
        """`rows` (R,) hold what comes after a `Prompt` of whole faces."""
        super().begin_rows(rows, prompt.handed)
        for block, layer, other, memory in zip(
            self.weights.blocks, self.cache.layers, self.others, prompt.memories, strict=True
        ):
            if block.is_full:
                for tensor, given in zip(layer.tensors(), memory, strict=True):
                    tensor[rows, :, : given.shape[2]] = given
            else:
                in_other = other is not None and self.turns[block.level]
                (other if in_other else layer.state)[rows] = memory[0]

    def step(self, place: int) -> None:
        """`tokens` at that place in their faces -> `logits` of the next ones. Positions are those of the cache."""
        group, members = self.config.group_sizes[0], self.members
        is_vertex, is_face = place % group == group - 1, place == self.config.tokens_per_face - 1
        corner, vertex = place % group, place // group
        self._stage(0, 0, EMBED, self.x[0], members[0][corner], read=self.weights.embedding)
        if is_vertex:
            self._stage(1, 1, POOL, self.x[1], members[1][vertex], read=members[0])
            if is_face:
                self._stage(2, 2, POOL, self.x[2], self.handed[1], read=members[1])
            self._stage(3, 1, UPSAMPLE, self.x[1], self.handed[0], read=members[1][vertex])
        self._stage(4, 0, UPSAMPLE, self.x[0], self.x[0], read=members[0][corner])
        self._project(self.x[0], None, self.weights.head, self.weights.head_bias, None, self.logits, 4, 4)

    def _stage(self, stage: int, level: int, source: str, made: torch.Tensor, out: torch.Tensor, read=None) -> None:
        part = self.config.stage_slices()[stage]
        for index in range(part.start, part.stop):
            is_first, is_last = index == part.start, index == part.stop - 1
            x = (made if read is None else read) if is_first else self.x[level]
            self._block(index, x, made, source if is_first else PLAIN, out if is_last else self.x[level])
        self.turns[level] ^= stage in (2, 3, 4)

    def _block(self, index: int, x: torch.Tensor, made: torch.Tensor, source: str, out: torch.Tensor) -> None:
        block, tiles, layer = self.weights.blocks[index], self.tiles, self.cache.layers[index]
        self._heads(block, x, made, source)
        residual = x if source == PLAIN else made
        parts, middle = 0, self.middle
        if not tiles.wide:
            parts = self.groups
            if block.is_full:
                self._keys(block, layer)
                self._combine(block)
            else:
                states = (layer.state, self.others[index])
                turn = self.turns[block.level]
                self._linear_project(block, states[turn], states[1 - turn])
        else:
            if block.is_full:
                self._keys(block, layer)
            else:
                self._linear(layer.state)
            self._project(
                self.attended, block.read_norm, block.out, None, residual, middle, tiles.out, tiles.out_warps
            )
        self._hidden(block, middle if not parts else residual, parts)
        self._project(self.hidden, None, block.down, block.down_bias, middle, out, tiles.down, tiles.down_warps)

    # One method a kernel: its grid, sizes and arguments.

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, **sizes: Any) -> None:
        self.phases += 1
        launched = {"launch_pdl": True} if self.pdl else {}
        kernel[grid](*arguments, **sizes, PDL=self.pdl, num_warps=warps, num_stages=self.tiles.stages, **launched)

    def _row_tiles(self) -> int:
        return -(-self.rows // self.tiles.rows)

    def _heads(self, block: BlockWeights, x: torch.Tensor, made: torch.Tensor, source: str) -> None:
        config, weights, tiles = self.config, self.weights, self.tiles
        channels, level = config.hidden_size, block.level
        handed, scale = (self.handed[level], weights.scales[level]) if source == UPSAMPLE else (x, weights.slopes)
        self._launch(
            project_heads,
            (-(-3 * channels // 2 // tiles.heads), self._row_tiles()),
            x, handed, scale, self.tokens, made,
            block.attention_norm, block.heads, self.places.rotary[level], self.qkv, self.rows, config.rms_norm_eps,
            C=channels, D=config.head_dim, GROUP=config.group_sizes[0], SOURCE=source,
            WIDE=tiles.wide, BM=tiles.rows, BN=tiles.heads, BK=tiles.inner or _power(channels),
            warps=tiles.heads_warps,
        )  # fmt: skip

    def _linear_project(self, block: BlockWeights, state: torch.Tensor, following: torch.Tensor) -> None:
        channels, tiles = self.config.hidden_size, self.tiles
        self._launch(
            attend_linear_project,
            (self.rows, self.groups, -(-channels // tiles.out)),
            self.qkv, self.weights.slopes, state, following, block.read_norm, block.out, self.partial, self.square,
            C=channels, D=self.config.head_dim, HEADS=tiles.group, BN=tiles.out, warps=tiles.out_warps,
        )  # fmt: skip

    def _linear(self, state: torch.Tensor) -> None:
        heads, tiles = self.config.num_attention_heads, self.tiles
        self._launch(
            attend_linear,
            (self.rows, -(-heads // tiles.group)),
            self.qkv, self.weights.slopes, state, self.attended,
            C=self.config.hidden_size, D=self.config.head_dim, HEADS=tiles.group, warps=1,
        )  # fmt: skip

    def _keys(self, block: BlockWeights, layer: Any) -> None:
        config, tiles = self.config, self.tiles
        splits = tiles.splits[block.level]
        keys, values, *scales = layer.tensors()
        self._launch(
            attend_keys,
            (self.rows, config.num_attention_heads, splits),
            self.qkv, keys, values, *(scales or (keys, values)), self.places.slots[block.level], self.most, self.sums,
            self.attended if splits == 1 else self.read, keys.shape[2], config.head_dim**-0.5 / math.log(2),
            C=config.hidden_size, D=config.head_dim,
            SPLITS=splits, BT=tiles.keys, QUANTIZED=bool(scales), warps=tiles.keys_warps,
        )  # fmt: skip

    def _combine(self, block: BlockWeights) -> None:
        channels, tiles = self.config.hidden_size, self.tiles
        self._launch(
            combine_project,
            (self.rows, self.groups, -(-channels // tiles.out)),
            self.most, self.sums, self.read, block.out, self.partial,
            C=channels, D=self.config.head_dim, HEADS=tiles.group, SPLITS=tiles.splits[block.level], BN=tiles.out,
            warps=tiles.out_warps,
        )  # fmt: skip

    def _hidden(self, block: BlockWeights, x: torch.Tensor, parts: int) -> None:
        channels, tiles, units = self.config.hidden_size, self.tiles, block.down.shape[1]
        self._launch(
            gate_up,
            (-(-units // tiles.hidden), self._row_tiles()),
            x, self.partial, self.square, self.middle, block.mlp_norm, block.gate_up, block.gate_up_bias, self.hidden,
            self.rows, self.config.rms_norm_eps,
            C=channels, I=units, PARTS=parts, NORMALISED=not block.is_full,
            WIDE=tiles.wide, BM=tiles.rows, BN=tiles.hidden, BK=tiles.inner or _power(channels),
            warps=tiles.hidden_warps,
        )  # fmt: skip

    def _project(self, x, norm, w, bias, residual, out, width: int, warps: int) -> None:
        outs, inner = w.shape
        tiles = self.tiles
        width = max(width, 16) if tiles.wide else width
        self._launch(
            project,
            (-(-outs // width), self._row_tiles()),
            x, w if norm is None else norm, w, w if bias is None else bias, out if residual is None else residual, out,
            self.rows, self.config.rms_norm_eps,
            N=outs, K=inner, NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
            WIDE=tiles.wide, BM=tiles.rows, BN=width, BK=tiles.inner or _power(inner), warps=warps,
        )  # fmt: skip
