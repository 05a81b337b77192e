"""From a mesh file, or arrays, to what the data set keeps. Runs in processes that may be stopped at any time."""

import hashlib
import json
import os
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import trimesh

from iflame_hf.mesh_files_iflame import MESH_SUFFIXES, declared_up_axis, load_mesh
from iflame_hf.mesh_iflame import canonicalise, normalise, quantise, to_y_up
from training.prepare.items import printable
from training.prepare.rejection import Rejected, as_rejected

try:
    import fast_simplification
    from scipy.spatial import cKDTree
except ImportError:
    fast_simplification = None

_MAX_LICENSE_LENGTH = 200
# A mesh with more than this many times the faces allowed is rejected before its repeated and degenerate faces are
# dropped, which would take long and hardly ever leave few enough.
_MAX_FACES_FACTOR = 8
# The distance of two surfaces is that of so many points of each to so many points of the other.
_NUM_PROBES, _NUM_SAMPLES = 4_000, 50_000


class Recipe(NamedTuple):
    """How meshes are chosen and changed; the options of prepare_data of the same names."""

    min_faces: int
    max_faces: int
    up_axis: str = "y"
    decimate: bool = False
    max_deviation: float = 0.05
    resolution: int = 128


class Prepared(NamedTuple):
    """A mesh as the data set keeps it."""

    vertices: np.ndarray  # (V, 3) float32, y up, the box centred at 0, its longest side 1; no two equal
    faces: np.ndarray  # (F, 3) int32, no two on the same vertices
    num_faces_q: int  # faces after quantisation
    digest: bytes  # equal for meshes that are equal after quantisation
    license: str | None  # what the file itself says


def make_handler(recipe: Recipe) -> Any:
    """What answers the requests of a worker process: a payload, as an [`Item`] has it, becomes a [`Prepared`]."""
    return lambda payload: prepare(payload, recipe)


def can_decimate() -> bool:
    """Whether the packages that `decimate` needs are installed."""
    return fast_simplification is not None


def prepare(payload: str | tuple[Any, Any], recipe: Recipe) -> Prepared:
    """
    Read, orient, normalise, clean and measure one mesh: a path, or a tuple (vertices, faces).

    Raises [`Rejected`], whose reason does not name the file, or MemoryError.
    """
    license, up_axis = None, recipe.up_axis
    try:
        if isinstance(payload, str):
            _check_file(payload)
            if payload.lower().endswith((".glb", ".gltf")):
                license = _check_gltf(payload)
            up_axis = declared_up_axis(payload) or up_axis
        vertices, faces = _load(payload)
        vertices = normalise(to_y_up(vertices, up_axis)).astype(np.float32)
    except (MemoryError, Rejected):
        raise
    except Exception as error:
        raise as_rejected(error, payload if isinstance(payload, str) else "") from error
    is_far_too_large = not recipe.decimate and len(faces) > _MAX_FACES_FACTOR * recipe.max_faces
    if not is_far_too_large:
        vertices, faces = clean(vertices, faces)
    if recipe.decimate and len(faces) > recipe.max_faces:
        vertices, faces = decimate(vertices, faces, recipe.max_faces, recipe.max_deviation)
    if len(faces) > recipe.max_faces:
        raise Rejected("too many faces", f"it has {len(faces)} faces, more than {recipe.max_faces}")
    quantised, corners = canonicalise(quantise(vertices.astype(np.float64), recipe.resolution), faces)
    if len(corners) < recipe.min_faces:
        raise Rejected("too few faces", f"quantisation leaves {len(corners)} faces of {len(faces)}")
    sides = quantised[corners[:, 1:]] - quantised[corners[:, :1]]
    if not np.cross(sides[:, 0], sides[:, 1]).any():
        raise Rejected("flat", "its faces have no area")
    digest = hashlib.blake2b(digest_size=16)
    for array in (quantised, corners):
        digest.update(np.array(array.shape, dtype="<i8").tobytes() + array.astype("<i4").tobytes())
    return Prepared(vertices, faces.astype(np.int32), len(corners), digest.digest(), license)


