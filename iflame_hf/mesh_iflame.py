"""Geometry of triangle meshes on arrays: load, normalise, quantise, canonicalise, weld.

Arrays, unless said otherwise: `vertices` (V, 3) float64 in the axis order x, y, z; `levels` (V, 3) int64, quantised
vertices in the same order; `faces` (F, 3) int64 rows of vertex indices, counter-clockwise seen from outside. y is up
from `to_y_up` to `from_y_up`. No function changes its arguments.
"""

import copy
import json
import os
import re
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import numpy as np

MESH_SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off", ".dae")
READER_PACKAGES = {".dae": "pycollada", ".zae": "pycollada"}  # with which trimesh reads these files
# The vertical axis of a file that does not say: of glTF by specification, of dae by its default, of the others as
# Blender and slicers write and read them. `up_axis_of` looks into the file too.
FILE_UP_AXES = {".glb": "y", ".gltf": "y", ".obj": "y", ".off": "y", ".dae": "y", ".ply": "z", ".stl": "z"}

# Vertices are ordered by y, then x, then z. A level needs 21 bits at most, three of them fit one int64.
MAX_RESOLUTION = 2**21 - 1
_VERTEX_KEY = np.array([2**21, 2**42, 1], dtype=np.int64)
_ROTATIONS = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1]])

# Why something is no usable mesh: the kinds of `MeshError`. The words stay the same when messages change.
MESH_ERROR_KINDS = {
    "unknown_format": "the suffix is of no format that is read",
    "missing_file": "a file that the mesh file refers to is not there",
    "no_permission": "a file must not be read",
    "not_a_file": "the path is of a folder or a device",
    "empty_file": "the file has no content",
    "lfs_pointer": "a pointer of Git LFS in place of the file",
    "wrong_format": "the content is not of the format that the suffix says",
    "compressed_geometry": "geometry that only a decoder which is not here can read",
    "unreadable": "damaged, cut off, or with something in it that the reader does not know",
    "bad_shape": "arrays or lists of another shape or type than vertices (V, 3) and faces (F, 3) have; no mesh at all",
    "empty": "no vertices or no faces",
    "not_finite": "a coordinate, or the extent, is NaN or infinite",
    "bad_indices": "a face has a corner that no vertex is",
    "flat": "all vertices lie in one point, or no face has an area",
    "no_face_left": "no face is left after quantisation",
    "too_many_faces": "more faces than asked for",
    "out_of_bounds": "the mesh does not lie within the box that it has to be in",
}
NOT_A_MESH = "a mesh is a path, a Trimesh, a Scene or a tuple (vertices, faces), not {}"


class _NamesOptions(ValueError):
    """An error whose message names options as Python's parameters are named; `worded` names them as the users of
    another program know them.

    Args:
        text: the message, with %s for each option.
        options: names of parameters; without any the text is taken as it is, whatever is in it.
    """

    def __init__(self, text: str, *options: str):
        self.text, self.options, self.source = text, options, ""
        super().__init__(text % options if options else text)

    def worded(self, name_of: Any = str) -> str:
        """The message with `name_of(option)` for every option."""
        return self.source + (self.text % tuple(map(name_of, self.options)) if self.options else self.text)

    def after(self, source: str) -> "_NamesOptions":
        """The same error with a message that begins with `source`."""
        error = copy.copy(self)
        error.source = source + self.source
        error.args = (error.worded(),)
        return error


class OptionError(_NamesOptions):
    """An option that cannot be as given."""


class MeshError(_NamesOptions):
    """What was given is no usable mesh; the message says why to people, and begins with the file's name where there
    is one. `kind` says why to programs: one of `MESH_ERROR_KINDS`."""

    def __init__(self, message: str, kind: str = "unreadable", options: tuple[str, ...] = ()):
        super().__init__(message, *options)
        self.kind = kind


def import_trimesh():
    """The trimesh package, imported when it is first needed; ImportError with advice when it is missing."""
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("mesh files and Trimesh objects need the package trimesh: pip install trimesh") from error
    return trimesh


