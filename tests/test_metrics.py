"""What is said of generated meshes as a set, against loops written out, SciPy, trimesh and cases known by hand."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_fixtures import solids
from scipy.optimize import linear_sum_assignment
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist, jensenshannon

from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_iflame import normalise
from training import metrics
from training.metrics import (
    chamfer_distances,
    coverage,
    earth_movers_distances,
    jensen_shannon_divergence,
    minimum_matching_distance,
    normalised,
    one_nearest_neighbour_accuracy,
    sample_points,
    topology,
)

ROOT = Path(__file__).resolve().parents[1]
CUBE = trimesh.creation.box()
STRIP = [[0, 1, 2], [1, 3, 2]]  # two triangles that share the edge of vertices 1 and 2
SQUARE = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]]


def clouds(seed, count, points, dtype=np.float64, spread=1.0):
    return (np.random.default_rng(seed).normal(size=(count, points, 3)) * spread).astype(dtype)


def chamfer_by_trees(a, b):
    squared = [[(cKDTree(y).query(x)[0] ** 2, cKDTree(x).query(y)[0] ** 2) for y in b] for x in a]
    return np.array([[there.mean() + back.mean() for there, back in row] for row in squared])


def test_chamfer_distances_are_those_of_a_loop_over_points():
    a, b = clouds(0, 2, 5), clouds(1, 3, 7)
    wanted = np.zeros((2, 3))
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            wanted[i, j] += sum(min(sum((p - q) ** 2) for q in y) for p in x) / 5
            wanted[i, j] += sum(min(sum((p - q) ** 2) for p in x) for q in y) / 7
    np.testing.assert_allclose(chamfer_distances(a, b), wanted, rtol=1e-12)
    one, other = [[[0, 0, 0], [1, 0, 0]]], [[[0, 0, 2], [3, 0, 0]]]  # (4 + 4) / 2 and (4 + 4) / 2, by hand
    np.testing.assert_array_equal(chamfer_distances(one, other), [[8]])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    shape=st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 40)] * 2),
    block_size=st.one_of(st.none(), st.integers(1, 4000)),
)
def test_chamfer_distances_are_those_of_trees_whatever_the_blocks(seed, shape, block_size):
    a, b = clouds(seed, shape[0], shape[2]), clouds(seed + 1, shape[1], shape[3])
    np.testing.assert_allclose(chamfer_distances(a, b, block_size), chamfer_by_trees(a, b), rtol=1e-12)
    np.testing.assert_allclose(chamfer_distances(a, None, block_size), chamfer_by_trees(a, a), rtol=1e-12)
    np.testing.assert_array_equal(chamfer_distances(a, a, block_size), chamfer_distances(a, None, block_size))


def test_float32_loses_nothing_between_near_clouds_far_from_the_origin():
    a = np.round(clouds(0, 2, 300) * 2**14) / 2**20 + 8  # float32 holds these exactly
    b = a + 2**-20
    single = chamfer_distances(a.astype("f4"), b.astype("f4"))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, chamfer_by_trees(a, b), rtol=2e-6)
    np.testing.assert_array_equal(np.diag(chamfer_distances(a.astype("f4"))), 0)


def test_a_set_with_itself_takes_each_pair_once_and_is_symmetric(monkeypatch):
    import training.metrics as module

    pairs, original = [], module._chamfer
    monkeypatch.setattr(
        module, "_chamfer", lambda cloud, others, rows: pairs.append(len(others)) or original(cloud, others, rows)
    )
    a = clouds(0, 6, 20, np.float32)
    symmetric = chamfer_distances(a)
    assert sum(pairs) == 6 * 7 // 2
    np.testing.assert_array_equal(symmetric, symmetric.T)
    np.testing.assert_allclose(symmetric, chamfer_distances(a, a.copy()), rtol=1e-6)
    assert sum(pairs) == 6 * 7 // 2 + 36


def test_no_more_pairs_of_points_are_held_than_allowed(monkeypatch):
    import training.metrics as module

    sizes, original = [], module._squared_distances

    def watched(cloud, others):
        squares = original(cloud, others)
        sizes.append(squares.numel())
        return squares

    monkeypatch.setattr(module, "_squared_distances", watched)
    a, b = clouds(0, 3, 50), clouds(1, 8, 40)
    for block_size in (40, 333, 2000, 4100, 10**6):
        sizes.clear()
        chamfer_distances(a, b, block_size)
        assert 0.4 * min(block_size, 8 * 50 * 40) <= max(sizes) <= block_size and sum(sizes) == 3 * 8 * 50 * 40


@pytest.mark.parametrize("distances", [chamfer_distances, earth_movers_distances])
def test_arrays_give_arrays_and_tensors_tensors_of_the_type_computed_in(distances):
    a, b = clouds(0, 2, 8), clouds(1, 3, 8)
    wanted = distances(a, b)
    assert isinstance(wanted, np.ndarray) and wanted.dtype == np.float64 and wanted.shape == (2, 3)
    for dtype, result in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.half, torch.float32)):
        tensor = torch.from_numpy(a).to(dtype).requires_grad_()
        given = distances(tensor, torch.from_numpy(b).to(dtype))
        assert isinstance(given, torch.Tensor) and given.dtype == result and not given.requires_grad
        np.testing.assert_allclose(given.numpy(), wanted, rtol=2e-2 if dtype == torch.half else 1e-5)
    np.testing.assert_allclose(distances(a[::-1], b.tolist()), wanted[::-1], rtol=1e-12)
    assert distances(a.astype("f4"), b).dtype == np.float64


@pytest.mark.gpu
def test_chamfer_distances_on_a_gpu_are_those_of_the_cpu():
    a, b = torch.from_numpy(clouds(0, 5, 700, "f4")), torch.from_numpy(clouds(1, 4, 500, "f4"))
    for block_size in (None, 10_000):
        given = chamfer_distances(a.cuda(), b.cuda(), block_size)
        assert given.device.type == "cuda"
        torch.testing.assert_close(given.cpu(), chamfer_distances(a, b), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="a is on cuda:0 and b on cpu: move one to the other"):
        chamfer_distances(a.cuda(), b)


def test_what_is_compiled_for_a_gpu_computes_chamfer_distances(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    a, b = (torch.from_numpy(clouds(seed, 5, points)).transpose(1, 2) for seed, points in ((0, 17), (1, 40)))
    found = metrics.chamfer_compiled.__wrapped__()(a[0], b)
    expected = chamfer_distances(a[:1].transpose(1, 2), b.transpose(1, 2))[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_earth_movers_distances_are_means_of_the_best_assignment():
    a, b = clouds(0, 3, 24), clouds(1, 2, 24)
    costs = [[cdist(x, y) for y in b] for x in a]
    wanted = [[cost[linear_sum_assignment(cost)].sum() / 24 for cost in row] for row in costs]
    np.testing.assert_allclose(earth_movers_distances(a, b), wanted, rtol=1e-12)
    itself = earth_movers_distances(a)
    np.testing.assert_array_equal(itself, itself.T)
    np.testing.assert_array_equal(np.diag(itself), 0)
    # nearest points would take the one at 1 twice; one to one it is 1 + 9 or 10 + 0
    np.testing.assert_allclose(earth_movers_distances([[[0, 0, 0], [1, 0, 0]]], [[[1, 0, 0], [10, 0, 0]]]), [[5]])


def test_earth_movers_distances_of_a_moved_cloud_are_the_way_it_went():
    a = clouds(3, 1, 40)
    np.testing.assert_allclose(earth_movers_distances(a, a + [0.03, 0.04, 0]), [[0.05]], rtol=1e-9)


def test_all_but_earth_movers_distances_runs_without_scipy():
    script = (
        "import sys\nsys.modules['scipy'] = sys.modules['scipy.optimize'] = sys.modules['scipy.sparse'] = None\n"
        "import trimesh\nfrom training.metrics import *\n"
        "box = trimesh.creation.box()\nprint(topology(box.vertices, box.faces).pieces)\n"
        "points = sample_points(box.vertices, box.faces, 9, 0)[None]\nprint(coverage(chamfer_distances(points)))\n"
        "try:\n    earth_movers_distances(points)\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["1", "1.0"] and "pip install scipy" in done.stdout


@pytest.mark.parametrize(
    "a, b, words",
    [
        (np.zeros((4, 3)), None, "a must be clouds of the shape \\(N, P, 3\\), got \\(4, 3\\)"),
        (np.zeros((2, 4, 3)), np.zeros((2, 4, 2)), "b must be points .* got \\(2, 4, 2\\)"),
        (np.zeros((0, 4, 3)), None, "not empty, got \\(0, 4, 3\\)"),
        (np.zeros((2, 4, 3)), np.zeros((2, 0, 3)), "b must .* not empty"),
        (np.full((1, 4, 3), np.nan), None, "a coordinate of a is NaN"),
        (np.zeros((1, 4, 3)), np.full((1, 4, 3), np.inf), "a coordinate of b is NaN or infinite"),
        ([[[0, 0, 0]], [[1, 1]]], None, "a must be an array"),
        ("points", None, "a must be an array"),
    ],
)
def test_what_is_no_set_of_clouds_is_refused(a, b, words):
    for distances in (chamfer_distances, earth_movers_distances):
        with pytest.raises(ValueError, match=words):
            distances(a, b)


def test_what_cannot_be_computed_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        chamfer_distances(clouds(0, 1, 4), block_size=0)
    with pytest.raises(ValueError, match="as many points, got 4 in a and 5 in b"):
        earth_movers_distances(clouds(0, 1, 4), clouds(0, 1, 5))


def test_a_set_compared_with_itself_is_covered_and_at_no_distance():
    a = clouds(0, 12, 30)
    distances = chamfer_distances(a)
    assert coverage(distances) == 1 and minimum_matching_distance(distances) == 0
    assert jensen_shannon_divergence(normalised(a, "longest side"), normalised(a, "longest side")) == 0
    assert one_nearest_neighbour_accuracy(distances, distances, distances) == 0  # copies


def test_coverage_and_matching_distance_by_hand():
    distances = [[1.0, 5.0, 9.0], [2.0, 3.0, 4.0]]  # both samples are nearest to the first of three references
    assert coverage(distances) == 1 / 3
    assert minimum_matching_distance(distances) == (1 + 3 + 4) / 3
    assert coverage(torch.tensor(distances).T) == 1  # of three samples the last two are nearest to the second
    assert coverage([[1.0, 1.0], [1.0, 1.0]]) == 0.5  # of equally near ones the first


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), samples=st.integers(1, 9), references=st.integers(1, 9), ties=st.booleans())
def test_coverage_and_matching_distance_are_those_of_loops(seed, samples, references, ties):
    random = np.random.default_rng(seed)
    distances = random.random((samples, references)) if not ties else random.integers(0, 3, (samples, references))
    covered = {min(range(references), key=lambda j: row[j]) for row in distances}
    assert coverage(distances) == len(covered) / references
    nearest = [min(distances[i][j] for i in range(samples)) for j in range(references)]
    assert minimum_matching_distance(distances) == pytest.approx(sum(nearest) / references, rel=1e-12)


def accuracy_of(samples, references):
    """1-NNA of numbers, by their differences."""
    between = [
        np.abs(x[:, None] - y) for x, y in ((samples, samples), (references, references), (samples, references))
    ]
    return one_nearest_neighbour_accuracy(*between)


def test_nearest_neighbours_cannot_tell_two_samples_of_one_distribution():
    random = np.random.default_rng(0)
    accuracies = [accuracy_of(*random.normal(size=(2, 200))) for _ in range(20)]
    assert abs(np.mean(accuracies) - 0.5) < 0.03  # its standard error is about 0.01
    assert 0.75 < accuracy_of(random.normal(size=200), random.normal(size=200) * 30) < 1


def test_nearest_neighbours_tell_far_sets_apart():
    random = np.random.default_rng(0)
    assert accuracy_of(random.random(30), random.random(30) + 100) == 1
    near, far = clouds(0, 10, 50), clouds(1, 10, 50, spread=5)
    between = chamfer_distances(near), chamfer_distances(far), chamfer_distances(near, far)
    assert one_nearest_neighbour_accuracy(*between) == 1
    assert one_nearest_neighbour_accuracy(*map(torch.from_numpy, between)) == 1


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), size=st.integers(2, 7), ties=st.booleans())
def test_nearest_neighbour_accuracy_is_that_of_a_loop_in_any_order(seed, size, ties):
    random = np.random.default_rng(seed)
    samples, references = random.integers(0, 9, (2, size)) if ties else random.normal(size=(2, size))
    right = 0.0
    for own_set, other_set in ((samples, references), (references, samples)):
        for index, one in enumerate(own_set):
            own = min(abs(one - each) for place, each in enumerate(own_set) if place != index)
            other = min(abs(one - each) for each in other_set)
            right += 1 if own < other else 0.5 if own == other else 0
    accuracy = accuracy_of(samples, references)
    assert accuracy == right / (2 * size)
    assert accuracy == accuracy_of(references, samples) == accuracy_of(samples[::-1], references)


@pytest.mark.parametrize("function", [coverage, minimum_matching_distance])
def test_what_are_no_distances_is_refused(function):
    for distances, words in (
        (np.zeros(3), "shape \\(N, M\\).* got \\(3,\\)"),
        (np.zeros((0, 3)), "not empty"),
        ([[np.nan, 1]], "NaN"),
        ([[-1.0, 1]], "negative"),
        ([[1], [1, 2]], "must be an array"),
    ):
        with pytest.raises(ValueError, match=words):
            function(distances)


def test_sets_of_different_sizes_and_of_one_have_no_accuracy():
    with pytest.raises(ValueError, match="as many samples as references, got \\(2, 2\\), \\(3, 3\\) and \\(2, 3\\)"):
        one_nearest_neighbour_accuracy(np.ones((2, 2)), np.ones((3, 3)), np.ones((2, 3)))
    with pytest.raises(ValueError, match="at least two"):
        one_nearest_neighbour_accuracy([[0.0]], [[0.0]], [[1.0]])
    with pytest.raises(ValueError, match="a distance in rr is NaN"):
        one_nearest_neighbour_accuracy(np.ones((2, 2)), np.full((2, 2), np.nan), np.ones((2, 2)))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), resolution=st.integers(2, 30), sizes=st.tuples(*[st.integers(1, 400)] * 2))
def test_the_divergence_is_scipys_over_the_cells_of_the_grid(seed, resolution, sizes):
    random = np.random.default_rng(seed)
    a, b = (random.random((1, size, 3)) ** power - 0.5 for size, power in zip(sizes, (1, 2), strict=True))
    grid = np.linspace(-0.5, 0.5, resolution)  # the nearest of these on each axis
    filled = []
    for points in (a[0], b[0]):
        counts = np.zeros((resolution,) * 3)
        for point in points:
            counts[tuple(np.abs(grid - each).argmin() for each in point)] += 1
        filled.append(counts.ravel())
    wanted = jensenshannon(*filled, base=2) ** 2
    given = jensen_shannon_divergence(a, torch.from_numpy(b), resolution)
    assert given == pytest.approx(wanted, abs=1e-9) and given == jensen_shannon_divergence(b, a, resolution)
    assert 0 <= given <= 1


def test_the_divergence_by_hand():
    low, high = [[-0.5, -0.5, -0.5]], [[0.5, 0.5, 0.5]]
    assert jensen_shannon_divergence(low, high) == 1 and jensen_shannon_divergence(low, low * 5) == 0
    # half of the points in a shared cell: (1 log 4/3 + 1/2 log 2/3 + 1/2 log 2) / 2 bits
    wanted = (np.log2(4 / 3) + np.log2(2 / 3) / 2 + np.log2(2) / 2) / 2
    assert jensen_shannon_divergence(low, low + high) == pytest.approx(wanted, rel=1e-12)
    with pytest.raises(ValueError, match="points_b must lie in .* got one at 0.7: normalise by 'longest side'"):
        jensen_shannon_divergence(low, [[0, -0.7, 0]])
    with pytest.raises(ValueError, match="resolution must be at least 2"):
        jensen_shannon_divergence(low, high, 1)
    with pytest.raises(ValueError, match="points_a must be points .* not empty"):
        jensen_shannon_divergence(np.zeros((0, 3)), high)
    with pytest.raises(ValueError, match="points_b is NaN"):
        jensen_shannon_divergence(low, [[np.nan, 0, 0]])


def test_points_lie_on_the_surface_evenly_and_are_the_seeds():
    for mesh in solids().values():
        vertices, faces = np.array(mesh.vertices), np.array(mesh.faces)
        points = sample_points(vertices, faces, 500, seed=3)
        assert points.shape == (500, 3) and points.dtype == np.float64
        assert np.abs(trimesh.proximity.closest_point_naive(mesh, points)[1]).max() < 1e-9
        np.testing.assert_array_equal(points, sample_points(vertices, faces, 500, seed=3))
        assert (points != sample_points(vertices, faces, 500, seed=4)).any()


def test_a_face_gets_points_by_its_area():
    vertices = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 5], [9, 0, 5], [0, 1, 5]]  # areas of 1 to 9
    points = sample_points(vertices, [[0, 1, 2], [3, 4, 5]], 10_000, seed=0)
    assert abs((points[:, 2] > 2.5).mean() - 0.9) < 0.012  # four standard errors
    centre = points[points[:, 2] < 2.5].mean(axis=0)
    np.testing.assert_allclose(centre, [1 / 3, 1 / 3, 0], atol=0.03)


@pytest.mark.parametrize("scale", [1e-120, 1e120])
def test_the_unit_of_a_mesh_may_be_any(scale):
    unit, far = (sample_points(CUBE.vertices * size, CUBE.faces, 50, seed=0) for size in (1, scale))
    np.testing.assert_allclose(far / scale, unit, atol=1e-12)
    assert topology(CUBE.vertices * scale, CUBE.faces) == topology(CUBE.vertices, CUBE.faces)


def test_a_mesh_without_an_area_has_no_points():
    line = trimesh.transform_points(
        [[0, 0, 0], [1, 0, 0], [3, 0, 0]], trimesh.transformations.rotation_matrix(1, [1, 2, 3])
    )
    with pytest.raises(MeshError, match="no face has an area"):
        sample_points(line, [[0, 1, 2]], 10, seed=0)
    with pytest.raises(MeshError, match="in one point"):
        sample_points(np.ones((3, 3)), [[0, 1, 2]], 10, seed=0)
    with pytest.raises(MeshError, match="no faces"):
        sample_points(SQUARE, np.zeros((0, 3), int), 10, seed=0)
    with pytest.raises(ValueError, match="count must be at least 1 point, got 0"):
        sample_points(SQUARE, STRIP, 0, seed=0)


def test_clouds_are_normalised_each_by_itself():
    points = clouds(0, 3, 50) * np.array([1, 7, 100])[:, None, None] + [5, -2, 40]
    boxes, balls = normalised(points, "longest side"), normalised(points, "unit sphere")
    for cloud, box, ball in zip(points, boxes, balls, strict=True):
        np.testing.assert_allclose(box, normalise(cloud), atol=1e-12)
        np.testing.assert_allclose(ball.mean(axis=0), 0, atol=1e-12)
        assert np.linalg.norm(ball, axis=1).max() == pytest.approx(1, rel=1e-12)
        np.testing.assert_allclose(normalised(cloud, "unit sphere"), ball, atol=1e-12)
    tensor = normalised(torch.from_numpy(points).float(), "longest side")
    assert tensor.dtype == torch.float32 and tensor.shape == points.shape
    np.testing.assert_allclose(tensor.numpy(), boxes, atol=1e-5)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="'unit sphere' or 'longest side', got 'cube'"):
        normalised(clouds(0, 1, 5), "cube")
    with pytest.raises(ValueError, match="all points of a cloud lie in one place"):
        normalised(np.stack([clouds(0, 1, 5)[0], np.full((5, 3), 0.1)]), "unit sphere")
    with pytest.raises(ValueError, match="shape \\(..., P, 3\\)"):
        normalised(np.zeros(3), "unit sphere")
