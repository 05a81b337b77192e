"""The scripts in examples/, each run with a small model."""

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from code_cache import own_code_cache  # noqa: F401
from mesh_fixtures import solids
from safetensors.torch import load_file
from small_models import BOS, PAD, small_model

from iflame_hf import IFlameTokenizer

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAMES = ("batch_export", "complete", "fine_tune", "sample")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a model that ends some of its meshes, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return str(folder)


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *arguments):
    load(name).main([str(argument) for argument in arguments])


def triangles(mesh):
    """The faces as a set of sets of corners, in steps of the model's grid."""
    corners = np.rint(np.asarray(mesh.vertices)[np.asarray(mesh.faces)] * 128).astype(int)
    return {frozenset(map(tuple, face)) for face in corners.tolist()}


def test_there_is_a_test_here_for_every_example():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_uses_the_public_interface_only(name):
    text = (EXAMPLES / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 80
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {
        name for node in nodes for name in ([node.module] if isinstance(node, ast.ImportFrom) else _names(node))
    }
    assert not [module for module in modules if module.split(".")[0] in ("training", "hub_upload", "iflame_cli")]
    assert not [module for module in modules if module.startswith("iflame_hf.")]
    assert not re.search(r"\w\._[a-z]", text), "a private name is used"


def _names(node):
    return [alias.name for alias in node.names]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_in_an_examples_docstring_is_one_that_it_takes(name, tmp_path, monkeypatch):
    module = load(name)
    (tmp_path / "models" / "iflame-artist").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(rf"^    python examples/{name}\.py (.+)$", module.__doc__, re.MULTILINE)

    class Parsed(Exception):
        pass

    def stop(*_, **__):
        raise Parsed

    monkeypatch.setattr(module, "run" if name == "fine_tune" else "pipeline", stop)
    with pytest.raises(Parsed):
        module.main(shlex.split(command))


def test_sample_writes_as_many_meshes_as_asked_for_and_the_same_ones_for_a_seed(model, tmp_path, capsys):
    for folder in ("a", "b"):
        run("sample", "--model", model, "--num", 3, "--max-faces", 8, "--seed", 4, "--out", tmp_path / folder)
    lines = capsys.readouterr().out.splitlines()
    files = sorted((tmp_path / "a").iterdir())
    assert len(lines) == 2 * 3 and 1 <= len(files) <= 3
    assert sum("no face" in line for line in lines) == 2 * (3 - len(files))
    for path in files:
        assert len(trimesh.load_mesh(path).faces) > 0
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_sample_asks_for_a_category(model, tmp_path):
    with pytest.raises(ValueError, match="this model takes no category: it was trained without any"):
        run("sample", "--model", model, "--category", "chair", "--out", tmp_path / "none")
    small_model(categories=["chair", "lamp"]).save_pretrained(tmp_path / "model")
    IFlameTokenizer().save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--num", 3, "--max-faces", 8, "--seed", 4)
    for category in ("chair", "lamp"):
        run("sample", *options, "--category", category, "--out", tmp_path / category)
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("chair", "lamp")}
    assert files["chair"] and files["chair"] != files["lamp"]


def test_complete_goes_on_from_the_lowest_faces_and_keeps_them(model, tmp_path, capsys):
    whole = tmp_path / "torus.obj"
    solids()["torus"].export(whole)
    faces = len(solids()["torus"].faces)
    options = ("--model", model, "--keep", 0.05, "--num", 2, "--max-faces", faces // 10, "--out", tmp_path / "out")
    run("complete", whole, *options)
    kept = round(0.05 * faces)
    assert f"the {kept} lowest of {faces} faces" in capsys.readouterr().out
    part = trimesh.load_mesh(tmp_path / "out" / "part.glb")
    quantised = IFlameTokenizer().decode_mesh(IFlameTokenizer().encode_mesh(whole))
    assert len(part.faces) == kept and triangles(part) < triangles(quantised)
    completed = [trimesh.load_mesh(tmp_path / "out" / f"completed-0{number}.glb") for number in range(2)]
    assert all(triangles(part) <= triangles(mesh) for mesh in completed)
    assert any(triangles(part) < triangles(mesh) for mesh in completed)


def test_batch_export_writes_named_meshes_in_metres_on_the_ground_with_normals_and_an_index(model, tmp_path):
    options = ("--num", 8, "--max-faces", 30, "--prefix", "chair", "--height", 0.9, "--license", "cc0-1.0")
    run("batch_export", "--model", model, "--out", tmp_path, *options)
    index = json.loads((tmp_path / "index.json").read_text())
    entries = index["meshes"]
    assert (index["up_axis"], index["unit"]) == ("y", "metre")
    assert entries and {entry["file"] for entry in entries} == {path.name for path in tmp_path.glob("*.glb")}
    for entry in entries:
        mesh = trimesh.load_mesh(tmp_path / entry["file"], process=False)
        assert entry["name"] == Path(entry["file"]).stem and entry["name"].startswith("chair_")
        assert (len(mesh.vertices), len(mesh.faces)) == (entry["vertices"], entry["faces"])
        assert mesh.extents == pytest.approx(entry["size"], abs=1e-6)
        assert mesh.extents[1] == pytest.approx(0.9) or mesh.extents[1] == 0
        assert mesh.bounds[0, 1] == pytest.approx(0, abs=1e-6)
        assert mesh.bounds.mean(axis=0)[[0, 2]] == pytest.approx([0, 0], abs=1e-6)
        content = (tmp_path / entry["file"]).read_bytes()
        assert b'"NORMAL"' in content and b"cc0-1.0" in content and entry["name"].encode() in content


def test_fine_tune_makes_a_data_set_of_a_folder_and_teaches_a_model_that_then_generates(model, tmp_path, capfd):
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(10):
        trimesh.creation.box(extents=(1, 1 + number, 2)).export(folder / f"box-{number}.glb")
    (folder / "notes.stl").write_text("not a mesh")
    run("fine_tune", folder, "--model", model, "--out", tmp_path / "out", "--steps", 2, "--samples", 2)
    printed = capfd.readouterr().out
    assert "10 meshes of 12 to 12 faces" in printed and "rejected, see rejected.jsonl" in printed
    assert printed.count("training.prepare_data") == 1 and printed.count("train.py") == 1
    before, after = (load_file(Path(path) / "model.safetensors") for path in (model, tmp_path / "out" / "model"))
    assert before.keys() == after.keys() and any((before[name] != after[name]).any() for name in before)
    assert (tmp_path / "out" / "model" / "samples.png").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_no_folder_is_refused_at_once(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    for model in ("outputs/nope", "./nope", "nope"):
        with pytest.raises(SystemExit) as end:
            run(name, *([] if name in ("sample", "batch_export") else ["mesh.obj"]), "--model", model)
        assert end.value.code == 2 and f"there is no folder {model}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
