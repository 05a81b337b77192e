"""Files of meshes, read back by assimp, an importer that shares no code with what wrote them."""

import json
import os
import struct

import numpy as np
import pytest
import trimesh
from mesh_fixtures import signed_volume, solids

from iflame_hf import IFlameTokenizer, export_mesh
from iflame_hf.export_iflame import EXPORT_SUFFIXES, wind_outward

EXPECTED_UP = {".glb": 1, ".obj": 1, ".ply": 2, ".stl": 2}


def tall_cone(up_axis="y"):
    """A cone of height 4 and radius 1 with its tip up, away from the origin."""
    mesh = trimesh.creation.cone(radius=1, height=4, sections=7)
    mesh.apply_translation((3.0, 0.5, 0.25))
    if up_axis == "y":
        mesh = trimesh.Trimesh(mesh.vertices[:, [0, 2, 1]] * [1, 1, -1], mesh.faces, process=False)
    assert mesh.volume > 0 and np.ptp(mesh.vertices, axis=0).argmax() == "xyz".index(up_axis)
    return mesh


def assimp(path, *flags):
    """Positions (V, 3), faces (F, 3), normals (V, 3) or None of the one mesh in a file."""
    assimp_py = pytest.importorskip("assimp_py")
    combined = assimp_py.Process_Triangulate
    for flag in flags:
        combined |= getattr(assimp_py, flag)
    scene = assimp_py.import_file(str(path), combined)
    (mesh,) = scene.meshes
    normals = None if mesh.normals is None else np.array(mesh.normals, dtype=np.float64).reshape(-1, 3)
    positions = np.array(mesh.vertices, dtype=np.float64).reshape(-1, 3)
    return positions, np.array(mesh.indices, dtype=np.int64).reshape(-1, 3), normals


def soup(vertices, faces):
    """The set of oriented triangles, each as its corners from the least one on, without the vertices' order."""
    corners = np.asarray(vertices, dtype=np.float32)[np.asarray(faces)].tolist()
    return sorted(min(tuple(map(tuple, face[i:] + face[:i])) for i in range(3)) for face in corners)


def glb_tree(path):
    data = path.read_bytes()
    (length,) = struct.unpack("<I", data[12:16])
    return json.loads(data[20 : 20 + length])


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_another_reader_finds_the_same_triangles_upright_and_outward(suffix, up_axis, tmp_path):
    for name, mesh in {"cone": tall_cone(up_axis), **solids()}.items():
        mesh.vertices = np.round(mesh.vertices * 64) / 64  # which every format holds exactly
        path = export_mesh(mesh, tmp_path / f"{name}{suffix}", up_axis=up_axis)
        positions, faces, _ = assimp(path)
        vertices = np.asarray(mesh.vertices)
        if up_axis == "y" and suffix in (".ply", ".stl"):
            vertices = vertices[:, [0, 2, 1]] * [1, -1, 1]  # (x, y, z) -> (x, -z, y)
        if up_axis == "z" and suffix in (".glb", ".obj"):
            vertices = vertices[:, [0, 2, 1]] * [1, 1, -1]  # (x, y, z) -> (x, z, -y)
        assert soup(positions, faces) == soup(vertices, mesh.faces)
        assert signed_volume(positions, faces) == pytest.approx(mesh.volume, rel=1e-5)
        if name == "cone":
            height = positions[:, EXPECTED_UP[suffix]]
            assert np.ptp(positions, axis=0).argmax() == EXPECTED_UP[suffix]
            assert (height > height.max() - 1e-6).sum() * 2 < (height < height.min() + 1e-6).sum(), "the tip is up"


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_vertices_are_welded_in_the_file(suffix, tmp_path):
    box = trimesh.creation.box()
    apart = trimesh.Trimesh(box.vertices[box.faces.ravel()], np.arange(36).reshape(12, 3), process=False)
    path = export_mesh(apart, tmp_path / f"box{suffix}")
    assert len(trimesh.load_mesh(path, process=False).vertices) == 8
    positions, faces, _ = assimp(path, "Process_JoinIdenticalVertices")
    assert len(positions) == 8 and len(faces) == 12


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_normals_are_written_by_choice_and_point_outwards(suffix, tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=2)
    assert assimp(export_mesh(ball, tmp_path / f"flat{suffix}"))[2] is None
    positions, _, normals = assimp(export_mesh(ball, tmp_path / f"smooth{suffix}", normals=True))
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert ((normals * positions).sum(axis=1) > 0.99).all()


def test_an_stl_has_the_normals_of_its_faces(tmp_path):
    positions, faces, normals = assimp(export_mesh(trimesh.creation.box(), tmp_path / "box.stl"))
    a, b, c = np.moveaxis(positions[faces], 1, 0)
    across = np.cross(b - a, c - a)
    assert np.allclose(normals[faces[:, 0]], across / np.linalg.norm(across, axis=1)[:, None])


