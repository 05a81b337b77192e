"""How good generated meshes are as a set: distances of point clouds, what is made of them, and topology.

    clouds = np.stack([sample_points(vertices, faces, 2048, seed=0) for vertices, faces in meshes])
    clouds = normalised(clouds, "longest side")
    between = chamfer_distances(clouds, references)
    coverage(between), minimum_matching_distance(between), jensen_shannon_divergence(clouds, references)
    one_nearest_neighbour_accuracy(chamfer_distances(clouds), chamfer_distances(references), between)

COV, MMD and JSD are those of Achlioptas et al. (arXiv 1707.02392), 1-NNA is that of Lopez-Paz and Oquab (arXiv
1610.06545) as PointFlow (Yang et al., arXiv 1906.12320) applies it to shapes. Figures compare only at the same number
of points, the same number of meshes and the same scale. N, M clouds, P, Q points of a cloud, V vertices, F faces.
"""

import importlib.util
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import trimesh

from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_iflame import bounding_box, checked_arrays, denormalise, normalise, quantise

# Squared distances held at once: as many as fit the caches of a CPU, and as many as keep another device busy.
_CPU_BLOCK, _DEVICE_BLOCK = 2**19, 2**26
_LEAST_AREA = 1e-12  # of a mesh whose longest side is 1: below it, rounding is all that a line has
_LEAST_HEIGHT = 1e-9  # of a triangle over its longest side, as a share of that side
SMALL_ANGLE_DEGREES = 1.0


class Topology(NamedTuple):
    """What `topology` finds; the shares are 0 where there is no edge."""

    faces: int
    edges: int  # vertex pairs that at least one face runs along
    closed: bool  # every edge has exactly two faces
    manifold_edges: float  # share of the edges that have exactly two faces
    boundary_edges: float  # share of the edges that have one face
    flipped_edges: int  # edges of exactly two faces that run along them in the same direction
    repeated_faces: int  # on the same three vertices as an earlier face, whatever their winding
    degenerate_faces: int  # two corners in one place, or all three on a line
    pieces: int  # sets of faces connected by shared edges
    small_angles: float  # share of the faces with an angle below SMALL_ANGLE_DEGREES; degenerate ones are among them


