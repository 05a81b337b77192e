"""How many steps a run takes, and the learning rate of each."""

from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from iflame_cli.errors import CommandError
from training.arguments import Arguments
from training.optim.schedule import learning_rate_curve
from training.run.checkpoint import Progress
from training.run.log import Window

# Steps whose gradient is not finite are left out; so many in a row, or all there are, end the run.
MAX_STEPS_LEFT_OUT = 10
# How many steps max_minutes leaves time for is estimated from the speed so far, after every so many of them.
STEPS_BETWEEN_ESTIMATES = 20


class Steps:
    """
    The step that a run ends after, and the learning rates that lead there.

    Args:
        progress: of this run, whose `planned_steps` and `max_steps` are kept here.
        optimizer: whose learning rates are set, before Accelerate prepares it.
        rows_in_epoch: None if that is not known; then the options say how many steps there are.

    Attributes:
        last: number of the last step.
        rows_per_step: of all processes together.
        schedule: to be stepped after each step of the optimiser.
        left_out: how many steps were left out since one was taken.
    """

    def __init__(
        self,
        arguments: Arguments,
        progress: Progress,
        optimizer: torch.optim.Optimizer,
        rows_in_epoch: int | None,
        num_processes: int,
    ):
        self.arguments = arguments
        self.progress = progress
        self.rows_in_epoch = rows_in_epoch
        options = arguments.train
        self.rows_per_step = num_processes * options.per_device_train_batch_size * options.gradient_accumulation_steps
        if options.max_steps > 0:
            progress.planned_steps = options.max_steps
        else:
            rows = options.num_train_epochs * rows_in_epoch
            progress.planned_steps = max(1, round(rows / self.rows_per_step))
        self.last = progress.planned_steps
        self.left_out = 0
        self.schedule = LambdaLR(optimizer, self._curve())

    def end_after(self, step: int) -> None:
        """Let the run, and with it the schedule, end after another step."""
        if step != self.last:
            self.last = self.progress.max_steps = step
            self.schedule.lr_lambdas = [self._curve()] * len(self.schedule.lr_lambdas)

    def require_finite(self, is_finite: bool, labels: int) -> None:
        """
        Counts a step that was taken, or left out since its gradient is not finite. Raises CommandError where too many
        in a row were left out.

        Args:
            labels: that the step learnt from.
        """
        self.left_out = 0 if is_finite else self.left_out + 1
        if self.left_out >= min(MAX_STEPS_LEFT_OUT, self.last):
            advice = "lower --learning_rate, or train in bf16 instead of fp16"
            if labels == 0:
                advice = "not one mesh of their rows could be used, as the warnings above say"
            raise CommandError(f"the gradient was not finite in {self.left_out} steps in a row: {advice}")

    def due(self, every: int, at_end: bool) -> bool:
        """Whether something is to be done now that is done every so many steps (never if 0), or after the last."""
        step = self.progress.step
        return bool(every) and step % every == 0 or at_end and step == self.last

    def fitting(self, pace: Window) -> int:
        """The last step that max_minutes leaves time for at the speed so far; estimated now and then only."""
        minutes, planned = self.arguments.train.max_minutes, self.progress.planned_steps
        if minutes is None or not pace.steps or pace.steps % STEPS_BETWEEN_ESTIMATES:
            return self.last
        left = max(0.0, 60 * minutes - self.progress.seconds) / (pace.seconds / pace.steps)
        fitting = min(planned, self.progress.step + max(1, int(left)))
        return fitting if abs(fitting - self.last) > 0.02 * self.last else self.last

    def describe(self) -> str:
        """Such as: 1,000 steps of 8 rows, 2.0 epochs."""
        steps = f"{self.last:,} steps of {self.rows_per_step} rows"
        if self.rows_in_epoch is None:
            return steps
        return f"{steps}, {self.last * self.rows_per_step / self.rows_in_epoch:.1f} epochs"

    def _curve(self) -> Callable[[int], float]:
        options = self.arguments.train
        return learning_rate_curve(
            options.lr_scheduler_type, options.warmup_steps, self.last, self.arguments.schedule_kwargs()
        )
