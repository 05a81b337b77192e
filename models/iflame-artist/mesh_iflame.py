"""Geometry of triangle meshes on arrays: normalise, turn, quantise, canonicalise, weld.

Arrays, unless said otherwise: `vertices` (V, 3) float64 in the axis order x, y, z; `grid` (V, 3) int64, quantised
vertices in the same order; `faces` (F, 3) int64, the vertices of each face, counter-clockwise seen from outside. y is
up from `to_y_up` to `from_y_up`. No function changes its arguments.
"""

from typing import Any

import numpy as np

from .mesh_errors_iflame import MeshError

# Vertices are ordered by y, then x, then z. Grid coordinates need 21 bits at most: three fit one int64.
MAX_RESOLUTION = 2**21 - 1
_VERTEX_KEY = np.array([2**21, 2**42, 1], dtype=np.int64)
_ROTATIONS = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1]])


def normalise(vertices: np.ndarray, bounds: Any = None) -> np.ndarray:
    """Centre the bounding box at 0 and scale its longest side to 1: (V, 3) in any unit -> (V, 3) in [-0.5, 0.5].

    `bounds` (2, 3), the lowest and the highest corner of a box around all vertices, takes the place of their own
    bounding box: for a part, that of the whole mesh.

    Raises MeshError for vertices that lie in a single point, for an extent that is not a finite number, and for
    bounds that leave a vertex outside; ValueError for bounds that are none.
    """
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    if bounds is None:
        centre, size = _centre_and_size(low, high)
    else:
        lowest, highest = _checked_bounds(bounds)
        centre, size = _centre_and_size(lowest, highest)
        if (low < lowest - 1e-6 * size).any() or (high > highest + 1e-6 * size).any():
            raise MeshError(
                f"the mesh, from {low.tolist()} to {high.tolist()}, does not lie within the bounds given",
                "out_of_bounds",
            )
    return (vertices - centre) / size


def denormalise(vertices: np.ndarray, bounds: Any) -> np.ndarray:
    """The inverse of `normalise`: (V, 3) in [-0.5, 0.5] -> (V, 3) in the units of `bounds`."""
    centre, size = _centre_and_size(*_checked_bounds(bounds))
    return vertices * size + centre


def bounding_box(vertices: np.ndarray, room_above: float = 0.0, up_axis: str = "y") -> np.ndarray:
    """Lowest and highest corner (2, 3) of a box around vertices (V, 3), with `room_above` times its height added on
    top of it, along `up_axis`."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    up = "xyz".index(up_axis)
    high[up] += room_above * (high[up] - low[up])
    return np.stack([low, high])


def _checked_bounds(bounds: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        low, high = np.asarray(bounds, dtype=np.float64)
        if low.shape == high.shape == (3,) and not (low > high).any():
            return low, high
    except (TypeError, ValueError):
        pass
    raise ValueError("bounds are the lowest and the highest corner of a box, ((x, y, z), (x, y, z))")


def _centre_and_size(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, float]:
    with np.errstate(over="ignore"):
        size = (high - low).max()
    if size == 0:
        raise MeshError("all vertices lie in one point", "flat")
    if not size < np.inf:
        raise MeshError("its extent is not a finite number", "not_finite")
    return low / 2 + high / 2, size


def quantise(vertices: np.ndarray, resolution: int = 128) -> np.ndarray:
    """Nearest grid coordinates 0..resolution, half to even: (V, 3) in [-0.5, 0.5] -> (V, 3) int64. What lies outside
    is clipped."""
    return np.rint(np.minimum(np.maximum(vertices + 0.5, 0), 1) * resolution).astype(np.int64)


def dequantise(grid: np.ndarray, resolution: int = 128) -> np.ndarray:
    """The coordinates of points of the grid: (V, 3) int64 in 0..resolution -> (V, 3) float64 in [-0.5, 0.5]."""
    return grid / resolution - 0.5


def to_y_up(vertices: np.ndarray, up_axis: str) -> np.ndarray:
    """Turn vertices or grid points (V, 3) whose up-axis is `up_axis` so that y is up; winding is kept. Right stays
    right, where that is x in y-up and z-up axes, and -y in x-up ones (COLLADA 1.4, `<up_axis>`)."""
    if up_axis == "z":
        return np.stack([vertices[:, 0], vertices[:, 2], -vertices[:, 1]], axis=1)
    if up_axis == "x":
        return np.stack([-vertices[:, 1], vertices[:, 0], vertices[:, 2]], axis=1)
    return vertices


def from_y_up(vertices: np.ndarray, up_axis: str) -> np.ndarray:
    """The inverse of `to_y_up`."""
    if up_axis == "z":
        return np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], axis=1)
    if up_axis == "x":
        return np.stack([vertices[:, 1], -vertices[:, 0], vertices[:, 2]], axis=1)
    return vertices


def turn(vertices: np.ndarray, up_axis: str, to_up_axis: str) -> np.ndarray:
    """Turn vertices (V, 3) whose up-axis is `up_axis` so that `to_up_axis` is up."""
    return vertices if up_axis == to_up_axis else from_y_up(to_y_up(vertices, up_axis), to_up_axis)


def canonicalise(grid: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one form of a quantised mesh that sequences are written from, in the order of PolyGen (arXiv 2002.10880).

    Equal vertices are merged; faces that lost a corner are dropped, and so are all but the first, in the order given,
    of the faces on the same three vertices, whatever their winding; then unused vertices. Vertices are ordered by
    y, then x, then z; each face is rotated, never reversed, so that its lowest vertex comes first; faces are ordered
    by their sorted vertices. (V, 3), (F, 3) -> (V', 3), (F', 3); F' may be 0.
    """
    grid, faces = _merge_vertices(grid, faces)
    faces = faces[_distinct_faces(faces)]
    faces = faces[np.arange(len(faces))[:, None], _ROTATIONS[faces.argmin(axis=1)]]
    return _drop_unused(grid, faces)


