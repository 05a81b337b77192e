"""Meshes to ids and back: the sequence itself, and everything a model may emit."""

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from mesh_fixtures import random_mesh, reference_meshes, signed_volume, solids

from iflame_hf.mesh_iflame import bounding_box, denormalise, normalise
from iflame_hf.tokenization_iflame import IFlameTokenizer

PAD, BOS, EOS = 129, 130, 131
START, END = [BOS] * 9, [EOS] * 9


@pytest.fixture
def tokenizer() -> IFlameTokenizer:
    return IFlameTokenizer()


def corner_triples(mesh: trimesh.Trimesh) -> list:
    return np.asarray(mesh.vertices)[np.asarray(mesh.faces)].tolist()


# The sequence


@pytest.mark.parametrize("name", reference_meshes())
def test_sequences_are_the_original_codes_with_second_and_third_vertex_of_a_face_swapped(name, tokenizer):
    vertices, faces, tokens = reference_meshes()[name]
    swapped = tokens.reshape(-1, 3, 3)[:, [0, 2, 1]].ravel().tolist()
    assert tokenizer.encode_mesh((vertices, faces)) == START + swapped + END


@pytest.mark.parametrize("name", reference_meshes())
def test_reversed_winding_reads_and_writes_the_original_codes_sequences(name, tokenizer):
    vertices, faces, tokens = reference_meshes()[name]
    reversing = IFlameTokenizer(reversed_winding=True)
    ids = reversing.encode_mesh((vertices, faces))
    assert ids == START + tokens.ravel().tolist() + END
    ours, originals = tokenizer.decode_mesh(tokenizer.encode_mesh((vertices, faces))), reversing.decode_mesh(ids)
    assert corner_triples(ours) == corner_triples(originals)


def test_a_box_is_written_from_the_bottom_up_in_the_order_z_x_y(tokenizer):
    ids = tokenizer.encode_mesh(trimesh.creation.box(extents=(2.0, 1.0, 0.5)))
    corners = np.array(ids[9:-9]).reshape(-1, 3, 3)
    assert len(ids) == 9 * 14
    assert [sorted(set(corners[..., axis].ravel().tolist())) for axis in range(3)] == [[48, 80], [0, 128], [32, 96]]
    firsts = [tuple(face[0][::-1]) for face in corners.tolist()]
    assert firsts == sorted(firsts) and firsts[0] == (32, 0, 48)


def test_start_and_end_face_can_be_left_out(tokenizer):
    box = trimesh.creation.box()
    faces = tokenizer.encode_mesh(box, add_start=False, add_end=False)
    assert len(faces) == 108 and max(faces) <= 128
    assert tokenizer.encode_mesh(box, add_end=False) == START + faces
    assert tokenizer.encode_mesh(box, add_start=False) == faces + END


def test_more_faces_than_allowed_are_refused_with_advice(tokenizer):
    box = trimesh.creation.box()
    assert len(tokenizer.encode_mesh(box, max_faces=12)) == 126
    with pytest.raises(ValueError, match="12 faces after quantisation, more than 11: simplify"):
        tokenizer.encode_mesh(box, max_faces=11)


def test_a_mesh_that_vanishes_in_quantisation_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "needle.obj").write_text("v 0 0 0\nv 1000 0 0\nv 1000 1 0\nf 1 2 3\n")
    with pytest.raises(ValueError, match="needle.obj: no face is left after quantisation to 128 steps"):
        tokenizer.encode_mesh(tmp_path / "needle.obj")
    assert len(IFlameTokenizer(4096).encode_mesh(tmp_path / "needle.obj")) == 27


def test_a_mesh_flat_to_a_point_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "point.obj").write_text("v 1 2 3\nv 1 2 3\nv 1 2 3\nf 1 2 3\n")
    with pytest.raises(ValueError, match="point.obj: all vertices lie in one point"):
        tokenizer.encode_mesh(tmp_path / "point.obj")
    with pytest.raises(ValueError, match="^all vertices lie in one point"):
        tokenizer.encode_mesh((np.ones((3, 3)), [[0, 1, 2]]))


