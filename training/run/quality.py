"""How good the model of a run is by now: its evaluation, and samples of it."""

from pathlib import Path

from training.arguments import TrainArguments
from training.measure.metrics import evaluate
from training.measure.samples import draw_samples
from training.rows.map import Data
from training.run.checkpoint import Progress
from training.run.log import RunLog
from training.run.processes import Processes
from training.run.weights import Weights


class Quality:
    """Judges the weights of a run, and tells its log. Methods are called on all processes together."""

    def __init__(self, weights: Weights, data: Data, options: TrainArguments, processes: Processes, log: RunLog):
        self.weights = weights
        self.data = data
        self.options = options
        self.processes = processes
        self.log = log

    def evaluate(self, progress: Progress) -> None:
        """
        Evaluate on the validation meshes, if there are any, and note the loss in the run's progress. Raises Stopped if
        the run is asked to stop.
        """
        if self.data.validation is None:
            return
        step = progress.step
        metrics = evaluate(
            self.weights.judged,
            self.data.validation_loader,
            self.weights.accelerator,
            self.data.validation.category_names,
            self.weights.tokenizer.coordinate_resolution + 1,
            self.processes.check,
        )
        progress.eval_loss = metrics["eval_loss"]
        self.log.write(step, metrics)
        self.log.report(
            f"step {step}: evaluation loss {metrics['eval_loss']:.4f}, accuracy of tokens "
            f"{metrics['eval_token_accuracy']:.1%}, vertices {metrics['eval_vertex_accuracy']:.1%}, faces "
            f"{metrics['eval_face_accuracy']:.1%}"
        )

    def sample(self, step: int, folder: Path) -> None:
        """Generate meshes, on the main process. Raises Stopped if the run is asked to stop."""
        options = self.options
        if options.num_samples == 0:
            return
        model = self.weights.whole()
        if model is None:
            while not self.processes.check():
                pass
            return
        samples = draw_samples(
            model,
            self.weights.tokenizer,
            self.weights.accelerator,
            folder,
            options.num_samples,
            options.sample_max_faces,
            options.seed,
            options.temperature,
            options.top_k,
            options.top_p,
            self.processes.check,
        )
        self.processes.check(done=True)
        ended = sum(sample["ended"] for sample in samples)
        faces = [sample["faces"] for sample in samples]
        self.log.write(step, {"samples": str(folder), "samples_ended": ended, "sample_faces": faces})
        self.log.report(f"{len(samples)} samples, {ended} of them complete: {folder / 'samples.png'}")