def test_name_and_licence_are_in_the_file(tmp_path):
    options = {"name": "oak chair\nof Zoë", "license": "cc-by-4.0", "extras": {"seed": 7}}
    files = {suffix: export_mesh(tall_cone(), tmp_path / f"m{suffix}", **options) for suffix in EXPORT_SUFFIXES}
    tree = glb_tree(files[".glb"])
    assert tree["asset"]["version"] == "2.0" and tree["asset"]["generator"] == "iFlame"
    assert tree["asset"]["copyright"] == "cc-by-4.0"
    assert tree["asset"]["extras"] == {"name": "oak chair of Zoë", "license": "cc-by-4.0", "seed": 7}
    assert {node.get("name") for node in tree["nodes"]} >= {"oak chair of Zoë"}
    assert tree["materials"][0]["doubleSided"] and tree["meshes"][0]["primitives"][0]["material"] == 0
    lines = files[".obj"].read_text(encoding="utf-8").splitlines()
    assert lines[:3] == ["# iFlame", "# oak chair of Zoë", "# licence: cc-by-4.0"] and "o oak_chair_of_Zoë" in lines
    header = files[".ply"].read_bytes().split(b"end_header")[0].decode("ascii").splitlines()
    assert header[2:5] == ["comment iFlame", "comment oak chair of Zo?", "comment licence: cc-by-4.0"]
    assert files[".stl"].read_bytes().startswith(b"iFlame, oak chair of Zo?, licence: cc-by-4.0  ")
    for path in files.values():
        positions, faces, _ = assimp(path)
        assert soup(positions, faces) and signed_volume(positions, faces) > 0


def test_without_a_name_the_file_gives_it(tmp_path):
    assert glb_tree(export_mesh(tall_cone(), tmp_path / "my-cone.glb"))["asset"]["extras"] == {"name": "my-cone"}


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
def test_a_generated_mesh_comes_back_to_the_same_tokens(suffix, tmp_path):
    """Where its vertical axis is minded, a file holds exactly what the model generated."""
    for up_axis in ("y", "z"):
        tokenizer = IFlameTokenizer(up_axis=up_axis)
        ids = tokenizer.encode_mesh(tall_cone(up_axis))
        path = export_mesh(tokenizer.decode_mesh(ids), tmp_path / f"{up_axis}{suffix}", up_axis=up_axis)
        reader = IFlameTokenizer(up_axis="yz"[EXPECTED_UP[suffix] - 1])
        assert reader.encode_mesh(path) == ids and len(ids) > 100


# Winding


def faces_of(mesh, faces=None):
    return np.asarray(mesh.vertices, dtype=np.float64), np.array(mesh.faces if faces is None else faces)


@pytest.mark.parametrize("name", solids())
def test_a_closed_mesh_is_turned_outwards(name):
    vertices, faces = faces_of(solids()[name])
    assert signed_volume(vertices, wind_outward(vertices, faces[:, ::-1])) == pytest.approx(solids()[name].volume)
    assert np.array_equal(wind_outward(vertices, faces), faces), "one that is right is not touched"


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_faces_that_contradict_each_other_are_made_consistent(share):
    for mesh in solids().values():
        vertices, faces = faces_of(mesh)
        wrong = np.random.default_rng(0).random(len(faces)) < share
        mixed = np.where(wrong[:, None], faces[:, ::-1], faces)
        assert signed_volume(vertices, wind_outward(vertices, mixed)) == pytest.approx(mesh.volume)


def test_an_open_mesh_keeps_the_winding_of_most_of_its_area():
    vertices, faces = faces_of(trimesh.creation.icosphere(subdivisions=2))
    cap = faces[vertices[faces][:, :, 2].min(axis=1) > 0.1]
    assert len(cap) > 20
    assert np.array_equal(wind_outward(vertices, cap), cap)
    assert np.array_equal(wind_outward(vertices, cap[:, ::-1]), cap[:, ::-1]), "an open mesh has no outside"
    for base in (cap, cap[:, ::-1]):
        for turned in range(len(base)):  # one of them is where a traversal begins
            mixed = base.copy()
            mixed[turned] = mixed[turned, ::-1]
            assert soup(vertices, wind_outward(vertices, mixed)) == soup(vertices, base)


def test_each_piece_is_judged_by_itself_but_a_hollow_stays():
    ball = trimesh.creation.icosphere(subdivisions=1)
    far, hollow = ball.copy(), ball.copy()
    far.apply_translation((5, 0, 0))
    far.invert()
    hollow.apply_scale(0.5)
    hollow.invert()
    together = trimesh.util.concatenate([ball, far, hollow])
    vertices, faces = faces_of(together)
    volume = signed_volume(vertices, wind_outward(vertices, faces))
    assert volume == pytest.approx(ball.volume * (1 + 1 - 0.125))


