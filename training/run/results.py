"""What steps gave, read one step late: while the host reads of one, the device is at work on the next."""

import math
from collections import deque

import torch
from accelerate.utils import gather_object

from training.run.checkpoint import Progress
from training.run.log import Line, RunLog
from training.run.steps import Steps


class StepResult:
    """
    What a step gave.

    Args:
        number: of the step.
        labels: that all processes learnt from.
        loss: this process's part of the loss, on its device.
        found: (2,) on the device: the norm of the gradient and the loss of all processes. The step was left out if
            either is not finite.
    """

    def __init__(self, number: int, labels: int, loss: torch.Tensor, found: torch.Tensor):
        self.number, self.labels, self.loss = number, labels, loss
        self.line: Line | None = None
        self._found, self._event = found, None
        if found.device.type == "cuda":
            self._found = torch.empty_like(found, device="cpu", pin_memory=True)
            self._found.copy_(found, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> tuple[float, float]:
        """The norm of the gradient and the loss, once the device has them."""
        if self._event is not None:
            self._event.synchronize()
        norm, loss = self._found.tolist()
        return norm, loss


class StepResults:
    """
    The results of the latest steps, which are counted in `progress` and written into the log when they are read.
    Methods are called on all processes together.
    """

    def __init__(self, progress: Progress, steps: Steps, log: RunLog, row_length: int):
        self.progress, self.steps, self.log, self.row_length = progress, steps, log, row_length
        self.said = ""  # of the latest line, for a progress bar
        self._unread: deque[StepResult] = deque()

    def add(self, result: StepResult, line: Line | None) -> None:
        """Take a step's result, with what the log is to say after it."""
        result.line = line
        self._unread.append(result)

    def read(self) -> None:
        """
        Read of all steps that are not read yet; waits until the device has done them. Raises CommandError where too
        many in a row were left out.
        """
        while self._unread:
            self._count(self._unread.popleft())

    def _count(self, result: StepResult) -> None:
        progress = self.progress
        norm, loss = result.read()
        is_finite = math.isfinite(norm) and math.isfinite(loss)
        if is_finite:
            progress.loss_sum += loss
            progress.loss_steps += 1
            progress.labels += result.labels
        else:
            losses = gather_object([float(result.loss)])
            self.log.report(
                f"step {result.number} is left out, its gradient is not finite; losses by process: {losses}"
            )
        self.steps.require_finite(is_finite, result.labels)
        if result.line is not None and progress.loss_steps:
            gradient_norm = norm if is_finite else None
            self.said = self.log.write_training(progress, result.number, result.line, self.row_length, gradient_norm)
