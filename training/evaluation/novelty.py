"""How near samples are to training meshes, and which are copies."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from training.evaluation.meshes import GridMesh, clouds
from training.metrics import chamfer_distances
from training.rows.encode import QUARTER_TURNS

# Two clouds of the same surface lie so far apart that their distance over that of two others, in 2,048 points of 300
# real meshes, was 0.93 to 1.10.
COPY_RATIO = 1.25
FINALISTS = 4
SEEDS = {"training": 0, "again": 1, "queries": 2}


class Nearest(NamedTuple):
    """The nearest training mesh of each of N meshes."""

    index: np.ndarray  # (N,) of training meshes
    symmetry: np.ndarray  # (N,) of `symmetries`, by which the mesh comes nearest
    distance: np.ndarray  # (N,) chamfer distance, in squared longest sides
    noise: np.ndarray  # (N,) chamfer distance of two clouds of that training mesh

    def part(self, places: slice) -> "Nearest":
        return Nearest(*(each[places] for each in self))

    @property
    def copies(self) -> np.ndarray:
        """Which cannot be told from the training mesh by their points, (N,) bool."""
        return self.distance <= COPY_RATIO * self.noise


def symmetries() -> np.ndarray:
    """(8, 3, 3) matrices M, for points p @ M: quarter turns about y, then the same after mirroring x, as
    `training.rows.encode.augment` turns and mirrors."""
    turns = [[(cosine, 0, -sine), (0, 1, 0), (sine, 0, cosine)] for cosine, sine in QUARTER_TURNS]
    mirror = np.diag([-1.0, 1.0, 1.0])
    return np.array([*turns, *(mirror @ np.array(turn) for turn in turns)], dtype=np.float32)


def nearest_training(
    queries: Sequence[GridMesh],
    training: Sequence[GridMesh],
    points: int = 2048,
    search_points: int = 256,
    candidates: int = 32,
    seed: int = 0,
    device: Any = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> Nearest:
    """
    For each mesh the training mesh with the least chamfer distance under any of the eight `symmetries`.

    All pairs are compared by `search_points` points of each, the best `candidates` meshes by all `points` as they are
    turned best there, and the best FINALISTS of these turned in all ways. The first takes
    N x M x 8 x 2 x search_points^2 distances of points of about 8 operations each: for 2,000 meshes against 9,000 with
    256 points 1.5e14.
    """
    of_training = torch.from_numpy(clouds(training, points, seed, SEEDS["training"])).to(device)
    of_queries = torch.from_numpy(clouds(queries, points, seed, SEEDS["queries"])).to(device)
    turned = of_queries[None] @ torch.from_numpy(symmetries()).to(device)[:, None]  # (8, N, P, 3)
    search = of_training[:, :search_points].contiguous()
    least, turns = None, None
    for number, each in enumerate(turned):
        distances = chamfer_distances(each[:, :search_points].contiguous(), search)
        if least is None:
            least, turns = distances, torch.zeros_like(distances, dtype=torch.uint8)
        else:
            turns[distances < least] = number
            least = torch.minimum(least, distances)
        say(f"nearest of {len(training):,} training meshes: {number + 1} of {len(turned)} symmetries")
    best = least.topk(min(candidates, len(training)), largest=False).indices  # (N, K)
    index, symmetry, distance = [], [], []
    for number, meshes in enumerate(best):
        few = meshes[_as_turned(turned[:, number], turns[number, meshes], of_training[meshes]).argsort()[:FINALISTS]]
        every = chamfer_distances(turned[:, number].contiguous(), of_training[few])  # (8, FINALISTS)
        place = int(every.argmin())
        index.append(int(few[place % len(few)]))
        symmetry.append(place // len(few))
        distance.append(float(every.flatten()[place]))
    index = np.array(index)
    distinct, which = np.unique(index, return_inverse=True)
    again = torch.from_numpy(clouds([training[i] for i in distinct], points, seed, SEEDS["again"])).to(device)
    noise = [chamfer_distances(of_training[i : i + 1], again[j : j + 1])[0, 0] for j, i in enumerate(distinct)]
    return Nearest(
        index,
        np.array(symmetry),
        np.array(distance),
        torch.stack(noise).cpu().numpy()[which.ravel()],
    )


def _as_turned(turned: torch.Tensor, turns: torch.Tensor, meshes: torch.Tensor) -> torch.Tensor:
    """Distances (K,) of meshes (K, P, 3), each to that of clouds (8, P, 3) which its number in `turns` (K,) says."""
    result = meshes.new_empty(len(meshes))
    for turn in turns.unique().tolist():
        own = turns == turn
        result[own] = chamfer_distances(turned[turn : turn + 1].contiguous(), meshes[own])[0]
    return result


def novelty(samples: Nearest, held_out: Nearest) -> dict[str, Any]:
    """
    `copies` and `held_out_copies`, shares; `nearer_than_held_out`, the share of samples that lie nearer to a training
    mesh than the median held-out mesh does: 0.5 where samples are as new as held-out meshes; and quantiles of the
    distances.
    """
    middle = float(np.median(held_out.distance))
    return {
        "nearer_than_held_out": float((samples.distance < middle).mean()),
        "copies": float(samples.copies.mean()),
        "held_out_copies": float(held_out.copies.mean()),
        "distance": _quantiles(samples.distance),
        "held_out_distance": _quantiles(held_out.distance),
    }


def _quantiles(distances: np.ndarray) -> dict[str, float]:
    return {f"{share:.0%}": float(np.quantile(distances, share)) for share in (0.05, 0.25, 0.5, 0.75, 0.95)}
