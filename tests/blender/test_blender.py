"""
Files of `export_mesh`, imported by Blender's own importers with their default settings.

Blender is the package bpy, which exists for one version of Python each; without it these tests are skipped. In an
environment of its own, made by Python 3.11:

    pip install bpy==5.0.1 pytest .
    python -m pytest tests/blender

On a machine without a desktop bpy needs the libraries of one: libxrender1 libxi6 libxkbcommon0 libsm6 libgl1 libegl1.
"""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_fixtures import solids

from iflame_hf import export_mesh
from iflame_hf.export_iflame import EXPORT_SUFFIXES

bpy = pytest.importorskip("bpy", reason="Blender, the package bpy, is not installed")

WITH_NORMALS = (".glb", ".obj", ".ply")


def imported(path: Path):
    """The one object that Blender makes of a file, in an otherwise empty scene."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    importer = {
        ".glb": bpy.ops.import_scene.gltf,
        ".obj": bpy.ops.wm.obj_import,
        ".ply": bpy.ops.wm.ply_import,
        ".stl": bpy.ops.wm.stl_import,
    }[path.suffix]
    assert importer(filepath=str(path)) == {"FINISHED"}
    (thing,) = bpy.context.scene.objects
    assert thing.type == "MESH"
    return thing


def geometry(thing):
    """In Blender's world: the faces' corners (F, 3, 3), the normals at these (F, 3, 3), the faces' normals (F, 3)."""
    turned = np.array(thing.matrix_world.to_3x3())
    positions = np.array([vertex.co for vertex in thing.data.vertices]) @ turned.T + np.array(thing.location)
    corners = positions[[list(face.vertices) for face in thing.data.polygons]]
    corner_normals = np.array([each.vector for each in thing.data.corner_normals]) @ turned.T
    return corners, corner_normals.reshape(-1, 3, 3), np.array([f.normal for f in thing.data.polygons]) @ turned.T


def oriented(corners):
    """Triangles (F, 3, 3) in steps of 1/64, in one order, each from its least corner on: equal for equal winding."""
    faces = [[tuple(corner) for corner in face] for face in np.round(corners * 64).astype(int).tolist()]
    return sorted(min(tuple(face[i:] + face[:i]) for i in range(3)) for face in faces)


def shapes(up_axis):
    """Closed meshes, wound outwards, and one that is tall and thinner at its top."""
    cone = trimesh.creation.cone(radius=1, height=4, sections=7)
    cone.apply_translation((3.0, 0.5, 0.25))
    if up_axis == "y":
        cone.vertices = cone.vertices[:, [0, 2, 1]] * [1, 1, -1]
    meshes = {"cone": cone, **solids()}
    for mesh in meshes.values():
        mesh.vertices = np.round(mesh.vertices * 64) / 64
    return meshes


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_blender_shows_the_same_triangles_upright_and_their_outside_outwards(suffix, up_axis, tmp_path):
    for name, mesh in shapes(up_axis).items():
        expected = mesh.triangles if up_axis == "z" else mesh.triangles[..., [0, 2, 1]] * [1, -1, 1]
        inside_out = trimesh.Trimesh(mesh.vertices, mesh.faces[:, ::-1], process=False)
        corners, _, face_normals = geometry(
            imported(export_mesh(inside_out, tmp_path / f"m{suffix}", up_axis=up_axis))
        )
        assert oriented(corners) == oriented(expected), name
        across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        assert np.allclose(face_normals, across / np.linalg.norm(across, axis=1, keepdims=True), atol=1e-3), name
        if name == "cone":
            height = corners[..., 2]
            assert (height > height.max() - 1e-3).sum() * 2 < (height < height.min() + 1e-3).sum(), "the tip is up"


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
def test_vertices_are_shared_in_blender(suffix, tmp_path):
    thing = imported(export_mesh(trimesh.creation.box(), tmp_path / f"box{suffix}"))
    assert len(thing.data.vertices) == 8 and len(thing.data.polygons) == 12


@pytest.mark.parametrize("suffix", EXPORT_SUFFIXES)
def test_faces_look_flat_without_normals(suffix, tmp_path):
    thing = imported(export_mesh(trimesh.creation.icosphere(subdivisions=2), tmp_path / f"ball{suffix}"))
    _, corner_normals, face_normals = geometry(thing)
    assert not any(face.use_smooth for face in thing.data.polygons)
    assert np.allclose(corner_normals, face_normals[:, None], atol=1e-4)


@pytest.mark.parametrize("suffix", WITH_NORMALS)
def test_faces_look_smooth_with_normals(suffix, tmp_path):
    ball = trimesh.creation.icosphere(subdivisions=2)
    thing = imported(export_mesh(ball, tmp_path / f"ball{suffix}", normals=True))
    corners, corner_normals, _ = geometry(thing)
    assert all(face.use_smooth for face in thing.data.polygons) and thing.data.has_custom_normals
    assert ((corners * corner_normals).sum(axis=-1) > 0.995).all(), "on a ball they point away from its centre"


@pytest.mark.parametrize(
    ("suffix", "expected"),
    [(".glb", "oak chair of Zoë"), (".obj", "oak_chair_of_Zoë"), (".ply", "chair-7"), (".stl", "chair-7")],
)
def test_the_object_has_its_name_in_blender(suffix, expected, tmp_path):
    """Blender names what it reads from ply and stl by their files."""
    thing = imported(export_mesh(trimesh.creation.box(), tmp_path / f"chair-7{suffix}", name="oak chair of Zoë"))
    assert thing.name == thing.data.name == expected


def test_the_material_of_a_glb_is_matte_and_seen_from_both_sides(tmp_path):
    thing = imported(export_mesh(trimesh.creation.box(), tmp_path / "box.glb"))
    (material,) = thing.data.materials
    (surface,) = [node for node in material.node_tree.nodes if node.type == "BSDF_PRINCIPLED"]
    values = {name: surface.inputs[name].default_value for name in ("Base Color", "Metallic", "Roughness")}
    assert material.name == "matte" and not material.use_backface_culling
    assert values["Metallic"] == 0 and values["Roughness"] == pytest.approx(0.9)
    assert list(values["Base Color"]) == pytest.approx([0.8, 0.8, 0.8, 1.0])
