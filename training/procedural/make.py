"""Procedural meshes: furniture and buildings of many kinds, numbers of parts and proportions.

A mesh is 128 units long on its longest side, and its corners lie on multiples of 4 from its middle: the usual 129
values of a coordinate represent it exactly, and only every fourth is used, which a small model learns several times
sooner than all.
Every part is a closed solid with outward winding; parts touch or cross, but hardly ever share a triangle.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from training.procedural import buildings, furniture
from training.procedural.parts import Solid, merge, pick

_MAKERS: dict[str, Callable[[np.random.Generator], list[Solid]]] = {
    "table": furniture.table,
    "chair": furniture.chair,
    "stool": furniture.stool,
    "bench": furniture.bench,
    "bed": furniture.bed,
    "shelf": furniture.shelf,
    "sofa": furniture.sofa,
    "lamp": furniture.lamp,
    "house": buildings.house,
    "tower": buildings.tower,
    "church": buildings.church,
    "castle": buildings.castle,
    "fence": buildings.fence,
    "bridge": buildings.bridge,
}
KINDS: tuple[str, ...] = tuple(_MAKERS)
_MAX_TRIES = 1000


class ProceduralMesh(NamedTuple):
    """A mesh: `kind` from KINDS, `vertices` (V, 3) float32, y up, and `faces` (F, 3) int32, outward winding."""

    kind: str
    vertices: np.ndarray
    faces: np.ndarray


def make_mesh(rng: np.random.Generator, kind: str | None = None) -> ProceduralMesh:
    """One mesh of `kind`, or of a kind drawn evenly. Raises ValueError for an unknown kind."""
    if kind is None:
        kind = pick(rng, KINDS)
    if kind not in _MAKERS:
        raise ValueError(f"unknown kind {kind!r}; known are {', '.join(KINDS)}")
    points, triangles = merge(_MAKERS[kind](rng))
    return ProceduralMesh(kind, np.array(points, dtype=np.float32), np.array(triangles, dtype=np.int32))


def make_dataset(
    num_meshes: int, seed: int, min_faces: int = 12, max_faces: int = 200, kinds: Sequence[str] = KINDS
) -> list[ProceduralMesh]:
    """`num_meshes` meshes of `kinds`, drawn evenly, with `min_faces` to `max_faces` faces.

    Mesh i depends on `seed`, i, the limits and the kinds alone. Raises ValueError for a negative number or seed, for
    an unknown kind or none, and for limits that hardly a mesh meets (they have 20 to 198).
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ValueError(f"kinds must be some of {', '.join(KINDS)}, got {', '.join(unknown) or 'none'}")
    if num_meshes < 0 or seed < 0:
        raise ValueError(f"num_meshes and seed must not be negative, got {num_meshes} and {seed}")
    return [_make_within(seed, index, min_faces, max_faces, kinds) for index in range(num_meshes)]


def _make_within(seed: int, index: int, min_faces: int, max_faces: int, kinds: Sequence[str]) -> ProceduralMesh:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    for _ in range(_MAX_TRIES):
        mesh = make_mesh(rng, pick(rng, kinds))
        if min_faces <= len(mesh.faces) <= max_faces:
            return mesh
    raise ValueError(
        f"none of {_MAX_TRIES} procedural meshes has {min_faces} to {max_faces} faces; they have 20 to 198"
    )
