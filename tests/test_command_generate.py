"""`iflame generate`, as a process and by its main()."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from command_fixtures import ROOT, command, files_of, generate, model_folder, process  # noqa: F401
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import BOS, EOS, PAD, small_model
from tqdm import tqdm

from iflame_cli.command_line import main
from iflame_cli.making import Progress
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from iflame_hf.format_iflame import known_format
from iflame_hf.mesh_files_iflame import read_gltf_tree
from training.publish.verify import lay_out_cache


def drop_a_weight(path):
    weights = load_file(path)
    del weights["lm_head.bias"]
    save_file(weights, path, metadata={"format": "pt"})


def test_a_process_writes_numbered_meshes_and_a_record_by_a_model_that_the_hub_knows_by_its_name(model, tmp_path):
    lay_out_cache(Path(model), tmp_path / "home", "some-user/small")
    arguments = (
        "generate",
        "some-user/small",
        "--revision",
        "main",
        "--num",
        11,
        "--out",
        "some/meshes",
        "--max-faces",
        5,
        "--seed",
        1,
        "--batch-size",
        4,
    )
    settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = process(*arguments, "--device", "cpu", cwd=tmp_path, **settings)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "some" / "meshes"
    record = json.loads((out / "meshes.json").read_text())
    assert record["seed"] == 1 and record["max_faces"] == 5 and len(record["meshes"]) == 11
    named = [entry["file"] for entry in record["meshes"]]
    written = {f"mesh-{number:02d}.glb" for number in range(11) if named[number]}
    assert set(files_of(out)) == written | {"meshes.json"} and len(written) > 5
    for entry in record["meshes"]:
        assert set(entry) >= {"faces", "vertices", "ended"}
        if entry["file"]:
            mesh = trimesh.load_mesh(out / entry["file"], process=False)
            assert (len(mesh.faces), len(mesh.vertices)) == (entry["faces"], entry["vertices"])
            assert f"{os.path.join('some', 'meshes', entry['file'])}  {entry['faces']} faces" in run.stdout
    assert "Traceback" not in run.stderr and "Loading weights" not in run.stderr
    same = ("--num", "11", "--seed", "1", "--batch-size", "4")
    assert generate(model, tmp_path / "of the folder", *same) == 0
    for name in written:
        meshes = [trimesh.load_mesh(folder / name, process=False) for folder in (out, tmp_path / "of the folder")]
        assert np.array_equal(meshes[0].triangles, meshes[1].triangles)


def test_a_seed_gives_the_same_meshes_and_an_unsaid_one_is_told(model, tmp_path, capsys):
    for out, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert generate(model, tmp_path / out, "--num", "3", "--seed", seed) == 0
    meshes = {out: files_of(tmp_path / out) for out in "abc"}
    assert meshes["a"] == meshes["b"] and meshes["a"] != meshes["c"]
    capsys.readouterr()
    assert generate(model, tmp_path / "d", "--num", "3") == 0
    seed = re.search(r"--seed (\d+) for the same meshes", capsys.readouterr().err)[1]
    assert generate(model, tmp_path / "e", "--num", "3", "--seed", seed) == 0
    assert files_of(tmp_path / "d") == files_of(tmp_path / "e")


def test_the_meshes_are_those_of_the_pipeline(model, tmp_path):
    from transformers import pipeline

    options = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "closing_strength": 2.0}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()] + ["--no-keep-order"]
    options["keep_order"] = False
    assert generate(model, tmp_path, "--num", "3", "--seed", "5", "--format", "obj", *arguments) == 0
    expected = pipeline("mesh-generation", model=model, device="cpu")(num_meshes=3, max_faces=5, seed=5, **options)
    for number, mesh in enumerate(expected):
        path = tmp_path / f"mesh-{number:02d}.obj"
        assert path.exists() == bool(len(mesh.faces))
        if len(mesh.faces):
            assert len(trimesh.load_mesh(path, process=False).faces) == len(mesh.faces)
    assert list(tmp_path.glob("*.obj"))


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply", "stl"])
def test_every_format_can_be_written_with_normals_and_licence(model, suffix, tmp_path):
    arguments = ["--format", suffix, "--normals", "--license", "cc0-1.0", "--seed", "1", "--num", "2"]
    assert generate(model, tmp_path, *arguments, faces=9) == 0
    paths = list(tmp_path.glob(f"*.{suffix}"))
    assert paths
    for path in paths:
        assert len(trimesh.load_mesh(path).faces) > 0
        assert b"cc0-1.0" in path.read_bytes()


def test_nothing_is_overwritten_unless_asked_for(model, tmp_path, capsys):
    assert generate(model, tmp_path, "--num", "2", "--seed", "1") == 0
    before = files_of(tmp_path)
    assert generate(model, tmp_path, "--num", "2", "--seed", "2") == 1
    assert "exists already: choose another --out, or give --overwrite" in capsys.readouterr().err
    assert files_of(tmp_path) == before
    assert generate(model, tmp_path, "--num", "2", "--seed", "2", "--overwrite") == 0
    assert files_of(tmp_path) != before


def test_a_mesh_without_a_face_has_no_file_and_none_at_all_is_a_failure(tmp_path, capsys):
    empty = small_model()
    with torch.no_grad():
        empty.lm_head.bias[EOS] += 50
    empty.save_pretrained(tmp_path / "empty")
    IFlameTokenizer().save_pretrained(tmp_path / "empty")
    assert generate(str(tmp_path / "empty"), tmp_path / "out", "--num", "2") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert [entry["file"] for entry in json.loads((tmp_path / "out" / "meshes.json").read_text())["meshes"]] == [
        None
    ] * 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: drop_a_weight(folder / "model.safetensors"), "its weights lack lm_head.bias"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_with_1_and_one_line(model, damage, reason, tmp_path, capsys):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    damage(folder)
    assert generate(str(folder), tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert re.search(reason, error) and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_does_not_have_ends_with_1(tmp_path, capsys):
    assert generate("nobody/nothing-at-all", tmp_path / "out") == 1
    assert "the model nobody/nothing-at-all cannot be loaded" in capsys.readouterr().err


def test_too_little_memory_is_told_with_advice(model, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(IFlameForCausalLM, "generate", full)
    assert generate(model, tmp_path / "out") == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == "iflame: the memory of the device does not suffice: try a smaller --batch-size, or --device cpu"


def test_the_bar_counts_meshes_as_they_end_and_the_faces_so_far():
    written = io.StringIO()
    with tqdm(total=5, initial=2, file=written, mininterval=0) as bar:
        progress = Progress(bar, known_format())
        rows = torch.tensor([[BOS] * 9 + [1] * 18, [BOS] * 9 + [1] * 9 + [EOS] * 9])
        assert not progress(rows[:, :18], None).any() and bar.n == 2
        assert not progress(rows, None).any() and bar.n == 3
    assert "3/5" in written.getvalue() and "faces=2" in written.getvalue()


def test_the_bar_counts_the_faces_of_an_engine_which_shows_it_the_prompt_alone():
    written = io.StringIO()
    prompt = torch.full((2, 9), BOS)
    with tqdm(total=5, initial=2, file=written, mininterval=0) as bar:
        progress = Progress(bar, known_format())
        for _ in range(4):
            assert not progress(prompt, None).any() and bar.n == 2
        assert "faces=3" in written.getvalue() and "faces=4" not in written.getvalue()
        bar.update(2)
        progress.begin()
        progress(prompt, None)
        assert bar.n == 4 and progress.faces == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_ctrl_c_keeps_what_is_written_and_ends_with_130(model, tmp_path):
    arguments = ["generate", model, "--num", "5000", "--out", "out", "--max-faces", "3", "--batch-size", "1"]
    running = subprocess.Popen(
        [*command(), *arguments, "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "faces" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, error = running.communicate(timeout=120)
    assert running.returncode == 130
    assert error.strip().endswith("iflame: stopped") and "Traceback" not in error
    record = json.loads((tmp_path / "out" / "meshes.json").read_text())
    named = {entry["file"] for entry in record["meshes"]} - {None}
    found = {path.name for path in (tmp_path / "out").iterdir()} - {"meshes.json"}
    assert named and named <= found and len(found - named) <= 1
    assert not [name for name in found if "partial" in name]


def test_json_gives_a_line_a_mesh_on_the_output_and_says_all_else_as_errors(model, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", model, "--num", "4", "--max-faces", "5", "--device", "cpu", "--json"]) == 0
    said = capfd.readouterr()
    told = [json.loads(line) for line in said.out.splitlines()]
    recorded = json.loads((tmp_path / "meshes" / "meshes.json").read_text())["meshes"]
    told.sort(key=lambda each: each["seed"])  # they are told as they come
    assert [{name: value for name, value in each.items() if name != "path"} for each in told] == recorded
    assert len(told) == 4 and any(each["path"] for each in told)
    for each in told:
        assert each["path"] is None if each["file"] is None else (tmp_path / each["path"]).is_file()
    assert re.search(r"--seed \d+ for the same meshes", said.err)


def save_with_likely_tokens(folder, mesh_grammar=True, **bias):
    """A model's folder, with more of some tokens than of others."""
    likely = small_model()
    with torch.no_grad():
        likely.lm_head.bias[[PAD, BOS, EOS]] -= 30
        for token, more in bias.items():
            likely.lm_head.bias[int(token.removeprefix("token_"))] += more
    likely.generation_config.mesh_grammar = mesh_grammar
    likely.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return str(folder)


