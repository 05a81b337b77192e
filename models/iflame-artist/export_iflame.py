"""Meshes as files that other programs open: glb, obj, ply and stl."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from .files_iflame import write_whole
from .format_iflame import UP_AXES
from .mesh_files_iflame import FILE_UP_AXES, import_trimesh, load_mesh
from .mesh_iflame import turn

EXPORT_SUFFIXES = (".glb", ".obj", ".ply", ".stl")
WINDINGS = ("outward", "kept")
PIVOTS = ("ground", "centre")
GENERATOR = "iFlame"
# glTF's own default is bare metal, which is black without surroundings to mirror, and hides the inside of faces.
_MATERIAL = {
    "name": "matte",
    "doubleSided": True,
    "pbrMetallicRoughness": {"baseColorFactor": [0.8, 0.8, 0.8, 1.0], "metallicFactor": 0.0, "roughnessFactor": 0.9},
}


def export_mesh(
    mesh: Any,
    path: str | os.PathLike,
    *,
    up_axis: str = "y",
    winding: str = "outward",
    height: float | None = None,
    pivot: str | None = None,
    normals: bool = False,
    name: str | None = None,
    license: str | None = None,
    extras: dict[str, Any] | None = None,
) -> Path:
    """Writes a mesh for use in other programs, whole or not at all, over a file of that name; returns the path.

    The format follows from the suffix: .glb, .obj, .ply or .stl. Equal vertices are welded (stl has none to share).
    In the file the vertical axis is the one that the format's readers expect: y in glb, as its specification says,
    and in obj (-z is forward, the default of Blender's importer); z in ply and stl, as Blender and slicers take them.

    Args:
        mesh: anything `load_mesh` takes, such as a `trimesh.Trimesh` of `decode_mesh`.
        up_axis: the vertical axis of `mesh`, "y" or "z": that of the tokenizer it comes from.
        winding: "outward" turns each piece of the mesh the right way round, see `wind_outward`; "kept" leaves all
            faces as they are.
        height: the mesh is scaled, about the origin, so that it is so high: metres, in glb by its specification, in
            the other formats where a unit is taken for one. By default it keeps its size.
        pivot: where the origin is put, about which programs turn and place the mesh: "ground" under the centre of the
            mesh's bounding box, at its lowest height; "centre" at the centre of that box. By default it stays.
        normals: write smooth normals of the vertices. Without them programs shade each face flat, which suits meshes
            of few faces. (stl always has the normals of its faces.)
        name: of the object; by default the file's name without its suffix.
        license: noted in the file, for example "cc-by-4.0"; stl has no place for it.
        extras: names and values, as JSON has them, for the glb's `asset.extras`; no other format has a place for them.

    Raises ValueError for a mesh that `load_mesh` refuses or that has no height to scale, and for an unknown format,
    axis, winding, height or pivot; OSError where the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in EXPORT_SUFFIXES:
        raise ValueError(f"{path}: unknown format {suffix!r} to write; known are {', '.join(EXPORT_SUFFIXES)}")
    if up_axis not in UP_AXES:
        raise ValueError(f"up_axis must be one of {', '.join(UP_AXES)}, got {up_axis!r}")
    if winding not in WINDINGS:
        raise ValueError(f"winding must be one of {', '.join(WINDINGS)}, got {winding!r}")
    if height is not None and not 0 < height < float("inf"):
        raise ValueError(f"height must be a positive number of metres, got {height}")
    if pivot not in (None, *PIVOTS):
        raise ValueError(f"pivot must be one of {', '.join(PIVOTS)}, got {pivot!r}")
    vertices, faces = load_mesh(mesh)
    welded, which = np.unique(vertices, axis=0, return_inverse=True)
    faces = which.reshape(-1)[faces]
    faces = faces[(faces != np.roll(faces, 1, axis=1)).all(axis=1)]
    if len(faces) == 0:
        raise ValueError("every face of the mesh has two equal corners")
    if winding == "outward":
        faces = wind_outward(welded, faces)
    vertices = _placed(turn(welded, up_axis, FILE_UP_AXES[suffix]), "xyz".index(FILE_UP_AXES[suffix]), height, pivot)
    piece = import_trimesh().Trimesh(vertices=vertices, faces=faces, process=False)
    name = _one_line(name or path.stem)
    notes = [GENERATOR, name] + ([f"licence: {_one_line(license)}"] if license else [])
    write = {".glb": _glb, ".obj": _obj, ".ply": _ply, ".stl": _stl}[suffix]
    write_whole(path, write(piece, name, notes, normals, license, extras))
    return path


def _placed(vertices: np.ndarray, up: int, height: float | None, pivot: str | None) -> np.ndarray:
    """Vertices (V, 3) of a mesh with its height and its origin as `export_mesh` says, `up` the vertical column."""
    if height is not None:
        own = np.ptp(vertices[:, up])
        if own == 0:
            raise ValueError(f"the mesh lies flat: it cannot be scaled to a height of {height}")
        vertices = vertices * (height / own)
    if pivot is not None:
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        origin = low / 2 + high / 2
        if pivot == "ground":
            origin[up] = low[up]
        vertices = vertices - origin
    return vertices


def wind_outward(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces (F, 3) int64 wound counter-clockwise seen from outside, as far as an outside can be told.

    Of each connected piece of the mesh whose faces contradict each other, the fewer (by area) are reversed. Then a
    closed piece that is inside out is turned, unless it lies within the bounding box of another closed piece, where
    it may be a hollow. Open pieces have no outside: beyond the first step they stay as they are.
    """
    trimesh = import_trimesh()
    mesh = trimesh.Trimesh(vertices=vertices, faces=faces, process=False)
    trimesh.repair.fix_winding(mesh)
    wound = np.array(mesh.faces)
    pieces = trimesh.graph.connected_components(mesh.face_adjacency, nodes=np.arange(len(faces)))
    pieces = [np.asarray(piece) for piece in pieces]

    was_reversed = (_smallest_first(wound) != _smallest_first(faces)).any(axis=1)
    closed = []
    for piece in pieces:
        areas = mesh.area_faces[piece]
        if areas[was_reversed[piece]].sum() > areas.sum() / 2:
            wound[piece] = wound[piece, ::-1]
        edges = np.concatenate([wound[piece][:, pair] for pair in ([0, 1], [1, 2], [2, 0])])
        is_tight, is_wound = trimesh.graph.is_watertight(edges)
        if is_tight and is_wound:
            corners = vertices[wound[piece]]  # (F, 3 corners, 3)
            closed.append((piece, corners.min(axis=(0, 1)), corners.max(axis=(0, 1)), _volume(corners)))
    for number, (piece, low, high, volume) in enumerate(closed):
        within = any(
            (other_low <= low).all() and (high <= other_high).all()
            for other, (_, other_low, other_high, _) in enumerate(closed)
            if other != number
        )
        if volume < 0 and not within:
            wound[piece] = wound[piece, ::-1]
    return wound


def _smallest_first(faces: np.ndarray) -> np.ndarray:
    places = (faces.argmin(axis=1)[:, None] + np.arange(3)) % 3
    return np.take_along_axis(faces, places, axis=1)


def _volume(corners: np.ndarray) -> float:
    """Volume within a closed surface of triangles (F, 3 corners, 3), negative where they look inwards."""
    a, b, c = np.moveaxis(corners - corners.mean(axis=(0, 1)), 1, 0)
    return float((a * np.cross(b, c)).sum() / 6)


def _one_line(text: str) -> str:
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", str(text)).strip()


def _glb(piece: Any, name: str, notes: list[str], normals: bool, license: str | None, extras: dict | None) -> bytes:
    def finish(tree: dict) -> None:
        tree["asset"]["generator"] = GENERATOR
        if license:
            tree["asset"]["copyright"] = _one_line(license)
        described = {"name": name} | ({"license": _one_line(license)} if license else {}) | (extras or {})
        tree["asset"]["extras"] = described
        tree["materials"] = [_MATERIAL]
        for mesh in tree["meshes"]:
            for primitive in mesh["primitives"]:
                primitive["material"] = 0

    scene = import_trimesh().Scene()
    scene.add_geometry(piece, node_name=name, geom_name=name)
    return scene.export(file_type="glb", include_normals=normals, tree_postprocessor=finish)


def _obj(piece: Any, name: str, notes: list[str], normals: bool, *_: Any) -> bytes:
    piece.metadata["name"] = name.replace(" ", "_")  # a blank ends the name in some readers
    text = piece.export(file_type="obj", include_normals=normals, header="\n# ".join(notes))
    return (text.rstrip("\n") + "\n").encode()


def _ply(piece: Any, name: str, notes: list[str], normals: bool, *_: Any) -> bytes:
    data = piece.export(file_type="ply", vertex_normal=normals)
    start, body = data.split(b"element vertex", 1)
    start = re.sub(rb"comment [^\n]*\n", b"", start)  # trimesh's own
    comments = "".join(f"comment {note}\n" for note in notes).encode("ascii", "replace")  # the header is ASCII
    return start + comments + b"element vertex" + body


def _stl(piece: Any, name: str, notes: list[str], *_: Any) -> bytes:
    data = piece.export(file_type="stl")
    header = ", ".join(notes).encode("ascii", "replace")[:80]  # of 80 bytes; must not begin with "solid"
    return header.ljust(80) + data[80:]
