"""Runs of training/generate.py as processes of their own, started from one that has imported everything once."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path


def run_generate(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the new process: what `python training/generate.py` does, with its messages in a file."""
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from training.generate import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Sampler:
    """Starts processes; each has its messages in `messages`."""

    def __init__(self, folder: Path):
        self.messages = folder / "messages.txt"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["training.generate"])

    def start(self, arguments: list[str], environment: dict[str, str] | None = None):
        environment = {"HF_HUB_OFFLINE": "1", **(environment or {})}
        process = self.context.Process(target=run_generate, args=(arguments, environment, str(self.messages)))
        process.start()
        return process

    def start_ranks(self, arguments: list[list[str]]) -> list:
        """The processes that torchrun would start, one for each list of arguments."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(arguments))}
        return [
            self.start(given, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank, given in enumerate(arguments)
        ]

    def finish(self, *processes, status: int = 0, seconds: float = 120) -> str:
        """What they said when all have ended, which must be with that status."""
        for process in processes:
            process.join(seconds)
        codes = [process.exitcode for process in processes]
        for process in processes:
            if process.is_alive():
                process.kill()
        said = self.messages.read_text() if self.messages.exists() else ""
        assert codes == [status] * len(processes), f"exit codes {codes}:\n{said}"
        return said


def wait_for_meshes(folder: Path, number: int, *processes, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(list(folder.glob("mesh-*"))) < number:
        assert all(process.is_alive() for process in processes), "a process ended too early"
        assert time.monotonic() < end, f"there were not {number} meshes in {seconds} seconds"
        time.sleep(0.01)
