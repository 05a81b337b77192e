"""What the processes of a run tell each other."""

import torch
from accelerate import Accelerator

from training.run.interruption import Interruption, Stopped


class Agreement:
    """
    Numbers that all processes of a run must have in common. Each method is called on all of them together.

    Args:
        interruption: whether this process was asked to stop.
    """

    def __init__(self, accelerator: Accelerator, interruption: Interruption):
        self.accelerator = accelerator
        self.interruption = interruption

    def sums(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes, in one collective. With one process no device is asked."""
        if self.accelerator.num_processes == 1:
            return [int(number) for number in numbers]
        numbers = torch.tensor(numbers, dtype=torch.long, device=self.accelerator.device)
        return self.accelerator.reduce(numbers, "sum").tolist()

    def check(self, done: bool = False) -> bool:
        """
        Whether any process is done with what the others wait for. Raises Stopped if none is, and any was asked to
        stop.
        """
        asked, done = self.sums(self.interruption.asked, done)
        if asked and not done:
            raise Stopped
        return done > 0
