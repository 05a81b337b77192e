"""`iflame tokenize`, as a process and by its main()."""

import json
import re

import numpy as np
import pytest
import trimesh
from command_fixtures import process
from mesh_fixtures import solids
from PIL import Image

from iflame_cli.command_line import main
from iflame_cli.tokenizing import describe, measure
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
    assert (found["mean_error"] > 0) == (name != "box"), "the corners of the box lie on points of the grid"
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


def test_a_folder_is_tokenized_with_a_table_in_the_end(tmp_path, capsys):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.glb")
    assert main(["tokenize", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    *_, table = output.split("\n\n")
    head, *rows, total = table.strip().splitlines()
    assert head.split()[:4] == ["faces", "kept", "dropped", "tokens"]
    assert [row.split()[-1] for row in rows] == [str(tmp_path / f"{name}.glb") for name in sorted(solids())]
    counts = [int(row.split()[0].replace(",", "")) for row in rows]
    assert sum(counts) == int(total.split()[0].replace(",", "")) == sum(len(m.faces) for m in solids().values())
    assert "all 4 meshes" in total
    assert main(["tokenize", str(tmp_path), "--json"]) == 0
    assert [json.loads(line)["faces"] for line in capsys.readouterr().out.splitlines()] == counts


def test_what_tokens_do_not_keep_of_a_textured_mesh_is_named(tmp_path, capsys):
    box = trimesh.creation.box()
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((8, 2)), image=Image.new("RGB", (2, 2)))
    box.export(tmp_path / "crate.glb")
    assert main(["tokenize", str(tmp_path / "crate.glb")]) == 0
    assert re.search(r"besides  materials, textures, UVs(, normals)?: not kept", capsys.readouterr().out)
    assert {"materials", "textures", "UVs"} <= set(measure(tmp_path / "crate.glb")["lost_attributes"])
    for suffix in ("stl", "glb"):  # the material of files of this project is the same for all
        assert "besides" not in describe(measure(export_mesh(trimesh.creation.box(), tmp_path / f"plain.{suffix}")))


def test_a_simplified_mesh_says_what_it_was_simplified_from(tmp_path, capsys):
    path = export_mesh(trimesh.creation.icosphere(subdivisions=4), tmp_path / "ball.glb")
    found = measure(path, decimate=200)
    assert found["faces_in_file"] == 5120 and 100 < found["faces"] <= 200
    assert main(["tokenize", str(path), "--decimate", "200"]) == 0
    assert f"{found['faces']} faces, simplified from 5,120, closed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="ball.glb: its 5,120 faces cannot be simplified to 1"):
        measure(path, decimate=1)
