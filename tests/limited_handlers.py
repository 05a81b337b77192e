"""What the processes of test_isolation.py do with their requests; importable there."""

import ctypes
import os
import re
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def make_handler() -> Callable[[Any], Any]:
    return handle


def handle(request: Any) -> Any:
    if isinstance(request, tuple):
        action, *arguments = request
        return ACTIONS[action](*arguments)
    time.sleep(0.002)
    return request, os.getpid()


def lift_limit_and_grow() -> None:
    """Outgrow the limit where the system does not enforce it."""
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (hard, hard))
    kept = []
    while True:
        kept.append(np.ones(2**22))
        time.sleep(0.02)


def crash_once(path: str) -> str:
    if not os.path.exists(path):
        open(path, "w").close()
        os._exit(7)
    return "survived"


def fail(message: str) -> None:
    raise ValueError(message)


ACTIONS = {
    "sleep": time.sleep,
    "hold the interpreter": lambda: re.match("(a+)+$", "a" * 64 + "b"),
    "allocate": lambda: np.ones(2**33),
    "grow": lift_limit_and_grow,
    "segfault": lambda: ctypes.string_at(0),
    "exit": os._exit,
    "crash once": crash_once,
    "fail": fail,
    "large": lambda size: b"x" * size,
}
