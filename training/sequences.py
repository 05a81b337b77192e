"""From a mesh in a table to the token ids that are trained on: reading, augmentation, encoding."""

from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute

from iflame_hf.mesh_iflame import load_mesh, normalise
from iflame_hf.tokenization_iflame import IFlameTokenizer

# Ranges of the paper's code.
SCALE_RANGE = (0.75, 1.25)
SHIFT_RANGE = np.array([0.1, 0.1, 0.075])


class MeshTable:
    """The meshes of an arrow table with the columns `vertices` and `faces`, lists of lists of numbers, in memory."""

    def __init__(self, table: pyarrow.Table):
        self._vertices, self._faces = _Matrices(table["vertices"]), _Matrices(table["faces"])

    def __len__(self) -> int:
        return len(self._faces.ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V, 3) and faces (F, 3) of one mesh. Raises ValueError if its lists are not equally long."""
        return self._vertices[index], self._faces[index]

    @property
    def num_faces(self) -> np.ndarray:
        return np.diff(self._faces.ends, prepend=0)


class _Matrices:
    """A column of lists of lists, as arrays (rows, numbers in a row)."""

    def __init__(self, column: pyarrow.ChunkedArray):
        lists = column.combine_chunks()
        rows = lists.flatten()
        self.ends = np.cumsum(_lengths(lists))
        self._row_ends = np.concatenate([[0], np.cumsum(_lengths(rows))])
        self._numbers = rows.flatten().to_numpy(zero_copy_only=False)

    def __getitem__(self, index: int) -> np.ndarray:
        start, end = self.ends[index - 1] if index else 0, self.ends[index]
        first, last = self._row_ends[start], self._row_ends[end]
        count = end - start
        if count == 0:
            raise ValueError("the mesh has no vertices or no faces")
        return self._numbers[first:last].reshape(count, -1)


def _lengths(lists: pyarrow.Array) -> np.ndarray:
    return pyarrow.compute.fill_null(pyarrow.compute.list_value_length(lists), 0).to_numpy().astype(np.int64)


def augment(vertices: np.ndarray, rng: np.random.Generator, scale: bool = True, shift: bool = True) -> np.ndarray:
    """
    The augmentation of the paper's code on normalised vertices (V, 3): stretch each axis by 0.75 to 1.25 and normalise
    again, then move by up to 0.1 (0.075 along the third axis) as far as the cube [-0.5, 0.5] leaves room. Always takes
    the same random numbers.
    """
    numbers = rng.random((2, 3))
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    factors = SCALE_RANGE[0] + (SCALE_RANGE[1] - SCALE_RANGE[0]) * numbers[0] if scale else np.ones(3)
    sides = factors * (high - low)
    factors, sides = factors / sides.max(), sides / sides.max()
    room = 0.5 - sides / 2
    offset = SHIFT_RANGE * (2 * numbers[1] - 1) if shift else np.zeros(3)
    offset = np.maximum(np.minimum(offset, room), -room)
    return vertices * factors + (offset - factors * (low + high) / 2)  # all in one: passes over vertices cost most


@dataclass
class MeshEncoder:
    """Makes token ids of meshes for rows of `row_length` tokens, augmented by `scale` and `shift` as asked for."""

    tokenizer: IFlameTokenizer
    row_length: int
    seed: int = 0
    scale: bool = False
    shift: bool = False

    def __call__(self, mesh: tuple[np.ndarray, np.ndarray], epoch: int, *identity: int) -> np.ndarray:
        """
        Token ids of a mesh, at most as long as a row: a longer one loses its end. The augmentation is a function of
        the seed, the epoch and the numbers that identify the mesh. Raises ValueError for what is no usable mesh.
        """
        vertices, faces = load_mesh(mesh)
        vertices = normalise(vertices)
        if self.scale or self.shift:
            rng = np.random.default_rng((self.seed, epoch, *identity))
            vertices = augment(vertices, rng, self.scale, self.shift)
        return self.tokenizer.encode_arrays(vertices, faces)[: self.row_length]

    @property
    def id_type(self) -> np.dtype:
        """The smallest type of number that holds all token ids."""
        return np.min_scalar_type(self.tokenizer.vocab_size - 1)
