"""Meshes from files and from objects of trimesh, as the arrays of `mesh_iflame`."""

import json
import os
import re
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import numpy as np

from .mesh_errors_iflame import NOT_A_MESH, MeshError, errors_name
from .mesh_iflame import checked_arrays, triangulate

MESH_SUFFIXES = (".obj", ".glb", ".gltf", ".ply", ".stl", ".off", ".dae")
READER_PACKAGES = {".dae": "pycollada", ".zae": "pycollada"}  # with which trimesh reads these files
# The vertical axis of a file that does not say: of glTF by specification, of dae by its default, of the others as
# Blender and slicers write and read them. `up_axis_of` looks into the file too.
FILE_UP_AXES = {".glb": "y", ".gltf": "y", ".obj": "y", ".off": "y", ".dae": "y", ".ply": "z", ".stl": "z"}


def import_trimesh():
    """The trimesh package, imported when it is first needed; ImportError with advice when it is missing."""
    try:
        import trimesh
    except ImportError as error:
        raise ImportError("mesh files and Trimesh objects need the package trimesh: pip install trimesh") from error
    return trimesh


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
        return checked_arrays(vertices, faces)


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


def read_off_lines(path: str) -> tuple[str, list[list[str]], list[list[str]]]:
    """The first word of an OFF file, such as "COFF", and the words in the lines of its vertices and of its faces."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = re.sub(r"#.*", "", file.read()).strip()
    header = re.match(r"(ST)?C?N?OFF", text)
    if header is None:
        raise MeshError("it does not begin with OFF", "wrong_format")
    lines = [line.split() for line in text[header.end() :].splitlines() if line.strip()]
    end_of_vertices = 1 + int(lines[0][0])
    end = end_of_vertices + int(lines[0][1])
    if len(lines) < end:
        raise MeshError("it ends early")
    return header[0], lines[1:end_of_vertices], lines[end_of_vertices:end]


def _read_off(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and triangles of an OFF file. trimesh 5.2 fails where polygons of different sizes meet."""
    _, points, polygons = read_off_lines(path)
    vertices = np.array([words[:3] for words in points], dtype=np.float64)
    polygons = [words[1 : 1 + int(words[0])] for words in polygons]
    polygons = [corners for corners in polygons if len(corners) >= 3]  # others are points and lines
    if not polygons:
        return vertices, np.zeros((0, 3), dtype=np.int64)
    corners = np.array([corner for corners in polygons for corner in corners], dtype=np.int64)
    return vertices, triangulate(corners, np.array([len(corners) for corners in polygons], dtype=np.int64))
