"""How meshes vary from epoch to epoch: turned, mirrored, and with all of it off as ever."""

import hashlib

import numpy as np
import pytest
import scipy.stats
import trimesh
from mesh_fixtures import random_mesh, signed_volume, solids

from iflame_hf import IFlameTokenizer
from iflame_hf.mesh_iflame import from_y_up, normalise
from training.arguments import TURNS
from training.rows.balance import Balance
from training.rows.encode import MeshEncoder, augment
from training.rows.map import MappedRows, MeshRows, RowKey, RowStream, mesh_sizes

FIXED = {"scale": 0, "shift": False}
# Of the rows of two epochs by vertical axis and shift, as they were when nothing else varied.
EARLIER_ROWS = {
    ("y", False): "c4d2458a5a8b2e81",
    ("y", True): "e338a40c2e8776e7",
    ("z", False): "f30cf8906b36b845",
    ("z", True): "7c26430f5a846d07",
}
EARLIER_BALANCED_ROWS = "9c2f2c71d4fad1de"


class MadeMeshes:
    """Thirty meshes of twenty faces, and four categories of them."""

    def __init__(self):
        self._meshes = []
        for seed in range(30):
            rng = np.random.default_rng(seed)
            vertices = rng.random((12 + seed, 3)) * [3, 2, 1] + [5, -1, 0.5]
            self._meshes.append((vertices, np.stack([rng.permutation(12 + seed)[:3] for _ in range(20)])))
        self.num_faces = np.full(30, 20)
        self.categories = np.minimum(np.arange(30) // 4, 3)

    def read(self, indices):
        return [self._meshes[index] for index in indices]

    def describe(self, index):
        return f"mesh {index}"


def digest_of_rows(stream, rows):
    content = hashlib.sha256()
    for epoch in range(2):
        content.update(rows.pack([RowKey(epoch, draws) for draws in stream.rows_of(epoch)]).ids.tobytes())
    return content.hexdigest()[:16]


def lopsided(up_axis="y"):
    """A closed mesh, normalised, that no turn or mirror leaves as it is."""
    wedge = trimesh.convex.convex_hull(
        np.array([[0, 0, 0], [4, 0, 0], [0, 0, 2], [3, 0, 1], [1, 3, 0.5], [0.5, 2, 1.5], [2, 1.5, 1.8]], dtype=float)
    )
    assert wedge.is_volume and wedge.volume > 0
    return normalise(from_y_up(np.asarray(wedge.vertices), up_axis)), np.asarray(wedge.faces)


def varied(mesh, count=60, **options):
    options = {**FIXED, **options}
    return [augment(*mesh, np.random.default_rng(seed), **options) for seed in range(count)]


def turn_drawn(seed):
    """The share of a whole turn that is drawn, after the numbers of stretching and moving."""
    return np.random.default_rng(seed).random(8)[6]


def points(vertices):
    return {tuple(row) for row in (np.round(vertices, 9) + 0.0).tolist()}


@pytest.mark.parametrize(("up_axis", "shift"), EARLIER_ROWS)
def test_without_stretching_turns_and_mirror_rows_are_what_they_were(up_axis, shift):
    meshes = MadeMeshes()
    stream = RowStream(meshes.num_faces + 2, np.arange(30), 100, seed=5)
    rows = MeshRows(meshes, IFlameTokenizer(up_axis=up_axis), 900, 5, scale=0, shift=shift)
    assert digest_of_rows(stream, rows) == EARLIER_ROWS[up_axis, shift]


def test_balanced_rows_in_which_all_groups_come_equally_often_are_what_they_were():
    meshes = MadeMeshes()
    stream = RowStream(meshes.num_faces + 2, np.arange(30), 100, 5, Balance([meshes.categories], 0))
    rows = MeshRows(meshes, IFlameTokenizer(), 900, 5, shift=True)
    assert digest_of_rows(stream, rows) == EARLIER_BALANCED_ROWS


@pytest.mark.parametrize("up_axis", ["y", "z"])
@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("mirror", [False, True])
def test_a_solid_keeps_its_volume_and_looks_outwards(turn, mirror, up_axis):
    vertices, faces = lopsided(up_axis)
    volume, sides = signed_volume(vertices, faces), np.ptp(vertices, axis=0)
    up, mirrored = "xyz".index(up_axis), []
    for new_vertices, new_faces in varied((vertices, faces), turn=turn, mirror=mirror, up_axis=up_axis):
        solid = trimesh.Trimesh(new_vertices, new_faces, process=False)
        assert solid.is_watertight and solid.is_winding_consistent and solid.volume > 0
        factor = np.ptp(new_vertices[:, up]) / sides[up]  # by which it was fitted into the cube
        assert solid.volume == pytest.approx(volume * factor**3)
        assert np.abs(new_vertices).max() == pytest.approx(0.5) and np.ptp(new_vertices, axis=0).max() <= 1 + 1e-12
        np.testing.assert_allclose(new_vertices.min(axis=0), -new_vertices.max(axis=0), atol=1e-12)
        mirrored.append(np.array_equal(new_faces, faces[:, ::-1]))
        assert mirrored[-1] or np.array_equal(new_faces, faces)
    assert (15 < sum(mirrored) < 45) if mirror else not any(mirrored)


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_mirrored_mesh_has_its_x_reversed_and_the_faces_with_it(up_axis):
    vertices, faces = lopsided(up_axis)
    (mirrored, reversed_faces) = next(
        found for found in varied((vertices, faces), mirror=True, up_axis=up_axis) if found[1][0, 0] != faces[0, 0]
    )
    np.testing.assert_allclose(mirrored, vertices * (-1, 1, 1), atol=1e-12)
    tokenizer = IFlameTokenizer(up_axis=up_axis)
    original, found = (
        tokenizer.decode_mesh(tokenizer.encode_arrays(*mesh))
        for mesh in ((vertices, faces), (mirrored, reversed_faces))
    )
    assert len(found.faces) == len(original.faces) and found.is_winding_consistent
    assert found.volume == pytest.approx(original.volume, rel=0.02) and found.volume > 0
    expected = original.vertices * (-1, 1, 1)
    distances = np.linalg.norm(expected[:, None] - found.vertices[None], axis=2)
    assert distances.min(axis=1).max() <= 1 / 128 and distances.min(axis=0).max() <= 1 / 128


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_each_axis_is_stretched_evenly_in_its_logarithm(scale):
    vertices, faces = lopsided()
    ratios = []
    for stretched, kept in varied((vertices, faces), 400, scale=scale):
        assert kept is faces and np.ptp(stretched, axis=0).max() == pytest.approx(1)
        np.testing.assert_allclose(stretched.min(axis=0), -stretched.max(axis=0), atol=1e-12)
        factors = np.ptp(stretched, axis=0) / np.ptp(vertices, axis=0)
        np.testing.assert_allclose(stretched, factors * vertices, atol=1e-12)
        ratios.append(np.log(factors / factors[0])[1:] / np.log1p(scale))
    # The difference of two even draws from -1 to 1 has a triangle for its density, and two thirds for its variance.
    for of_axis in np.array(ratios).T:
        assert scipy.stats.kstest(of_axis, scipy.stats.triang(0.5, -2, 4).cdf).pvalue > 1e-3


def test_a_stretched_mesh_fills_its_longest_side_in_tokens_and_keeps_its_winding():
    mesh, tokenizer, boxes = lopsided(), IFlameTokenizer(), set()
    plain = MeshEncoder(tokenizer, 9 * 202)(mesh, 0, 0)
    np.testing.assert_array_equal(MeshEncoder(tokenizer, 9 * 202, scale=0)(mesh, 3, 0), plain)
    np.testing.assert_array_equal(plain, tokenizer.encode_arrays(*mesh))
    for epoch in range(20):
        ids = MeshEncoder(tokenizer, 9 * 202, scale=0.25)(mesh, epoch, 0)
        levels = ids[9:-9].reshape(-1, 3)
        sides = np.ptp(levels, axis=0)
        assert sides.max() == 128 and np.abs(levels.min(axis=0) + levels.max(axis=0) - 128).max() <= 1
        decoded = tokenizer.decode_mesh(ids)
        assert len(decoded.faces) == len(mesh[1]) and decoded.is_watertight and decoded.volume > 0
        boxes.add(tuple(sides))
    assert len(boxes) > 15


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_quarter_turns_are_four_and_four_of_one_lead_back(up_axis):
    mesh = lopsided(up_axis)
    up, found = "xyz".index(up_axis), {}
    for vertices, _ in varied(mesh, turn="quarter", up_axis=up_axis):
        np.testing.assert_allclose(vertices[:, up], mesh[0][:, up], atol=1e-12)
        found[frozenset(points(vertices))] = vertices
    assert len(found) == 4 and frozenset(points(mesh[0])) in found
    seed = next(seed for seed in range(60) if 1 / 4 <= turn_drawn(seed) < 1 / 2)
    vertices, steps = mesh[0], []
    for _ in range(4):
        vertices, _ = augment(vertices, mesh[1], np.random.default_rng(seed), **FIXED, turn="quarter", up_axis=up_axis)
        steps.append(frozenset(points(vertices)))
    assert steps[-1] == frozenset(points(mesh[0])) and set(steps) == found.keys()


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_any_angle_keeps_heights_and_distances_up_to_one_factor(up_axis):
    vertices, faces = lopsided(up_axis)
    up, angles = "xyz".index(up_axis), []
    flat = [axis for axis in range(3) if axis != up]
    for turned, _ in varied((vertices, faces), 200, turn="any", up_axis=up_axis):
        factor = np.ptp(turned[:, up]) / np.ptp(vertices[:, up])
        np.testing.assert_allclose(turned[:, up], factor * vertices[:, up], atol=1e-12)
        before, after = vertices[1] - vertices[0], turned[1] - turned[0]
        assert np.linalg.norm(after) == pytest.approx(factor * np.linalg.norm(before))
        (a, b), (c, d) = before[flat], after[flat]
        angles.append(np.arctan2(a * d - b * c, a * c + b * d) % (2 * np.pi))
    assert np.histogram(angles, bins=8, range=(0, 2 * np.pi))[0].min() >= 10


def test_a_stretched_and_turned_box_keeps_its_right_angles():
    box = trimesh.creation.box(extents=(1.0, 0.6, 0.3))
    for vertices, _ in varied((normalise(box.vertices), box.faces), scale=0.25, shift=True, turn="any", mirror=True):
        assert np.abs(vertices).max() <= 0.5 + 1e-12
        edges = vertices[[1, 2, 4]] - vertices[0]  # along the three axes of trimesh's box
        assert np.abs(edges @ edges.T - np.diag((edges**2).sum(axis=1))).max() < 1e-12


def test_the_variation_of_a_mesh_is_a_function_of_seed_epoch_and_mesh():
    mesh, made = random_mesh(1), set()
    options = {"scale": 0.25, "shift": True, "turn": "any", "mirror": True}
    for seed, epoch, index in np.ndindex(2, 2, 2):
        ids = MeshEncoder(IFlameTokenizer(), 9 * 202, seed, **options)(mesh, epoch, index)
        again = MeshEncoder(IFlameTokenizer(), 9 * 202, seed, **options)
        again(random_mesh(2), 0, 7)
        np.testing.assert_array_equal(again(mesh, epoch, index), ids)
        made.add(ids.tobytes())
    assert len(made) == 8


def test_stretch_and_shift_are_drawn_alike_whether_a_mesh_is_turned_or_not():
    cube = trimesh.creation.box()
    mesh = normalise(cube.vertices), np.asarray(cube.faces)
    for seed in range(20):
        alone, _ = augment(*mesh, np.random.default_rng(seed))
        mirrored, _ = augment(*mesh, np.random.default_rng(seed), mirror=True)
        assert points(alone) == points(mirrored), "a box that is mirrored is the same box"


@pytest.mark.parametrize("turn", ["quarter", "any"])
def test_rows_planned_without_a_look_at_the_meshes_hold_them_however_they_are_turned(turn):
    class Solids(MadeMeshes):
        def __init__(self):
            self._meshes = [(np.asarray(mesh.vertices), np.asarray(mesh.faces)) for mesh in solids().values()]
            self.num_faces = np.array([len(faces) for _, faces in self._meshes])
            self.categories = np.zeros(len(self._meshes), dtype=np.int64)

    meshes = Solids()
    length = 9 * (int(meshes.num_faces.max()) + 2)
    stream = RowStream(*mesh_sizes(meshes, length, "error"), length // 9, seed=1)
    rows = MeshRows(meshes, IFlameTokenizer(), length, 1, 0.25, True, turn, True)
    batches = MappedRows(rows, stream).batches([], 1)
    for _, place in batches:
        if place[0] == 20:
            break
    plain = [len(MeshEncoder(IFlameTokenizer(), length)(mesh, 0, 0)) for mesh in meshes.read(range(4))]
    found = {len(rows.encode(mesh, epoch, 0)) for mesh in meshes.read(range(4)) for epoch in range(20)}
    assert max(plain) == length and max(found) <= length
