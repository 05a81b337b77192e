"""Geometry on arrays: reading files, and each step from a mesh to its canonical form and back."""

import json
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_fixtures import gltf_square, reference_meshes, signed_volume, solids, write_dae, write_gltf_binary

from iflame_hf.mesh_files_iflame import MESH_SUFFIXES, is_mesh, load_mesh
from iflame_hf.mesh_iflame import canonicalise, dequantise, from_y_up, normalise, quantise, to_y_up, weld

SQUARE = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
HALVES = np.array([[0, 1, 2], [0, 2, 3]])


@st.composite
def quantised_meshes(draw):
    """A small grid, so that vertices meet, and faces with any corners, so that many are degenerate or repeated."""
    seed, vertex_count, face_count = (
        draw(st.integers(0, 2**32 - 1)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 30)),
    )
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (vertex_count, 3)), rng.integers(0, vertex_count, (face_count, 3)), rng


def turned(face):
    """The corners of a face as a tuple that begins with the smallest, the winding kept."""
    first = face.index(min(face))
    return tuple(face[first:] + face[:first])


def triangles(vertices, faces):
    """All faces as sorted tuples of corners, independent of the order of vertices and faces."""
    corners = np.asarray(vertices)[np.asarray(faces)].tolist()
    return sorted(turned([tuple(corner) for corner in face]) for face in corners)


# Reading


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_every_format_gives_the_mesh_that_was_written(suffix, tmp_path):
    mesh, path = solids()["annulus"], tmp_path / f"a mesh é{suffix}"
    if suffix == ".gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh)).items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "model.gltf").rename(path)
    else:
        mesh.export(path)
    for source in (path, str(path)):
        vertices, faces = load_mesh(source)
        assert vertices.dtype == np.float64 and faces.dtype == np.int64 and faces.shape == mesh.faces.shape
        written, read = triangles(mesh.vertices, mesh.faces), triangles(vertices, faces)
        np.testing.assert_allclose(np.array(read), np.array(written), atol=1e-5)


def test_an_upper_case_suffix_is_a_mesh_too(tmp_path):
    solids()["box"].export(tmp_path / "box.obj")
    path = (tmp_path / "box.obj").rename(tmp_path / "BOX.OBJ")
    assert is_mesh(str(path)) and len(load_mesh(path)[1]) == 12


def test_objects_and_arrays_give_the_same_mesh_as_a_file():
    mesh = solids()["torus"]
    for source in (
        mesh,
        trimesh.Scene(mesh),
        (mesh.vertices, mesh.faces),
        (mesh.vertices.tolist(), mesh.faces.tolist()),
    ):
        assert is_mesh(source)
        vertices, faces = load_mesh(source)
        np.testing.assert_array_equal(vertices, mesh.vertices)
        np.testing.assert_array_equal(faces, mesh.faces)


def test_loading_leaves_the_arrays_it_was_given_alone():
    vertices, faces = np.concatenate([SQUARE, [[9.0, 9, 9]]]), HALVES.copy()
    load_mesh((vertices, faces))
    assert vertices.shape == (5, 3)
    np.testing.assert_array_equal(faces, HALVES)


def test_vertices_without_a_face_do_not_count():
    vertices, faces = load_mesh((np.concatenate([[[100.0, 0, 0]], SQUARE]), HALVES + 1))
    np.testing.assert_array_equal(vertices, SQUARE)
    np.testing.assert_array_equal(faces, HALVES)


POLYGONS = {
    "obj": "v 0 0 0\nv 1 0 0\nv 2 1 0\nv 1 2 0\nv 0 1 0\nv 0 0 1\nf 1 2 3 4 5\nf 1 2 6\nf 2 3 6 1\n",
    "off": "OFF # five, three and four corners\n\n6 3 0\n0 0 0\n1 0 0\n2 1 0\n1 2 0\n0 1 0\n0 0 1\n"
    "5 0 1 2 3 4 255 0 0\n3 0 1 5\n4 1 2 5 0\n",
    "ply": "ply\nformat ascii 1.0\nelement vertex 6\nproperty float x\nproperty float y\nproperty float z\n"
    "element face 3\nproperty list uchar int vertex_indices\nend_header\n"
    "0 0 0\n1 0 0\n2 1 0\n1 2 0\n0 1 0\n0 0 1\n5 0 1 2 3 4\n3 0 1 5\n4 1 2 5 0\n",
}


