"""How far a run has come and how fast it goes, in a line every few seconds."""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import StoppingCriteria

from training.run.interruption import Interruption, Stopped

SECONDS_BETWEEN_LINES = 5
LINES_OF_A_RATE = 24  # the rates are those of the last two minutes


class Reader(Protocol):
    def read(self) -> Sequence[Any]: ...


class Pace:
    """
    Counts the meshes that are made, and shows the pace on stderr.

    Args:
        reader: its `read()` gives those that have come since the last time, each with its number of `faces`.
        done: meshes that are there already.
        num: meshes that there will be.
    """

    def __init__(self, reader: Reader, done: int, num: int):
        self.reader, self.done, self.num = reader, done, num
        self.faces = 0
        self.is_shown = False
        # time, meshes, faces
        self.past = deque([(time.monotonic(), done, 0)], maxlen=LINES_OF_A_RATE)

    def show_if_due(self) -> None:
        if time.monotonic() - self.past[-1][0] >= SECONDS_BETWEEN_LINES:
            self.show()

    def show(self) -> None:
        new = self.reader.read()
        self.done += len(new)
        self.faces += sum(record.faces for record in new)
        now, (since, meshes, faces) = time.monotonic(), self.past[0]
        seconds = max(now - since, 1e-9)
        self.past.append((now, self.done, self.faces))
        rate, faces_rate = (self.done - meshes) / seconds, (self.faces - faces) / seconds
        line = f"{self.done:,} of {self.num:,} meshes; {rate:,.2f} meshes/s, {faces_rate:,.0f} faces/s"
        if rate and self.done < self.num:
            line += f"; {_in_words((self.num - self.done) / rate)} left"
        if sys.stderr.isatty():
            print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.is_shown = True

    def end(self) -> None:
        """What is said next begins on a line of its own."""
        if self.is_shown and sys.stderr.isatty():
            print(file=sys.stderr)


def _in_words(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class AfterEachFace(StoppingCriteria):
    """Shows the pace where there is one to show, and raises Stopped once the run is asked to stop."""

    looks_once_a_face = True  # for a decode engine

    def __init__(self, interruption: Interruption, pace: Pace | None):
        self.interruption, self.pace = interruption, pace

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        if self.interruption.asked:
            raise Stopped
        if self.pace is not None:
            self.pace.show_if_due()
        return torch.tensor(False)  # of all rows, and on the CPU: no answer has to be waited for
