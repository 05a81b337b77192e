"""How often each mesh is drawn, where some groups of meshes are much larger than others."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow

FACE_BINS = (50, 100, 200, 400, 800, 1600, 3200, 6400)  # the most faces in each bin but the last


@dataclass(frozen=True)
class Balance:
    """
    Draws the meshes of small groups more often. For one grouping, a group of n meshes is drawn with a probability
    proportional to n ** power, shared equally by its meshes; for several, a mesh's probability is proportional to the
    product of those that each grouping alone gives it.

    Args:
        groups: for each grouping the group of every mesh, (N,) whole numbers.
        power: 0 draws all groups equally often, 1 leaves them as they are.
    """

    groups: Sequence[np.ndarray]
    power: float

    def weights(self, used: np.ndarray) -> np.ndarray:
        """The probability (M,) of each mesh to use, their indices (M,); groups are counted among these."""
        weights = np.ones(len(used))
        for groups in self.groups:
            _, inverse, counts = np.unique(groups[used], return_inverse=True, return_counts=True)
            weights /= ((counts**self.power).sum() * counts ** (1 - self.power))[inverse]
        return weights / weights.sum() if len(self.groups) > 1 else weights

    def content(self) -> bytes:
        """What the weights follow from."""
        groups = (np.ascontiguousarray(groups, dtype=np.int64).tobytes() for groups in self.groups)
        return b"".join([repr(float(self.power)).encode(), *groups])


def bins_of_faces(num_faces: np.ndarray | int) -> np.ndarray:
    """The bin of each number of faces, 0 for those up to the first of FACE_BINS."""
    return np.searchsorted(FACE_BINS, num_faces)


def check_columns(columns: Sequence[str], schema: pyarrow.Schema, file: str) -> None:
    """Raises ValueError, naming the file, unless meshes can be grouped by each of these columns of it."""
    usable = [field.name for field in schema if _is_groupable(field.type)]
    for column in columns:
        if column not in usable:
            wrong = "is neither text nor whole numbers" if column in schema.names else "is not there"
            others = f"it can be balanced by {', '.join(usable)}" if usable else "no other column can be balanced by"
            raise ValueError(f"--balance {column}: in {file} that column {wrong}; {others}")


def _is_groupable(kind: pyarrow.DataType) -> bool:
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_integer(kind)