@pytest.mark.parametrize("suffix", POLYGONS)
def test_polygons_become_triangles_of_the_same_area_and_orientation(suffix, tmp_path):
    path = tmp_path / f"polygons.{suffix}"
    path.write_text(POLYGONS[suffix])
    vertices, faces = load_mesh(path)
    assert len(faces) == 3 + 1 + 2
    flat = trimesh.Trimesh(vertices, faces, process=False)
    upward = flat.face_normals[:, 2] > 0.99
    assert upward.sum() == 3
    np.testing.assert_allclose(flat.area_faces[upward].sum(), 2.5)


def test_polygons_of_an_array_become_fans():
    vertices, faces = load_mesh((SQUARE, [[0, 1, 2, 3]]))
    np.testing.assert_array_equal(faces, HALVES)


def test_triangles_of_off_files_are_those_that_trimesh_reads(tmp_path):
    mesh, path = solids()["icosphere"], tmp_path / "icosphere.off"
    mesh.export(path)
    oracle = trimesh.load_mesh(path, process=False)
    vertices, faces = load_mesh(path)
    np.testing.assert_array_equal(vertices, oracle.vertices)
    np.testing.assert_array_equal(faces, oracle.faces)
    path.write_text(path.read_text().replace("OFF\n", "OFF"))  # as in ModelNet, the counts right after the word
    np.testing.assert_array_equal(load_mesh(path)[1], oracle.faces)


def test_a_scene_is_flattened_with_the_transforms_of_all_nodes_above(tmp_path):
    box, scene = trimesh.creation.box(), trimesh.Scene()
    turn = trimesh.transformations.rotation_matrix(np.pi / 2, (0, 0, 1))
    scene.graph.update("arm", "world", matrix=turn)
    scene.add_geometry(box, geom_name="box", node_name="near", transform=np.diag([2.0, 1, 1, 1]))
    scene.add_geometry(
        box,
        geom_name="box",
        node_name="far",
        parent_node_name="arm",
        transform=trimesh.transformations.translation_matrix((10, 0, 0)),
    )
    scene.export(tmp_path / "scene.glb")
    for source in (scene, tmp_path / "scene.glb"):
        vertices, faces = load_mesh(source)
        assert len(faces) == 24
        np.testing.assert_allclose(vertices.min(axis=0), (-1, -0.5, -0.5), atol=1e-6)
        np.testing.assert_allclose(vertices.max(axis=0), (1, 10.5, 0.5), atol=1e-6)
        assert signed_volume(vertices, faces) == pytest.approx(3.0)


@pytest.mark.parametrize("scale", [(-1, 1, 1), (1, -2, 1), (-1, -1, -1), (-1, -1, 1), (1, 1, 1)])
def test_a_mirrored_node_keeps_its_outside_outside(scale, tmp_path):
    mesh, scene = solids()["annulus"], trimesh.Scene()
    scene.add_geometry(mesh, transform=np.diag([*scale, 1.0]))
    scene.export(tmp_path / "mirrored.glb")
    for source in (scene, tmp_path / "mirrored.glb"):
        assert signed_volume(*load_mesh(source)) == pytest.approx(mesh.volume * abs(np.prod(scale)), rel=1e-4)


def test_points_and_lines_of_a_scene_are_left_out():
    scene = trimesh.Scene([trimesh.PointCloud(np.eye(3)), solids()["box"]])
    scene.add_geometry(trimesh.load_path(np.array([[[0.0, 0, 0], [1, 1, 1]]])))
    assert len(load_mesh(scene)[1]) == 12


@pytest.mark.parametrize("mode", [4, 5])
def test_triangles_and_strips_of_gltf_keep_their_winding(mode, tmp_path):
    vertices, faces = load_mesh(write_gltf_binary(tmp_path / "square.glb", *gltf_square(mode)))
    normals = trimesh.Trimesh(vertices, faces, process=False).face_normals
    np.testing.assert_allclose(normals, [[0, 0, 1], [0, 0, 1]])


# Refusing; what else is refused, and with which word, test_mesh_errors.py says


