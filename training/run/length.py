"""How many steps a run does, what is due after each of them, and the learning rate at each."""

from collections.abc import Callable

from torch.optim.lr_scheduler import LambdaLR

from iflame_cli.errors import CommandError
from training.arguments import Arguments
from training.optim.schedule import learning_rate_curve
from training.run.checkpoint import Progress
from training.run.log import Window

# Steps before the speed of a machine is taken for known.
STEPS_TO_MEASURE = 20
# Share of a run's steps by which an estimate of those that time allows must differ from them to count.
MIN_CHANGE = 0.02
# Steps whose gradient is not finite are left out; so many in a row, or all there are, end the run.
MAX_STEPS_LEFT_OUT = 10


def count_steps(max_steps: int, epochs: float, rows_in_epoch: int | None, rows_per_step: int) -> int:
    """The steps of a run: `max_steps`, or where that is no positive number those of so many epochs."""
    return max_steps if max_steps > 0 else max(1, round(epochs * rows_in_epoch / rows_per_step))


def curve_of(arguments: Arguments, max_steps: int) -> Callable[[int], float]:
    """The factors of the learning rate in a run of so many steps."""
    options = arguments.train
    return learning_rate_curve(options.lr_scheduler_type, options.warmup_steps, max_steps, arguments.schedule_kwargs())


class Length:
    """
    The step at which a run ends, with its schedule of learning rates.

    Args:
        progress: of the run, which says how many steps are planned; it is told when the run is to do another number.
    """

    def __init__(self, progress: Progress, schedule: LambdaLR, arguments: Arguments):
        self.progress = progress
        self.schedule = schedule
        self.arguments = arguments
        self.max_steps = progress.planned_steps
        self.left_out = 0  # steps in a row

    def set(self, max_steps: int) -> None:
        """Let the run and its schedule end at another step."""
        if max_steps == self.max_steps:
            return
        self.max_steps = max_steps
        self.progress.max_steps = max_steps
        self.schedule.lr_lambdas = [curve_of(self.arguments, max_steps)] * len(self.schedule.lr_lambdas)

    def estimate(self, pace: Window) -> int:
        """The step at which max_minutes will be over, as far as the pace of the steps so far can tell."""
        minutes = self.arguments.train.max_minutes
        if minutes is None or pace.steps == 0 or pace.steps % STEPS_TO_MEASURE:
            return self.max_steps
        left = max(0.0, 60 * minutes - self.progress.seconds) / (pace.seconds / pace.steps)
        fitting = min(self.progress.planned_steps, self.progress.step + max(1, int(left)))
        return fitting if abs(fitting - self.max_steps) > MIN_CHANGE * self.max_steps else self.max_steps

    def count_left_out(self, is_left_out: bool, labels: int) -> None:
        """
        Count a step, one with so many labels, among those that were left out in a row, or begin anew after one that
        was not. Raises CommandError if they are too many.
        """
        self.left_out = self.left_out + 1 if is_left_out else 0
        if self.left_out >= min(MAX_STEPS_LEFT_OUT, self.max_steps):
            advice = "lower --learning_rate, or train in bf16 instead of fp16"
            if labels == 0:
                advice = "not one mesh of their rows could be used, as the warnings above say"
            raise CommandError(f"the gradient was not finite in {self.left_out} steps in a row: {advice}")

    def is_line_due(self) -> bool:
        """Whether the log gets a line on the loss after the step just done."""
        return self._is_due(self.arguments.train.logging_steps, at_end=True)

    def is_checkpoint_due(self) -> bool:
        every = self.arguments.train.save_steps
        return self._is_due(every, at_end=every > 0)

    def judgements_due(self) -> list[str]:
        """What of "evaluation" and "samples" is due."""
        options = self.arguments.train
        evaluation = self._is_due(options.eval_steps or options.save_steps, at_end=True)
        samples = self._is_due(options.sample_steps, at_end=False)
        return ["evaluation"] * evaluation + ["samples"] * samples

    def _is_due(self, every: int, at_end: bool) -> bool:
        step = self.progress.step
        return bool(every and step % every == 0 or at_end and step == self.max_steps)
