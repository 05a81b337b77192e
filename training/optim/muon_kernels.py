"""
What stands before and after the products of Muon's step, in Triton, for all matrices of one shape at once: momentum
and updates, their division by their norms, and the step of the parameters.

Each reads and writes what it must once and computes in float32. The matrices lie anywhere; a table on the device says
where, so that a CUDA graph can read them. Squares are added up tile by tile, then the tiles: results are the same in
every run. A step that is left out writes neither momentum nor parameters, whatever its gradients are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from iflame_hf.block_kernels_iflame import blocks
from iflame_hf.kernels_iflame import jit, launch, why_no_kernels

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

# N matrices of R rows and C columns, (r, c) as they are multiplied: the longer side is c, and then columns of zeros

# Of the columns of matrices in products on a GPU.
MULTIPLE = 16
TILE = 64
# What a program divides, and the sums of squares that it reads at once.
PIECE = 4096
SUMS = 256
# Bytes at which a matrix must begin for its elements to be read four at a time.
ALIGNMENT = 16


class Table(NamedTuple):
    """Where N matrices of one shape lie, and what belongs to them."""

    places: torch.Tensor  # (3, N) int64: of parameters, gradients, momentum
    shape: torch.Size
    is_aligned: bool


class Tables:
    """Tables are made once for the same places, and then lie on the device."""

    def __init__(self):
        self._tables: dict[int, tuple[tuple[int, ...], Table]] = {}
        self._captured: list[Table] = []  # which graphs read

    def of(
        self,
        parameters: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor],
        buffers: Sequence[torch.Tensor],
    ) -> Table | None:
        """The table of matrices of one shape; None where a CUDA graph is captured and there is none yet."""
        places = tuple(x.data_ptr() for x in (*parameters, *gradients, *buffers))
        like = parameters[0]
        is_captured = like.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        known, table = self._tables.get(places[0], (None, None))
        if known != places or table.shape != like.shape:
            if is_captured:
                return None
            on_host = torch.tensor(places, dtype=torch.int64).view(3, -1)
            if like.device.type == "cuda":
                on_host = on_host.pin_memory()
            is_aligned = like.shape[1] % 4 == 0 and all(place % ALIGNMENT == 0 for place in places)
            table = Table(on_host.to(like.device, non_blocking=True), like.shape, is_aligned)
            self._tables[places[0]] = places, table
        if is_captured:
            self._captured.append(table)
        return table


def has_muon_kernels(*matrices: Sequence[torch.Tensor]) -> bool:
    """Whether the step of such parameters, gradients and momentum is computed here."""
    device = matrices[0][0].device
    if device.type != "cuda" or why_no_kernels() is not None:
        return False
    return all(
        x.device == device and x.dtype == torch.float32 and not isinstance(x, DTensor) and x.is_contiguous()
        for each in matrices
        for x in each
    )


_jit = jit("count", "tiles")


@_jit
def _add(x, y):
    return x + y


@_jit
def _parts(count, size):
    return (count + size - 1) // size


@_jit
def _lerp(x, y, weight):
    """As torch's."""
    return tl.where(weight < 0.5, x + weight * (y - x), y - (y - x) * (1 - weight))


