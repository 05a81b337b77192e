"""training/generate.py: a folder of meshes that is the same however it came about."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import trimesh
from small_models import BOS, EOS, PAD, small_model

from iflame_hf import IFlameTokenizer
from training import generate as program
from training.sampling import record

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "training" / "generate.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] += 5
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def command(model, out, *options):
    start = [sys.executable, SCRIPT, "--model", model, "--out", out, "--max_faces", "12", "--seed", "3"]
    return [str(word) for word in (*start, *options)]


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


def run(*arguments, processes=1):
    """Runs the program, as so many processes that `accelerate launch` starts; the output of the first, all errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)} if processes > 1 else {}
    started = [
        subprocess.Popen(
            command(*arguments),
            env=environment(**shared, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if shared else {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [process.communicate(timeout=300) for process in started]
    errors = "".join(error for _, error in told)
    return subprocess.CompletedProcess(None, max(process.returncode for process in started), told[0][0], errors)


def contents(out):
    """Every entry, and the triangles of its file."""
    lines = [json.loads(line) for line in (out / record.LIST).read_text().splitlines()]
    triangles = [
        None
        if line["file"] is None
        else trimesh.load(out / line["file"], force="mesh", process=False).triangles.tolist()
        for line in lines
    ]
    return lines, triangles


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "meshes"
    ended = run(model, out, "--num", 30)
    assert ended.returncode == 0, ended.stderr
    assert f"30 meshes, {sum(line['faces'] for line in contents(out)[0])} faces" in ended.stdout
    return out


def test_there_is_a_mesh_for_each_number_and_a_line_for_each_mesh(model, made):
    lines, triangles = contents(made)
    assert [line["number"] for line in lines] == list(range(30))
    assert [line["seed"] for line in lines] == list(range(3, 33))
    assert len({line["faces"] for line in lines}) > 3 and {line["ended"] for line in lines} == {True, False}
    for line, shape in zip(lines, triangles, strict=True):
        assert line["faces"] == (0 if shape is None else len(shape))
        assert line["file"] in (None, f"mesh-{line['number']:06d}.glb")
    tokenizer, network = IFlameTokenizer(), small_model().from_pretrained(model)
    for line in lines[:4]:
        ids = network.generate(do_sample=True, seed=line["seed"], top_k=0, max_faces=12)[0]
        assert line["faces"] == len(tokenizer.decode_mesh(ids).faces)


def test_several_processes_make_the_same_meshes(model, made, tmp_path):
    ended = run(model, tmp_path / "out", "--num", 30, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "out") == contents(made)
    assert len(list((tmp_path / "out").glob(record.PARTS))) == 2


def test_a_run_that_was_killed_goes_on_and_ends_as_one_that_was_not(model, made, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(command(model, out, "--num", 30, "--rows", 2), env=environment())
    while len(record.entries(out)) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = record.entries(out)
    assert 5 <= len(there) < 30 and not (out / record.LIST).exists()
    # A line that the kill has torn, and a file that someone has taken away.
    part = next(out.glob(record.PARTS))
    part.write_text(part.read_text() + '{"number": 29, "fi')
    gone = next(entry for entry in there.values() if entry["file"])
    (out / gone["file"]).unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.glb")}
    ended = run(model, out, "--num", 30, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert contents(out) == contents(made)
    for path, stamp in stamps.items():
        assert path.stat().st_mtime_ns == stamp, "what was there is not made again"


def test_a_signal_ends_it_with_a_word(model, tmp_path):
    process = subprocess.Popen(
        command(model, tmp_path / "out", "--num", 5000), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not record.entries(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped: the same command goes on" in errors
    assert not list((tmp_path / "out").glob("*.partial"))


def test_more_meshes_may_be_asked_for_and_other_settings_may_not(model, tmp_path, capsys):
    def generate(*options):
        status = program.main([str(each) for each in command(model, tmp_path / "out", *options)[2:]])
        return status, capsys.readouterr()

    assert generate("--num", 2)[0] == 0
    assert generate("--num", 4)[0] == 0
    assert len(contents(tmp_path / "out")[0]) == 4
    status, told = generate("--num", 4, "--temperature", 0.5)
    assert status == 1 and "temperature was 1.0, now 0.5" in told.err and "--overwrite" in told.err
    assert generate("--num", 3, "--temperature", 0.5, "--overwrite", "--format", "ply")[0] == 0
    assert sorted(path.suffix for path in (tmp_path / "out").glob("mesh-*")) == [".ply"] * len(
        [line for line in contents(tmp_path / "out")[0] if line["file"]]
    )


def test_what_is_wrong_is_said_in_words(model, tmp_path, capsys):
    def fails(*options):
        assert program.main([str(option) for option in options]) == 1
        return capsys.readouterr().err

    assert "no iFlame model" in fails("--model", _other_model(tmp_path), "--out", tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    assert "not empty" in fails("--model", model, "--out", tmp_path / "full", "--num", "1")
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("--model", model, "--out", tmp_path / "file" / "x", "--num", "1")
    for wrong in (["--temperature", "0"], ["--num", "0"], ["--top_p", "2"], ["--format", "fbx"]):
        with pytest.raises(SystemExit) as ended:
            program.main(["--model", str(model), "--out", str(tmp_path / "b"), *wrong])
        assert ended.value.code == 2
    capsys.readouterr()


def _other_model(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "other"
