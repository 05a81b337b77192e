"""The weights of a run: what a checkpoint holds of them, what is evaluated and sampled, and the model published."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.measure.metrics import write_whole
from training.run.card import RunRecord, model_card
from training.run.checkpoint import Progress
from training.run.create import is_sharded

WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"


class Weights:
    """
    A model as Accelerate has prepared it, with the moving average of its weights, if there is one, which then is what
    is evaluated, sampled and published. Methods are called on all processes together; the main process writes.

    Args:
        repo_id: the name that the cards of the model call it by.
        record: makes on the main process what a card tells of the run.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        average: AveragedModel | None,
        tokenizer: IFlameTokenizer,
        accelerator: Accelerator,
        repo_id: str,
        record: Callable[[], RunRecord],
    ):
        self.model = model
        self.average = average
        self.tokenizer = tokenizer
        self.accelerator = accelerator
        self.repo_id = repo_id
        self.record = record
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def judged(self) -> torch.nn.Module:
        """The model whose quality counts."""
        return self.model if self.average is None else self.average.module

    def update_average(self) -> None:
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))

    def whole(self) -> IFlameForCausalLM | None:
        """The model whose quality counts with all of its weights, to generate with; None but on the main process."""
        sharded = self.accelerator.get_state_dict(self.model) if is_sharded(self.accelerator) else None
        if not self.accelerator.is_main_process:
            return None
        if sharded is None:
            return self.accelerator.unwrap_model(self.judged)
        model = IFlameForCausalLM(self.accelerator.unwrap_model(self.model).config)
        model.load_state_dict(sharded)
        return model.to(self.accelerator.device)

    def save(self, folder: Path, progress: Progress) -> None:
        """What resumes a run, into a folder that is a model which `from_pretrained` loads, too."""
        self.accelerator.save_state(str(folder))
        self._write(folder, self.accelerator.get_state_dict(self.model))
        if self.accelerator.is_main_process:
            if self.average is not None:
                save_file(self.average.state_dict(), folder / AVERAGE)
            progress.write(folder)

    def publish(self, folder: Path) -> None:
        """Put the model with its tokenizer and card into a folder, file by file in whole."""
        weights = self.accelerator.get_state_dict(self.judged)
        if self.accelerator.is_main_process:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".model-") as beside:
                self._write(Path(beside), weights)
                for path in Path(beside).iterdir():
                    os.replace(path, folder / path.name)

    def write_card(self, folder: Path, samples: Sequence[str]) -> None:
        """The page that the Hub shows of a model, with what this run knows; hub_upload.py writes a fuller one."""
        if self.accelerator.is_main_process:
            self._write_card(self.accelerator.unwrap_model(self.model), folder, samples)

    def _write(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(self.model)
            if is_sharded(self.accelerator):  # its class is one that torch has made, which nobody could load
                generation_config = model.generation_config
                with torch.device("meta"):
                    model = IFlameForCausalLM(model.config)
                model.generation_config = generation_config
            model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)
            self._write_card(model, folder)

    def _write_card(self, model: IFlameForCausalLM, folder: Path, samples: Sequence[str] = ()) -> None:
        card = model_card(model, self.record(), repo_id=self.repo_id, samples=samples)
        write_whole(folder / "README.md", str(card).encode())

    def _load(self, models: list[torch.nn.Module], folder: str) -> None:
        """Called by Accelerate, which still loads the weights itself where they are sharded."""
        if models:
            self.accelerator.unwrap_model(self.model).load_state_dict(load_file(Path(folder) / WEIGHTS))
            models.clear()
        if self.average is not None:
            self.average.load_state_dict(load_file(Path(folder) / AVERAGE))
