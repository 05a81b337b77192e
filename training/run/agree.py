"""What the processes of a run tell each other."""

import torch
import torch.distributed
from accelerate import Accelerator

from training.run.interruption import Interruption, Stopped


class Agreement:
    """
    Numbers that all processes of a run must have in common. Each method is called on all of them together. They go
    from host to host: no device is waited for.

    Args:
        interruption: whether this process was asked to stop.
    """

    def __init__(self, accelerator: Accelerator, interruption: Interruption):
        self.accelerator = accelerator
        self.interruption = interruption
        self._hosts = None  # of the processes; None: the group of all is one of hosts
        if accelerator.num_processes > 1 and accelerator.device.type != "cpu":
            self._hosts = torch.distributed.new_group(backend="gloo")

    def sums(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes, in one collective."""
        if self.accelerator.num_processes == 1:
            return [int(number) for number in numbers]
        numbers = torch.tensor(numbers, dtype=torch.long)
        torch.distributed.all_reduce(numbers, group=self._hosts)
        return numbers.tolist()

    def check(self, done: bool = False) -> bool:
        """
        Whether any process is done with what the others wait for. Raises Stopped if none is, and any was asked to
        stop.
        """
        asked, done = self.sums(self.interruption.asked, done)
        if asked and not done:
            raise Stopped
        return done > 0