def sample_points(vertices: Any, faces: Any, count: int, seed: int) -> np.ndarray:
    """
    Points (count, 3) float64 spread evenly over the surface, in the units of `vertices` (V, 3), by
    `trimesh.sample.sample_surface`. The same arguments give the same points.

    Raises MeshError, a ValueError, for arrays that are no mesh and for a mesh without an area; ValueError for a count
    below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 point, got {count}")
    vertices, faces = checked_arrays(vertices, faces)
    mesh = trimesh.Trimesh(normalise(vertices), faces, process=False)
    if not mesh.area > _LEAST_AREA:
        raise MeshError("no face has an area, so that no points can be sampled", "flat")
    points, _ = trimesh.sample.sample_surface(mesh, count, seed=seed)
    return denormalise(np.asarray(points), bounding_box(vertices))


def normalised(points: Any, how: str) -> Any:
    """
    Clouds (..., P, 3) in any unit, each moved and scaled by itself; an array gives an array, a tensor a tensor.

    Args:
        how: "unit sphere": the mean point at 0, the farthest point at distance 1, as PointNet (arXiv 1612.00593) has
            it. "longest side": the bounding box's centre at 0, its longest side 1, as `iflame_hf` normalises meshes;
            all points are in [-0.5, 0.5].

    Raises ValueError for other words, for shapes that are no clouds, for NaN and for points that are all in one place.
    """
    clouds = _checked(points, "points")
    low, high = clouds.amin(dim=-2, keepdim=True), clouds.amax(dim=-2, keepdim=True)
    if not (low < high).any(dim=-1).all():
        raise ValueError("all points of a cloud lie in one place: there is no size to scale by")
    if how == "unit sphere":
        clouds = clouds - clouds.mean(dim=-2, keepdim=True)
        clouds = clouds / clouds.norm(dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    elif how == "longest side":
        clouds = (clouds - (low / 2 + high / 2)) / (high - low).amax(dim=-1, keepdim=True)
    else:
        raise ValueError(f"how must be 'unit sphere' or 'longest side', got {how!r}")
    return clouds if isinstance(points, torch.Tensor) else clouds.numpy()


@torch.no_grad()
def chamfer_distances(a: Any, b: Any = None, block_size: int | None = None) -> Any:
    """
    The chamfer distance of every cloud of `a` (N, P, 3) to every cloud of `b` (M, Q, 3): (N, M), in squared units.

    It is the mean squared distance of the points of one to the nearest point of the other, plus the same the other way
    round: that of PointFlow with means in place of sums. Coordinates are subtracted before anything is squared:
    |x|^2 + |y|^2 - 2 xy would lose in float32 what distances of near points consist of.

    Args:
        a: an array or a tensor, on whatever device. float64 is computed in float64, all else in float32.
        b: as `a`, or None for `a` itself: then each pair is computed once.
        block_size: the most pairs of points looked at together; they take two numbers of memory each. None: 2**19 on a
            CPU, whose caches they fit, 2**26 (0.5 GiB) elsewhere. The larger of one point's Q pairs and this is taken.
            On CUDA, with Triton, None compiles kernels that keep no pair.

    Returns:
        A tensor, without gradients, if `a` is one, else an array; of the type computed in.

    Raises ValueError for other shapes, empty sets, NaN, clouds on two devices and a block_size below 1.
    """
    first, second, is_same = _checked_pair(a, b)
    if block_size is None and first.device.type == "cuda" and importlib.util.find_spec("triton"):
        return _like(a, _matrix(first, second, is_same, chamfer_compiled()))
    if block_size is None:
        block_size = _CPU_BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    num_points, num_others = first.shape[2], second.shape[2]
    rows = min(num_points, max(1, block_size // num_others))
    clouds = max(1, block_size // (rows * num_others))

    def one_to_all(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        return torch.cat([_chamfer(cloud, part, rows) for part in others.split(clouds)])

    return _like(a, _matrix(first, second, is_same, one_to_all))


@torch.no_grad()
def earth_movers_distances(a: Any, b: Any = None) -> Any:
    """
    The earth mover's distance of every cloud of `a` (N, P, 3) to every cloud of `b` (M, P, 3): (N, M), in units.

    It is the mean distance, not squared, of the points of one to those of the other under the best one-to-one
    assignment: that of Achlioptas et al. and of PointFlow, with means in place of sums. Their code approximates the
    assignment; SciPy's `linear_sum_assignment` is exact and slow: on the CPU, in float64, its time grows with P^3.

    Args, Returns: as those of `chamfer_distances`.

    Raises ValueError as `chamfer_distances` does, and for clouds of different numbers of points; ImportError without
    SciPy.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("earth_movers_distances needs one more package: pip install scipy") from error
    first, second, is_same = _checked_pair(a, b)
    if first.shape[2] != second.shape[2]:
        raise ValueError(
            f"the earth mover's distance is of clouds of as many points, got {first.shape[2]} in a and "
            f"{second.shape[2]} in b"
        )

    def one_to_all(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        cloud, distances = cloud.double().cpu(), []
        for other in others.double().cpu():
            costs = _squared_distances(cloud, other[None])[0].sqrt().numpy()
            distances.append(costs[linear_sum_assignment(costs)].mean())
        return torch.tensor(distances)

    return _like(a, _matrix(first, second, is_same, one_to_all))


def coverage(distances: Any) -> float:
    """
    COV (Achlioptas et al.): the share of the references that are the nearest one to at least one sample; of
    equally near ones the first. Higher is better; 1 for a set compared with itself.

    Args:
        distances: (samples, references), an array or a tensor.

    Raises ValueError for another shape, an empty set, NaN or a negative distance.
    """
    distances = _checked_distances(distances, "distances")
    return len(np.unique(distances.argmin(axis=1))) / distances.shape[1]


def minimum_matching_distance(distances: Any) -> float:
    """
    MMD (Achlioptas et al.): the distance of a reference to its nearest sample, averaged over references, in
    the unit of the distances. Lower is better.

    Args, Raises: as those of `coverage`.
    """
    return float(_checked_distances(distances, "distances").min(axis=0).mean())


def one_nearest_neighbour_accuracy(ss: Any, rr: Any, sr: Any) -> float:
    """
    1-NNA (Lopez-Paz and Oquab; PointFlow): how often the nearest neighbour of a shape, itself left out,
    tells whether it is a sample or a reference. 0.5 is best: samples cannot be told from references. 1: always, 0: the
    samples are copies.

    A shape as near to one of its own kind as to one of the other counts half, so that no order of the shapes matters.

    Args:
        ss, rr, sr: distances, each (S, S), of samples to samples, references to references, samples to references.
            The diagonals of the first two are not looked at.

    Raises ValueError for other shapes, so also for sets of different sizes, where 0.5 would mean nothing; for sets of
    fewer than two; for NaN and for negative distances.
    """
    ss, rr, sr = (_checked_distances(each, name) for each, name in ((ss, "ss"), (rr, "rr"), (sr, "sr")))
    size = len(sr)
    if any(each.shape != (size, size) for each in (ss, rr, sr)):
        raise ValueError(
            f"ss, rr and sr must all be of as many samples as references, got {ss.shape}, {rr.shape} and {sr.shape}"
        )
    if size < 2:
        raise ValueError("leaving one out takes at least two samples and two references, got one of each")
    itself = np.diag(np.full(size, np.inf))
    own = np.concatenate([(ss + itself).min(axis=1), (rr + itself).min(axis=1)])
    other = np.concatenate([sr.min(axis=1), sr.min(axis=0)])
    return float(np.where(own == other, 0.5, own < other).mean())


def jensen_shannon_divergence(points_a: Any, points_b: Any, resolution: int = 28) -> float:
    """
    JSD (Achlioptas et al.): how differently two sets of clouds fill the unit cube, in bits (logarithms to
    base 2): 0 for the same distribution, 1 for sets that share no cell. Lower is better.

    The points of all clouds of a set are counted in the cells around `resolution` points a side, the outermost on the
    cube's sides, as in the code of the paper without its cut to a sphere.

    Args:
        points_a: (..., 3) in [-0.5, 0.5], as `normalised(..., "longest side")` gives them; an array or a tensor.
        points_b: as `points_a`, of any number of points.

    Raises ValueError for other shapes, empty sets, NaN, points outside of the cube and a resolution below 2.
    Memory grows with the third power of the resolution.
    """
    if resolution < 2:
        raise ValueError(f"resolution must be at least 2 cells a side, got {resolution}")
    cells = []
    for points, name in ((points_a, "points_a"), (points_b, "points_b")):
        points = _checked(points, name, num_dims=1).double().cpu().numpy().reshape(-1, 3)
        if (farthest := max(points.max(), -points.min())) > 0.5 + 1e-6:
            raise ValueError(f"{name} must lie in [-0.5, 0.5], got one at {farthest:.6g}: normalise by 'longest side'")
        cells.append(quantise(points, resolution - 1) @ np.array([resolution**2, resolution, 1]))
    shares = [np.bincount(each, minlength=resolution**3) / len(each) for each in cells]
    middle = (shares[0] + shares[1]) / 2
    divergences = [(each[each > 0] * np.log2(each[each > 0] / middle[each > 0])).sum() for each in shares]
    return float(min(max(sum(divergences) / 2, 0.0), 1.0))


def topology(vertices: Any, faces: Any) -> Topology:
    """
    What is sound and what is not about a mesh of vertices (V, 3) in any unit and faces (F, 3).

    Vertices must be welded: two in one place are two, and their faces do not touch. Those of `decode_mesh` are.
    A face with the same vertex twice counts as degenerate; it has no edge and is in no piece. `closed` is what trimesh
    calls watertight, and without flipped edges the winding is what trimesh calls consistent.

    Raises MeshError, a ValueError, for arrays that are no mesh, one without faces too, and for vertices in one point.
    """
    return topologies([(vertices, faces)])[0]


def topologies(meshes: Iterable[tuple[Any, Any]]) -> list[Topology]:
    """
    `topology` of each of several meshes, (vertices, faces), all at once: for small ones in a third of the time.

    Raises MeshError as `topology` does, with the mesh's place among them where there are several.
    """
    meshes = list(meshes)
    corners, parts, first = [], [], 0
    for index, mesh in enumerate(meshes):
        try:
            vertices, faces = checked_arrays(*mesh)
            corners.append(normalise(vertices)[faces])
        except MeshError as error:
            raise (error.after(f"mesh {index}: ") if len(meshes) > 1 else error) from error
        parts.append(faces + first)  # vertices are numbered on, so that no two meshes share one
        first += len(vertices)
    if not meshes:
        return []
    faces = np.concatenate(parts)
    mesh_of = np.repeat(np.arange(len(meshes)), [len(each) for each in parts])
    degenerate, smallest = _shapes(np.concatenate(corners))
    small = smallest < np.radians(SMALL_ANGLE_DEGREES)

    def count(mesh_of: np.ndarray, which: np.ndarray) -> list[int]:
        return np.bincount(mesh_of[which], minlength=len(meshes)).tolist()

    is_sound = (faces != np.roll(faces, 1, axis=1)).all(axis=1)
    sound, mesh_of_sound = faces[is_sound], mesh_of[is_sound]
    edges, face_of = trimesh.geometry.faces_to_edges(sound, return_index=True)
    # (3 F',): which edge each side of a face is, and whether the face runs from its lower to its higher vertex
    distinct, edge_of = np.unique(edges.min(axis=1) * first + edges.max(axis=1), return_inverse=True)
    edge_of, is_upward = edge_of.ravel(), edges[:, 0] < edges[:, 1]
    num_faces = np.bincount(edge_of, minlength=len(distinct))
    num_upward = np.bincount(edge_of[is_upward], minlength=len(distinct))
    mesh_of_edge = np.empty(len(distinct), dtype=np.int64)
    mesh_of_edge[edge_of] = mesh_of_sound[face_of]
    order = edge_of.argsort(kind="stable")
    follows = edge_of[order][1:] == edge_of[order][:-1]
    links = face_of[np.stack([order[:-1], order[1:]], axis=1)[follows]]
    pieces = trimesh.graph.connected_components(links, nodes=np.arange(len(sound)))
    ordered = np.sort(sound, axis=1)
    by_corners = np.lexsort(ordered.T)
    repeats = by_corners[1:][(ordered[by_corners[1:]] == ordered[by_corners[:-1]]).all(axis=1)]
    columns = {
        "faces": [len(each) for each in parts],
        "edges": count(mesh_of_edge, np.arange(len(distinct))),
        "manifold": count(mesh_of_edge, num_faces == 2),
        "boundary": count(mesh_of_edge, num_faces == 1),
        "flipped": count(mesh_of_edge, (num_faces == 2) & (num_upward != 1)),
        "repeated": count(mesh_of_sound, repeats),
        "degenerate": count(mesh_of, degenerate),
        "pieces": count(mesh_of_sound, np.array([each[0] for each in pieces], dtype=np.int64)),
        "small": count(mesh_of, small),
    }
    found = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    return [
        Topology(
            faces=each["faces"],
            edges=each["edges"],
            closed=each["edges"] > 0 and each["manifold"] == each["edges"],
            manifold_edges=each["manifold"] / max(each["edges"], 1),
            boundary_edges=each["boundary"] / max(each["edges"], 1),
            flipped_edges=each["flipped"],
            repeated_faces=each["repeated"],
            degenerate_faces=each["degenerate"],
            pieces=each["pieces"],
            small_angles=each["small"] / each["faces"],
        )
        for each in found
    ]


def mean_topology(meshes: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """
    The fields of `Topology` averaged over meshes, each (vertices, faces): `closed` is the share of closed meshes, and
    each mesh counts the same, however many faces it has.

    Raises MeshError as `topology` does, with the mesh's place in the set; ValueError for an empty set.
    """
    found = []
    for index, (vertices, faces) in enumerate(meshes):
        try:
            found.append(topology(vertices, faces))
        except MeshError as error:
            raise error.after(f"mesh {index}: ") from error
    if not found:
        raise ValueError("there is no mesh to average over")
    return dict(zip(Topology._fields, np.mean(found, axis=0).tolist(), strict=True))


def _shapes(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of triangles (F, 3 corners, 3): which are degenerate, (F,) bool, and their smallest angles (F,) in radians."""
    sides = np.roll(corners, -1, axis=1) - corners
    doubled_area = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)
    # at each corner, between the side from it and the one to it
    cosines = -(sides * np.roll(sides, 1, axis=1)).sum(axis=2)
    smallest = np.arctan2(doubled_area[:, None], cosines).min(axis=1)
    return doubled_area <= _LEAST_HEIGHT * (sides**2).sum(axis=2).max(axis=1), smallest


def _matrix(
    first: torch.Tensor,
    second: torch.Tensor,
    is_same: bool,
    one_to_all: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """(N, M) of rows `one_to_all(cloud, clouds)`; of a set with itself, each pair once."""
    result = first.new_empty(len(first), len(second))
    for index, cloud in enumerate(first):
        begin = index if is_same else 0
        distances = one_to_all(cloud, second[begin:])
        result[index, begin:] = distances
        if is_same:
            result[begin:, index] = distances
    return result


def _chamfer(cloud: torch.Tensor, others: torch.Tensor, rows: int) -> torch.Tensor:
    """Distances (M,) of a cloud (3, P) to others (M, 3, Q), `rows` of its points at a time."""
    to_others, from_others = [], None
    for part in cloud.split(rows, dim=1):
        squares = _squared_distances(part, others)
        to_others.append(squares.amin(dim=2))
        nearest = squares.amin(dim=1)
        from_others = nearest if from_others is None else torch.minimum(from_others, nearest)
    return torch.cat(to_others, dim=1).mean(dim=1) + from_others.mean(dim=1)


@cache
def chamfer_compiled() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    Distances (M,) of a cloud (3, P) to others (M, 3, Q) as `_chamfer` gives them, by a kernel for either direction
    that takes the least of the squares as it computes them and keeps none.
    """
    # fullgraph: what is not compiled would keep all pairs, and must not be taken without a word
    to_others = torch.compile(_to_others, dynamic=True, fullgraph=True)
    from_others = torch.compile(_from_others, dynamic=True, fullgraph=True)
    return lambda cloud, others: to_others(cloud, others) + from_others(cloud, others)


def _to_others(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return _pairs(cloud, others).amin(dim=2).mean(dim=1)


def _from_others(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return _pairs(cloud, others).amin(dim=1).mean(dim=1)


def _pairs(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(3, P), (M, 3, Q) -> (M, P, Q) squared distances, by nothing that works in place."""
    differences = [
        mine[:, None] - theirs[:, None, :] for mine, theirs in zip(cloud, others.unbind(dim=1), strict=True)
    ]
    return differences[0].square() + differences[1].square() + differences[2].square()


def _squared_distances(cloud: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(3, P), (M, 3, Q) -> (M, P, Q)."""
    squares = None
    for mine, theirs in zip(cloud, others.unbind(dim=1), strict=True):
        difference = mine[:, None] - theirs[:, None, :]
        squares = difference.square_() if squares is None else squares.addcmul_(difference, difference)
    return squares


def _checked(points: Any, name: str, num_dims: int = 2) -> torch.Tensor:
    """Points as a tensor of at least `num_dims` dimensions, float64 if they were, else float32."""
    if not isinstance(points, torch.Tensor):
        try:
            array = np.asarray(points)
            points = torch.from_numpy(np.array(array, dtype="f8" if array.dtype == np.float64 else "f4", order="C"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} must be an array or a tensor of numbers ({error})") from error
    if points.ndim < num_dims or points.shape[-1] != 3 or points.numel() == 0:
        shape = "(..., P, 3)" if num_dims == 2 else "(..., 3)"
        raise ValueError(f"{name} must be points of the shape {shape} and not empty, got {tuple(points.shape)}")
    points = points.detach() if points.dtype == torch.float64 else points.detach().float()
    if not points.isfinite().all():
        raise ValueError(f"a coordinate of {name} is NaN or infinite")
    return points


def _checked_pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Two sets of clouds as (N, 3, P) and (M, 3, Q) of one type, and whether they are the same."""
    is_same = b is None or b is a
    pair = [_checked(a, "a")]
    if not is_same:
        pair.append(_checked(b, "b"))
    for points, name in zip(pair, "ab", strict=False):
        if points.ndim != 3:
            raise ValueError(f"{name} must be clouds of the shape (N, P, 3), got {tuple(points.shape)}")
    first, second = pair[0], pair[-1]
    if first.device != second.device:
        raise ValueError(f"a is on {first.device} and b on {second.device}: move one to the other")
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = (each.to(dtype).transpose(1, 2).contiguous() for each in (first, second))
    return first, second, is_same


def _checked_distances(distances: Any, name: str) -> np.ndarray:
    if isinstance(distances, torch.Tensor):
        distances = distances.detach().double().cpu()
    try:
        distances = np.asarray(distances, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array or a tensor of numbers ({error})") from error
    if distances.ndim != 2 or distances.size == 0:
        raise ValueError(f"{name} must be of the shape (N, M), one row a shape, and not empty, got {distances.shape}")
    if not (np.isfinite(distances).all() and distances.min() >= 0):
        raise ValueError(f"a distance in {name} is NaN, infinite or negative")
    return distances


def _like(given: Any, result: torch.Tensor) -> Any:
    return result if isinstance(given, torch.Tensor) else result.numpy()