def test_a_part_of_a_mesh_can_stay_in_its_place(tokenizer):
    whole = tokenizer.encode_mesh(solids()["torus"])
    part = tokenizer.decode_mesh(whole[: 9 * 41])
    assert tokenizer.encode_mesh(part, normalise=False, add_end=False) == whole[: 9 * 41]
    assert tokenizer.encode_mesh(part, add_end=False) != whole[: 9 * 41]
    with pytest.raises(ValueError, match=r"must lie in \[-0.5, 0.5\]"):
        tokenizer.encode_mesh(solids()["torus"], normalise=False)


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_part_with_the_bounds_of_the_whole_has_the_tokens_that_it_has_in_the_whole(up_axis):
    """In any units: the whole is 4 wide and far from the origin."""
    tokenizer = IFlameTokenizer(up_axis=up_axis)
    whole = solids()["torus"]
    ids = tokenizer.encode_mesh(whole)
    vertices = denormalise(tokenizer.decode_mesh(ids[: 9 * 41]).vertices, whole.bounds)
    assert whole.bounds[0].min() < -4 and np.abs(vertices - [5, -3, 11]).max() < 4
    part = (vertices, tokenizer.decode_mesh(ids[: 9 * 41]).faces)
    assert tokenizer.encode_mesh(part, bounds=whole.bounds, add_end=False) == ids[: 9 * 41]
    rows = tokenizer([part, part], bounds=whole.bounds.tolist(), add_end=False)["input_ids"]
    assert rows == [ids[: 9 * 41]] * 2
    assert tokenizer.encode_mesh(part, add_end=False) != ids[: 9 * 41]


