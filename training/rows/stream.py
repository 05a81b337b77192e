"""
Training rows of a data set that is larger than the disk, read with `datasets` in streaming mode.

A data set is read by row groups of its parquet files, which `IterableDataset.reshard` makes shards of. Every epoch
shuffles the row groups and deals them into blocks of a few; a block is read whole, its meshes are encoded, shuffled
and packed, and its rows follow one another. What a block holds is a function of the seed and its number, and blocks
are numbered on from epoch to epoch. So process r of W takes the blocks r, r + W, r + 2 W, ... and its workers take
these by turns:

- each mesh is in exactly one row of an epoch, for any number of processes and workers, whether or not the numbers of
  row groups, blocks, processes and workers divide each other;
- no process reads what another one learns from, and none waits at the end of an epoch;
- a place in the data is a block and a row in it, and going on from there costs reading that block again.

The buffer of `IterableDataset.shuffle` would make the last point false (its content is not part of `state_dict`), and
a common order of rows over all processes, as for memory-mapped data, the second one. The price: one process may be
in the next epoch while another still finishes the one before, and the number of rows of an epoch is not known before
it has been read.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import pyarrow
from fsspec.core import has_magic

from training.rows.conditions import NO_CONDITIONS, Conditions
from training.rows.encode import MeshEncoder, MeshTable
from training.rows.load import Batch, Place, TrainingRows, batch_inputs, in_workers
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE, PackedRows, count_faces, pack, plan_rows

# Meshes that are made arrays of at once, and the most that a row group may hold: it is in memory while it is packed.
MESHES_AT_ONCE = 1000
MOST_MESHES = 100_000


def open_stream(sources: Sequence[str], with_category: bool = False) -> datasets.IterableDataset:
    """
    The columns `vertices`, `faces` and, where there are such, `name` and, if asked for, `category` of a data set, a
    shard for every row group.

    Args:
        sources: parquet files, patterns of such, hf://datasets/user/name/... among them; or one folder or name of a
            data set on the Hub, whose split `train` is taken.

    Raises:
        ValueError: there is no such data set, it is not kept as parquet, or a column is missing.
    """
    names = set(_load(sources).features or ())
    missing = {"vertices", "faces"} - names
    if missing:
        raise ValueError(f"{', '.join(sources)} has no column {' and no column '.join(sorted(missing))}")
    optional = ("name", "category") if with_category else ("name",)
    columns = ["vertices", "faces", *(name for name in optional if name in names)]
    stream = _load(sources, columns=columns, batch_size=MESHES_AT_ONCE)  # by default a row group, which may be empty
    try:
        return stream.reshard()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{', '.join(sources)} cannot be streamed as parquet: {error}") from error


def read_categories(sources: Sequence[str], most: int | None = None) -> list[str | None]:
    """
    The category of every mesh of a data set, see `open_stream`, or of the first so many; nothing else of it is read.
    None where it is not known.

    Raises:
        ValueError: there is no such data set, or it has no column `category`.
    """
    if "category" not in (_load(sources).features or ()):
        raise ValueError(f"{', '.join(sources)} has no column category, which --condition_on category needs")
    return [None if value is None else str(value) for value in _column(sources, "category", most)]


def read_num_faces(sources: Sequence[str], most: int | None = None) -> list[int]:
    """
    The number of faces of every mesh of a data set, or of the first so many, by its column `num_faces_q` or
    `num_faces`; without such a column, nothing.

    Raises:
        ValueError: there is no such data set.
    """
    names = set(_load(sources).features or ())
    column = next((name for name in ("num_faces_q", "num_faces") if name in names), None)
    return [] if column is None else [int(value) for value in _column(sources, column, most) if value]


def _column(sources: Sequence[str], name: str, most: int | None) -> list[Any]:
    stream = _load(sources, columns=[name], batch_size=MESHES_AT_ONCE).with_format("arrow")
    values: list[Any] = []
    try:
        for table in (stream if most is None else stream.take(most)).iter(MESHES_AT_ONCE):
            values += table[name].to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(f"the column {name} of {', '.join(sources)} cannot be read: {error}") from error
    return values


def _load(sources: Sequence[str], **options: Any) -> datasets.IterableDataset:
    if len(sources) == 1 and not (sources[0].endswith(".parquet") or "://" in sources[0] or has_magic(sources[0])):
        where = {"path": sources[0]}
    else:
        where = {"path": "parquet", "data_files": list(sources)}
    try:
        return datasets.load_dataset(**where, split="train", streaming=True, **options)
    except (OSError, ValueError) as error:  # of which pyarrow's and the Hub's errors are kinds
        raise ValueError(f"{', '.join(sources)} cannot be streamed as parquet: {error}") from error


class StreamedRows(TrainingRows):
    """
    Training rows of a stream; a place is a block and a row in it, each process has its own.

    Args:
        stream: shards with the columns `vertices`, `faces` and perhaps `name` and `category`.
        long_meshes: what becomes of a mesh that is longer than a row: "error", "crop" or "drop".
        shards_in_block: how many shards are shuffled and packed together.
        label: what else tells this data set from others.
        conditions: what is known of each mesh in its row.
    """

    rows_in_epoch = None

    def __init__(
        self,
        stream: datasets.IterableDataset,
        encode: MeshEncoder,
        long_meshes: str = "error",
        shards_in_block: int = 8,
        label: str = "",
        conditions: Conditions = NO_CONDITIONS,
    ):
        self.stream = stream.with_format("arrow")
        self.encode = encode
        self.long_meshes = long_meshes
        self.label = label
        self.conditions = conditions
        self.knows_categories = bool(conditions.categories) and "category" in (stream.column_names or ())
        self.blocks_in_epoch = -(-stream.num_shards // shards_in_block)

    def read_block(self, block: int) -> PackedRows:
        """The rows of a block. Raises ValueError for a mesh that is not allowed."""
        epoch, number = divmod(block, self.blocks_in_epoch)
        seed, length = self.encode.seed, self.encode.row_length
        shards = np.random.default_rng((seed, epoch)).permutation(self.stream.num_shards)
        shards = np.array_split(shards, self.blocks_in_epoch)[number]
        meshes = [mesh for shard in shards.tolist() for mesh in self._read_shard(epoch, shard)]
        sizes = np.array([len(ids) // TOKENS_PER_FACE for ids, _ in meshes], dtype=np.int64)
        rows = (
            []
            if len(sizes) == 0
            else plan_rows(sizes, length // TOKENS_PER_FACE, np.random.default_rng((seed, epoch, number)))
        )
        return pack(
            [[meshes[index][0] for index in row] for row in rows],
            length,
            self.encode.tokenizer,
            self.conditions.columns(meshes[index][1] for row in rows for index in row),
            dtype=self.encode.id_type,
        )

    def _read_shard(self, epoch: int, shard: int) -> Iterator[tuple[np.ndarray, dict[str, int]]]:
        """Token ids of the meshes of a shard, and what the model is told of each."""
        index = 0
        for table in self.stream.shard(self.stream.num_shards, shard).iter(MESHES_AT_ONCE):
            meshes = MeshTable(table)
            categories = table["category"].to_pylist() if self.knows_categories else [None] * len(meshes)
            too_long = meshes.num_faces + EXTRA_FACES > self.encode.row_length // TOKENS_PER_FACE
            for row in range(len(meshes)):
                if not too_long[row] or self.long_meshes == "crop":
                    try:
                        ids = self.encode(meshes[row], epoch, shard, index + row).astype(self.encode.id_type)
                    except ValueError as error:
                        warnings.warn(f"{_describe(table, shard, row)} is left out: {error}", stacklevel=1)
                        continue
                    faces = count_faces(ids, self.encode.tokenizer)
                    category = self.conditions.index(categories[row])
                    yield ids, self.conditions.of_mesh(category, faces, epoch, shard, index + row)
                elif self.long_meshes == "error":
                    faces = int(meshes.num_faces[row])
                    raise ValueError(
                        f"{_describe(table, shard, row)} has {faces} faces as triangles and is longer than a row of "
                        f"{self.encode.row_length} tokens: give --row_length {TOKENS_PER_FACE * (faces + EXTRA_FACES)}"
                        ", or --long_meshes crop or --long_meshes drop"
                    )
            index += len(meshes)
            if index > MOST_MESHES:
                raise ValueError(
                    f"row group {shard} has more than {MOST_MESHES:,} meshes and cannot be shuffled in memory: write "
                    "the parquet files with smaller row groups, as training.prepare_data does"
                )

    def batches(
        self,
        places: list[Place],
        size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Batch, Place]]:
        """
        See TrainingRows. With another number of processes than the places are of, they go on with the first block
        that none had begun, and what was left of the begun ones is skipped, with a warning.
        """
        rows = self._rows(*self._start(places, rank, world_size), world_size, num_workers)
        while True:
            taken, following = zip(*islice(rows, size), strict=True)
            yield batch_inputs(PackedRows.joined(taken), self.encode.tokenizer, pin_memory), following[-1]

    def _start(self, places: list[Place], rank: int, world_size: int) -> Place:
        if not places:
            return [rank, 0]
        if len(places) == world_size:
            return places[rank]
        block = max(block for block, _ in places) + 1
        if rank == 0:
            warnings.warn(
                f"{len(places)} processes were reading the data and {world_size} go on: the rest of the blocks that "
                f"were being read is skipped, up to block {block} ({block / self.blocks_in_epoch:.2f} epochs)",
                stacklevel=1,
            )
        return [block + rank, 0]

    def _rows(self, block: int, row: int, step: int, num_workers: int) -> Iterator[tuple[PackedRows, Place]]:
        """A process's rows from a place on, one by one, with the place after each."""
        empty = 0
        blocks = in_workers(self.read_block, count(block, step), num_workers)
        for number, rows in zip(count(block, step), blocks, strict=False):
            for index in range(row, len(rows.ids)):
                yield rows[index : index + 1], [number, index + 1]
            row, empty = 0, 0 if len(rows.ids) else empty + 1
            if empty == self.blocks_in_epoch:
                raise ValueError("there is no mesh in the stream that a row can hold")

    def epochs(self, place: Place) -> float:
        return place[0] / self.blocks_in_epoch

    def describe(self) -> str:
        return f"{self.stream.num_shards:,} row groups in {self.blocks_in_epoch:,} blocks, streamed in rows"

    def digest(self) -> str:
        settings = (
            self.label,
            self.stream.num_shards,
            self.blocks_in_epoch,
            self.encode.row_length,
            self.encode.seed,
            self.long_meshes,
            *filter(None, [self.conditions.content()]),
        )
        return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def stream_rows(
    sources: Sequence[str],
    encode: MeshEncoder,
    long_meshes: str,
    shards_in_block: int,
    conditions: Conditions = NO_CONDITIONS,
) -> StreamedRows:
    """The training rows of `open_stream(sources)`; known again by the names of the files, wherever they lie."""
    label = " ".join(os.path.basename(source) for source in sources)
    stream = open_stream(sources, with_category=bool(conditions.categories))
    return StreamedRows(stream, encode, long_meshes, shards_in_block, label, conditions)


def _describe(table: pyarrow.Table, shard: int, row: int) -> str:
    if "name" in table.column_names:
        return f"{table['name'][row].as_py()}, mesh {row} of row group {shard},"
    return f"mesh {row} of row group {shard}"
