"""`iflame complete`, as a process and by its main()."""

import json
import shutil
import sys

import numpy as np
import pytest
import trimesh
from command_fixtures import model_folder, part_file, process  # noqa: F401

from iflame_cli.command_line import main
from iflame_hf import IFlameTokenizer, export_mesh


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


def test_all_parts_are_checked_before_the_first_is_completed(model, part, tmp_path, capsys):
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
    assert "or raise --max-faces" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.glb"))


def complete(model, *arguments):
    return main(["complete", model, *map(str, arguments), "--device", "cpu", "--seed", "1"])


def test_a_folder_of_parts_is_completed_and_each_knows_its_part(model, part, tmp_path):
    (tmp_path / "parts").mkdir()
    for name in ("a.glb", "b.glb"):
        shutil.copy(part, tmp_path / "parts" / name)
    export_mesh(trimesh.load_mesh(part), tmp_path / "parts" / "c.stl")
    (tmp_path / "parts" / "notes.txt").write_text("no mesh")
    assert complete(model, tmp_path / "parts", "--max-faces", 12, "--out", tmp_path / "o", "--num", 2) == 0
    entries = json.loads((tmp_path / "o" / "meshes.json").read_text())["meshes"]
    names = [f"{name}-completed-0{number}.glb" for name in "abc" for number in range(2)]
    assert [entry["file"] for entry in entries] == names
    assert [entry["part"] for entry in entries[::2]] == [
        str(tmp_path / "parts" / name) for name in ("a.glb", "b.glb", "c.stl")
    ]


def test_a_part_with_too_many_faces_is_named_and_keep_or_decimate_make_it_fit(model, tmp_path, capsys):
    path = export_mesh(trimesh.creation.icosphere(subdivisions=3, radius=0.4), tmp_path / "ball.glb")
    arguments = (path, "--max-faces", 60)
    assert complete(model, *arguments, "--out", tmp_path / "no") == 1
    error = capsys.readouterr().err
    assert "ball.glb: it has " in error and "may have 60: keep its lowest faces only (--keep 0.5)" in error
    assert "--decimate 30" in error and not (tmp_path / "no").exists()
    assert complete(model, *arguments, "--keep", 40, "--out", tmp_path / "kept") == 0
    assert complete(model, *arguments, "--decimate", 30, "--keep", "0.5", "--out", tmp_path / "simple") == 0
    ids = IFlameTokenizer().encode_mesh(path, normalise=False)
    lowest = IFlameTokenizer().decode_mesh(ids[: 9 * 41])
    kept = trimesh.load_mesh(tmp_path / "kept" / "ball-completed-00.glb", process=False)
    corners = {tuple(vertex) for vertex in np.asarray(kept.vertices).round(6).tolist()}
    assert {tuple(vertex) for vertex in np.asarray(lowest.vertices).round(6).tolist()} <= corners
    simple = trimesh.load_mesh(tmp_path / "simple" / "ball-completed-00.glb", process=False)
    assert 15 <= len(simple.faces) <= 60


def test_what_is_kept_of_a_mesh_in_its_own_units_stays_in_its_box(model, tmp_path):
    path = export_mesh(trimesh.creation.icosphere(subdivisions=1, radius=7), tmp_path / "ball.glb")
    assert complete(model, path, "--keep", "0.5", "--max-faces", 60, "--out", tmp_path) == 0
    completed = trimesh.load_mesh(tmp_path / "ball-completed-00.glb")
    assert np.abs(completed.bounds).max() <= 7.001 and completed.bounds[0][1] == pytest.approx(-7, abs=14 / 128)


def test_what_a_part_loses_is_told(model, tmp_path, capsys):
    box = trimesh.creation.box((0.5, 0.5, 0.5))
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.full((8, 4), 200, dtype=np.uint8))
    box.export(tmp_path / "box.ply")
    assert complete(model, tmp_path / "box.ply", "--max-faces", 14, "--out", tmp_path / "o") == 0
    assert "box.ply: not in what is completed: vertex colours" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["fbx", "blend", "usd", "3ds"])
def test_a_format_that_is_not_read_is_told_how_to_convert(model, suffix, tmp_path, capsys):
    path = tmp_path / f"chair.{suffix}"
    path.write_bytes(b"Kaydara FBX Binary")
    for arguments in (["tokenize", str(path)], ["complete", model, str(path)]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert f"chair.{suffix}: unknown mesh format '.{suffix}'" in error and "File > Export > glTF 2.0" in error


@pytest.mark.parametrize("command", [["tokenize"], ["complete", "user/name"]])
def test_simplifying_without_the_package_is_told_with_what_to_install(command, tmp_path, monkeypatch, capsys):
    path = export_mesh(trimesh.creation.icosphere(), tmp_path / "ball.glb")
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    assert main([*command, str(path), "--decimate", "20"]) == 1
    assert "--decimate needs the package fast-simplification: pip install fast-simplification" in (
        capsys.readouterr().err
    )