def test_room_above_a_part_is_added_along_the_vertical_axis():
    box = trimesh.creation.box(extents=(1, 2, 3)).vertices
    assert bounding_box(box).tolist() == [[-0.5, -1, -1.5], [0.5, 1, 1.5]]
    assert bounding_box(box, 0.5).tolist() == [[-0.5, -1, -1.5], [0.5, 2, 1.5]]
    assert bounding_box(box, 1, "z").tolist() == [[-0.5, -1, -1.5], [0.5, 1, 4.5]]
    tokenizer = IFlameTokenizer()
    low, high = tokenizer.decode_mesh(
        tokenizer.encode_mesh((box, trimesh.creation.box().faces), bounds=bounding_box(box, 1.0))
    ).bounds
    assert low[1] == -0.5 and high[1] == 0 and high[2] - low[2] == 0.75, "half of the height is free, above"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bounds": [[0, 0, 0], [1, 1, 1]]}, "does not lie within the bounds"),
        ({"bounds": [[-9, -9, -9], [9, 1, 99]], "normalise": False}, "leave out normalise=False"),
        ({"bounds": 3}, "bounds are the lowest and the highest corner"),
        ({"bounds": [[1, 1, 1], [0, 0, 0]]}, "bounds are the lowest and the highest corner"),
        ({"bounds": [[1, 1], [2, 2]]}, "bounds are the lowest and the highest corner"),
        ({"bounds": [[1, 1, 1], [1, 1, 1]]}, "in one point"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(tokenizer, options, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer.encode_mesh(solids()["torus"], **options)


# The round trip


@pytest.mark.parametrize("reversed_winding", [False, True])
@pytest.mark.parametrize("up_axis", ["y", "z"])
@pytest.mark.parametrize("name", solids())
def test_signed_volume_survives_within_the_quantisation_error(name, up_axis, reversed_winding):
    tokenizer = IFlameTokenizer(up_axis=up_axis, reversed_winding=reversed_winding)
    mesh = solids()[name]
    for faces in (mesh.faces, mesh.faces[:, ::-1]):
        before = trimesh.Trimesh(normalise(np.asarray(mesh.vertices)), faces, process=False)
        after = tokenizer.decode_mesh(tokenizer.encode_mesh((mesh.vertices, faces)))
        volumes = signed_volume(before.vertices, before.faces), signed_volume(after.vertices, after.faces)
        # a corner moves by at most half a step on each axis, so the surface by that along its normal
        assert abs(volumes[0] - volumes[1]) <= before.area * np.sqrt(3) / 2 / 128
        assert volumes[0] * volumes[1] > 0
        assert after.volume == pytest.approx(volumes[1])


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_every_vertex_comes_back_within_half_a_step(up_axis):
    tokenizer = IFlameTokenizer(up_axis=up_axis)
    for mesh in solids().values():
        after = tokenizer.decode_mesh(tokenizer.encode_mesh(mesh))
        distances = np.abs(normalise(np.asarray(mesh.vertices))[:, None] - after.vertices[None]).max(axis=2)
        assert distances.min(axis=1).max() <= 0.5 / 128 + 1e-12
        assert distances.min(axis=0).max() <= 0.5 / 128 + 1e-12


def test_z_up_sorts_along_z_and_is_y_up_of_the_turned_mesh(tokenizer):
    mesh = solids()["annulus"]
    turned = mesh.copy()
    turned.apply_transform(trimesh.transformations.rotation_matrix(-np.pi / 2, (1, 0, 0)))
    turned.vertices = np.round(turned.vertices, 12)
    mesh.vertices = np.round(mesh.vertices, 12)
    z_up = IFlameTokenizer(up_axis="z")
    ids = z_up.encode_mesh(mesh)
    assert ids == tokenizer.encode_mesh(turned) != tokenizer.encode_mesh(mesh)
    heights = z_up.decode_mesh(ids).vertices[:, 2]
    assert (np.diff(heights) >= 0).all() and heights[0] < heights[-1]


def test_a_mirrored_scene_node_comes_back_with_its_outside_outside(tokenizer):
    scene = trimesh.Scene()
    scene.add_geometry(solids()["annulus"], transform=np.diag([-1.0, 1, 1, 1]))
    mesh = tokenizer.decode_mesh(tokenizer.encode_mesh(scene))
    assert mesh.volume > 0 and mesh.is_watertight


def test_a_decoded_mesh_is_welded(tokenizer):
    corners = np.asarray(solids()["icosphere"].triangles).reshape(-1, 3)
    mesh = tokenizer.decode_mesh(tokenizer.encode_mesh((corners, np.arange(len(corners)).reshape(-1, 3))))
    assert mesh.is_watertight and len(mesh.vertices) == 162


@pytest.mark.parametrize("name", reference_meshes())
def test_encoding_a_decoded_mesh_gives_the_same_ids(name, tokenizer):
    ids = tokenizer.encode_mesh(reference_meshes()[name][:2])
    assert tokenizer.encode_mesh(tokenizer.decode_mesh(ids)) == ids


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["y", "z"]), st.booleans(), st.sampled_from([4, 63, 128]))
def test_encoding_decoded_arrays_gives_the_same_ids(seed, up_axis, reversed_winding, resolution):
    tokenizer = IFlameTokenizer(resolution, up_axis=up_axis, reversed_winding=reversed_winding)
    ids = tokenizer.encode_arrays(
        np.random.default_rng(seed).uniform(-0.5, 0.5, (30, 3)), random_mesh(seed, 30, 60)[1]
    )
    np.testing.assert_array_equal(tokenizer.encode_arrays(*tokenizer.decode_arrays(ids)), ids)


