"""Programs as processes of their own, started from one that has imported everything once."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path


def speak_into(output: str) -> None:
    """In the new process: what it says goes to a file."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def environments_of_ranks(count: int) -> list[dict[str, str]]:
    """What `accelerate launch --num_processes COUNT` and torchrun set for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


class Processes:
    """Starts processes that have imported a module; each has its messages in `messages`."""

    def __init__(self, folder: Path, module: str):
        self.messages = folder / "messages.txt"
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([module])

    def start_process(self, target: Callable[..., None], *arguments: object):
        process = self.context.Process(target=target, args=arguments)
        process.start()
        return process

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
