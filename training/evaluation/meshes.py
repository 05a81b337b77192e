"""The meshes that an evaluation compares: all on the grid of the tokens, so that none is finer than another."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_files_iflame import load_mesh
from iflame_hf.mesh_iflame import dequantise, has_equal_corners, normalise, quantise, weld
from training.rows.map import MESHES_AT_ONCE
from training.rows.meshes import ParquetMeshes

HALVES = ("first", "second")
FAR_COLUMN = "nn_iou_train"  # how much a held-out mesh overlaps with the most similar training mesh
_SPLIT_FILES = ("data/{}-*.parquet", "data/{}.parquet", "{}-*.parquet", "{}.parquet")


class GridMesh(NamedTuple):
    """A mesh on the grid, with what was taken from it; y is up, the bounding box centred at 0, its longest side 1."""

    name: str
    vertices: np.ndarray  # (V, 3), no two equal
    faces: np.ndarray  # (F, 3), no two on the same three vertices
    repeated: int = 0  # faces left out, on the vertices of an earlier one
    degenerate: int = 0  # faces left out, with two corners in one place
    ended: bool | None = None  # of a sample, whether it came to its end; None where that is not known
    category: str | None = None  # of a mesh of a data set, where it is known


def on_grid(name: str, vertices: np.ndarray, faces: np.ndarray, resolution: int) -> GridMesh:
    """
    A mesh of vertices (V, 3), y up in any unit, and faces (F, 3), on a grid of `resolution` steps along its longest
    side: what a model could have learnt of it, or made.

    Raises MeshError where no face with an area is left.
    """
    corners = quantise(normalise(vertices), resolution)[faces]
    grid, kept = weld(corners)
    degenerate = int(has_equal_corners(corners).sum())
    return checked(GridMesh(name, dequantise(grid, resolution), kept, len(faces) - degenerate - len(kept), degenerate))


def checked(mesh: GridMesh) -> GridMesh:
    """The mesh, centred and scaled. Raises MeshError where it has no face or none with an area."""
    if len(mesh.faces) == 0:
        raise MeshError("it has no face", "empty")
    vertices = normalise(mesh.vertices)
    first, second, third = np.moveaxis(vertices[mesh.faces], 1, 0)
    if not np.linalg.norm(np.cross(second - first, third - first), axis=1).sum() > 1e-9:
        raise MeshError("no face has an area", "flat")
    return mesh._replace(vertices=vertices)


def split_files(folder: Path, split: str) -> list[str]:
    """The parquet files of a split in the folder of a prepared set, or in one of plain files; empty if there are
    none."""
    return [str(path) for pattern in _SPLIT_FILES for path in sorted(folder.glob(pattern.format(split)))]


def held_out_files(folder: Path, splits: Sequence[str]) -> tuple[str, list[str]]:
    """The first of the splits that has files, and these. Raises ValueError where there is no such folder or split."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder} is no folder")
    for split in splits:
        if found := split_files(folder, split):
            return split, found
    raise ValueError(f"--data {folder} has no parquet files of a split {' or '.join(splits)}")


def read_split(
    meshes: ParquetMeshes, resolution: int, indices: Sequence[int] | None = None
) -> tuple[list[GridMesh], Counter]:
    """Those of a split, or of some of its places, that can be used, and how many cannot, by the kind of error."""
    places = list(range(len(meshes.num_faces)) if indices is None else indices)
    found, unusable = [], Counter()
    for first in range(0, len(places), MESHES_AT_ONCE):
        part = places[first : first + MESHES_AT_ONCE]
        table = meshes.read(part)
        for number, place in enumerate(part):
            try:
                mesh = on_grid(meshes.describe(place), *load_mesh(table[number]), resolution)
            except MeshError as error:
                unusable[error.kind] += 1
                continue
            known = meshes.category_names[meshes.categories[place]] if meshes.has_category[place] else None
            found.append(mesh._replace(category=known))
    return found, unusable


def places_of(meshes: ParquetMeshes, half: str | None = None, most: int | None = None, seed: int = 0) -> np.ndarray:
    """
    Places of meshes, sorted: so many at most, drawn at random, of all or of one half.

    Args:
        half: "first" or "second" of HALVES. A mesh is in one by a hash of its name, so that it stays there in
            whatever order, and whichever others there are; without names by its place. None: all.
    """
    places = np.arange(len(meshes.num_faces))
    if half is not None:
        names = meshes.names() or map(str, places)
        places = places[[hashlib.blake2b(name.encode()).digest()[0] % 2 == HALVES.index(half) for name in names]]
    if most is not None and most < len(places):
        places = np.sort(np.random.default_rng(seed).permutation(places)[:most])
    return places


def column_of(files: Sequence[str], name: str) -> np.ndarray | None:
    """A column of numbers (N,) float64 of all meshes, NaN where there is none; None where no file has it."""
    values: list[Any] = []
    for file in files:
        with pyarrow.parquet.ParquetFile(file) as opened:
            if name in opened.schema_arrow.names:
                values += opened.read(columns=[name])[name].to_pylist()
            else:
                values += [None] * opened.metadata.num_rows
    if all(value is None for value in values):
        return None
    return np.array(values, dtype=np.float64)


def clouds(meshes: Sequence[GridMesh], points: int, *seed: int) -> np.ndarray:
    """Points (N, points, 3) float32 spread evenly over the surfaces, as `training.metrics.sample_points` spreads them
    over one; other seeds, and other places in `meshes`, give others. The first of them are such points too."""
    rng = np.random.default_rng(seed)
    result = np.empty((len(meshes), points, 3), dtype=np.float32)
    for place, mesh in enumerate(meshes):
        first, second, third = mesh.vertices[mesh.faces.T]
        second, third = second - first, third - first
        normals = second[:, [1, 2, 0]] * third[:, [2, 0, 1]] - second[:, [2, 0, 1]] * third[:, [1, 2, 0]]
        ends = np.sqrt((normals**2).sum(axis=1)).cumsum()
        numbers = rng.random((3, points))
        chosen = np.searchsorted(ends, numbers[0] * ends[-1], side="right").clip(max=len(ends) - 1)
        a, b = numbers[1:]
        is_outside = a + b > 1  # of the triangle: its other half of the parallelogram
        a[is_outside], b[is_outside] = 1 - a[is_outside], 1 - b[is_outside]
        result[place] = first[chosen] + a[:, None] * second[chosen] + b[:, None] * third[chosen]
    return result
