"""How many threads generate() computes with on a CPU."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of a container: microseconds of CPU time in a period, or "max", and the period.
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def spare_a_core(device: torch.device) -> Iterator[None]:
    """Has torch compute with a thread fewer than there are cores on a CPU, and with as many as before afterwards.

    The threads of an operation wait for one another. With a thread on every core, anything else that runs, be it the
    program that reads the faces, holds one of them up, and with it all others, many times in every step.

    What was chosen is kept: a number in OMP_NUM_THREADS or MKL_NUM_THREADS, and fewer threads by
    `torch.set_num_threads`. torch keeps the number for each thread of Python, so generations in several do not meet.
    """
    before = torch.get_num_threads()
    threads = min(before, max(1, available_cores() - 1))
    if device.type != "cpu" or threads == before or any(_is_number(name) for name in VARIABLES):
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def available_cores() -> int:
    """Cores that this process may use: those it is bound to, and of them what its container may use."""
    bound_to = getattr(os, "sched_getaffinity", None)
    cores = len(bound_to(0)) if bound_to else os.cpu_count() or 1
    try:
        limit, period = CPU_LIMIT.read_text().split()
        return min(cores, max(1, math.floor(int(limit) / int(period))))
    except (OSError, ValueError):  # no such file, or no limit
        return cores


def _is_number(name: str) -> bool:
    return os.environ.get(name, "").split(",")[0].strip().isdecimal()