def test_faces_that_were_dropped_are_counted_and_told(tmp_path, capsys):
    model = save_with_likely_tokens(tmp_path / "model", mesh_grammar=False, token_5=9, token_6=9, token_7=9)
    assert generate(model, tmp_path / "out", "--num", "2", "--seed", "1", faces=60) == 0
    told = capsys.readouterr().out
    for entry in json.loads((tmp_path / "out" / "meshes.json").read_text())["meshes"]:
        dropped = entry["dropped_faces"]
        assert 0 < entry["faces"] == 60 - sum(dropped.values()) and not entry["ended"]
        assert dropped["degenerate"] > 0
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        line = f"{entry['file']}  {entry['faces']} faces, {sum(dropped.values())} more dropped ({why}); "
        assert line + "not ended: cut off at 60 faces (--max-faces)\n" in told


def test_a_mesh_is_made_again_alone_by_its_own_seed(model, tmp_path):
    assert generate(model, tmp_path / "all", "--num", "5", "--seed", "10", "--batch-size", "3") == 0
    entries = json.loads((tmp_path / "all" / "meshes.json").read_text())["meshes"]
    assert [entry["seed"] for entry in entries] == [10, 11, 12, 13, 14]
    named = [entry for entry in entries if entry["file"]]
    assert len(named) > 2
    for entry in named:
        out = tmp_path / str(entry["seed"])
        assert generate(model, out, "--seed", str(entry["seed"]), "--num", "1") == 0
        meshes = [trimesh.load_scene(path) for path in (tmp_path / "all" / entry["file"], out / "mesh-00.glb")]
        assert np.array_equal(*(scene.to_geometry().triangles for scene in meshes))
        for path in (tmp_path / "all" / entry["file"], out / "mesh-00.glb"):
            assert read_gltf_tree(str(path))["asset"]["extras"]["seed"] == entry["seed"]


