"""Contact sheets: what is nearer hides what is farther, outside looks different from inside, files are whole."""

import numpy as np
import pytest
import trimesh
from PIL import Image
from scipy.spatial import ConvexHull

from iflame_cli import render
from iflame_cli.render import render_mesh, render_meshes
from training.procedural.make import KINDS, make_mesh

BOX = trimesh.creation.box((1.0, 2.0, 0.5))


def is_blue(picture: np.ndarray) -> np.ndarray:
    return picture[..., 2].astype(int) > picture[..., 0].astype(int) + 8


def is_red(picture: np.ndarray) -> np.ndarray:
    return picture[..., 0].astype(int) > picture[..., 2].astype(int) + 8


def test_a_solid_covers_its_silhouette():
    picture = render_mesh(BOX.vertices, BOX.faces, 300)
    seen = BOX.vertices @ render._CAMERA.T
    outline = ConvexHull(seen[:, :2])
    scale = 300 * (1 - 2 * render._MARGIN) / np.ptp(seen[:, :2], axis=0).max()
    covered = (picture != 255).any(axis=-1).sum()
    assert covered == pytest.approx(
        outline.volume * scale**2, rel=0.02
    )  # the volume of a hull in the plane is its area


def test_outside_is_blue_and_inside_is_red():
    outside, inside = render_mesh(BOX.vertices, BOX.faces), render_mesh(BOX.vertices, BOX.faces[:, ::-1])
    assert is_blue(outside).mean() > 0.1 and not is_red(outside).any()
    assert is_red(inside).mean() > 0.1


def test_up_is_up_and_right_is_right():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0.5, 3, 0]], dtype=float)
    drawn = (render_mesh(vertices, np.array([[0, 1, 2]])) != 255).any(axis=-1)
    rows = np.flatnonzero(drawn.any(axis=1))
    widths = drawn.sum(axis=1)
    assert widths[rows[5]] < widths[rows[-5]], "the tip is at the top"
    tilted = np.array([[0, 0, 0], [4, 0, 0], [4, 1, 0]], dtype=float)
    drawn = (render_mesh(tilted, np.array([[0, 1, 2]])) != 255).any(axis=-1)
    columns = np.flatnonzero(drawn.any(axis=0))
    heights = drawn.sum(axis=0)
    assert heights[columns[5]] < heights[columns[-5]], "the high end is on the right"


def test_a_near_part_hides_a_far_one_in_whatever_order_they_come():
    near = trimesh.creation.box((1, 1, 1)).apply_translation(3 * render._CAMERA[2])
    far = trimesh.creation.box((0.5, 0.5, 0.5))
    far.invert()
    alone = render_mesh(near.vertices, near.faces)
    for parts in ([near, far], [far, near]):
        both = trimesh.util.concatenate(parts)
        np.testing.assert_array_equal(render_mesh(both.vertices, both.faces), alone)


def test_the_order_of_faces_does_not_change_the_picture():
    vertices, faces = make_mesh(np.random.default_rng(0), "chair")[1:]
    picture = render_mesh(vertices, faces).astype(int)
    shuffled = render_mesh(vertices, np.random.default_rng(1).permutation(faces)).astype(int)
    assert (
        np.abs(picture - shuffled).max(axis=-1) > 40
    ).mean() < 0.002  # where two parts lie in one plane, either wins


def test_edges_are_drawn_over_faces():
    flat = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=float)
    picture = render_mesh(flat, np.array([[0, 1, 2], [0, 2, 3]]), 200)
    middle = picture[90:110, 90:110].reshape(-1, 3).astype(int).sum(axis=1)
    assert middle.min() < 0.7 * np.median(middle), "the diagonal"


def test_scale_and_place_do_not_change_the_picture():
    vertices, faces = make_mesh(np.random.default_rng(3), "house")[1:]
    picture = render_mesh(vertices, faces).astype(int)
    moved = render_mesh(vertices.astype(float) * 4096 + 8192, faces).astype(int)
    assert (np.abs(picture - moved).max(axis=-1) > 40).mean() < 0.002


@pytest.mark.parametrize(
    "vertices, faces",
    [
        (np.zeros((0, 3)), np.zeros((0, 3), dtype=int)),
        (np.ones((3, 3)), np.array([[0, 1, 2]])),
        (np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2]]), np.array([[0, 1, 2]])),
    ],
    ids=["nothing", "a point", "a line"],
)
def test_a_mesh_without_area_leaves_the_picture_white(vertices, faces):
    assert (render_mesh(vertices, faces, 32) == 255).all()


def test_a_sheet_holds_every_kind_row_by_row_and_leaves_empty_cells_white(tmp_path):
    meshes = [make_mesh(np.random.default_rng(0), kind) for kind in KINDS[:4]]
    path = tmp_path / "new folder" / "sheet.png"
    render_meshes([meshes[0], None, meshes[1], (np.zeros((0, 3)), np.zeros((0, 3), int)), meshes[2]], path, 2, size=64)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * 64, 2 * 64, 3)
    cells = sheet.reshape(3, 64, 2, 64, 3).transpose(0, 2, 1, 3, 4).reshape(6, 64, 64, 3)
    assert [bool((cell != 255).any()) for cell in cells] == [True, False, True, False, True, False]
    np.testing.assert_array_equal(cells[2], render_mesh(meshes[1].vertices, meshes[1].faces, 64))


def test_titles_stand_below_and_trimesh_objects_and_arrays_look_alike(tmp_path):
    render_meshes([BOX, (BOX.vertices, BOX.faces)], tmp_path / "sheet.png", titles=["box", "box"], size=100)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape[0] > 100 and sheet.shape[1] == 200
    assert (sheet[100:] != 255).any()
    np.testing.assert_array_equal(sheet[:, :100], sheet[:, 100:])


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"old")

    def half_written(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", half_written)
    with pytest.raises(OSError, match="no space left"):
        render_meshes([BOX], path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "meshes, options, message",
    [
        ([], {}, "no meshes to draw"),
        ([(np.full((3, 3), np.nan), np.array([[0, 1, 2]]))], {}, "NaN or infinite"),
        ([BOX], {"columns": 0}, "columns and size must be at least 1"),
        ([BOX], {"titles": ["a", "b"]}, "1 meshes and 2 titles"),
    ],
)
def test_wrong_arguments_are_refused_in_plain_words(tmp_path, meshes, options, message):
    with pytest.raises(ValueError, match=message):
        render_meshes(meshes, tmp_path / "sheet.png", **options)
    assert not list(tmp_path.iterdir())
