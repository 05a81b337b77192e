"""What a run does after some of its steps: evaluations, samples, checkpoints."""

from pathlib import Path

from accelerate.utils import gather_object

from training.arguments import TrainArguments
from training.rows.load import Place
from training.run.agree import Agreement
from training.run.assess import Assessment
from training.run.checkpoint import Checkpoints, Progress
from training.run.interruption import Stopped
from training.run.results import StepResults
from training.run.steps import Steps
from training.run.write import ModelWriter


class Milestones:
    """
    Methods are called on all processes together.

    Attributes:
        saved_step: the step of the latest checkpoint that lacks nothing.
    """

    def __init__(
        self,
        options: TrainArguments,
        progress: Progress,
        steps: Steps,
        checkpoints: Checkpoints,
        writer: ModelWriter,
        assessment: Assessment,
        agreement: Agreement,
        results: StepResults,
    ):
        self.options = options
        self.progress = progress
        self.steps = steps
        self.checkpoints = checkpoints
        self.writer = writer
        self.assessment = assessment
        self.agreement = agreement
        self.results = results
        self.saved_step: int | None = None

    def reach(self, place: Place) -> bool:
        """
        After a step: evaluate, sample and save as is due then.

        Args:
            place: in this process's data, after the step.

        Returns:
            Whether the run was asked to stop meanwhile.
        """
        options, due = self.options, self.steps.due
        if due(options.eval_steps or options.save_steps, at_end=True):
            self.progress.due.append("evaluation")
        if due(options.sample_steps, at_end=False):
            self.progress.due.append("samples")
        return self.catch_up(place, save=due(options.save_steps, at_end=options.save_steps > 0))

    def catch_up(self, place: Place | None, save: bool) -> bool:
        """Do what is still due after the latest step; returns whether the run was asked to stop meanwhile."""
        due = self.progress.due
        if not due and not save:
            return False
        self.results.read()
        try:
            while due:
                if due[0] == "evaluation":
                    self.assessment.evaluate()
                else:
                    self.assessment.sample(Path(self.options.output_dir) / f"samples-{self.progress.step}")
                due.pop(0)
                self.saved_step = None  # where a checkpoint says that this is still to be done
            if save:
                self.save(place)
            self.agreement.check()
        except Stopped:
            return True
        return False

    def save(self, place: Place | None) -> bool:
        """Save a checkpoint, unless this very step has one; whether it has one now."""
        step = self.progress.step
        if self.saved_step != step:
            self.progress.scheduler = self.steps.schedule.state_dict()
            if place is not None:
                self.progress.places = gather_object([place])
            if self.checkpoints.save(step, self.writer.write_checkpoint):
                self.saved_step = step
        return self.saved_step == step