@contextmanager
def errors_name(source: Any):
    """Begin the message of a ValueError with `source` where that is a path or a name, not arrays or an object."""
    try:
        yield
    except ValueError as error:
        if not isinstance(source, (str, os.PathLike)):
            raise
        beginning = f"{os.fspath(source)}: "
        if isinstance(error, _NamesOptions):
            raise error.after(beginning) from error
        raise ValueError(f"{beginning}{error}") from error


def is_mesh(item: Any) -> bool:
    """Whether `item` is something `load_mesh` takes: a path with a mesh file's suffix (any `os.PathLike` counts), a
    Trimesh, a Scene, or a tuple of two arrays or lists (vertices, faces). Reads no file."""
    if isinstance(item, str):
        return item.lower().endswith(MESH_SUFFIXES)
    if isinstance(item, tuple):
        return len(item) == 2 and all(isinstance(part, list) or hasattr(part, "__array__") for part in item)
    return isinstance(item, os.PathLike) or is_trimesh(item) or is_scene(item)


def load_mesh(mesh: Any) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) float64, in the units of the source, and faces (F, 3) int64 of a mesh, checked.

    `mesh` is the path of an obj, glb, gltf, ply, stl, off or dae file, a `trimesh.Trimesh`, a `trimesh.Scene` (its
    nodes are placed by their transforms, mirrored ones keep their outside outside), or a tuple (vertices, faces).
    Polygons become fans of triangles. Vertices that no face uses are left out.

    Raises FileNotFoundError for a missing file; ImportError where reading its format takes a package that is not
    installed; MeshError, naming the file where there is one, for a file that cannot
    be read and for a mesh without faces, with coordinates that are not finite, or with an index that no vertex has.
    """
    with errors_name(mesh):
        if isinstance(mesh, (str, os.PathLike)):
            vertices, faces = _read_file(os.fspath(mesh))
        elif is_trimesh(mesh) or is_scene(mesh):
            vertices, faces = _flatten(mesh)
        elif isinstance(mesh, tuple) and len(mesh) == 2:
            vertices, faces = mesh
        else:
            raise MeshError(NOT_A_MESH.format(type(mesh).__name__), "bad_shape")
        return _checked(vertices, faces)


def up_axis_of(path: str | os.PathLike) -> str:
    """The vertical axis of a mesh file, "x", "y" or "z": what it declares itself, else the custom of its format."""
    return declared_up_axis(path) or FILE_UP_AXES[os.path.splitext(os.fspath(path))[1].lower()]


def declared_up_axis(path: str | os.PathLike) -> str | None:
    """The vertical axis, "x", "y" or "z", that a mesh file says it has, or None. Of the formats that are read only dae
    can say (`<up_axis>` of the document's `<asset>`); readers, trimesh among them, leave the vertices as they are.

    Raises OSError for a file that cannot be opened.
    """
    if not os.fspath(path).lower().endswith(".dae"):
        return None
    depth = 0
    try:
        for event, element in ElementTree.iterparse(path, events=("start", "end")):
            depth += event == "start"
            if event == "end":
                name = element.tag.rpartition("}")[2]
                if name == "up_axis" and depth == 3:
                    return {"X_UP": "x", "Y_UP": "y", "Z_UP": "z"}.get((element.text or "").strip())
                if name == "asset" and depth == 2:
                    return None
                depth -= 1
    except (ElementTree.ParseError, ValueError, LookupError):  # damaged, or of an unknown encoding
        pass
    return None


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
    """Nearest of the levels 0..resolution, half to even: (V, 3) in [-0.5, 0.5] -> (V, 3) int64. What lies outside is
    clipped."""
    return np.rint(np.minimum(np.maximum(vertices + 0.5, 0), 1) * resolution).astype(np.int64)


def dequantise(levels: np.ndarray, resolution: int = 128) -> np.ndarray:
    """The coordinates of levels: (V, 3) int64 in 0..resolution -> (V, 3) float64 in [-0.5, 0.5]."""
    return levels / resolution - 0.5


def to_y_up(vertices: np.ndarray, up_axis: str) -> np.ndarray:
    """Turn vertices or levels (V, 3) whose up-axis is `up_axis` so that y is up; winding is kept. Right stays right,
    where that is x in y-up and z-up axes, and -y in x-up ones (COLLADA 1.4, `<up_axis>`)."""
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


def canonicalise(levels: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one form of a quantised mesh that sequences are written from, in the order of PolyGen (arXiv 2002.10880).

    Equal vertices are merged; faces that lost a corner are dropped, and so are all but the first, in the order given,
    of the faces on the same three vertices, whatever their winding; then unused vertices. Vertices are ordered by
    y, then x, then z; each face is rotated, never reversed, so that its lowest vertex comes first; faces are ordered
    by their sorted vertices. (V, 3), (F, 3) -> (V', 3), (F', 3); F' may be 0.
    """
    levels, faces = _merge_vertices(levels, faces)
    faces = faces[_distinct_faces(faces)]
    faces = faces[np.arange(len(faces))[:, None], _ROTATIONS[faces.argmin(axis=1)]]
    return _drop_unused(levels, faces)


def weld(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels (V, 3) and faces (F', 3) of separate triangles `corners` (F, 3 corners, 3) int64.

    Equal corners become one vertex, ordered as by `canonicalise`. Degenerate faces, and all but the first on the same
    three vertices, are dropped; the others keep their order and their corners' order.
    """
    levels, faces = _merge_vertices(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3))
    return _drop_unused(levels, faces[np.sort(_distinct_faces(faces))])


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


def _merge_vertices(levels: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keys = levels @ _VERTEX_KEY
    order = keys.argsort()
    keys = keys[order]
    is_new = np.empty(len(keys), dtype=bool)
    is_new[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=is_new[1:])
    renumbered = np.empty(len(keys), dtype=np.int64)
    renumbered[order] = is_new.cumsum() - 1
    return levels[order[is_new]], renumbered[faces]


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


def _checked(vertices: Any, faces: Any) -> tuple[np.ndarray, np.ndarray]:
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


def is_trimesh(item: Any) -> bool:
    return hasattr(item, "vertices") and hasattr(item, "faces")


def is_scene(item: Any) -> bool:
    return hasattr(item, "geometry") and hasattr(item, "graph")


def _flatten(loaded: Any) -> tuple[np.ndarray, np.ndarray]:
    """The triangles of a Trimesh or of all nodes of a Scene; points, lines and cameras are left out."""
    if not is_scene(loaded):
        return loaded.vertices, loaded.faces
    all_vertices, all_faces, offset = [np.zeros((0, 3))], [np.zeros((0, 3), dtype=np.int64)], 0
    for node in loaded.graph.nodes_geometry:
        transform, name = loaded.graph[node]
        geometry = loaded.geometry[name]
        if not is_trimesh(geometry) or len(geometry.faces) == 0:
            continue
        vertices, faces = np.asarray(geometry.vertices), np.asarray(geometry.faces)
        mirrored = np.linalg.det(transform[:3, :3]) < 0
        all_vertices.append(vertices @ transform[:3, :3].T + transform[:3, 3])
        all_faces.append((faces[:, ::-1] if mirrored else faces) + offset)
        offset += len(vertices)
    return np.concatenate(all_vertices), np.concatenate(all_faces)


def _read_file(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and faces of a file, or MeshError with the reason (without the file's name)."""
    suffix = check_file(path)
    trimesh = import_trimesh()
    with errors_of_reader(path, suffix):
        if suffix == ".off":
            return _read_off(path)
        if suffix in (".glb", ".gltf"):
            _check_gltf(path)
        if suffix == ".ply":
            _check_text_ply(path)
        return _flatten(trimesh.load_scene(path, process=False, skip_materials=True))


def check_file(path: str) -> str:
    """The suffix, in lower case, of a file that may be a mesh by its first bytes. Raises FileNotFoundError, and
    MeshError with the reason (without the file's name)."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in MESH_SUFFIXES:
        raise MeshError(
            f"unknown mesh format {suffix!r}; known are {', '.join(MESH_SUFFIXES)}. Convert others, for example in "
            "Blender: File > Export > glTF 2.0",
            "unknown_format",
        )
    if not os.path.isfile(path):
        raise MeshError("not a file", "not_a_file")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise MeshError("the file is empty", "empty_file")
    if head.startswith(b"version https://git-lfs"):
        raise MeshError("a Git LFS pointer, not the mesh itself; fetch it with `git lfs pull`", "lfs_pointer")
    if suffix == ".glb" and not head.startswith(b"glTF"):
        raise MeshError("not a binary glTF file: it does not begin with glTF", "wrong_format")
    return suffix


@contextmanager
def errors_of_reader(path: str, suffix: str):
    """Turn whatever a reader of mesh files raises into MeshError (without the file's name), but ImportError, with the
    name, and MemoryError, which says nothing of the file."""
    try:
        yield
    except ImportError as error:
        package = READER_PACKAGES.get(suffix)
        how = f"the package {package}: pip install {package}" if package else f"another package ({error})"
        raise ImportError(f"{path}: reading {suffix} files needs {how}") from error
    except MemoryError:
        raise
    except Exception as error:  # each of trimesh's readers raises what its parser happens to raise
        kind = error.kind if isinstance(error, MeshError) else "unreadable"
        if suffix == ".obj" and isinstance(error, IndexError):  # the reader looks vertices up as it goes
            kind = "bad_indices"
        elif isinstance(error, FileNotFoundError):
            kind = "missing_file"
        elif isinstance(error, PermissionError):
            kind = "no_permission"
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise MeshError(f"cannot be read as {suffix[1:]}: {reason}", kind) from error


def _check_text_ply(path: str) -> None:
    """MeshError for a text file with fewer lines than its header promises, which trimesh takes for a smaller mesh."""
    with open(path, "rb") as file:
        header, _, body = file.read().partition(b"end_header")
    if b"format ascii" in header:
        promised = sum(int(count) for count in re.findall(rb"^element \S+ (\d+)", header, re.MULTILINE))
        found = sum(bool(line.strip()) for line in body.splitlines())
        if found < promised:
            raise MeshError(f"it is cut off: {found} lines of data where its header promises {promised}")


def read_gltf_tree(path: str) -> dict[str, Any]:
    """The JSON of a glb or gltf file."""
    with open(path, "rb") as file:
        data = file.read(20)
        if data.startswith(b"glTF"):  # 12 bytes of header, then the length and type of the JSON chunk
            data = file.read(min(int.from_bytes(data[12:16], "little"), os.path.getsize(path)))
        else:
            data += file.read()
    return json.loads(data)


def _check_gltf(path: str) -> None:
    """MeshError for what the glTF format has and trimesh would leave out, or misread, without a word."""
    tree = read_gltf_tree(path)
    for extension in tree.get("extensionsRequired", []):
        if "compression" in extension:
            message = f"its geometry is compressed ({extension}); save it without compression"
            raise MeshError(message, "compressed_geometry")
    for mesh in tree.get("meshes", []):
        for primitive in mesh["primitives"]:
            if primitive.get("mode") == 6:
                raise MeshError("it has triangle fans; save it with separate triangles")
            if tree["accessors"][primitive["attributes"]["POSITION"]].get("normalized"):
                raise MeshError("its positions are normalised integers; save it with floating-point positions")


def read_off_rows(path: str) -> tuple[str, list[list[str]], list[list[str]]]:
    """The header's word of an OFF file, such as "COFF", and the words of the rows of its vertices and of its faces."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = re.sub(r"#.*", "", file.read()).strip()
    header = re.match(r"(ST)?C?N?OFF", text)
    if header is None:
        raise MeshError("it does not begin with OFF", "wrong_format")
    rows = [line.split() for line in text[header.end() :].splitlines() if line.strip()]
    end_of_vertices = 1 + int(rows[0][0])
    end = end_of_vertices + int(rows[0][1])
    if len(rows) < end:
        raise MeshError("it ends early")
    return header[0], rows[1:end_of_vertices], rows[end_of_vertices:end]


def _read_off(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an OFF file. trimesh 5.2 fails where polygons of different sizes meet."""
    _, rows, polygons = read_off_rows(path)
    vertices = np.array([row[:3] for row in rows], dtype=np.float64)
    polygons = [row[1 : 1 + int(row[0])] for row in polygons]
    polygons = [corners for corners in polygons if len(corners) >= 3]  # others are points and lines
    if not polygons:
        return vertices, np.zeros((0, 3), dtype=np.int64)
    corners = np.array([corner for corners in polygons for corner in corners], dtype=np.int64)
    return vertices, triangulate(corners, np.array([len(corners) for corners in polygons], dtype=np.int64))
