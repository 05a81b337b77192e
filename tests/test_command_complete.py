"""`iflame complete`, as a process and by its main()."""

import json
import shutil

import numpy as np
import pytest
import trimesh
from command_fixtures import model_folder, part_file, process  # noqa: F401

from iflame_cli.command_line import main
from iflame_hf import export_mesh


def test_complete_goes_on_from_a_part_as_a_process(model, part, tmp_path):
    arguments = (
        "complete",
        model,
        part.name,
        "--num",
        2,
        "--max-faces",
        14,
        "--seed",
        1,
        "--device",
        "cpu",
        "--out",
        "o",
    )
    run = process(*arguments, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "o" / "meshes.json").read_text())
    assert [entry["part"] for entry in record["meshes"]] == ["part.glb"] * 2
    given = trimesh.load_mesh(part, process=False)
    corners = {tuple(vertex) for vertex in np.asarray(given.vertices).tolist()}
    for number in range(2):
        mesh = trimesh.load_mesh(tmp_path / "o" / f"part-completed-0{number}.glb", process=False)
        assert corners <= {tuple(vertex) for vertex in np.asarray(mesh.vertices).tolist()}
    assert max(entry["faces"] for entry in record["meshes"]) > len(given.faces) == 8


@pytest.mark.parametrize("suffix", ["obj", "stl"])
def test_complete_keeps_the_place_and_units_of_the_part(model, suffix, tmp_path):
    legs = trimesh.creation.box(extents=(40, 20, 40))
    legs.apply_translation((100, 10, -50))
    path = export_mesh(legs, tmp_path / f"legs.{suffix}")  # stl turns it so that z is up
    arguments = [
        "complete",
        model,
        str(path),
        "--max-faces",
        "20",
        "--seed",
        "1",
        "--device",
        "cpu",
        "--format",
        suffix,
    ]
    assert main([*arguments, "--room-above", "1", "--out", str(tmp_path / "room")]) == 0
    completed = trimesh.load_mesh(tmp_path / "room" / f"legs-completed-00.{suffix}")
    given = trimesh.load_mesh(path)
    near = np.abs(np.asarray(completed.vertices)[:, None] - np.asarray(given.vertices)[None]).max(axis=2).min(axis=0)
    assert near.max() < 40 / 128, "every corner of the part is there, to half a step"
    up = 1 if suffix == "obj" else 2
    assert completed.bounds[1][up] <= given.bounds[0][up] + 40 + 0.2
    assert main([*arguments, "--out", str(tmp_path / "no")]) == 1


def test_a_part_that_needs_a_place_is_told_how_to_get_one(model, tmp_path, capsys):
    path = export_mesh(trimesh.creation.box(extents=(3, 3, 3)), tmp_path / "big.glb")
    assert main(["complete", model, str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert "big.glb" in error and "--room-above or --bounds" in error
    assert not (tmp_path / "out").exists()


def test_all_parts_are_looked_at_before_the_first_is_completed(model, part, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(["complete", model, str(part), str(tmp_path / "none.obj"), *arguments]) == 1
    assert "none.obj: no such file" in capsys.readouterr().err
    (tmp_path / "bad.obj").write_text("nothing")
    assert main(["complete", model, str(part), str(tmp_path / "bad.obj"), *arguments]) == 1
    assert "bad.obj" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    twin = shutil.copy(part, tmp_path / "other" / "part.glb")
    assert main(["complete", model, str(part), str(twin), *arguments]) == 1
    assert "the same name" in capsys.readouterr().err
    assert main(["complete", model, str(part), "--max-faces", "8", *arguments]) == 1
    assert "--max-faces must be more" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.glb"))
