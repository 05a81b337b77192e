"""How sound meshes are, by their number of faces: what `training.metrics.topology` finds, averaged."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.evaluation.meshes import GridMesh
from training.metrics import Topology, topologies

BIN_EDGES = (100, 200, 400, 800)  # the most faces in each bin but the last
LARGE = 200
MESHES_AT_ONCE = 256
ALL_BINS = "all"
LARGE_BINS = f"above {LARGE}"


def bin_names() -> list[str]:
    least = [1, *(edge + 1 for edge in BIN_EDGES)]
    return [f"{low} to {high}" for low, high in zip(least, BIN_EDGES, strict=False)] + [f"above {BIN_EDGES[-1]}"]


def soundness(meshes: Sequence[GridMesh]) -> dict[str, dict[str, Any]]:
    """
    Averages over the meshes of each bin of faces, of all, and of those above LARGE faces; a bin without meshes is not
    there. Each mesh counts the same. `meshes` is their number; all else are shares but `pieces`, a number: `ended` (of
    samples that may or may not have), `closed`, `manifold_edges`, `boundary_edges` and `flipped_edges` (of edges),
    `repeated_faces` and `degenerate_faces` (of the faces before these were left out), `small_angles` (of faces).
    """
    if not meshes:
        return {}
    found: list[Topology] = []
    for first in range(0, len(meshes), MESHES_AT_ONCE):
        found += topologies((mesh.vertices, mesh.faces) for mesh in meshes[first : first + MESHES_AT_ONCE])
    values = [_of_mesh(mesh, each) for mesh, each in zip(meshes, found, strict=True)]
    sizes = np.array([len(mesh.faces) for mesh in meshes])
    place = np.searchsorted(BIN_EDGES, sizes)
    groups = {ALL_BINS: sizes > 0, LARGE_BINS: sizes > LARGE}
    groups.update({name: place == index for index, name in enumerate(bin_names())})
    return {name: _mean([values[i] for i in np.flatnonzero(group)]) for name, group in groups.items() if group.any()}


def boundary_ratios(samples: dict[str, Any], data: dict[str, Any]) -> dict[str, float | None]:
    """The boundary edges of samples over those of data, for all and above LARGE faces; None where data have none."""
    return {
        name: samples[name]["boundary_edges"] / data[name]["boundary_edges"] if data[name]["boundary_edges"] else None
        for name in (ALL_BINS, LARGE_BINS)
        if name in samples and name in data
    }


def _of_mesh(mesh: GridMesh, found: Topology) -> dict[str, Any]:
    given = found.faces + mesh.repeated + mesh.degenerate
    return {
        "ended": mesh.ended,
        "closed": found.closed,
        "manifold_edges": found.manifold_edges,
        "boundary_edges": found.boundary_edges,
        "flipped_edges": found.flipped_edges / max(found.edges, 1),
        "repeated_faces": (found.repeated_faces + mesh.repeated) / given,
        "degenerate_faces": (found.degenerate_faces + mesh.degenerate) / given,
        "small_angles": found.small_angles,
        "pieces": found.pieces,
    }


def _mean(values: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {"meshes": len(values)}
    for name in values[0]:
        known = [each[name] for each in values if each[name] is not None]
        figures[name] = float(np.mean(known)) if known else None
    return figures
