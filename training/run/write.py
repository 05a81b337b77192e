"""The folders that a run leaves: checkpoints, and its finished model."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from iflame_hf.files_iflame import write_whole
from training.run.card import model_card
from training.run.checkpoint import Checkpoints, Progress
from training.run.log import RunLog
from training.run.record import RunRecord
from training.run.weights import Weights


class ModelWriter:
    """
    Writes folders that `from_pretrained` loads, each with its tokenizer and a card.

    Attributes:
        published_step: of the weights that are written last, if it is not the last step.
    """

    def __init__(
        self, weights: Weights, tokenizer: IFlameTokenizer, output_dir: Path, progress: Progress, log: RunLog
    ):
        self.weights = weights
        self.accelerator = weights.accelerator
        self.tokenizer = tokenizer
        self.output_dir = output_dir
        self.progress = progress
        self.log = log
        self.published_step: int | None = None

    def write_checkpoint(self, folder: Path) -> None:
        """Called on every process: a folder that resumes this run and is a model that `from_pretrained` loads."""
        self.accelerator.save_state(str(folder))
        state = self.weights.state_dict()
        if self.accelerator.is_main_process:
            self._write_model(folder, state)
            self.weights.save_average(folder)
            self.progress.write(folder)

    def load_best(self, checkpoints: Checkpoints) -> bool:
        """Called on every process: go back to the checkpoint with the lowest evaluation loss; whether there is one."""
        best = checkpoints.best()
        if best is None:
            self.log.report("no checkpoint was evaluated: the model of the last step is published")
            return False
        self.log.report(f"the checkpoint with the lowest evaluation loss is {best}")
        self.accelerator.load_state(str(best))
        self.published_step = Progress.read(best).step
        return True

    def publish(self) -> None:
        """Called on every process: leave the finished model in the output folder, each file whole or not there."""
        state = self.weights.state_dict(published=True)
        if self.accelerator.is_main_process:
            with tempfile.TemporaryDirectory(dir=self.output_dir, prefix=".model-") as temporary:
                self._write_model(Path(temporary), state)
                for path in Path(temporary).iterdir():
                    os.replace(path, self.output_dir / path.name)

    def add_to_card(self, samples: Sequence[str]) -> None:
        """On the main process: the card of the finished model anew, with these files."""
        self._write_card(self.weights.unwrapped, self.output_dir, samples)

    def record(self) -> RunRecord:
        """What this run knows of the model that it publishes."""
        evaluation = self.log.evaluation(self.published_step or self.progress.step)
        return RunRecord(progress=asdict(self.progress), evaluation=evaluation)

    def _write_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        model = self.weights.model_to_save()
        model.save_pretrained(folder, state_dict=state)
        self.tokenizer.save_pretrained(folder)
        self._write_card(model, folder)

    def _write_card(self, model: IFlameForCausalLM, folder: Path, samples: Sequence[str] = ()) -> None:
        """The page that the Hub shows of a model, with what this run knows; hub_upload.py writes a fuller one."""
        card = model_card(model, self.record(), repo_id=str(self.output_dir), samples=samples)
        write_whole(folder / "README.md", str(card).encode())
