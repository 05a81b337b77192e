"""A run that is asked to stop, by Ctrl-C, a signal, or the end of what started it."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil


class Stopped(Exception):
    """The run was asked to stop, in the middle of what can be done again."""


class Interruption:
    """
    While it is entered, Ctrl-C and SIGTERM only set `asked`; Ctrl-C once more, five seconds later, ends at once. The
    end of `accelerate launch`, which dies of a SIGTERM without a word to the process it has started, counts as one.

    Args:
        until: what is still done when it is asked, which is said on stderr.

    Attributes:
        number: the signal that asked, if one did.
    """

    def __init__(self, until: str = "a checkpoint is saved") -> None:
        self.number: int | None = None
        self._says = f"\nstopping, once {until}\n".encode()
        self._first = 0.0
        self._before: dict[int, Any] = {}
        parent = os.getppid()
        self._launcher = parent if _is_accelerate(parent) else None

    @property
    def asked(self) -> bool:
        return self.number is not None or (self._launcher is not None and os.getppid() != self._launcher)

    def __enter__(self) -> "Interruption":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number, self._first = number, time.monotonic()
            os.write(2, self._says)  # print must not be used in a handler
        elif number == signal.SIGINT and time.monotonic() - self._first > 5:
            raise KeyboardInterrupt


def _is_accelerate(process: int) -> bool:
    try:
        words = psutil.Process(process).cmdline()
    except psutil.Error:
        return False
    return "accelerate.commands.launch" in words or any(Path(word).stem.startswith("accelerate") for word in words[:2])
