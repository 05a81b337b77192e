"""What one process of a run knows and all of them must. A run of one process never waits for its device here."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from training.run.interruption import Interruption, Stopped


class Processes:
    """All processes of a run, this one among them. Its methods are called on all of them together."""

    def __init__(self, accelerator: Accelerator, interruption: Interruption):
        self.accelerator = accelerator
        self.interruption = interruption

    def sum(self, *numbers: int) -> list[int]:
        """Each number, added up over all processes in one collective."""
        if self.accelerator.num_processes == 1:
            return [int(number) for number in numbers]
        known = torch.tensor(numbers, dtype=torch.long, device=self.accelerator.device)
        return self.accelerator.reduce(known, "sum").tolist()

    def check(self, done: bool = False) -> bool:
        """Whether any is done with what the others wait for. Raises Stopped if none is, and any was asked to stop."""
        asked, done = self.sum(self.interruption.asked, done)
        if asked and not done:
            raise Stopped
        return done > 0

    def raise_first(self, failure: Exception | None) -> None:
        """Raises on every process the failure of the first that has one."""
        failure = next(filter(None, gather_object([failure])), None)
        if failure is not None:
            raise failure
