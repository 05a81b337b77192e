"""How many threads generate() computes with on a CPU."""

import functools
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    from threadpoolctl import ThreadpoolController
except ImportError:  # optional
    ThreadpoolController = None

# Of a container: microseconds of CPU time in a period, or "max", and the period.
CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def spare_a_core(device: torch.device) -> Iterator[None]:
    """Has torch and numpy compute with a thread fewer than there are cores on a CPU, and with as many as before
    afterwards.

    The threads of an operation wait for one another. With a thread on every core, anything else that runs, be it the
    program that reads the faces, holds one of them up, and with it all others, many times in every step.

    What was chosen is kept: a number in OMP_NUM_THREADS or MKL_NUM_THREADS, and fewer threads by
    `torch.set_num_threads`. torch keeps the number for each thread of Python, so generations in several do not meet.
    numpy's is one for all, and is changed where threadpoolctl is installed.
    """
    before = torch.get_num_threads()
    threads = min(before, max(1, available_cores() - 1))
    if device.type != "cpu" or any(_is_number(name) for name in VARIABLES):
        yield
        return
    with _numpy_threads.at_most(threads):
        if threads == before:  # to set it would change that of threads to come
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


class _NumpyThreads:
    """The threads of numpy's OpenBLAS, fewer of them as long as anybody wants so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._limit: Any = None

    @contextmanager
    def at_most(self, threads: int) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._limit = _limit_openblas(threads)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0 and self._limit is not None:
                    self._limit.restore_original_limits()
                    self._limit = None


_numpy_threads = _NumpyThreads()


def _limit_openblas(threads: int) -> Any:
    """What undoes it; None where there is nothing to limit, or fewer threads were chosen."""
    if ThreadpoolController is None or _is_number("OPENBLAS_NUM_THREADS"):
        return None
    libraries = _openblas()
    if max((each["num_threads"] for each in libraries.info()), default=0) <= threads:
        return None
    return libraries.limit(limits=threads)


@functools.cache  # looking for them takes milliseconds
def _openblas() -> Any:
    return ThreadpoolController().select(internal_api="openblas")


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