def test_triangles_that_stand_alone_are_kept():
    vertices = np.eye(3).repeat(3, axis=0) + np.tile(np.eye(3) * 5, (3, 1))
    faces = np.array([[0, 1, 2], [5, 4, 3]])
    assert np.array_equal(wind_outward(vertices, faces), faces)


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
def test_winding_can_be_kept_as_it_is(suffix, tmp_path):
    inside_out = tall_cone()
    inside_out.invert()
    positions, faces, _ = assimp(export_mesh(inside_out, tmp_path / f"kept{suffix}", winding="kept"))
    assert signed_volume(positions, faces) < 0
    positions, faces, _ = assimp(export_mesh(inside_out, tmp_path / f"turned{suffix}"))
    assert signed_volume(positions, faces) > 0


# What goes wrong


@pytest.mark.parametrize(
    ("mesh", "name", "options", "reason"),
    [
        (trimesh.creation.box(), "box.fbx", {}, "unknown format '.fbx'.*known are .glb, .obj, .ply, .stl"),
        (trimesh.creation.box(), "box", {}, "unknown format ''"),
        (trimesh.creation.box(), "box.glb", {"up_axis": "x"}, "up_axis must be one of y, z"),
        (trimesh.creation.box(), "box.glb", {"winding": "in"}, "winding must be one of outward, kept"),
        (trimesh.Trimesh(), "box.glb", {}, "no vertices"),
        (([[0, 0, 0], [1, 1, 1]], [[0, 1, 1]]), "box.glb", {}, "two equal corners"),
        (([[0, 0, 0], [1, 1, 1], [0, 0, float("nan")]], [[0, 1, 2]]), "box.glb", {}, "NaN"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_no_file(mesh, name, options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_mesh(mesh, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = export_mesh(trimesh.creation.box(), tmp_path / "mesh.glb")
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        export_mesh(tall_cone(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["mesh.glb"] and path.read_bytes() == before


def test_the_mesh_that_was_given_is_not_changed(tmp_path):
    mesh = tall_cone()
    mesh.invert()
    vertices, faces = np.array(mesh.vertices), np.array(mesh.faces)
    for suffix in EXPORT_SUFFIXES:
        export_mesh(mesh, tmp_path / f"mesh{suffix}", normals=True)
    assert np.array_equal(mesh.vertices, vertices) and np.array_equal(mesh.faces, faces)


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_mesh_gets_its_height_and_stands_on_the_ground_at_the_origin(suffix, up_axis, tmp_path):
    mesh = tall_cone(up_axis)
    path = export_mesh(mesh, tmp_path / f"cone{suffix}", up_axis=up_axis, height=1.8, pivot="ground")
    positions, faces, _ = assimp(path)
    up = EXPECTED_UP[suffix]
    sides = [axis for axis in range(3) if axis != up]
    low, high = positions.min(axis=0), positions.max(axis=0)
    assert low[up] == pytest.approx(0, abs=1e-6) and high[up] == pytest.approx(1.8, rel=1e-6)
    assert low[sides] == pytest.approx(-high[sides], abs=1e-6)
    assert signed_volume(positions, faces) == pytest.approx(mesh.volume * (1.8 / 4) ** 3, rel=1e-5)


def test_height_alone_scales_about_the_origin_and_pivot_alone_moves(tmp_path):
    mesh = tall_cone()
    scaled, _, _ = assimp(export_mesh(mesh, tmp_path / "scaled.obj", height=2))
    moved, _, _ = assimp(export_mesh(mesh, tmp_path / "moved.obj", pivot="centre"))
    same, _, _ = assimp(export_mesh(mesh, tmp_path / "same.obj"))
    assert scaled == pytest.approx(same / 2, abs=1e-6)
    assert moved == pytest.approx(same - (same.min(axis=0) + same.max(axis=0)) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"height": 0}, "height must be a positive number of metres, got 0"),
        ({"height": float("inf")}, "height must be"),
        ({"pivot": "top"}, "pivot must be one of ground, centre, got 'top'"),
    ],
)
def test_a_height_or_a_pivot_that_cannot_be_is_refused(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_mesh(tall_cone(), tmp_path / "cone.glb", **options)
    assert not list(tmp_path.iterdir())


def test_a_mesh_that_lies_flat_cannot_have_a_height(tmp_path):
    flat = (np.array([[0, 2, 0], [1, 2, 0], [0, 2, 1]]), np.array([[0, 1, 2]]))
    with pytest.raises(ValueError, match="the mesh lies flat: it cannot be scaled to a height of 2"):
        export_mesh(flat, tmp_path / "flat.glb", height=2)
