"""Meshes for training and evaluation, and where they come from: parquet files, or the procedural generator."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, Protocol

import datasets
import fsspec
import numpy as np
import pyarrow.parquet

from training.arguments import DataArguments
from training.procedural.make import make_dataset
from training.rows.balance import bins_of_faces, check_columns
from training.rows.encode import MeshTable, count_triangles

# What the held-out procedural meshes add to the seed.
VALIDATION_SEED = 1_000_003


class Meshes(Protocol):
    """A collection of meshes, in memory or on disk."""

    num_faces: np.ndarray  # (N,) triangles
    categories: np.ndarray  # (N,) indices into category_names
    category_names: list[str]
    has_category: np.ndarray  # (N,) bool: False where the name stands for no known category

    def read(self, indices: Sequence[int]) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Vertices (V, 3) and faces (F, 3) of some meshes; getting a damaged one raises ValueError."""

    def groups(self, column: str) -> np.ndarray:
        """
        Numbers (N,) that are equal for meshes with the same value in a column; of `num_faces` for meshes in the same
        of the FACE_BINS, by their triangles. Raises ValueError if there is no such column, or it holds no text and no
        whole numbers.
        """

    def describe(self, index: int) -> str:
        """What an error message calls the mesh."""


class ProceduralMeshes:
    """Meshes of `training.procedural.make`, in memory; their kind is their category."""

    def __init__(self, meshes: Sequence[Any]):
        self._meshes = meshes
        self.num_faces = np.array([len(mesh.faces) for mesh in meshes], dtype=np.int64)
        self.category_names, self.categories = _number([mesh.kind for mesh in meshes])
        self.has_category = np.ones(len(meshes), dtype=bool)

    def read(self, indices: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(self._meshes[index].vertices, self._meshes[index].faces) for index in indices]

    def groups(self, column: str) -> np.ndarray:
        if column == "num_faces":
            return bins_of_faces(self.num_faces)
        if column != "category":
            raise ValueError(
                f"generated meshes have no {column} to balance by: give --balance category, --balance num_faces or no "
                "--balance"
            )
        return self.categories

    def describe(self, index: int) -> str:
        return f"generated mesh {index} ({self._meshes[index].kind})"


class ParquetMeshes:
    """
    The meshes of parquet files, here or at hf:// addresses, memory-mapped by `datasets`: columns `vertices` and
    `faces` (lists of three numbers; of more corners, which become fans of triangles), and `category` and `name` where
    there are such.

    Args:
        max_samples: take only the first so many.
        grouped_by: columns that `groups` will be asked for.

    Raises:
        ValueError: no such file, a column is missing or of another type, or there is no mesh in them.
    """

    def __init__(self, files: Sequence[str], max_samples: int | None = None, grouped_by: Sequence[str] = ()):
        grouped_by = [column for column in grouped_by if column != "num_faces"]  # which is counted
        optional, filled = {"category", "name"}, []
        for file in chain.from_iterable(map(expand, files)):
            try:
                with fsspec.open(file) as opened:
                    metadata = pyarrow.parquet.read_metadata(opened)
            except (OSError, pyarrow.ArrowInvalid) as error:
                raise ValueError(f"{file} cannot be read as a parquet file: {error}") from error
            schema = metadata.schema.to_arrow_schema()
            names = set(schema.names)
            missing = {"vertices", "faces"} - names
            if missing:
                raise ValueError(f"{file} has no column {' and no column '.join(sorted(missing))}")
            check_columns(grouped_by, schema, file)
            optional &= names
            filled += [str(file)] * (metadata.num_rows > 0)
        if not filled:
            raise ValueError(f"there is no mesh in {', '.join(map(str, files))}")
        columns = ["vertices", "faces", *sorted(optional.union(grouped_by))]
        self._data = datasets.load_dataset("parquet", data_files=filled, split="train", columns=columns)
        if max_samples is not None:
            self._data = self._data.take(min(max_samples, len(self._data)))
        table = self._data.with_format("arrow")
        self.num_faces = count_triangles(table["faces"][:])
        has_categories = "category" in optional
        categories = self._data["category"][:] if has_categories else ["all"] * len(self._data)
        self.category_names, self.categories = _number([str(category) for category in categories])
        self.has_category = np.array([has_categories and category is not None for category in categories])
        self._rows = self._data.select_columns(["vertices", "faces"]).with_format("arrow")
        self._names = self._data.select_columns(["name"]) if "name" in optional else None

    def read(self, indices: Sequence[int]) -> MeshTable:
        return MeshTable(self._rows[list(indices)])

    def groups(self, column: str) -> np.ndarray:
        if column == "num_faces":
            return bins_of_faces(self.num_faces)
        values = self._data[column][:]
        if all(value is None for value in values):
            raise ValueError(f"no mesh has a value in the column {column}, so --balance {column} has nothing to go by")
        return _number([str(value) for value in values])[1]

    def names(self) -> list[str] | None:
        """Of all meshes; None where the files have none."""
        return None if self._names is None else [str(name) for name in self._names["name"][:]]

    def describe(self, index: int) -> str:
        return f"mesh {index}" if self._names is None else f"mesh {index} ({self._names[index]['name']})"


def expand(pattern: str) -> list[str]:
    """
    The files that a pattern names, on this machine or, of hf:// addresses, on the Hub; a plain name is itself. Raises
    ValueError if there is none.
    """
    if not fsspec.core.has_magic(pattern):
        return [pattern]
    system, path = fsspec.core.url_to_fs(pattern)
    found = sorted(system.glob(path))
    if not found:
        is_held_out = "validation" in pattern.rpartition("/")[2]
        advice = "; a set without held-out meshes has none: leave out --validation_file" if is_held_out else ""
        raise ValueError(f"no file matches {pattern}{advice}")
    return [system.unstrip_protocol(name) if "://" in pattern else name for name in found]


def _number(names: list[str]) -> tuple[list[str], np.ndarray]:
    unique, indices = np.unique(names, return_inverse=True)
    return unique.tolist(), indices


def generated_meshes(options: DataArguments, seed: int, held_out: bool = False) -> ProceduralMeshes | None:
    """The generated meshes that the options ask for, for training or held out; None if there are to be none."""
    if held_out:
        count, most, seed = options.num_procedural_validation_meshes, options.max_eval_samples, seed + VALIDATION_SEED
    else:
        count, most = options.num_procedural_meshes, options.max_train_samples
    count = count if most is None else min(count, most)
    return _generated(count, seed, options.procedural_max_faces, tuple(options.procedural_kinds)) if count else None


@lru_cache(maxsize=2)
def _generated(count: int, seed: int, max_faces: int, kinds: tuple[str, ...]) -> ProceduralMeshes:
    return ProceduralMeshes(make_dataset(count, seed, max_faces=max_faces, kinds=kinds))