def test_a_dae_file_is_read_with_pycollada_and_without_it_the_package_is_named(tmp_path):
    path = write_dae(tmp_path / "box.dae", SQUARE, HALVES, "y")
    assert len(load_mesh(path)[1]) == 2
    source = """
import sys
sys.modules["collada"] = None  # Python takes it for one that is not installed
from iflame_hf.mesh_files_iflame import load_mesh
try:
    load_mesh(sys.argv[1])
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", source, str(path)], capture_output=True, text=True, check=True)
    reason = "reading .dae files needs the package pycollada: pip install pycollada"
    assert run.stdout.strip() == f"{path}: {reason}"


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.obj"):
        load_mesh(tmp_path / "missing.obj")
    (tmp_path / "folder.obj").mkdir()
    with pytest.raises(ValueError, match="folder.obj: not a file"):
        load_mesh(tmp_path / "folder.obj")


def test_a_missing_buffer_is_named(tmp_path):
    tree, blob = gltf_square()
    tree["buffers"][0]["uri"] = "nowhere.bin"
    (tmp_path / "square.gltf").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="square.gltf: cannot be read as gltf.*nowhere.bin"):
        load_mesh(tmp_path / "square.gltf")


@pytest.mark.parametrize("extension", ["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
def test_compressed_geometry_is_refused_not_read_as_zeros(extension, tmp_path):
    square = gltf_square(extensionsRequired=[extension])
    with pytest.raises(ValueError, match=f"compressed.glb: .*{extension}"):
        load_mesh(write_gltf_binary(tmp_path / "compressed.glb", *square))


def test_triangle_fans_and_integer_positions_of_gltf_are_refused_not_lost(tmp_path):
    with pytest.raises(ValueError, match="fan.glb: .*triangle fans"):
        load_mesh(write_gltf_binary(tmp_path / "fan.glb", *gltf_square(6)))
    tree, blob = gltf_square()
    tree["accessors"][0]["normalized"] = True
    with pytest.raises(ValueError, match="normalised integers"):
        load_mesh(write_gltf_binary(tmp_path / "integers.glb", tree, blob))


# Normalising and quantising


@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1.0, 1e9, 1e300])
def test_normalising_centres_the_box_and_makes_its_longest_side_one(scale):
    vertices = normalise(np.array([[0.0, 1, 2], [4, 2, 2], [1, 3, 3]]) * scale)
    np.testing.assert_allclose(vertices.min(axis=0), [-0.5, -0.25, -0.125], rtol=1e-12)
    np.testing.assert_allclose(vertices.max(axis=0), [0.5, 0.25, 0.125], rtol=1e-12)


def test_a_point_and_an_endless_mesh_cannot_be_normalised():
    with pytest.raises(ValueError, match="one point"):
        normalise(np.full((3, 3), 7.0))
    with pytest.raises(ValueError, match="not a finite number"):
        normalise(np.array([[-1.7e308, 0, 0], [1.7e308, 0, 0], [0, 1, 0]]))
    with pytest.raises(ValueError, match="not a finite number"):
        normalise(np.array([[np.nan, 0, 0], [1, 0, 0], [0, 1, 0]]))


def test_grid_coordinates_run_from_zero_to_the_resolution_and_round_half_to_even():
    steps = np.array([-1.0, 0, 0.5, 1.5, 2.5, 63.49, 64, 64.5, 127.5, 128, 129])
    grid = quantise(np.stack([steps / 128 - 0.5] * 3, axis=1))
    assert grid[:, 0].tolist() == [0, 0, 0, 2, 2, 63, 64, 64, 128, 128, 128]
    assert grid.dtype == np.int64


@pytest.mark.parametrize("resolution", [1, 64, 128, 1000])
def test_dequantising_is_the_inverse_of_quantising(resolution):
    grid = np.random.default_rng(0).integers(0, resolution + 1, (200, 3))
    np.testing.assert_array_equal(quantise(dequantise(grid, resolution), resolution), grid)


def test_turning_z_up_into_y_up_is_a_rotation_and_can_be_undone():
    np.testing.assert_array_equal(to_y_up(np.array([[1, 2, 3]]), "z"), [[1, 3, -2]])
    np.testing.assert_array_equal(to_y_up(np.array([[1, 2, 3]]), "y"), [[1, 2, 3]])
    assert np.linalg.det(to_y_up(np.eye(3), "z")) == pytest.approx(1)
    points = np.random.default_rng(0).normal(size=(10, 3))
    np.testing.assert_array_equal(from_y_up(to_y_up(points, "z"), "z"), points)


# The canonical form


@pytest.mark.parametrize("name", reference_meshes())
def test_the_canonical_form_is_the_original_codes_with_two_vertices_swapped(name):
    vertices, faces, tokens = reference_meshes()[name]
    grid, faces = canonicalise(quantise(normalise(vertices)), faces)
    corners = grid[faces][:, [0, 2, 1]]
    np.testing.assert_array_equal(corners[:, :, [2, 0, 1]].reshape(-1, 9), tokens)


@settings(max_examples=200, deadline=None)
@given(quantised_meshes())
def test_a_canonical_mesh_is_ordered_and_clean_and_holds_the_same_triangles(mesh):
    grid, faces, _ = mesh
    new_grid, new_faces = canonicalise(grid, faces)

    heights = [(y, x, z) for x, y, z in new_grid.tolist()]
    assert heights == sorted(set(heights)) and set(new_faces.ravel().tolist()) == set(range(len(heights)))
    triples = [tuple(sorted(face)) for face in new_faces.tolist()]
    assert triples == sorted(set(triples)) and all(len(set(triple)) == 3 for triple in triples)
    assert all(face[0] == min(face) for face in new_faces.tolist())

    expected = {}
    for face in grid[faces].tolist():
        corners = [tuple(corner) for corner in face]
        if len(set(corners)) == 3:
            expected.setdefault(frozenset(corners), turned(corners))
    assert triangles(new_grid, new_faces) == sorted(expected.values())


@settings(max_examples=100, deadline=None)
@given(quantised_meshes())
def test_numbering_of_vertices_turns_of_faces_and_order_of_distinct_faces_make_no_difference(mesh):
    grid, faces, rng = mesh
    expected = canonicalise(grid, faces)
    shuffle = rng.permutation(len(grid))
    renumbered = np.argsort(shuffle)[faces]
    rolled = np.take_along_axis(renumbered, (np.arange(3) + rng.integers(0, 3, (len(faces), 1))) % 3, axis=1)
    shuffled_faces = expected[1][rng.permutation(len(expected[1]))]
    for found in (canonicalise(grid[shuffle], rolled), canonicalise(expected[0], shuffled_faces)):
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_array_equal(found[1], expected[1])


def test_of_faces_on_the_same_vertices_the_first_stays():
    grid = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    for first in permutations(range(3)):
        for second in permutations(range(3)):
            both, alone = (canonicalise(grid, np.array(faces))[1] for faces in ([first, second], [first]))
            np.testing.assert_array_equal(both, alone)


def test_canonicalise_and_weld_do_not_change_what_they_are_given():
    grid, faces = quantise(normalise(SQUARE)), HALVES[::-1].copy()
    copies, corners = (grid.copy(), faces.copy()), grid[faces]
    kept = corners.copy()
    canonicalise(grid, faces)
    weld(corners)
    np.testing.assert_array_equal(grid, copies[0])
    np.testing.assert_array_equal(faces, copies[1])
    np.testing.assert_array_equal(corners, kept)


def test_nothing_is_left_of_a_mesh_of_degenerate_faces():
    grid, faces = canonicalise(np.array([[0, 0, 0], [1, 0, 0], [1, 0, 0]]), np.array([[0, 1, 2]]))
    assert grid.shape == (0, 3) and faces.shape == (0, 3)


def test_welding_keeps_the_order_of_faces_and_corners_and_drops_the_bad():
    a, b, c, d = ([0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5])
    corners = np.array([[d, c, b], [a, a, b], [b, c, a], [c, d, b], [b, d, c], [a, b, d]])
    grid, faces = weld(corners)
    np.testing.assert_array_equal(grid[faces], corners[[0, 2, 5]])
    assert len(grid) == 4


def test_welding_nothing_gives_nothing():
    grid, faces = weld(np.zeros((0, 3, 3), dtype=np.int64))
    assert grid.shape == (0, 3) and faces.shape == (0, 3)


def test_running_out_of_memory_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def load_scene(*args, **kwargs):
        raise MemoryError

    path = tmp_path / "box.obj"
    trimesh.creation.box().export(path)
    monkeypatch.setattr(trimesh, "load_scene", load_scene)
    with pytest.raises(MemoryError):
        load_mesh(path)
