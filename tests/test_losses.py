"""What does not come through: faces that decoding drops, and what a mesh file holds that tokens do not keep."""

import json

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_fixtures import gltf_square, write_gltf_binary
from PIL import Image

from iflame_hf.attributes import LOST_ATTRIBUTES, lost_attributes
from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_files_iflame import MESH_SUFFIXES, load_mesh
from iflame_hf.tokenization_iflame import IFlameTokenizer

BOS, EOS = 130, 131


# Faces


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=9, max_size=9), max_size=30), st.booleans())
def test_a_decoded_mesh_says_how_many_faces_were_dropped_and_why(faces, reversed_winding):
    kept, dropped = [], {"degenerate": 0, "repeated": 0}
    for face in faces:
        corners = {tuple(face[start : start + 3]) for start in (0, 3, 6)}
        if len(corners) < 3:
            dropped["degenerate"] += 1
        elif corners in kept:
            dropped["repeated"] += 1
        else:
            kept.append(corners)
    ids = [BOS] * 9 + [token for face in faces for token in face] + [0] * 5 + [EOS] * 9
    mesh = IFlameTokenizer(reversed_winding=reversed_winding).decode_mesh(ids)
    assert mesh.metadata["dropped_faces"] == dropped and len(mesh.faces) == len(kept)
    assert json.loads(json.dumps(mesh.metadata)) == mesh.metadata, "it is written into files"


# Attributes


def box() -> trimesh.Trimesh:
    return trimesh.creation.box()


def textured_box() -> trimesh.Trimesh:
    mesh = box()
    uv, image = np.asarray(mesh.vertices)[:, :2] + 0.5, Image.new("RGB", (2, 2), (200, 10, 10))
    mesh.visual = trimesh.visual.TextureVisuals(uv=uv, image=image)
    return mesh


def coloured_box(kind: str) -> trimesh.Trimesh:
    mesh = box()
    colours = np.random.default_rng(0).integers(0, 256, (len(getattr(mesh, kind)), 4), dtype=np.uint8)
    mesh.visual = trimesh.visual.ColorVisuals(
        mesh, **{{"vertices": "vertex", "faces": "face"}[kind] + "_colors": colours}
    )
    return mesh


def test_a_textured_glb_loses_its_material_its_texture_and_its_uvs(tmp_path):
    textured_box().export(tmp_path / "box.glb")
    assert lost_attributes(tmp_path / "box.glb") == ["materials", "textures", "UVs"]


def test_an_obj_with_an_mtl_loses_materials_and_a_texture_if_its_mtl_names_a_picture(tmp_path):
    textured_box().export(tmp_path / "box.obj")
    lost = ["materials", "textures", "UVs"]
    assert [word for word in lost_attributes(tmp_path / "box.obj") if word != "normals"] == lost
    for library in tmp_path.glob("*.mtl"):
        library.write_text("newmtl plain\nKd 1 0 0\n")
    assert [word for word in lost_attributes(str(tmp_path / "box.obj")) if word != "normals"] == ["materials", "UVs"]


@pytest.mark.parametrize("encoding", ["ascii", "binary"])
@pytest.mark.parametrize(("kind", "word"), [("vertices", "vertex colours"), ("faces", "face colours")])
def test_a_coloured_ply_loses_its_colours(kind, word, encoding, tmp_path):
    coloured_box(kind).export(tmp_path / "box.ply", encoding=encoding, vertex_normal=False)
    assert lost_attributes(tmp_path / "box.ply") == [word]


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_a_file_of_bare_triangles_loses_nothing(suffix, tmp_path):
    path = tmp_path / f"box{suffix}"
    if suffix == ".gltf":
        for name, content in trimesh.exchange.gltf.export_gltf(trimesh.Scene(box()), include_normals=False).items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "model.gltf").rename(path)
    elif suffix == ".dae":
        box().export(path)  # for which trimesh makes up a material and normals
        assert lost_attributes(path) == ["materials", "normals"]
        return
    else:
        no_normals = {".obj": {"include_normals": False}, ".ply": {"vertex_normal": False}}
        box().export(path, **no_normals.get(suffix, {}))
    assert len(load_mesh(path)[1]) == 12 and lost_attributes(path) == []


TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"
TEXTS = {
    "objects.obj": (f"o a\n{TRIANGLE}o b\nf 3 2 1\n", ["several objects"]),
    "one object.obj": (f"o a\ng a\n{TRIANGLE}", []),
    "groups.obj": (f"g a\n{TRIANGLE}g b\nf 3 2 1\n", ["several objects"]),
    "colours.obj": (TRIANGLE.replace("1 0\n", "1 0 0.5 0.5 0.5\n"), ["vertex colours"]),
    "comments.obj": (f"# vt 0 0\n#usemtl a\n# v 1 2 3 4 5 6\n{TRIANGLE}", []),
    "all.obj": (
        f"{TRIANGLE}vn 0 0 1\nvt 0 0\nusemtl a\np 1\nl 1 2\n",
        ["materials", "UVs", "normals", "points", "lines"],
    ),
    "colours.off": ("COFF\n3 1 0\n0 0 0 9 9 9 9\n1 0 0 9 9 9 9\n0 1 0 9 9 9 9\n3 0 1 2\n", ["vertex colours"]),
    "faces.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2 255 0 0\n", ["face colours"]),
    "edges.ply": (
        "ply\nformat ascii 1.0\ncomment TextureFile a.png\nelement vertex 3\nproperty float x\nproperty float y\n"
        "property float z\nproperty float nx\nproperty float s\nelement face 1\n"
        "property list uchar int vertex_indices\nelement edge 1\nproperty int vertex1\nproperty int vertex2\n"
        "end_header\n0 0 0 0 0\n1 0 0 0 0\n0 1 0 0 0\n3 0 1 2\n0 1\n",
        ["textures", "UVs", "normals", "lines"],
    ),
    "solids.stl": (
        "".join(
            f"solid {name}\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\nvertex 1 0 0\nvertex 0 1 {name}\nendloop\n"
            f"endfacet\nendsolid {name}\n"
            for name in "12"
        ),
        ["several objects"],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_file_loses_what_its_lines_say(name, tmp_path):
    text, lost = TEXTS[name]
    (tmp_path / name).write_text(text)
    assert len(load_mesh(tmp_path / name)[1]) > 0
    assert lost_attributes(tmp_path / name) == lost


def test_a_gltf_loses_all_that_its_tree_holds_beside_triangles(tmp_path):
    tree, blob = gltf_square()
    (primitive,) = tree["meshes"][0]["primitives"]
    others = {"NORMAL": 0, "COLOR_0": 0, "TEXCOORD_1": 0}
    tree["meshes"][0]["primitives"] = [
        primitive | {"attributes": {"POSITION": 0} | others, "material": 0, "targets": [{"POSITION": 0}]},
        {"attributes": {"POSITION": 0}, "mode": 0},
        {"attributes": {"POSITION": 0}, "mode": 3},
    ]
    tree |= {"nodes": [{"mesh": 0, "skin": 0}, {"mesh": 0}], "scenes": [{"nodes": [0, 1]}], "materials": [{}]}
    tree |= {"textures": [{}], "skins": [{"joints": [0]}], "animations": [{}], "cameras": [{}]}
    tree["extensions"] = {"KHR_lights_punctual": {"lights": [{}]}}
    lost = lost_attributes(write_gltf_binary(tmp_path / "all.glb", tree, blob))
    assert lost == [word for word in LOST_ATTRIBUTES if word != "face colours"]


def test_a_binary_stl_with_colours_loses_them(tmp_path):
    data = bytearray(box().export(file_type="stl"))
    data[84 + 48 : 84 + 50] = b"\x1f\x80"
    (tmp_path / "box.stl").write_bytes(data)
    assert lost_attributes(tmp_path / "box.stl") == ["face colours"]


def test_a_dae_of_several_textured_objects_says_so(tmp_path):
    data = trimesh.exchange.dae.export_collada([textured_box(), textured_box()])
    (tmp_path / "boxes.dae").write_bytes(data)
    assert {"several objects", "materials", "UVs"} <= set(lost_attributes(tmp_path / "boxes.dae"))


def test_meshes_in_memory_say_what_their_files_say():
    assert lost_attributes(box()) == lost_attributes(trimesh.Scene(box())) == []
    assert lost_attributes((np.asarray(box().vertices), np.asarray(box().faces))) == []
    assert lost_attributes(textured_box()) == ["materials", "textures", "UVs"]
    assert lost_attributes(coloured_box("vertices")) == ["vertex colours"]
    assert lost_attributes(coloured_box("faces")) == ["face colours"]
    scene = trimesh.Scene([textured_box(), box(), trimesh.PointCloud(np.eye(3))])
    scene.add_geometry(trimesh.load_path(np.array([[[0.0, 0, 0], [1, 1, 1]]])))
    assert lost_attributes(scene) == ["several objects", "materials", "textures", "UVs", "points", "lines"]


def test_a_pbr_material_has_a_texture_only_if_it_has_a_picture():
    mesh = box()
    for picture, lost in ((None, ["materials"]), (Image.new("RGB", (2, 2)), ["materials", "textures"])):
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 0, 0, 255], emissiveTexture=picture)
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        assert lost_attributes(mesh) == lost


def test_the_mesh_is_not_loaded_a_second_time(tmp_path, monkeypatch):
    for suffix in MESH_SUFFIXES:
        if suffix != ".gltf":
            box().export(tmp_path / f"box{suffix}")

    def load(*args, **kwargs):
        raise AssertionError("loaded")

    for name in ("load", "load_scene", "load_mesh"):
        monkeypatch.setattr(trimesh, name, load)
    paths = sorted(tmp_path.glob("box.*"))
    assert len(paths) >= 6 and [len(lost_attributes(path)) for path in paths]


def test_what_cannot_be_read_is_refused_by_name(tmp_path):
    for name, content, reason in (
        ("text.glb", "a chair", "does not begin with glTF"),
        ("cut.gltf", "{", "cannot be read as gltf"),
        ("cut.dae", "<COLLADA>", "cannot be read as dae"),
        ("chair.xyz", "0 0 0", "unknown mesh format"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(MeshError, match=f"{name}: .*{reason}"):
            lost_attributes(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.obj"):
        lost_attributes(tmp_path / "missing.obj")
    with pytest.raises(MeshError, match="not int"):
        lost_attributes(7)
