"""Whether samples are distributed as held-out meshes are: COV, MMD, 1-NNA and JSD, see `training.metrics`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from training.evaluation.meshes import GridMesh, clouds
from training.metrics import (
    chamfer_distances,
    coverage,
    earth_movers_distances,
    jensen_shannon_divergence,
    minimum_matching_distance,
    normalised,
    one_nearest_neighbour_accuracy,
)

LEAST_MESHES = 2  # of a set: a nearest neighbour takes another one


class Protocol(NamedTuple):
    """
    How sets are compared; figures compare only at the same values.

    Args:
        size: meshes of each set.
        points: of each mesh.
        normalisation: "unit sphere" or "longest side", see `normalised`. JSD is always of the latter.
        repeats: how often, each time with other points, and other meshes where a set has more than `size`.
        emd_meshes: how many of them are compared by the earth mover's distance as well; 0 for none.
        emd_points: of each mesh there.
    """

    size: int
    points: int = 2048
    normalisation: str = "unit sphere"
    repeats: int = 3
    seed: int = 0
    emd_meshes: int = 0
    emd_points: int = 256


def compare_sets(
    sets: Mapping[str, Sequence[GridMesh]],
    references: Sequence[GridMesh],
    protocol: Protocol,
    device: Any = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, list[float]]]:
    """
    For each set its figures against the references, each a list of `repeats` values: `coverage`, `mmd`, `one_nna`,
    `jsd`, and `emd_coverage` and so on where asked for.

    Raises ValueError where a set has fewer meshes than the protocol takes, or that are fewer than two.
    """
    for name, meshes in {**sets, "references": references}.items():
        if len(meshes) < protocol.size or protocol.size < LEAST_MESHES:
            raise ValueError(
                f"{protocol.size} meshes of each set are to be compared, {LEAST_MESHES} at least; {name} has "
                f"{len(meshes)}"
            )
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in sets}
    for repeat in range(protocol.repeats):
        drawn = [draw_clouds(each, protocol, repeat, place) for place, each in enumerate([references, *sets.values()])]
        for distance, suffix, parts in _comparisons(drawn, protocol, device):
            between_references = distance(parts[0], None)
            for name, part in zip(sets, parts[1:], strict=True):
                found = _figures(distance, part, parts[0], between_references)
                for figure, value in found.items():
                    figures[name].setdefault(suffix + figure, []).append(value)
        cubes = [normalised(each, "longest side") for each in drawn]
        for name, cube in zip(sets, cubes[1:], strict=True):
            figures[name].setdefault("jsd", []).append(jensen_shannon_divergence(cube, cubes[0]))
        say(f"distances of {protocol.size:,} meshes a set: {repeat + 1} of {protocol.repeats} repeats")
    return figures


def draw_clouds(meshes: Sequence[GridMesh], protocol: Protocol, repeat: int, place: int) -> np.ndarray:
    """Points (size, points, 3) of a random choice of meshes; `place` is that of the set, 0 of the references."""
    chosen = np.random.default_rng((protocol.seed, repeat, place)).permutation(len(meshes))[: protocol.size]
    return clouds([meshes[index] for index in chosen], protocol.points, protocol.seed, repeat, place)


def _comparisons(drawn: list[np.ndarray], protocol: Protocol, device: Any) -> list[tuple[Callable, str, list[Any]]]:
    """A distance, what its figures begin with, and the clouds that it is of, the references first."""
    parts = [torch.from_numpy(normalised(each, protocol.normalisation)) for each in drawn]
    found = [(chamfer_distances, "", [each.to(device) for each in parts])]
    if protocol.emd_meshes:
        few = [each[: protocol.emd_meshes, : protocol.emd_points].contiguous() for each in parts]
        found.append((earth_movers_distances, "emd_", few))
    return found


def _figures(distance: Callable, samples: Any, references: Any, between_references: Any) -> dict[str, float]:
    between = distance(samples, references)
    return {
        "coverage": coverage(between),
        "mmd": minimum_matching_distance(between),
        "one_nna": one_nearest_neighbour_accuracy(distance(samples, None), between_references, between),
    }


def summarised(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation (that of a sample; None of a single value)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "deviation": deviation, "values": list(values)}
