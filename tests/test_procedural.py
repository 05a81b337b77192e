"""Procedural meshes: closed, lossless in tokens, reproducible and various."""

import time

import numpy as np
import pytest
import trimesh

from iflame_hf.mesh_iflame import canonicalise, normalise, quantise
from training.procedural.make import KINDS, ProceduralMesh, make_dataset, make_mesh


@pytest.fixture(scope="module")
def dataset() -> list[ProceduralMesh]:
    return make_dataset(2000, seed=7)


def canonical(mesh: ProceduralMesh) -> tuple[np.ndarray, np.ndarray]:
    return canonicalise(quantise(normalise(mesh.vertices.astype(np.float64))), mesh.faces.astype(np.int64))


def fingerprint(mesh: ProceduralMesh) -> bytes:
    levels, faces = canonical(mesh)
    return levels[faces].tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_is_a_closed_solid_with_outward_winding(kind):
    for seed in range(12):
        mesh = make_mesh(np.random.default_rng(seed), kind)
        assert mesh.kind == kind
        parts = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).split(only_watertight=False)
        assert len(parts) >= 2
        assert sum(len(part.faces) for part in parts) == len(mesh.faces)
        for part in parts:
            assert part.is_watertight
            assert part.is_winding_consistent
            assert part.volume > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_stands_upright_on_the_floor_and_fills_the_grid(kind):
    for seed in range(12):
        _, vertices, faces = make_mesh(np.random.default_rng(seed), kind)
        assert vertices.dtype == np.float32 and vertices.shape[1:] == (3,)
        assert faces.dtype == np.int32 and faces.shape[1:] == (3,)
        assert set(faces.ravel()) == set(range(len(vertices)))
        assert vertices[:, 1].min() == 0
        assert np.ptp(vertices, axis=0).max() == 128


def test_quantising_moves_no_vertex_and_drops_no_face(dataset):
    for mesh in dataset[:500]:
        scaled = normalise(mesh.vertices.astype(np.float64))
        quantised = quantise(scaled)
        np.testing.assert_allclose(quantised, scaled * 128 + 64, atol=1e-6)
        assert not (quantised % 4).any()
    kept = [len(canonical(mesh)[1]) == len(mesh.faces) for mesh in dataset]
    assert np.mean(kept) > 0.999


def test_meshes_are_various(dataset):
    assert {mesh.kind for mesh in dataset} == set(KINDS)
    prints = {fingerprint(mesh) for mesh in dataset}
    assert len(prints) >= 0.95 * len(dataset)
    held_out = make_dataset(500, seed=8)
    assert np.mean([fingerprint(mesh) in prints for mesh in held_out]) < 0.15
    for kind in KINDS:
        shapes = {(len(mesh.vertices), len(mesh.faces)) for mesh in dataset if mesh.kind == kind}
        assert len(shapes) >= 3, f"{kind} always has the same parts"


def test_most_meshes_have_24_to_120_faces_and_none_more_than_200(dataset):
    counts = np.array([len(mesh.faces) for mesh in dataset])
    assert counts.min() >= 12 and counts.max() <= 200
    assert np.mean((counts >= 24) & (counts <= 120)) > 0.85
    assert counts.max() > 150


def test_a_mesh_depends_on_the_seed_and_its_index_alone(dataset):
    again = make_dataset(20, seed=7)
    for mesh, twin in zip(again, dataset[:20], strict=True):
        assert mesh.kind == twin.kind
        np.testing.assert_array_equal(mesh.vertices, twin.vertices)
        np.testing.assert_array_equal(mesh.faces, twin.faces)
    other = make_dataset(20, seed=8)
    assert sum(fingerprint(a) == fingerprint(b) for a, b in zip(again, other, strict=True)) <= 1


def test_limits_of_faces_are_kept():
    assert all(60 <= len(mesh.faces) <= 72 for mesh in make_dataset(50, seed=0, min_faces=60, max_faces=72))
    with pytest.raises(ValueError, match="none of 1000 procedural meshes has 5 to 7 faces"):
        make_dataset(1, seed=0, min_faces=5, max_faces=7)


def test_wrong_arguments_are_refused_in_plain_words():
    with pytest.raises(ValueError, match="unknown kind 'spoon'; known are table, chair"):
        make_mesh(np.random.default_rng(0), "spoon")
    with pytest.raises(ValueError, match="must not be negative"):
        make_dataset(-1, seed=0)
    with pytest.raises(ValueError, match="must not be negative"):
        make_dataset(1, seed=-1)
    assert make_dataset(0, seed=0) == []


def test_500_meshes_take_less_than_a_second_of_one_core():
    def processor_seconds() -> float:
        start = time.process_time()
        assert len(make_dataset(500, seed=1)) == 500
        return time.process_time() - start

    assert min(processor_seconds() for _ in range(3)) < 1


def test_only_the_kinds_asked_for_are_made_and_each_of_them():
    kinds = ("house", "chair", "table")
    assert {mesh.kind for mesh in make_dataset(60, seed=3, kinds=kinds)} == set(kinds)
    for wrong in (("house", "spaceship"), ()):
        with pytest.raises(ValueError, match="kinds must be some of table, .*, got (spaceship|none)"):
            make_dataset(1, seed=0, kinds=wrong)
