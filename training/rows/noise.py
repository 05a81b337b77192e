"""Rows in which some vertices are shown wrongly, so that a model learns to go on after a mistake of its own."""

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from training.rows.load import Batch, Place
from training.rows.pack import IGNORED

AXES = 3  # tokens of a vertex
REACH = 64  # vertices, from which a wrong one is taken
FARTHEST = 4  # grid steps by which one is moved


@dataclass(frozen=True)
class VertexNoise:
    """
    Of the vertices that the model reads, a share is wrong, each occurrence for itself: half of these are moved by up
    to 4 grid steps along one axis, half are another vertex out of the 64 before in the same mesh. What follows is to
    be predicted as ever: what was sampled wrongly has no part in what training shows otherwise, and mistakes add up.
    The second and third coordinate of a wrong vertex are not predicted.

    Args:
        share: of the vertices, from 0 to 1.
        seed: of the choice, which else depends on the tokens of the rows alone.
        coordinate_ids: how many token ids, from 0 on, are coordinates.
    """

    share: float
    seed: int
    coordinate_ids: int

    def of(self, batches: Iterable[tuple[Batch, Place]]) -> Iterator[tuple[Batch, Place]]:
        """The batches, changed where they are."""
        for batch, place in batches:
            self(batch)
            yield batch, place

    def __call__(self, batch: Batch) -> None:
        """Changes `input_ids` and `labels` (B, T), on the CPU, of rows of whole faces with their `layout`."""
        if not self.share:
            return
        ids = batch["input_ids"].numpy().reshape(-1, AXES)
        labels = batch["labels"].numpy().reshape(-1, AXES)
        meshes = batch["layout"].face_meshes.numpy().repeat(len(ids) // batch["layout"].face_meshes.numel())
        random = np.random.default_rng((self.seed, zlib.crc32(ids)))
        places = np.flatnonzero((random.random(len(ids)) < self.share) & self._are_vertices(ids))
        is_moved = random.random(len(places)) < 0.5
        moved = self._moved(ids, places[is_moved], random)
        others = places[~is_moved]
        sources = others - random.integers(1, REACH + 1, len(others))
        usable = (sources >= 0) & (meshes[sources] == meshes[others]) & self._are_vertices(ids[sources])
        others, taken = others[usable], ids[sources[usable]]
        ids[places[is_moved]] = moved
        ids[others] = taken
        labels[np.concatenate([places[is_moved], others]), 1:] = IGNORED

    def _are_vertices(self, vertices: np.ndarray) -> np.ndarray:
        return (vertices < self.coordinate_ids).all(axis=-1)

    def _moved(self, ids: np.ndarray, places: np.ndarray, random: np.random.Generator) -> np.ndarray:
        steps = random.integers(1, FARTHEST + 1, len(places)) * random.choice([-1, 1], len(places))
        vertices, axes = ids[places], random.integers(0, AXES, len(places))
        rows = np.arange(len(places))
        vertices[rows, axes] = np.clip(vertices[rows, axes] + steps, 0, self.coordinate_ids - 1)
        return vertices
