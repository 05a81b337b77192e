"""On GPUs training/generate.py makes the meshes of one on several, and training/train.py learns alike."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program_processes import environments_of_ranks
from small_models import ending_model
from training_processes import SHARDED, command_line, log_of, losses_of

from iflame_hf import IFlameTokenizer

pytestmark = pytest.mark.gpu
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ROOT = Path(__file__).resolve().parents[1]
NUM, ROWS = 300, 100  # meshes, some of them in rows that are refilled
TIME_LIMIT = 240


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ending_model(1, hidden_size=128, heads=4).to(torch.bfloat16).save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def run(program, arguments, processes, said, environment=None):
    """What processes of a program say, which must come to their end; if not, where each of their threads stands."""
    command = [sys.executable, str(ROOT / "training" / program), *map(str, arguments)]
    ranks = environments_of_ranks(processes) if processes > 1 or environment else [{}]
    shared = {
        **os.environ,
        **(environment or {}),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    messages = [said / f"{rank}.txt" for rank in range(processes)]
    said.mkdir(parents=True)
    running = []
    for path, rank in zip(messages, ranks, strict=True):
        with path.open("w") as file:
            running.append(subprocess.Popen(command, stdout=file, stderr=file, env={**shared, **rank}))
    ends_at = time.monotonic() + TIME_LIMIT
    try:
        for process in running:
            process.wait(max(0, ends_at - time.monotonic()))
    except subprocess.TimeoutExpired:
        for process in running:
            process.send_signal(signal.SIGABRT)
    statuses = [process.wait() for process in running]
    everything = "\n".join([str(statuses), *(path.read_text() for path in messages)])
    assert not any(statuses), everything
    return everything


def meshes_of(model_folder, out, processes):
    """The files that a run writes, by name."""
    arguments = ["--model", model_folder, "--out", out, "--num", NUM, "--rows", ROWS, "--max_faces", 60]
    run("generate.py", arguments, processes, out.with_suffix(".said"))
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".glb", ".jsonl")}


@TWO_GPUS
def test_the_meshes_of_two_gpus_are_those_of_one(model_folder, tmp_path):
    one, two = (meshes_of(model_folder, tmp_path / str(processes), processes) for processes in (1, 2))
    assert len(one) > NUM // 2
    differing = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    # The number in a name says which process made it: even ones are the first's.
    assert not differing, f"{len(differing)} of {len(one)}, of them {', '.join(differing[:20])}"


def trained(out, processes=1, environment=None, **options):
    """The losses of a small run, by step, and what it said."""
    options = {"use_cpu": False, "bf16": True, "hidden_size": 128, "num_attention_heads": 4, **options}
    folder = out.parent / f"{out.name}-{time.monotonic_ns()}"
    said = run("train.py", command_line(out, **options), processes, folder, environment)
    assert "no CUDA graphs" not in said and "cannot be a CUDA graph" not in said, said
    return losses_of(out)


def test_a_run_that_goes_on_from_a_checkpoint_learns_what_a_whole_one_does(tmp_path):
    whole = trained(tmp_path / "whole", save_steps=0)
    trained(tmp_path / "parts", max_steps=8, save_steps=4)
    for name in os.listdir(tmp_path / "parts"):
        if name == "checkpoint-8":
            shutil.rmtree(tmp_path / "parts" / name)
    parts = trained(tmp_path / "parts", save_steps=4, resume_from_checkpoint="latest")
    assert sorted(whole) == sorted(parts) == list(range(1, 9))
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=1e-2)


@TWO_GPUS
def test_two_gpus_learn_what_one_does(tmp_path):
    one = trained(tmp_path / "one", per_device_train_batch_size=4, save_steps=0)
    two = trained(tmp_path / "two", 2, per_device_train_batch_size=2, save_steps=0)
    assert sorted(one) == sorted(two) == list(range(1, 9))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=TWO_GPUS)])
def test_gpus_learn_from_sharded_weights_what_one_does_from_whole_ones(processes, compiled, tmp_path):
    options = {"torch_compile": compiled, "save_steps": 4, "eval_steps": 2}
    one = trained(tmp_path / "one", per_device_train_batch_size=4, **options)
    options["per_device_train_batch_size"] = 4 // processes
    sharded = trained(tmp_path / "sharded", processes, SHARDED, **options)
    assert sorted(one) == sorted(sharded) == list(range(1, 9))
    assert list(sharded.values()) == pytest.approx(list(one.values()), rel=1e-2)
    of_one, of_sharded = (
        [line["eval_loss"] for line in log_of(tmp_path / name) if "eval_loss" in line] for name in ("one", "sharded")
    )
    assert len(of_one) == 4 and of_sharded == pytest.approx(of_one, rel=1e-2)
    shutil.rmtree(tmp_path / "sharded" / "checkpoint-8")
    again = trained(tmp_path / "sharded", processes, SHARDED, resume_from_checkpoint="latest", **options)
    assert list(again.values()) == pytest.approx(list(sharded.values()), rel=1e-2)
