"""training/generate.py on several GPUs: the meshes of one."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from program_processes import environments_of_ranks
from small_models import ending_model

from iflame_hf import IFlameTokenizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

ROOT = Path(__file__).resolve().parents[1]
NUM, ROWS = 300, 100  # meshes, some of them in rows that are refilled
TIME_LIMIT = 240


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ending_model(1, hidden_size=128, heads=4).to(torch.bfloat16).save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def meshes_of(model_folder, out, processes):
    """The files that a run writes, by name. Processes that do not end say where each of their threads stands."""
    command = [sys.executable, str(ROOT / "training" / "generate.py"), "--model", str(model_folder)]
    command += ["--out", str(out), "--num", str(NUM), "--rows", str(ROWS), "--max_faces", "60"]
    ranks = environments_of_ranks(processes) if processes > 1 else [{}]
    shared = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    said = [out.with_suffix(f".{rank}.txt") for rank in range(processes)]
    running = []
    for path, rank in zip(said, ranks, strict=True):
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
    assert not any(statuses), "\n".join([str(statuses), *(path.read_text() for path in said)])
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".glb", ".jsonl")}


def test_the_meshes_of_two_gpus_are_those_of_one(model_folder, tmp_path):
    one, two = (meshes_of(model_folder, tmp_path / str(processes), processes) for processes in (1, 2))
    assert len(one) > NUM // 2
    differing = sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))
    # The number in a name says which process made it: even ones are the first's.
    assert not differing, f"{len(differing)} of {len(one)}, of them {', '.join(differing[:20])}"