def clean(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge equal vertices; drop faces with a repeated corner, all but the first of the faces on the same three
    vertices, and unused vertices. Faces keep their order. (V, 3), (F, 3) -> (V', 3), (F', 3)."""
    first, number = _distinct_rows(vertices)
    vertices, faces = vertices[first], number[faces]
    corners = np.sort(faces, axis=1)
    first = np.sort(_distinct_rows(corners)[0])
    corners = corners[first]
    faces = faces[first[(corners[:, 0] < corners[:, 1]) & (corners[:, 1] < corners[:, 2])]]
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    return vertices[used], (used.cumsum() - 1)[faces]


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows (N, 3): the index of the first of each M equal ones (M,), and the number of each row among those (N,).
    Many times faster than numpy.unique(axis=0)."""
    order = np.lexsort(rows.T)
    ordered = rows[order]
    is_new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    number = np.empty(len(rows), dtype=np.int64)
    number[order] = is_new.cumsum() - 1
    return order[is_new], number


def decimate(
    vertices: np.ndarray, faces: np.ndarray, max_faces: int, max_deviation: float
) -> tuple[np.ndarray, np.ndarray]:
    """
    At most `max_faces` faces of nearly the same surface, (V, 3), (F, 3) -> (V', 3), (F', 3): first edges are collapsed
    that lie in a plane, which changes nothing, then those that change least (Garland and Heckbert 1997, by
    fast-simplification).

    Raises [`Rejected`] if that cannot be done, or moves the surface by more than `max_deviation` of its longest side.
    """
    flat_vertices, flat_faces = fast_simplification.simplify(vertices, faces.astype(np.int32), lossless=True)
    new_vertices, new_faces = clean(flat_vertices.astype(np.float32), flat_faces)
    if len(new_faces) > max_faces:
        new_vertices, new_faces = fast_simplification.simplify(
            new_vertices, new_faces.astype(np.int32), target_count=max_faces
        )
        new_vertices, new_faces = clean(new_vertices.astype(np.float32), new_faces)
    if len(new_faces) == 0 or len(new_faces) > max_faces or not np.isfinite(new_vertices).all():
        raise Rejected("not decimated", f"{len(faces)} faces cannot be reduced to {max_faces}")
    moved = deviation((vertices, faces), (new_vertices, new_faces))
    if moved > max_deviation:
        raise Rejected(
            "not decimated",
            f"with {len(new_faces)} of {len(faces)} faces the surface moves by {moved:.3f} of its longest side",
        )
    return new_vertices, new_faces


def deviation(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> float:
    """The Hausdorff distance of two surfaces, each (vertices (V, 3), faces (F, 3)) normalised, between the vertices
    and some points of each and many points of the other: up to about 0.02 more than the true one."""
    trees, probes = [], []
    for vertices, faces in (one, other):
        mesh = trimesh.Trimesh(vertices, faces, process=False)
        points, _ = trimesh.sample.sample_surface(mesh, _NUM_SAMPLES, seed=0)
        trees.append(cKDTree(np.concatenate([points, vertices])))
        probes.append(np.concatenate([points[:_NUM_PROBES], vertices]))
    return float(max(trees[1].query(probes[0])[0].max(), trees[0].query(probes[1])[0].max()))


def _load(payload: str | tuple[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(payload, str) and not payload.lower().endswith(MESH_SUFFIXES):
        return load_mesh(trimesh.load_scene(payload, process=False, skip_materials=True))
    return load_mesh(payload)


def _check_file(path: str) -> None:
    with open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        raise Rejected("wrong format", "a web page, not a mesh: the download went wrong")


def _check_gltf(path: str) -> str | None:
    """The licence in a glTF file, None without one. Raises [`Rejected`] for a file that leads to other folders."""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
            if head.startswith(b"glTF"):
                text = file.read(min(int.from_bytes(head[12:16], "little"), os.path.getsize(path)))
            else:
                text = head + file.read()
        tree = json.loads(text)
        buffers = [buffer.get("uri") for buffer in tree.get("buffers", [])]
        license = tree.get("asset", {}).get("extras", {}).get("license")
    except (ValueError, AttributeError, RecursionError):
        return None  # the reader proper says what is wrong with it
    for uri in buffers:
        if isinstance(uri, str) and not uri.startswith("data:"):
            target = os.path.normpath(unquote(uri).replace("\\", "/"))
            if os.path.isabs(target) or target.startswith("..") or ":" in target:
                raise Rejected("unsafe name", f"its buffer {uri!r} is not in its own folder")
    return printable(license[:_MAX_LICENSE_LENGTH]) if isinstance(license, str) and license else None
