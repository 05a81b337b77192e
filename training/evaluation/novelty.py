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
    # A mesh comes to another, turned, as near as itself to the other, turned back: so one call compares all finalists.
    back = torch.from_numpy(symmetries()).to(device).transpose(1, 2)  # (8, 3, 3), inverse as they are orthogonal
    index, symmetry, distance = [], [], []
    for number, meshes in enumerate(best):
        query = of_queries[number : number + 1]
        as_turned = of_training[meshes] @ back[turns[number, meshes].long()]
        few = meshes[chamfer_distances(query, as_turned)[0].argsort()[:FINALISTS]]
        every = chamfer_distances(query, (of_training[few] @ back[:, None]).flatten(0, 1))[0]  # (8 FINALISTS,)
        place = every.argmin()
        index.append(few[place % len(few)])
        symmetry.append(place // len(few))
        distance.append(every[place])
    index, symmetry, distance = (torch.stack(each).cpu().numpy() for each in (index, symmetry, distance))
    distinct, which = np.unique(index, return_inverse=True)
    again = torch.from_numpy(clouds([training[i] for i in distinct], points, seed, SEEDS["again"])).to(device)
    noise = [chamfer_distances(of_training[i : i + 1], again[j : j + 1])[0, 0] for j, i in enumerate(distinct)]
    return Nearest(
        index,
        symmetry,
        distance,
        torch.stack(noise).cpu().numpy()[which.ravel()],
    )


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
