"""What a run tells: lines for the user, a log for programs, numbers for trackers."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from iflame_hf.files_iflame import write_whole
from training.run.checkpoint import Progress

LOG = "log.jsonl"


class RunLog:
    """
    Shows lines, and writes `log.jsonl` in the folder of a run: one object a line, each with the `step` it was written
    after. On any but the main process it does nothing.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator):
        self.path = output_dir / LOG
        self.accelerator = accelerator

    def report(self, line: str) -> None:
        """Show a line to the user, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(line, file=sys.stderr)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """
        Append a line to the log, and tell the trackers the numbers in it. A line that cannot be written, for example
        because the disk is full, is reported and left out whole: it is not worth a run.
        """
        if self.accelerator.is_main_process:
            size = self.path.stat().st_size if self.path.exists() else 0
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError as error:
                self.report(f"step {step} is missing in {self.path}, which could not be written: {error}")
                if self.path.exists():
                    os.truncate(self.path, size)
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log(numbers, step=step)

    def write_training(
        self,
        progress: Progress,
        step: int,
        line: "Line",
        row_length: int,
        gradient_norm: float | None,
    ) -> str:
        """
        A line on training up to a step: the mean loss since the line before, which is then counted anew, and the speed
        of the steps in the line's window. Returns the two in words.
        """
        window = line.window
        loss = progress.loss_sum / progress.loss_steps
        progress.loss_sum, progress.loss_steps = 0.0, 0
        speed = window.rows * row_length / window.seconds
        memory = {}
        if self.accelerator.device.type == "cuda":  # the most that this process's tensors have taken so far
            memory["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.write(
            step,
            {
                "loss": loss,
                "grad_norm": gradient_norm,
                "learning_rate": line.learning_rate,
                "epoch": line.epoch,
                "tokens_per_second": speed,
                "useful_tokens_per_second": window.labels / window.seconds,
                "labels": progress.labels,
                "minutes": line.seconds / 60,
                **memory,
            },
        )
        return f"loss {loss:.4f}, {speed:,.0f} tokens/s"

    def evaluation(self, step: int) -> dict[str, Any]:
        """The latest line on an evaluation up to a step; empty if there is none."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        found = [line for line in map(json.loads, lines) if "eval_loss" in line and line["step"] <= step]
        return found[-1] if found else {}

    def start_trackers(self, settings: dict[str, Any], run_name: str | None) -> None:
        """Let the trackers that Accelerate was asked for begin a run."""
        settings = {name: str(value) for name, value in settings.items()}
        names = {"wandb": {"name": run_name}} if run_name else {}
        self.accelerator.init_trackers("iflame", config=settings, init_kwargs=names)

    def cut(self, step: int) -> None:
        """Keep the lines up to a step only: later ones are written again, and a crash may have left half a line."""
        if not self.accelerator.is_main_process:
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                if 0 < json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        write_whole(self.path, "".join(kept).encode())


@dataclass
class Window:
    """What was done in some steps, and how long they took."""

    steps: int = 0
    seconds: float = 0.0
    rows: int = 0
    labels: int = 0

    def add(self, seconds: float, rows: int, labels: int) -> None:
        self.steps += 1
        self.seconds += seconds
        self.rows += rows
        self.labels += labels


@dataclass
class Line:
    """What a line of the log says of steps besides their loss."""

    window: Window
    learning_rate: float
    epoch: float
    seconds: float  # of training so far
