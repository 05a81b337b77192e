"""`iflame tokenize`, as a process and by its main()."""

import json

import numpy as np
import pytest
import trimesh
from command_fixtures import process
from mesh_fixtures import solids

from iflame_cli.command_line import main
from iflame_cli.tokenizing import measure
from iflame_hf import IFlameTokenizer, export_mesh


def spoilt_box(path):
    """A box with a vertex twice, a face on two corners, a face repeated, and a needle that rounding flattens."""
    box = trimesh.creation.box(extents=(2, 4, 2))
    vertices = [*box.vertices.tolist(), box.vertices[0].tolist(), [1, 2, 1 - 1e-4]]
    faces = [*box.faces.tolist(), box.faces[3][::-1].tolist(), [0, 8, 5], [7, 9, 6]]
    lines = ["v {} {} {}".format(*vertex) for vertex in vertices]
    path.write_text("\n".join(lines + ["f {} {} {}".format(*(np.array(face) + 1)) for face in faces]) + "\n")
    return path


def test_tokenize_counts_what_was_dropped_and_why_as_a_process(tmp_path):
    path = spoilt_box(tmp_path / "spoilt.obj")
    run = process("tokenize", path.name, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "read     10 vertices, 15 faces, open; longest side 4, y up" in run.stdout
    assert "kept     8 vertices, 12 faces, closed; 126 tokens" in run.stdout
    assert (
        "1 had two equal corners; 1 became a line or a point when rounded; 1 lay on the vertices of another: dropped"
        in run.stdout
    )
    assert "1 were at the place of another; 1 fell together with another when rounded: merged" in run.stdout
    assert "one step is 0.0312" in run.stdout
    run = process("tokenize", path.name, "--json", "--resolution", 64, cwd=tmp_path)
    found = json.loads(run.stdout)
    assert found["faces_repeated"] == found["faces_flattened_by_rounding"] == found["faces_with_equal_corners"] == 1
    assert found["step"] == 4 / 64 and found["largest_error"] == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("name", solids())
def test_the_counts_add_up_and_the_error_is_that_of_rounding(name, tmp_path):
    mesh = solids()[name]
    path = export_mesh(mesh, tmp_path / "mesh.glb")
    found = measure(path, 32)
    tokenizer = IFlameTokenizer(coordinate_resolution=32)
    ids = tokenizer.encode_mesh(path)
    decoded = tokenizer.decode_mesh(ids)
    assert (len(ids), len(decoded.vertices)) == (found["tokens"], found["kept_vertices"])
    assert decoded.is_watertight == found["closed_after"]
    dropped = sum(found[k] for k in ("faces_with_equal_corners", "faces_flattened_by_rounding", "faces_repeated"))
    assert found["kept_faces"] == found["faces"] - dropped == (found["tokens"] - 18) // 9
    merged = found["vertices_welded"] + found["vertices_merged_by_rounding"]
    assert found["kept_vertices"] <= found["vertices"] - merged
    assert found["mean_error"] <= found["largest_error"] <= 3**0.5 / 2 * found["step"] * 1.0001
    assert (found["mean_error"] > 0) == (name != "box"), "the corners of the box lie on levels"
    assert found["longest_side"] == pytest.approx(mesh.extents.max(), rel=1e-6)
    assert found["closed_before"]


def test_tokenize_minds_the_vertical_axis_of_a_format(tmp_path):
    mesh = trimesh.creation.cone(1, 4)
    assert measure(export_mesh(mesh, tmp_path / "a.stl"))["up_axis"] == "z"
    assert measure(export_mesh(mesh, tmp_path / "a.glb"))["up_axis"] == "y"
    assert measure(tmp_path / "a.glb", up_axis="z")["up_axis"] == "z"


def test_tokenize_goes_on_after_a_bad_file_and_ends_with_1(tmp_path, capsys):
    good = export_mesh(trimesh.creation.box(), tmp_path / "good.glb")
    (tmp_path / "bad.obj").write_text("nothing")
    assert main(["tokenize", str(tmp_path / "bad.obj"), str(tmp_path / "none.ply"), str(good)]) == 1
    output = capsys.readouterr()
    assert "good.glb" in output.out and "12 faces" in output.out
    assert "bad.obj" in output.err and "none.ply: no such file" in output.err and "2 of 3" in output.err
