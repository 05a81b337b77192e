"""Evaluations and samples of a model while it is trained."""

from pathlib import Path

from iflame_hf import IFlameTokenizer
from training.arguments import TrainArguments
from training.measure.metrics import evaluate
from training.measure.samples import draw_samples
from training.rows.map import Data
from training.run.agree import Agreement
from training.run.checkpoint import Progress
from training.run.log import RunLog
from training.run.weights import Weights


class Assessment:
    """
    What a run finds out about its model, and tells in its log. Methods are called on all processes together; they
    raise Stopped where any of them was asked to stop.
    """

    def __init__(
        self,
        weights: Weights,
        data: Data,
        tokenizer: IFlameTokenizer,
        options: TrainArguments,
        progress: Progress,
        agreement: Agreement,
        log: RunLog,
    ):
        self.weights = weights
        self.accelerator = weights.accelerator
        self.data = data
        self.tokenizer = tokenizer
        self.options = options
        self.progress = progress
        self.agreement = agreement
        self.log = log

    def evaluate(self) -> None:
        """Evaluate on the validation meshes, if there are any."""
        if self.data.validation is None:
            return
        metrics = evaluate(
            self.weights.published,
            self.data.validation_loader,
            self.accelerator,
            self.data.validation.category_names,
            self.tokenizer.coordinate_resolution + 1,
            self.agreement.check,
        )
        self.progress.eval_loss = metrics["eval_loss"]
        self.log.write(self.progress.step, metrics)
        self.log.report(
            f"step {self.progress.step}: evaluation loss {metrics['eval_loss']:.4f}, accuracy of tokens "
            f"{metrics['eval_token_accuracy']:.1%}, vertices {metrics['eval_vertex_accuracy']:.1%}, faces "
            f"{metrics['eval_face_accuracy']:.1%}"
        )

    def sample(self, folder: Path) -> None:
        """Generate meshes, on the main process; the others wait."""
        options = self.options
        if options.num_samples == 0:
            return
        model = self.weights.model_to_sample()
        if model is None:
            while not self.agreement.check():
                pass
            return
        samples = draw_samples(
            model,
            self.tokenizer,
            self.accelerator,
            folder,
            options.num_samples,
            options.sample_max_faces,
            options.seed,
            self.agreement.check,
        )
        self.agreement.check(done=True)
        ended = sum(sample["ended"] for sample in samples)
        self.log.write(
            self.progress.step,
            {"samples": str(folder), "samples_ended": ended, "sample_faces": [x["faces"] for x in samples]},
        )
        self.log.report(f"{len(samples)} samples, {ended} of them complete: {folder / 'samples.png'}")
