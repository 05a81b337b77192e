"""Checks that need a process of their own, whose imports take longer than they: one process makes them one by one."""

import json
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def serve(checks: dict[str, Callable[..., object]]) -> None:
    """In the new process: makes the check that each line names, with the words after the name as arguments."""
    for line in sys.stdin:
        name, *arguments = line.split()
        try:
            answer = {"answer": checks[name](*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


@contextmanager
def served(script: Path, environment: dict[str, str]) -> Iterator[Callable[[str], object]]:
    """A function that has a check made by a script's process, and returns the answer."""
    process = subprocess.Popen(
        [sys.executable, script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(check: str, seconds: float = 600) -> object:
        process.stdin.write(f"{check}\n")
        process.stdin.flush()
        assert select.select([process.stdout], [], [], seconds)[0], f"{check} takes more than {seconds} seconds"
        line = process.stdout.readline()
        assert line, f"the process ended at {check} with status {process.wait()}"
        found = json.loads(line)
        assert "error" not in found, found["error"]
        return found["answer"]

    yield ask
    process.kill()
    process.communicate()
