"""Which way is up in a mesh file: what the file itself says, else the custom of its format."""

import numpy as np
import pytest
import trimesh
from mesh_fixtures import solids, write_dae
from prepared_fixtures import prepare, rows

from iflame_hf import IFlameTokenizer
from iflame_hf.mesh_files_iflame import FILE_UP_AXES, declared_up_axis, load_mesh, up_axis_of
from iflame_hf.mesh_iflame import from_y_up, to_y_up, turn

AXES = ("x", "y", "z")


@pytest.mark.parametrize("suffix", FILE_UP_AXES)
def test_a_file_that_declares_no_axis_has_that_of_its_format(suffix, tmp_path):
    path = tmp_path / f"box{suffix.upper()}"
    path.write_bytes(b"no mesh")  # the reader proper says what is wrong with it
    assert declared_up_axis(path) is None
    assert up_axis_of(path) == up_axis_of(str(path)) == ("z" if suffix in (".ply", ".stl") else "y")


@pytest.mark.parametrize("up_axis", [*AXES, None])
def test_a_dae_says_which_way_is_up(up_axis, tmp_path):
    box = trimesh.creation.box(extents=(1, 2, 3))
    path = write_dae(tmp_path / "box.dae", box.vertices, box.faces, up_axis)
    assert declared_up_axis(path) == up_axis and up_axis_of(path) == (up_axis or "y")
    np.testing.assert_allclose(np.ptp(load_mesh(path)[0], axis=0), (1, 2, 3))  # in the file's own axes


def test_the_declaration_of_the_document_counts_not_that_of_a_part_of_it(tmp_path):
    box = trimesh.creation.box()
    path = write_dae(tmp_path / "box.dae", box.vertices, box.faces, "z")
    part = "<library_geometries><asset><up_axis>X_UP</up_axis></asset>"
    path.write_text(path.read_text().replace("<library_geometries>", part))
    assert "X_UP" in path.read_text() and declared_up_axis(path) == "z"
    path.write_text(path.read_text().replace("<up_axis>Z_UP</up_axis>", ""))
    assert declared_up_axis(path) is None


def test_words_that_are_no_axis_declare_nothing(tmp_path):
    box = trimesh.creation.box()
    path = write_dae(tmp_path / "box.dae", box.vertices, box.faces, "w")
    assert declared_up_axis(path) is None
    path.write_text(path.read_text().replace("W_UP", "\n  Z_UP "))
    assert declared_up_axis(path) == "z"


def test_turning_x_up_follows_the_specification_of_collada_and_can_be_undone():
    right, up, backward = (0, -1, 0), (1, 0, 0), (0, 0, 1)  # where these lie in a file that declares X_UP
    np.testing.assert_array_equal(to_y_up(np.array([right, up, backward]), "x"), np.eye(3))
    points = np.random.default_rng(0).normal(size=(10, 3))
    for up_axis in AXES:
        assert np.linalg.det(to_y_up(np.eye(3), up_axis)) == pytest.approx(1)
        np.testing.assert_array_equal(from_y_up(to_y_up(points, up_axis), up_axis), points)
        np.testing.assert_array_equal(turn(turn(points, up_axis, "z"), "z", up_axis), points)


@pytest.mark.parametrize("own_axis", ["y", "z"])
@pytest.mark.parametrize("up_axis", AXES)
def test_the_tokenizer_stands_a_dae_upright(up_axis, own_axis, tmp_path):
    mesh, tokenizer = solids()["annulus"], IFlameTokenizer(up_axis=own_axis)
    vertices = np.round(np.asarray(mesh.vertices), 3)
    expected = tokenizer.encode_mesh((vertices, mesh.faces))
    path = write_dae(tmp_path / "a.dae", turn(vertices, own_axis, up_axis), mesh.faces, up_axis)
    assert tokenizer.encode_mesh(path) == expected == tokenizer(str(path))["input_ids"]
    bounds = np.stack([vertices.min(axis=0), vertices.max(axis=0) + 1])
    with_room = tokenizer.encode_mesh((vertices, mesh.faces), bounds=bounds)
    file_bounds = np.sort(turn(bounds, own_axis, up_axis), axis=0)
    assert tokenizer.encode_mesh(path, bounds=file_bounds) == with_room != expected


def test_a_dae_that_declares_nothing_is_in_the_axes_of_the_tokenizer_as_other_files_are(tmp_path):
    mesh = solids()["annulus"]
    z_up = IFlameTokenizer(up_axis="z")
    path = write_dae(tmp_path / "a.dae", mesh.vertices, mesh.faces, None)
    mesh.export(tmp_path / "a.obj", digits=8)
    assert z_up.encode_mesh(path) == z_up.encode_mesh(mesh) == z_up.encode_mesh(tmp_path / "a.obj")


@pytest.mark.parametrize("option", ["y", "z"])
def test_prepare_data_stands_every_dae_upright_and_turns_other_files_as_it_is_told(option, tmp_path):
    heights = {"x": 1.1, "y": 1.2, "z": 1.3, "bare": 1.4}
    (tmp_path / "in").mkdir()
    for name, height in heights.items():
        vertices = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0, 0.25], [0, height, 0]])
        up_axis = option if name == "bare" else name
        faces = [[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]
        declared = None if name == "bare" else name
        write_dae(tmp_path / "in" / f"{name}.dae", turn(vertices, "y", up_axis), faces, declared)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--up_axis", option, "--num_workers", 1) == 0
    found = {row["name"]: np.ptp(row["vertices"], axis=0) for row in rows(tmp_path / "out")}
    assert found.keys() == heights.keys()
    for name, height in heights.items():
        np.testing.assert_allclose(found[name], [0.5 / height, 1, 0.25 / height], atol=1e-5)
