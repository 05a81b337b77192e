"""Rows of meshes for training and evaluation: how they vary from epoch to epoch, and their order.

Everything random is a function of the seed, the epoch and the mesh, so that neither the number of worker processes nor
of devices changes what is learnt, and a place in the data is two numbers: an epoch and a row.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator

from iflame_hf.tokenization_iflame import IFlameTokenizer
from training.arguments import Arguments
from training.rows.balance import Balance
from training.rows.conditions import NO_CONDITIONS, UNKNOWN, Conditions
from training.rows.encode import MeshEncoder
from training.rows.load import Batch, Place, TrainingRows, batch_inputs, in_workers
from training.rows.meshes import Meshes, ParquetMeshes, generated_meshes
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE, PackedRows, best_fit, count_faces, pack, plan_rows
from training.rows.stream import stream_rows

# Meshes that are read together in search of a usable one.
MESHES_AT_ONCE = 256
# What a worker sends at once: so many rows cost little more than one.
ROWS_IN_MESSAGE = 32
# Another number when the same seed comes to mean other rows: checkpoints from before are then refused.
ORDER = 2


class RowKey(NamedTuple):
    """
    All that a row is made from. A draw is a mesh's index, plus the number of meshes for every time that the mesh was
    drawn in the same epoch before.
    """

    epoch: int
    draws: np.ndarray


class EncodedMesh(NamedTuple):
    index: int
    ids: np.ndarray  # (tokens,)
    told: dict[str, int]  # what the model is told of it


class MeshRows:
    """
    Packed rows by their keys, for training and evaluation. Of each mesh is known what the conditions are.

    A mesh that turns out to be unusable, for example flat to a point once it is quantised, is left out with a warning.

    Args:
        grouped: also known is `group`, an index into the names of the meshes' categories, which need not be those of
            the model.
    """

    def __init__(
        self,
        meshes: Meshes,
        tokenizer: IFlameTokenizer,
        row_length: int,
        seed: int = 0,
        scale: float = 0.0,
        shift: bool = False,
        turn: str = "none",
        mirror: bool = False,
        conditions: Conditions = NO_CONDITIONS,
        grouped: bool = False,
    ):
        self.meshes = meshes
        self.conditions = conditions
        self.grouped = grouped
        self.categories = model_categories(meshes, conditions)
        self.tokenizer = tokenizer
        self.row_length = row_length
        self.encode = MeshEncoder(tokenizer, row_length, seed, scale, shift, turn, mirror)

    def pack(self, keys: Sequence[RowKey]) -> PackedRows:
        """The rows of N keys, in the order of these."""
        found = self._sequences(keys)
        known = self.conditions.columns(mesh.told for of_row in found for mesh in of_row)
        if self.grouped:
            known["group"] = [self.meshes.categories[mesh.index] for of_row in found for mesh in of_row]
        sequences = [[mesh.ids for mesh in of_row] for of_row in found]
        return pack(sequences, self.row_length, self.tokenizer, known, self.encode.id_type)

    def batch(self, keys: Sequence[RowKey]) -> Batch:
        """The model's inputs for the rows of N keys."""
        return batch_inputs(self.pack(keys), self.tokenizer)

    def told(self) -> bytes:
        """Changes with what a model is told of the meshes; empty if that is nothing."""
        content = self.conditions.content()
        return content + self.categories.astype(np.int64).tobytes() if content else content

    def _sequences(self, keys: Sequence[RowKey]) -> list[list[EncodedMesh]]:
        """The meshes of every row."""
        draws = [key.draws.tolist() for key in keys]
        indices = [draw % len(self.meshes.num_faces) for draw in chain.from_iterable(draws)]
        meshes, done, rows = self.meshes.read(indices), 0, []
        for key, of_row in zip(keys, draws, strict=True):
            rows.append([])
            for draw in of_row:
                index, number, done = indices[done], done, done + 1
                try:
                    ids = self.encode(meshes[number], key.epoch, draw)
                except ValueError as error:
                    warnings.warn(f"{self.meshes.describe(index)} is left out: {error}", stacklevel=1)
                    continue
                faces = count_faces(ids, self.tokenizer)
                told = self.conditions.of_mesh(int(self.categories[index]), faces, key.epoch, draw)
                rows[-1].append(EncodedMesh(index, ids, told))
        return rows


def model_categories(meshes: Meshes, conditions: Conditions) -> np.ndarray:
    """The category (N,) of each mesh by its place among those of the model; UNKNOWN if it is none of them."""
    if not conditions.categories:
        return np.full(len(meshes.num_faces), UNKNOWN)
    places = np.array([conditions.index(name) for name in meshes.category_names])
    return np.where(meshes.has_category, places[meshes.categories], UNKNOWN)


