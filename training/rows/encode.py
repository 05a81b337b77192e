"""From a mesh in a table to the token ids that are trained on: reading, augmentation, encoding."""

from dataclasses import dataclass

import numpy as np
import pyarrow
import pyarrow.compute

from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_files_iflame import load_mesh
from iflame_hf.mesh_iflame import normalise, triangulate
from iflame_hf.tokenization_iflame import IFlameTokenizer

# The range of the paper's code.
SHIFT_RANGE = np.array([0.1, 0.1, 0.075])
# Cosine and sine of no turn, a quarter, a half and three quarters.
QUARTER_TURNS = ((1, 0), (0, 1), (-1, 0), (0, -1))


class MeshTable:
    """The meshes of an arrow table with the columns `vertices` and `faces`, lists of lists of numbers, in memory.
    Faces may have any number of corners from three on: polygons become fans of triangles."""

    def __init__(self, table: pyarrow.Table):
        self._vertices, self._faces = _Rows(table["vertices"]), _Rows(table["faces"])
        self.num_faces = count_triangles(table["faces"])

    def __len__(self) -> int:
        return len(self.num_faces)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V, 3) and triangles (F, 3) of one mesh, not checked any further than that they are such. Raises
        MeshError if it has none, a value is missing, or rows of them are too short or of different lengths."""
        numbers, lengths = self._vertices[index]
        if len(lengths) == 0:
            raise MeshError("the mesh has no vertices", "empty")
        if (lengths != lengths[0]).any():
            raise MeshError("its vertices have different numbers of coordinates", "bad_shape")
        return numbers.reshape(len(lengths), -1), triangulate(*self._faces[index])


def count_triangles(faces: pyarrow.ChunkedArray) -> np.ndarray:
    """
    Triangles (N,) int64 that `triangulate` makes of the faces of each mesh in a column of lists of lists of corners,
    by the lengths of the lists alone. Of a mesh that it refuses the number means nothing; it is not negative.
    """
    counts = [np.zeros(0, dtype=np.int64)]
    for lists in faces.chunks:
        polygons, ends = _unnest(lists)
        if pyarrow.types.is_fixed_size_list(polygons.type):
            corners = polygons.type.list_size * ends
        else:
            offsets = polygons.offsets.to_numpy()  # where a mapped file lies, of which only these places are read
            corners = offsets[ends].astype(np.int64) - offsets[0]
        counts.append(np.maximum(np.diff(corners - 2 * ends, prepend=0), 0))
    return np.concatenate(counts)


class _Rows:
    """A column of lists of lists of numbers, as the numbers and the lengths of the inner lists of each."""

    def __init__(self, column: pyarrow.ChunkedArray):
        rows, self._ends = _unnest(column.combine_chunks())
        numbers = rows.flatten()
        self._row_lengths = _lengths(rows)
        self._row_ends = np.concatenate([[0], np.cumsum(self._row_lengths)])
        self._is_missing = None
        if numbers.null_count:  # as NaN they would make floats of the corners of all meshes
            self._is_missing = numbers.is_null().to_numpy(zero_copy_only=False)
            numbers = numbers.fill_null(0)
        self._numbers = numbers.to_numpy(zero_copy_only=False)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._ends[index - 1] if index else 0, self._ends[index]
        first, last = self._row_ends[start], self._row_ends[end]
        if self._is_missing is not None and self._is_missing[first:last].any():
            raise MeshError("a value is missing", "bad_shape")
        return self._numbers[first:last], self._row_lengths[start:end]


def _unnest(lists: pyarrow.Array) -> tuple[pyarrow.Array, np.ndarray]:
    """The inner lists of lists of lists, and where in them each of the outer ones ends. Raises ValueError for arrays
    of another type."""
    lists = lists.storage if isinstance(lists, pyarrow.ExtensionArray) else lists  # such as Array2D of `datasets`
    if not hasattr(lists.type, "value_type") or not hasattr(lists.type.value_type, "value_type"):
        raise ValueError(f"the columns vertices and faces must be lists of lists of numbers, not {lists.type}")
    return lists.flatten(), np.cumsum(_lengths(lists))


def _lengths(lists: pyarrow.Array) -> np.ndarray:
    return pyarrow.compute.fill_null(pyarrow.compute.list_value_length(lists), 0).to_numpy().astype(np.int64)


def augment(
    vertices: np.ndarray,
    faces: np.ndarray,
    rng: np.random.Generator,
    scale: float = 0.25,
    shift: bool = True,
    turn: str = "none",
    mirror: bool = False,
    up_axis: str = "y",
) -> tuple[np.ndarray, np.ndarray]:
    """
    Vary a normalised mesh, (V, 3) and (F, 3): stretch each axis, turn about the vertical axis and normalise again,
    then move by up to 0.1 (0.075 along the third axis) as far as the cube [-0.5, 0.5] leaves room. Always takes the
    same random numbers.

    Args:
        scale: each axis is stretched by a factor of its own, between 1 / (1 + scale) and 1 + scale, whose logarithm is
            drawn evenly; 0 leaves the sides as they are.
        shift: whether to move.
        turn: "none", "quarter" for a multiple of 90 degrees, "any" for any angle. Stretched before it is turned, a
            mesh keeps its right angles.
        mirror: in half of the cases mirror at the plane x = 0 and reverse the faces, which look outwards as before.
        up_axis: the vertical axis of the mesh, "y" or "z".
    """
    numbers, (angle, side) = rng.random((2, 3)), rng.random(2)
    factors = (1 + scale) ** (2 * numbers[0] - 1)
    if mirror and side < 0.5:
        vertices, faces = vertices * (-1, 1, 1), faces[:, ::-1]
    if turn != "none":
        vertices, factors = _turn(vertices * factors, angle, turn, up_axis), np.ones(3)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    sides = factors * (high - low)
    factors, sides = factors / sides.max(), sides / sides.max()
    room = 0.5 - sides / 2
    offset = SHIFT_RANGE * (2 * numbers[1] - 1) if shift else np.zeros(3)
    offset = np.maximum(np.minimum(offset, room), -room)
    # all in one: passes over vertices cost most
    return vertices * factors + (offset - factors * (low + high) / 2), faces


def _turn(vertices: np.ndarray, share: float, turn: str, up_axis: str) -> np.ndarray:
    """Vertices (V, 3) turned about the vertical axis by a share of a whole turn, rounded down to quarters if `turn`
    is "quarter"; these are exact."""
    up = "xyz".index(up_axis)
    if turn == "quarter":
        cosine, sine = QUARTER_TURNS[int(4 * share)]
    else:
        cosine, sine = np.cos(2 * np.pi * share), np.sin(2 * np.pi * share)
    turned = vertices.copy()
    first, second = (up + 1) % 3, (up + 2) % 3
    turned[:, first] = cosine * vertices[:, first] - sine * vertices[:, second]
    turned[:, second] = sine * vertices[:, first] + cosine * vertices[:, second]
    return turned


@dataclass
class MeshEncoder:
    """Makes token ids of meshes for rows of `row_length` tokens, augmented by `scale`, `shift`, `turn` and `mirror`
    as asked for, see `augment`."""

    tokenizer: IFlameTokenizer
    row_length: int
    seed: int = 0
    scale: float = 0.0
    shift: bool = False
    turn: str = "none"
    mirror: bool = False

    def __call__(self, mesh: tuple[np.ndarray, np.ndarray], epoch: int, *identity: int) -> np.ndarray:
        """
        Token ids of a mesh, at most as long as a row: a longer one loses its end. Whatever the augmentation, a mesh
        takes no more faces than it has. The augmentation is a function of the seed, the epoch and the numbers that
        identify the mesh. Raises ValueError for what is no usable mesh.
        """
        vertices, faces = load_mesh(mesh)
        vertices = normalise(vertices)
        if self.scale or self.shift or self.turn != "none" or self.mirror:
            rng = np.random.default_rng((self.seed, epoch, *identity))
            varied = self.scale, self.shift, self.turn, self.mirror
            vertices, faces = augment(vertices, faces, rng, *varied, self.tokenizer.up_axis)
        return self.tokenizer.encode_arrays(vertices, faces)[: self.row_length]

    @property
    def id_type(self) -> np.dtype:
        """The smallest type of number that holds all token ids."""
        return np.min_scalar_type(self.tokenizer.vocab_size - 1)
