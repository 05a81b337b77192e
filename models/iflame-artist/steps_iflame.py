"""One token of every row through the network by the kernels: which of them runs when, and on which memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .attention_kernels_iflame import attend_keys, attend_linear, attend_linear_project, combine_project
from .cache_iflame import StaticIFlameCache
from .choosing_iflame import Places
from .kernels_iflame import EMBED, PLAIN, POOL, UPSAMPLE, gate_up, launch, project, project_heads
from .ops_iflame import rotary_tables
from .packing_iflame import BlockWeights, PackedWeights
from .step_memory_iflame import StepMemory

# B rows, C channels, H heads, D head size, I hidden units, V token ids, G groups of heads, S splits of the keys


class Product(NamedTuple):
    """How a product is cut into programs."""

    width: int  # outputs: of query, key and value pairs of channels that turn together, of gate and up units
    warps: int = 4
    rows: int = 1  # at a time
    inner: int = 0  # inputs at a time; 0: all
    stages: int = 2  # of them on their way


class Tiles(NamedTuple):
    """How work is cut into programs."""

    wide: bool  # many rows are multiplied in tiles
    heads: Product  # query, key and value
    hidden: Product  # gate and up
    down: Product
    out: Product  # attention's projection
    group: int  # heads of a program of linear attention
    splits: tuple[int, int, int]  # of the keys of each level: two or more if not wide, else one
    lanes: int = 64  # keys side by side
    turns: int = 1  # keys of a lane at a time
    keys_warps: int = 2


HOPPER_SHARED_MEMORY = 227 * 1024  # bytes that a program may take
NARROW_ROWS = 16  # with up to so many, each is multiplied by itself


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)


def _power(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def choose_tiles(rows: int, heads: int, quantized: bool = False, small: bool = False) -> Tiles:
    """
    Tiles for so many rows and heads.

    Args:
        quantized: keys and values are in int8.
        small: for float32, which takes twice the memory of a multiprocessor, and for GPUs that have less than Hopper.
    """
    group = min(4, _power(heads))
    if rows <= NARROW_ROWS:
        products = Product(4, 1), Product(4, 1), Product(4), Product(16, 2)
        lanes, turns = (64, 1) if quantized else (32, 2)
        return Tiles(False, *products, group, (64, 32, 16), lanes, turns)
    if small:
        return Tiles(True, *[Product(width, 4, 32, 64, 2) for width in (32, 32, 16, 16)], 1, (1, 1, 1))
    if rows <= 128:
        qkv, hidden = Product(32, 2, 16, 128, 3), Product(64, 2, 16, 128, 3)
        down, out = Product(16, 4, 64, 128, 4), Product(16, 2, 16, 256, 3)
        return Tiles(True, qkv, hidden, down, out, group, (1, 1, 1))
    qkv, hidden = Product(32, 4, 64, 64, 4), Product(128, 4, 64, 64, 3)
    down, out = Product(32, 4, 64, 128, 4), Product(64, 4, 64, 64, 4)
    return Tiles(True, qkv, hidden, down, out, 1, (1, 1, 1))


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
        small = dtype == torch.float32 or _shared_memory(device) < HOPPER_SHARED_MEMORY
        quantized = cache.kv_cache_dtype is not None
        self.tiles = tiles or choose_tiles(self.rows, config.num_attention_heads, quantized, small)
        # Of the head, which has few outputs.
        self.head = self.tiles.down._replace(width=16) if self.tiles.wide else Product(4)
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
        self._project(self.x[0], None, self.weights.head, self.weights.head_bias, None, self.logits, self.head)

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
            self._project(self.attended, block.read_norm, block.out, None, residual, middle, tiles.out)
        self._hidden(block, middle if not parts else residual, parts)
        self._project(self.hidden, None, block.down, block.down_bias, middle, out, tiles.down)

    # One method a kernel: its grid, sizes and arguments.

    def _launch(
        self, kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, stages: int = 2, **sizes: Any
    ) -> None:
        self.phases += 1
        launched = {"launch_pdl": True} if self.pdl else {}
        launch(kernel, grid, *arguments, **sizes, PDL=self.pdl, num_warps=warps, num_stages=stages, **launched)

    def _launch_product(
        self, kernel: Any, tile: Product, weight: torch.Tensor, outputs: int, *arguments: Any, **sizes: Any
    ) -> None:
        inputs = weight.shape[-1]
        self._launch(
            kernel,
            (-(-outputs // tile.width), -(-self.rows // tile.rows)),
            *arguments, WIDE=self.tiles.wide, BM=tile.rows, BN=tile.width, BK=tile.inner or _power(inputs), **sizes,
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip

    def _heads(self, block: BlockWeights, x: torch.Tensor, made: torch.Tensor, source: str) -> None:
        config, weights = self.config, self.weights
        channels, level = config.hidden_size, block.level
        handed, scale = (self.handed[level], weights.scales[level]) if source == UPSAMPLE else (x, weights.slopes)
        self._launch_product(
            project_heads, self.tiles.heads, block.heads, 3 * channels // 2,
            x, handed, scale, self.tokens, made,
            block.attention_norm, block.heads, self.places.rotary[level], self.qkv,
            self.rows, config.rms_norm_eps, C=channels, D=config.head_dim, GROUP=config.group_sizes[0], SOURCE=source,
        )  # fmt: skip

    def _linear_project(self, block: BlockWeights, state: torch.Tensor, following: torch.Tensor) -> None:
        channels, tiles = self.config.hidden_size, self.tiles
        self._launch(
            attend_linear_project,
            (self.rows, self.groups, -(-channels // tiles.out.width)),
            self.qkv, self.weights.slopes, state, following, block.read_norm, block.out, self.partial,
            self.square, C=channels, D=self.config.head_dim, HEADS=tiles.group, BN=tiles.out.width,
            warps=tiles.out.warps,
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
            self.qkv, keys, values, *(scales or [keys]), self.places.slots[block.level], self.most, self.sums,
            self.attended if splits == 1 else self.read, keys.shape[2], config.head_dim**-0.5 / math.log(2),
            C=config.hidden_size, D=config.head_dim,
            SPLITS=splits, LANES=tiles.lanes, TURNS=tiles.turns, QUANTIZED=bool(scales), warps=tiles.keys_warps,
        )  # fmt: skip

    def _combine(self, block: BlockWeights) -> None:
        channels, tiles = self.config.hidden_size, self.tiles
        self._launch(
            combine_project,
            (self.rows, self.groups, -(-channels // tiles.out.width)),
            self.most, self.sums, self.read, block.out, self.partial,
            C=channels, D=self.config.head_dim, HEADS=tiles.group, SPLITS=tiles.splits[block.level],
            BN=tiles.out.width, warps=tiles.out.warps,
        )  # fmt: skip

    def _hidden(self, block: BlockWeights, x: torch.Tensor, parts: int) -> None:
        channels, units = self.config.hidden_size, block.down.shape[1]
        self._launch_product(
            gate_up, self.tiles.hidden, block.gate_up, units,
            x, self.partial, self.square, self.middle, block.mlp_norm, block.gate_up, block.gate_up_bias,
            self.hidden, self.rows, self.config.rms_norm_eps,
            C=channels, I=units, PARTS=parts, NORMALISED=not block.is_full,
        )  # fmt: skip

    def _project(self, x, norm, weight: torch.Tensor, bias, residual, out, tile: Product) -> None:
        outs, inner = weight.shape
        self._launch_product(
            project, tile, weight, outs,
            x, weight if norm is None else norm, weight, weight if bias is None else bias,
            out if residual is None else residual, out, self.rows, self.config.rms_norm_eps,
            N=outs, K=inner, NORM=norm is not None, BIAS=bias is not None, RESIDUAL=residual is not None,
        )  # fmt: skip