def mesh_sizes(meshes: Meshes, row_length: int, long_meshes: str) -> tuple[np.ndarray, np.ndarray]:
    """
    The largest number of faces (N,) each mesh can take in a row, and the indices (M,) of the meshes to use.

    Sizes are those before quantisation, which can only merge faces: rows are planned without reading a mesh.

    Raises:
        ValueError: a mesh is longer than a row and `long_meshes` is "error", or no mesh is left.
    """
    sizes, capacity = meshes.num_faces + EXTRA_FACES, row_length // TOKENS_PER_FACE
    too_long = sizes > capacity
    if too_long.any() and long_meshes == "error":
        longest = int(sizes.argmax())
        raise ValueError(
            f"{too_long.sum()} of {len(sizes)} meshes are longer than a row of {row_length} tokens; the longest, "
            f"{meshes.describe(longest)}, has {meshes.num_faces[longest]} faces as triangles: give --row_length "
            f"{TOKENS_PER_FACE * sizes[longest]}, or --long_meshes crop or --long_meshes drop"
        )
    used = np.flatnonzero(~too_long) if long_meshes == "drop" else np.arange(len(sizes))
    if len(used) == 0:
        raise ValueError(f"every mesh is longer than a row of {row_length} tokens: give a larger --row_length")
    return np.minimum(sizes, capacity), used


def require_usable(rows: MeshRows, used: np.ndarray, option: str, files: Sequence[str]) -> None:
    """
    Raises ValueError, with the reason of the first, if not one of the meshes to use becomes tokens; reads no further
    than to the first that does.

    Args:
        used: (M,) their indices.
        option: of the command line, by which the files were given.
    """
    reason = ""
    for first in range(0, len(used), MESHES_AT_ONCE):
        indices = used[first : first + MESHES_AT_ONCE].tolist()
        meshes = rows.meshes.read(indices)
        for number, index in enumerate(indices):
            try:
                rows.encode(meshes[number], 0, index)
                return
            except ValueError as error:
                reason = reason or f"{rows.meshes.describe(index)}: {error}"
    named = f"{option} {' '.join(files[:3])}{' ...' if len(files) > 3 else ''}"
    raise ValueError(f"not one of the {len(used):,} meshes of {named} can be used: {reason}")


class RowStream:
    """
    The endless stream of training rows: one epoch after the other, each in its own random order and company.

    Args:
        sizes: (N,) faces of every mesh in a row.
        used: (M,) indices of the meshes to use.
        capacity: faces of a row.
        balance: how often each mesh is drawn, if an epoch's M meshes are to be drawn with replacement; otherwise an
            epoch is every mesh once.
    """

    def __init__(self, sizes: np.ndarray, used: np.ndarray, capacity: int, seed: int, balance: Balance | None = None):
        self.sizes = sizes
        self.used = used
        self.capacity = capacity
        self.seed = seed
        self.balance = balance
        self.weights = None if balance is None else balance.weights(used)
        self.rows_of = lru_cache(maxsize=2)(self._rows_of)

    def _rows_of(self, epoch: int) -> list[np.ndarray]:
        """The draws of every row of an epoch."""
        rng = np.random.default_rng((self.seed, epoch))
        draws = self.used
        if self.weights is not None:
            draws = np.sort(rng.choice(self.used, size=len(self.used), p=self.weights))
            draws = draws + len(self.sizes) * (np.arange(len(draws)) - np.searchsorted(draws, draws))
        rows = plan_rows(self.sizes[draws % len(self.sizes)], self.capacity, rng)
        return [draws[row] for row in rows]

    def advance(self, epoch: int, row: int, count: int) -> tuple[int, int]:
        """The place `count` rows after row `row` of `epoch`."""
        row += count
        while row >= len(self.rows_of(epoch)):
            row -= len(self.rows_of(epoch))
            epoch += 1
        return epoch, row

    def batches(self, epoch: int, row: int, size: int, rank: int = 0, world_size: int = 1) -> Iterator[list[RowKey]]:
        """From that place on, without end: every `world_size` batches of `size` rows, the one of `rank`."""
        position = self.advance(epoch, row, rank * size)
        while True:
            batch = []
            for _ in range(size):
                batch.append(RowKey(position[0], self.rows_of(position[0])[position[1]]))
                position = self.advance(*position, 1)
            yield batch
            position = self.advance(*position, (world_size - 1) * size)

    def digest(self) -> str:
        """Changes with the meshes, their order, how often each is drawn, or the length of rows: what a place in the
        data depends on."""
        content = hashlib.sha256(repr((ORDER, self.capacity, self.seed, self.weights is not None)).encode())
        for array in (self.sizes, self.used):
            content.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        if self.balance is not None:
            content.update(self.balance.content())
        return content.hexdigest()[:16]


def evaluation_batches(
    sizes: np.ndarray, used: np.ndarray, capacity: int, size: int, rank: int = 0, world_size: int = 1
) -> list[list[RowKey]]:
    """
    Every mesh once in tightly packed rows, as batches of `size` rows; all ranks get the same number of batches, the
    last filled up with empty rows.
    """
    order = used[np.argsort(-sizes[used], kind="stable")]
    keys = [RowKey(0, order[row]) for row in best_fit(sizes[order].tolist(), capacity)]
    keys += [RowKey(0, order[:0])] * (-len(keys) % (size * world_size))
    batches = [keys[first : first + size] for first in range(0, len(keys), size)]
    return batches[rank::world_size]