def weld(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid points (V, 3) and faces (F', 3) of separate triangles `corners` (F, 3 corners, 3) int64.

    Equal corners become one vertex, ordered as by `canonicalise`. Degenerate faces, and all but the first on the same
    three vertices, are dropped; the others keep their order and their corners' order.
    """
    grid, faces = _merge_vertices(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3))
    return _drop_unused(grid, faces[np.sort(_distinct_faces(faces))])


def has_equal_corners(corners: np.ndarray) -> np.ndarray:
    """Which of separate triangles (F, 3 corners, 3) have two corners in one place: (F,) bool."""
    return (corners == np.roll(corners, 1, axis=1)).all(axis=2).any(axis=1)


def triangulate(corners: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Polygons as fans of triangles (F', 3) around their first corners, the winding kept: n corners, n - 2 triangles.

    `sides` (F,) are the numbers of corners of the polygons, whose `corners` (sum of sides,) follow one another. Raises
    MeshError where there is no polygon, or one of fewer than three corners.
    """
    if len(sides) == 0:
        raise MeshError("the mesh has no faces", "empty")
    if sides.min() < 3:
        raise MeshError("a face has fewer than three corners", "bad_shape")
    if sides.max() == 3:
        return corners.reshape(-1, 3)
    count = sides - 2
    first = np.repeat(np.cumsum(sides) - sides, count)
    second = first + 1 + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return corners[np.stack([first, second, second + 1], axis=1)]


def _merge_vertices(grid: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = grid @ _VERTEX_KEY
    order = keys.argsort()
    keys = keys[order]
    is_new = np.empty(len(keys), dtype=bool)
    is_new[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=is_new[1:])
    renumbered = np.empty(len(keys), dtype=np.int64)
    renumbered[order] = is_new.cumsum() - 1
    return grid[order[is_new]], renumbered[faces]


def _distinct_faces(faces: np.ndarray) -> np.ndarray:
    """Indices (F',) of the faces to keep, ordered by the faces' sorted vertices."""
    low, high = faces.min(axis=1), faces.max(axis=1)
    middle = faces.sum(axis=1) - low - high
    order = np.lexsort((high, middle, low))
    low, middle, high = low[order], middle[order], high[order]
    keep = (low != middle) & (middle != high)
    keep[1:] &= (low[1:] != low[:-1]) | (middle[1:] != middle[:-1]) | (high[1:] != high[:-1])
    return order[keep]


def _drop_unused(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    return (vertices, faces) if used.all() else (vertices[used], (used.cumsum() - 1)[faces])


def checked_arrays(vertices: Any, faces: Any) -> tuple[np.ndarray, np.ndarray]:
    try:
        vertices, faces = np.asarray(vertices, dtype=np.float64), np.asarray(faces)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"vertices must be an array of numbers and faces one of indices ({error})"
        raise MeshError(message, "bad_shape") from error
    if vertices.size == 0 or faces.size == 0:
        raise MeshError("the mesh has no vertices" if vertices.size == 0 else "the mesh has no faces", "empty")
    if vertices.ndim != 2 or vertices.shape[1] != 3:
        raise MeshError(f"vertices must have the shape (V, 3), not {vertices.shape}", "bad_shape")
    if faces.ndim != 2 or faces.shape[1] < 3 or faces.dtype.kind not in "iu":
        raise MeshError(
            f"faces must be whole numbers of the shape (F, 3), not {faces.dtype} {faces.shape}", "bad_shape"
        )
    if not np.isfinite(vertices).all():
        raise MeshError("a coordinate is NaN or infinite", "not_finite")
    if faces.min() < 0 or faces.max() >= len(vertices):
        raise MeshError(
            f"face indices run from {faces.min()} to {faces.max()}, but the {len(vertices)} vertices from 0 to "
            f"{len(vertices) - 1}",
            "bad_indices",
        )
    faces = faces.astype(np.int64, copy=False)
    return _drop_unused(vertices, triangulate(faces.ravel(), np.full(len(faces), faces.shape[1])))
