"""Runs of training/generate.py as processes of their own, started from one that has imported everything once."""

import os
import sys
import time
from pathlib import Path

from program_processes import Processes, environments_of_ranks, speak_into


def run_generate(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the new process: what `python training/generate.py` does, with its messages in a file."""
    os.environ.update(environment)
    speak_into(output)
    import torch

    from training.generate import main

    torch.set_num_threads(1)
    sys.exit(main(arguments))


class Sampler(Processes):
    """Starts processes that sample."""

    def __init__(self, folder: Path):
        super().__init__(folder, "training.generate")

    def start(self, arguments: list[str], environment: dict[str, str] | None = None):
        environment = {"HF_HUB_OFFLINE": "1", **(environment or {})}
        return self.start_process(run_generate, arguments, environment, str(self.messages))

    def start_ranks(self, arguments: list[list[str]]) -> list:
        """The processes that torchrun would start, one for each list of arguments."""
        ranks = environments_of_ranks(len(arguments))
        return [self.start(given, of_rank) for given, of_rank in zip(arguments, ranks, strict=True)]


def wait_for_meshes(folder: Path, number: int, *processes, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(list(folder.glob("mesh-*"))) < number:
        assert all(process.is_alive() for process in processes), "a process ended too early"
        assert time.monotonic() < end, f"there were not {number} meshes in {seconds} seconds"
        time.sleep(0.01)