class MappedRows(TrainingRows):
    """
    Training rows of meshes that can be had in any order. A place, an epoch and a row in it, is the same for all
    processes: they take their batches by turns.
    """

    def __init__(self, rows: MeshRows, stream: RowStream):
        self.rows = rows
        self.stream = stream
        self.rows_in_epoch = len(stream.rows_of(0))
        self.knows_categories = bool((rows.categories[stream.used] != UNKNOWN).any())

    def batches(
        self,
        places: list[Place],
        size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Batch, Place]]:
        epoch, row = places[0] if places else (0, 0)
        batches = self.stream.batches(epoch, row, size, rank, world_size)
        at_once = max(1, ROWS_IN_MESSAGE // size)
        tasks = iter(lambda: list(chain.from_iterable(islice(batches, at_once))), [])
        for rows in in_workers(self.rows.pack, tasks, num_workers):
            for first in range(0, len(rows.ids), size):
                epoch, row = self.stream.advance(epoch, row, world_size * size)
                yield batch_inputs(rows[first : first + size], self.rows.tokenizer, pin_memory), [epoch, row]

    def epochs(self, place: Place) -> float:
        epoch, row = place
        return epoch + row / len(self.stream.rows_of(epoch))

    def describe(self) -> str:
        return f"{len(self.stream.used):,} meshes in {self.rows_in_epoch:,} rows"

    def digest(self) -> str:
        digest, told = self.stream.digest(), self.rows.told()
        return hashlib.sha256(digest.encode() + told).hexdigest()[:16] if told else digest


@dataclass(frozen=True)
class HeldOutRows:
    """The batches of an evaluation, made anew whenever they are gone through."""

    rows: MeshRows
    keys: list[list[RowKey]]

    def __iter__(self) -> Iterator[Batch]:
        return map(self.rows.batch, self.keys)


@dataclass
class Data:
    """What a run learns from and is judged by."""

    rows: TrainingRows
    validation: Meshes | None
    validation_loader: HeldOutRows | None


def load_data(arguments: Arguments, tokenizer: IFlameTokenizer, accelerator: Accelerator, config: Any = None) -> Data:
    """The training rows, and the held-out rows if there are any. The model's `config` says what it is told of them."""
    options, train = arguments.data, arguments.train
    conditions = Conditions.of(config, options.condition_dropout, train.seed)
    if not conditions.names and "condition_dropout" in arguments.given:
        raise ValueError(
            "condition_dropout is for a model that is told something of each mesh: give --condition_on, or leave out "
            "--condition_dropout"
        )
    meshes: Meshes | None = None
    validation: Meshes | None = None
    if options.train_file:
        with _main_process_first(accelerator):  # which fills the cache of `datasets` for the others
            if not options.streaming:
                meshes = ParquetMeshes(options.train_file, options.max_train_samples, options.balance or ())
            if options.validation_file:
                validation = ParquetMeshes(options.validation_file, options.max_eval_samples)
    else:
        meshes = generated_meshes(options, train.seed)
        validation = generated_meshes(options, train.seed, held_out=True)

    length, capacity = options.row_length, options.row_length // TOKENS_PER_FACE
    varied = {
        "seed": train.seed,
        "scale": options.scale_augmentation,
        "shift": options.shift_augmentation,
        "turn": options.turn_augmentation,
        "mirror": options.mirror_augmentation,
    }
    rows: TrainingRows
    if meshes is None:
        encode = MeshEncoder(tokenizer, length, **varied)
        rows = stream_rows(options.train_file, encode, options.long_meshes, options.streaming_row_groups, conditions)
    else:
        sizes, used = mesh_sizes(meshes, length, options.long_meshes)
        balance = None
        if options.balance:
            balance = Balance([meshes.groups(column) for column in options.balance], options.balance_power)
        stream = RowStream(sizes, used, capacity, train.seed, balance)
        mapped = MeshRows(meshes, tokenizer, length, **varied, conditions=conditions)
        if options.train_file:
            require_usable(mapped, used, "--train_file", options.train_file)
        rows = MappedRows(mapped, stream)
    if conditions.categories and accelerator.is_main_process and not rows.knows_categories:
        warnings.warn(
            "the model is told the category of each mesh, and no training mesh has one that it knows: give meshes "
            "with the column category, or it learns to do without",
            stacklevel=1,
        )
    held_out = None
    if validation is not None:
        sizes, used = mesh_sizes(validation, length, options.long_meshes)
        fixed = MeshRows(validation, tokenizer, length, conditions=replace(conditions, dropout=0.0), grouped=True)
        if options.validation_file:
            require_usable(fixed, used, "--validation_file", options.validation_file)
        batches = evaluation_batches(
            sizes,
            used,
            capacity,
            train.per_device_eval_batch_size or train.per_device_train_batch_size,
            accelerator.process_index,
            accelerator.num_processes,
        )
        held_out = HeldOutRows(fixed, batches)
    return Data(rows, validation, held_out)


@contextmanager
def _main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """Accelerate's leaves the others waiting where the main process fails: here they go on, and fail as it did."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_main_process:
            accelerator.wait_for_everyone()