def test_meshes_get_a_height_a_pivot_and_a_thumbnail(model, tmp_path):
    arguments = ["--num", "3", "--seed", "1", "--height", "1.8", "--pivot", "ground", "--thumbnails"]
    assert generate(model, tmp_path, *arguments) == 0
    entries = [entry for entry in json.loads((tmp_path / "meshes.json").read_text())["meshes"] if entry["file"]]
    assert entries
    for entry in entries:
        (low, high) = trimesh.load_mesh(tmp_path / entry["file"]).bounds
        assert low[1] == pytest.approx(0, abs=1e-6) and high[1] == pytest.approx(1.8, rel=1e-6)
        assert low[[0, 2]] == pytest.approx(-high[[0, 2]], abs=1e-6)
        picture = np.asarray(Image.open(tmp_path / entry["thumbnail"]))
        assert entry["thumbnail"] == Path(entry["file"]).stem + ".png" and (picture != 255).any()
    assert len(list(tmp_path.iterdir())) == 2 * len(entries) + 1
    (tmp_path / "mesh-00.glb").unlink(missing_ok=True)
    assert generate(model, tmp_path, "--thumbnails") == 1, "a picture is not written over either"


def test_a_missing_package_for_thumbnails_is_told_at_once(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert generate(model, tmp_path / "out", "--thumbnails") == 1
    assert "--thumbnails needs the package pillow: pip install pillow" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "xpu:1"])
def test_a_device_that_is_not_there_is_told_before_weights_are_loaded(model, device, tmp_path, monkeypatch, capsys):
    if torch.accelerator.is_available() and device.split(":")[0] == torch.accelerator.current_accelerator().type:
        pytest.skip("there may be such a device")
    monkeypatch.setattr("iflame_cli.making.IFlameForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", model, "--out", str(tmp_path / "out"), "--device", device]) == 1
    error = capsys.readouterr().err
    assert f"--device {device}: " in error and "sees no such device here, only cpu" in error
    assert len(error.splitlines()) == 1