# What a model may emit


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 3), st.integers(-100, 140), st.sampled_from([PAD, BOS, EOS])), max_size=60))
def test_any_ids_decode_to_the_whole_faces_before_the_first_id_that_is_no_coordinate(ids):
    tokenizer = IFlameTokenizer()
    rest = list(ids)
    while rest and rest[0] in (PAD, BOS):
        rest.pop(0)
    faces, face = [], []
    for token in rest:
        if not 0 <= token <= 128:
            break
        face.append(token)
        if len(face) == 9:
            corners = [
                (x / 128 - 0.5, y / 128 - 0.5, z / 128 - 0.5) for z, x, y in zip(*[iter(face)] * 3, strict=True)
            ]
            if len(set(corners)) == 3 and set(corners) not in [set(other) for other in faces]:
                faces.append(corners)
            face = []
    mesh = tokenizer.decode_mesh(ids)
    assert [[tuple(corner) for corner in face] for face in corner_triples(mesh)] == faces
    assert len(mesh.vertices) == len({corner for face in faces for corner in face})


@pytest.mark.parametrize("cut", range(1, 10))
def test_a_face_that_was_cut_short_is_left_out(cut, tokenizer):
    ids = tokenizer.encode_mesh(trimesh.creation.box(), add_end=False)
    assert len(tokenizer.decode_mesh(ids[:-cut]).faces) == 11
    assert len(tokenizer.decode_mesh(ids[:-cut] + END).faces) == 11


def test_padding_before_the_mesh_the_start_face_and_all_after_the_end_are_passed_over(tokenizer):
    box = trimesh.creation.box()
    faces = tokenizer.encode_mesh(box, add_start=False, add_end=False)
    expected = corner_triples(tokenizer.decode_mesh(faces))
    assert len(expected) == 12
    for front in ([], START, [PAD] * 18 + START):
        for back in ([], END, [EOS], [PAD] * 9, END + [PAD] * 9, END + faces):
            assert corner_triples(tokenizer.decode_mesh(front + faces + back)) == expected


def test_nothing_decodes_to_an_empty_mesh(tokenizer):
    for ids in ([], START, START + END, [PAD] * 9, [EOS], [1, 2, 3], [7] * 9, torch.zeros(0, dtype=torch.long)):
        mesh = tokenizer.decode_mesh(ids)
        assert isinstance(mesh, trimesh.Trimesh) and mesh.vertices.shape == (0, 3) and mesh.faces.shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_ids_may_be_a_list_an_array_or_a_tensor_of_any_integer_type(dtype, tokenizer):
    ids = tokenizer.encode_mesh(trimesh.creation.box())
    expected = corner_triples(tokenizer.decode_mesh(ids))
    array = np.array(ids, dtype=dtype)
    for same in (array, torch.from_numpy(array), tuple(ids), list(array), list(torch.tensor(ids))):
        assert corner_triples(tokenizer.decode_mesh(same)) == expected


@pytest.mark.parametrize(
    "ids", [[0.0] * 9, torch.zeros(9), [[0] * 9], 7, ["<bos>"] * 9, [None], [[1, 2], [3]], [True] * 9, [2**70] * 9]
)
def test_what_is_not_one_sequence_of_whole_numbers_is_refused(ids, tokenizer):
    with pytest.raises(ValueError, match="one sequence of whole numbers"):
        tokenizer.decode_mesh(ids)


def test_a_batch_decodes_row_by_row(tokenizer):
    meshes = list(solids().values())
    rows = [tokenizer.encode_mesh(mesh) for mesh in meshes]
    padded = tokenizer(meshes, padding=True, return_tensors="pt")["input_ids"]
    for batch in (rows, padded, padded.numpy()):
        decoded = tokenizer.batch_decode_mesh(batch)
        assert [corner_triples(mesh) for mesh in decoded] == [
            corner_triples(tokenizer.decode_mesh(row)) for row in rows
        ]
    with pytest.raises(ValueError, match="one sequence"):
        tokenizer.batch_decode_mesh(rows[0])


def test_a_decoded_mesh_can_be_exported_and_read_again(tokenizer, tmp_path):
    ids = tokenizer.encode_mesh(solids()["torus"])
    for suffix in ("glb", "obj", "ply", "stl"):
        tokenizer.decode_mesh(ids).export(tmp_path / f"torus.{suffix}")
        assert tokenizer.encode_mesh(tmp_path / f"torus.{suffix}") == ids
