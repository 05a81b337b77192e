"""The project's programs on GPUs of this machine, or as processes on its CPU, each with a time limit."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from benchmarks.oracle import WrongResult

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "training" / "configs" / "accelerate"
MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}
# A program that is asked to end has so many seconds to do so.
GRACE = 10
# What a program of this project says when it fails, and what Python says; a process may have a number.
SENTENCE = re.compile(r"^(?:\[rank\d+\]: ?)?((?:train|generate|training/\w+\.py): .+)$", re.MULTILINE)
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)$", re.MULTILINE)
OF_ANOTHER = "another process of the run has ended"


def launch_command(script: str, strategy: str, count: int, dtype: str, use_cpu: bool) -> list[str]:
    """
    The words that start a script of training/, before its own options.

    Args:
        strategy: ddp or fsdp2; one process needs neither.
        count: of GPUs, or of processes on the CPU.
        dtype: that products are computed in.
    """
    path = str(ROOT / "training" / script)
    if use_cpu:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        return [sys.executable, *(torchrun if count > 1 else []), path]
    config = CONFIGS / f"{'one_gpu' if count == 1 else strategy}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(count), "--mixed_precision", MIXED_PRECISION[dtype]]
    return [*command, *(["--main_process_port", str(_free_port())] if count > 1 else []), path]


def run_program(command: list[str], said: Path, limit: float) -> float:
    """
    Runs a program to its end, and returns how many seconds that took.

    Args:
        said: the file for what it says.
        limit: seconds after which it is ended.

    Raises:
        WrongResult: it failed, which is said in its own words, or was not ended in time.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.setdefault("OMP_NUM_THREADS", "1")  # whatever the number of processes
    began = time.monotonic()
    with said.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise WrongResult(f"not at its end after {limit:g} s; the last it said: {_last_line(said)}") from None
        finally:
            _end(process)
    if status:
        raise WrongResult(f"exit status {status}: {_reason(said)}")
    return time.monotonic() - began


def _end(process: subprocess.Popen) -> None:
    """Ends a program and all that it has started, if it has not come to its end."""
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)  # launchers put them into groups of their own
    process.terminate()
    left = psutil.wait_procs(family, timeout=GRACE)[1]
    for each in left:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(left, timeout=GRACE)
    process.poll()


def _reason(said: Path) -> str:
    text = said.read_text(encoding="utf-8", errors="replace")
    for pattern in (SENTENCE, EXCEPTION):
        for found in pattern.findall(text):
            if OF_ANOTHER not in found and "ChildFailedError" not in found:
                return found[:300]
    return _last_line(said)


def _last_line(said: Path) -> str:
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "nothing")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