@_jit
def _tile(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """The matrix of a program, and the rows (BM, 1) and columns (1, BN) of its tile."""
    across = _parts(columns, BN)
    count = _parts(rows, BM) * across
    place = tl.program_id(0) % count
    row = (place // across).to(tl.int64) * BM + tl.arange(0, BM)
    column = (place % across).to(tl.int64) * BN + tl.arange(0, BN)
    return tl.program_id(0) // count, row[:, None], column[None, :]


@_jit
def _elements(table_ptr, at, ALIGNED: tl.constexpr):
    """Pointers to elements of the matrix that an entry of the table speaks of."""
    pointers = tl.load(table_ptr).to(tl.pointer_type(tl.float32)) + at
    if ALIGNED:
        pointers = tl.multiple_of(pointers, [16, 16])
    return pointers


@_jit
def _taken(found_ptr, rows):
    """How many rows a step writes: none where it is left out."""
    return tl.where(tl.load(found_ptr) == 0, rows, 0)


@_jit
def move_momentum(
    table_ptr,  # (3, N) int64
    found_ptr,  # (): not 0 where the step is left out, if LEAVES_OUT
    x_ptr,  # (N, r, c) bfloat16: receives the updates
    square_ptr,  # (N, tiles) float32: receives the sums of their squares
    momentum,
    share,  # one less momentum
    count,  # N
    rows,
    columns,
    padded,  # c
    NESTEROV: tl.constexpr,
    LEAVES_OUT: tl.constexpr,
    TALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Momentum moves towards the gradients; what comes of both lies as it is multiplied."""
    to_rows = padded if TALL else rows
    to_columns = columns if TALL else padded
    matrix, row, column = _tile(to_rows, to_columns, BM, BN)
    live = (row < rows) & (column < columns)
    at = row * columns + column
    buffers = _elements(table_ptr + 2 * count + matrix, at, ALIGNED)
    grad = tl.load(_elements(table_ptr + count + matrix, at, ALIGNED), mask=live, other=0.0)
    buffer = _lerp(tl.load(buffers, mask=live, other=0.0), grad, share)
    if LEAVES_OUT:
        live = live & (row < _taken(found_ptr, rows))
    tl.store(buffers, buffer, mask=live)
    update = buffer
    if NESTEROV:
        update = _lerp(grad, buffer, momentum)
    x = update.to(tl.bfloat16)
    square = x.to(tl.float32) * x.to(tl.float32)
    tl.store(square_ptr + tl.program_id(0), tl.reduce(tl.reduce(square, 1, _add), 0, _add))
    x_ptr += matrix.to(tl.int64) * to_rows * to_columns
    kept = (row < to_rows) & (column < to_columns)
    if TALL:
        tl.store(x_ptr + tl.trans(column) * padded + tl.trans(row), tl.trans(x), mask=tl.trans(kept))
    else:
        tl.store(x_ptr + row * padded + column, x, mask=kept)


@_jit
def divide_by_norms(
    x_ptr,  # (N, size) bfloat16
    square_ptr,  # (N, tiles) float32
    eps,
    tiles,
    size,
    BT: tl.constexpr,
    BN: tl.constexpr,
):
    pieces = _parts(size, BN)
    matrix = (tl.program_id(0) // pieces).to(tl.int64)
    at = (tl.program_id(0) % pieces).to(tl.int64) * BN + tl.arange(0, BN)
    x = tl.load(x_ptr + matrix * size + at, mask=at < size, other=0.0).to(tl.float32)
    square = tl.full((BT,), 0.0, tl.float32)
    for first in range(0, tiles, BT):
        tile = first + tl.arange(0, BT)
        square += tl.load(square_ptr + matrix * tiles + tile, mask=tile < tiles, other=0.0)
    norm = tl.sqrt(tl.reduce(square, 0, _add))
    x /= tl.where(norm < eps, eps, norm)  # what is not a number stays so
    tl.store(x_ptr + matrix * size + at, x.to(tl.bfloat16), mask=at < size)


@_jit
def move_parameters(
    table_ptr,  # (3, N) int64
    found_ptr,  # (): not 0 where the step is left out, if LEAVES_OUT
    x_ptr,  # (N, r, c) bfloat16
    rate,  # the learning rate, or where it lies, if RATE_LIES
    weight_decay,
    ratio,
    rows,
    columns,
    padded,  # c
    LEAVES_OUT: tl.constexpr,
    RATE_LIES: tl.constexpr,
    TALL: tl.constexpr,
    ALIGNED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Parameters decay and take their step, of updates that lie as they were multiplied."""
    matrix, row, column = _tile(rows, columns, BM, BN)
    live = (row < rows) & (column < columns)
    parameters = _elements(table_ptr + matrix, row * columns + column, ALIGNED)
    parameter = tl.load(parameters, mask=live, other=0.0)
    if TALL:
        x_ptr += matrix.to(tl.int64) * columns * padded
        kept = tl.trans((row < padded) & (column < columns))
        x = tl.trans(tl.load(x_ptr + tl.trans(column) * padded + tl.trans(row), mask=kept, other=0.0))
    else:
        x_ptr += matrix.to(tl.int64) * rows * padded
        kept = (row < rows) & (column < padded)
        x = tl.load(x_ptr + row * padded + column, mask=kept, other=0.0)
    if RATE_LIES:
        rate = tl.load(rate).to(tl.float32)
    parameter = parameter * (1 - rate * weight_decay) - rate * ratio * x.to(tl.float32)
    if LEAVES_OUT:
        live = live & (row < _taken(found_ptr, rows))
    tl.store(parameters, parameter, mask=live)


def move_momenta(
    table: Table, momentum: float, nesterov: bool, eps: float, found_inf: torch.Tensor | None
) -> torch.Tensor:
    """
    Moves momentum towards the gradients.

    Returns:
        (N, r, c) bfloat16: the updates divided by their norms, tall ones transposed, with columns of zeros up to a
        multiple of MULTIPLE
    """
    count, (rows, columns) = table.places.shape[1], table.shape
    tall = rows > columns
    short, long = min(rows, columns), max(rows, columns)
    padded = blocks(long, MULTIPLE) * MULTIPLE
    tiles = blocks(short, TILE) * blocks(padded, TILE)
    x = torch.empty(count, short, padded, dtype=torch.bfloat16, device=table.places.device)
    squares = torch.empty(count, tiles, dtype=torch.float32, device=table.places.device)
    with torch.cuda.device_of(x):
        launch(
            move_momentum, (count * tiles,), table.places, found_inf, x, squares,
            float(momentum), float(1 - momentum), count, rows, columns, padded,
            NESTEROV=bool(nesterov), LEAVES_OUT=found_inf is not None, TALL=tall, ALIGNED=table.is_aligned,
            BM=TILE, BN=TILE, num_warps=4,
        )  # fmt: skip
        size = short * padded
        launch(
            divide_by_norms, (count * blocks(size, PIECE),), x, squares, float(eps), tiles, size,
            BT=SUMS, BN=PIECE, num_warps=4,
        )  # fmt: skip
    return x


def step_parameters(
    table: Table,
    x: torch.Tensor,
    lr: float | torch.Tensor,
    weight_decay: float,
    ratio: float,
    found_inf: torch.Tensor | None,
) -> None:
    """Moves parameters by orthogonal updates that lie as `move_momenta` gives them."""
    count, (rows, columns) = table.places.shape[1], table.shape
    if isinstance(lr, torch.Tensor) and lr.device != x.device:
        lr = lr.item()  # of a CPU
    on_device = isinstance(lr, torch.Tensor)
    with torch.cuda.device_of(x):
        launch(
            move_parameters, (count * blocks(rows, TILE) * blocks(columns, TILE),), table.places, found_inf, x,
            lr if on_device else float(lr), float(weight_decay), float(ratio), rows, columns, x.shape[2],
            LEAVES_OUT=found_inf is not None, RATE_LIES=on_device, TALL=rows > columns, ALIGNED=table.is_aligned,
            BM=TILE, BN=TILE, num_warps=4,
        )  # fmt: skip
