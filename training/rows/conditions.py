"""What a model is told of each mesh before its first face: its category and its number of faces."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from iflame_hf.conditions_iflame import CONDITIONS, UNKNOWN, known_conditions

# Sets the random numbers by which conditions are left out apart from those of the augmentation of the same mesh.
DROPOUT_STREAM = 1


@dataclass(frozen=True)
class Conditions:
    """
    Args:
        categories: the names that the model knows, in its order; none: it is not told of categories.
        num_faces: whether it is told the number of faces.
        dropout: the probability with which a mesh's category is left out, and, independently, its number of faces.
    """

    categories: tuple[str, ...] = ()
    num_faces: bool = False
    dropout: float = 0.0
    seed: int = 0

    @classmethod
    def of(cls, config: Any, dropout: float = 0.0, seed: int = 0) -> "Conditions":
        """Those that a model's configuration asks for; of None, none."""
        known = () if config is None else known_conditions(config)
        categories = tuple(config.categories) if "category" in known else ()
        return cls(categories, "num_faces" in known, dropout, seed)

    @property
    def names(self) -> tuple[str, ...]:
        """Some of CONDITIONS."""
        asked = {"category": bool(self.categories), "num_faces": self.num_faces}
        return tuple(name for name in CONDITIONS if asked[name])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.categories)}

    def index(self, category: Any) -> int:
        """The place of a category among those of the model; UNKNOWN for others and for None."""
        return UNKNOWN if category is None else self._places.get(str(category), UNKNOWN)

    def of_mesh(self, category: int, num_faces: int, *identity: int) -> dict[str, int]:
        """
        What the model is told of one mesh, by `names`. What is left out is a function of the seed and the numbers that
        identify the mesh and the epoch.

        Args:
            category: its index.
            num_faces: in its sequence, start and end face not counted.
        """
        told = dict(zip(CONDITIONS, (category, num_faces), strict=True))
        if self.dropout and self.names:
            left_out = np.random.default_rng((self.seed, *identity, DROPOUT_STREAM)).random(2) < self.dropout
            told = {name: UNKNOWN if out else told[name] for name, out in zip(CONDITIONS, left_out, strict=True)}
        return {name: told[name] for name in self.names}

    def columns(self, meshes: Iterable[Mapping[str, int]]) -> dict[str, list[int]]:
        """What `of_mesh` says of each of several, as lists by `names`."""
        meshes = list(meshes)
        return {name: [told[name] for told in meshes] for name in self.names}

    def content(self) -> bytes:
        """Changes with what a model is told, but not with how often that is left out; empty if it is told nothing."""
        return repr((self.categories, self.num_faces)).encode() if self.names else b""


NO_CONDITIONS = Conditions()


def frequent_categories(names: Sequence[str | None], least: int) -> list[str]:
    """
    The categories that at least so many meshes have, sorted.

    Args:
        names: of every mesh; None where its category is not known.

    Raises:
        ValueError: there is none.
    """
    found, counts = np.unique([name for name in names if name], return_counts=True)
    if len(found) == 0:
        raise ValueError(
            "no training mesh has a category, so --condition_on category has nothing to go by: give meshes with the "
            "column category, or leave it out"
        )
    if counts.max() < least:
        raise ValueError(
            f"no category has {least} training meshes; the largest, {found[counts.argmax()]}, has {counts.max()}: "
            "give a smaller --min_category_meshes, or leave category out of --condition_on"
        )
    return found[counts >= least].tolist()
