"""Mesh files that commands are given: which they are, what is in them."""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from iflame_cli.errors import CommandError
from iflame_hf.attributes import lost_attributes
from iflame_hf.export_iflame import GENERATOR
from iflame_hf.mesh_files_iflame import MESH_SUFFIXES, import_trimesh, load_mesh, read_gltf_tree, up_axis_of


class MeshFile(NamedTuple):
    """What was read of a file."""

    path: Path
    vertices: np.ndarray  # (V, 3) float64, in the axes and units of the file
    faces: np.ndarray  # (F, 3) int64
    up_axis: str
    faces_in_file: int  # more than F where the mesh was simplified
    lost: list[str]  # what it holds besides triangles, as `lost_attributes` names it


def mesh_files(sources: list[Path]) -> list[Path]:
    """
    The files given and, for a folder, all mesh files in it by their names; none twice.

    Raises:
        CommandError: there is no such file or folder, or no mesh in a folder.
    """
    found = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.iterdir() if path.suffix.lower() in MESH_SUFFIXES)
            if not inside:
                raise CommandError(f"{source} holds no mesh files ({', '.join(MESH_SUFFIXES)})")
            found += inside
        elif source.exists():
            found.append(source)
        else:
            raise CommandError(f"{source}: no such file or folder")
    return list(dict.fromkeys(found))


def read_mesh(path: Path, up_axis: str | None = None, decimate: int | None = None) -> MeshFile:
    """
    Args:
        up_axis: the vertical axis of the file, by default the one it declares, or that of its format.
        decimate: most faces; a mesh with more is simplified.

    Raises:
        ValueError: the file is no usable mesh, or cannot be simplified so far, naming it.
        FileNotFoundError: there is no such file.
    """
    vertices, faces = load_mesh(path)
    count = len(faces)
    if decimate is not None and count > decimate:
        vertices, faces = simplify(vertices, faces, decimate)
        if not 0 < len(faces) <= decimate:
            raise ValueError(
                f"{path}: its {count:,} faces cannot be simplified to {decimate:,}: {len(faces):,} are left"
            )
    return MeshFile(path, vertices, faces, up_axis or up_axis_of(path), count, _lost(path))


def _lost(path: Path) -> list[str]:
    """`lost_attributes`, without the material that every glb of this project has, since a result gets it again."""
    lost = lost_attributes(path)
    if path.suffix.lower() == ".glb" and read_gltf_tree(str(path))["asset"].get("generator") == GENERATOR:
        return [name for name in lost if name != "materials"]
    return lost


def simplify(vertices: np.ndarray, faces: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V, 3) and faces (F, 3) of the mesh with its edges collapsed, those first that change it least, until
    about `most` faces are left."""
    _, first, which = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    mesh = import_trimesh().Trimesh(vertices[first], which.reshape(-1)[faces], process=False)
    simple = mesh.simplify_quadric_decimation(face_count=most)
    return np.array(simple.vertices, dtype=np.float64), np.array(simple.faces, dtype=np.int64)


def check_decimation(most: int | None) -> None:
    """Raises CommandError where meshes are to be simplified and the package that does it is missing."""
    if most is not None and find_spec("fast_simplification") is None:
        raise CommandError("--decimate needs the package fast-simplification: pip install fast-simplification")
