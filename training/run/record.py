"""What the folder of a run tells of it: how far it came, how well it did, and what it lacks at its end."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

# What train.py writes; its own modules need packages that publishing does not.
STATE = "trainer_state.json"
LOG = "log.jsonl"
# Share of its steps that a shortened run must have done to pass for converged, where it says nothing of its loss.
ENOUGH_STEPS = 0.5


@dataclass
class RunRecord:
    """What the folder of a run tells of it; all empty for a model that comes from elsewhere."""

    card: ModelCard | None = None  # the README.md in it
    progress: dict[str, Any] = field(default_factory=dict)  # of its latest checkpoint, else of its log
    evaluation: dict[str, Any] = field(default_factory=dict)  # of the weights in it
    ended: str = ""  # what the log says that the run lacks at its end

    @property
    def metadata(self) -> dict[str, Any]:
        """Those of the card."""
        return self.card.data.to_dict() if self.card else {}

    @property
    def arguments(self) -> dict[str, Any]:
        return self.progress.get("arguments", {})

    @property
    def is_empty(self) -> bool:
        """Whether no run has left a word of itself, so that the card is all there is to know."""
        return not self.progress and not self.evaluation

    @property
    def shortened(self) -> bool:
        """Whether max_minutes ended the run before it had done its steps."""
        step, planned = self.progress.get("step", 0), self.progress.get("planned_steps", 0)
        return 0 < self.progress.get("max_steps", 0) <= step < planned

    @property
    def missed_loss(self) -> bool:
        """Whether the run has come to its end, and not to required_eval_loss."""
        required, loss = self.arguments.get("required_eval_loss"), self.evaluation.get("eval_loss", float("nan"))
        ended = self.shortened or self.progress.get("step", 0) >= self.progress.get("planned_steps", 0)
        return ended and required is not None and not loss <= required

    def shortfall(self) -> str:
        """What the run lacks at its end, in words; empty if that is nothing, or if the run goes on."""
        if not self.arguments:
            return self.ended
        parts, converged = [], not self.missed_loss
        if self.shortened:
            step, planned = self.progress["step"], self.progress["planned_steps"]
            minutes = self.arguments.get("max_minutes")
            parts.append(f"stopped after {step:,} of {planned:,} steps by max_minutes: {minutes:g}")
            if self.arguments.get("required_eval_loss") is None:
                converged = step >= ENOUGH_STEPS * planned
        if not converged:
            parts.append("not converged")
        if self.missed_loss:
            loss, required = self.evaluation.get("eval_loss", float("nan")), self.arguments["required_eval_loss"]
            parts[-1] += f": the evaluation loss is {loss:.3f}, required_eval_loss {required:g}"
        return "; ".join(parts)

    @property
    def procedural(self) -> bool:
        """Whether the project's own meshes are all that the model has learnt from."""
        return bool(self.arguments) and not (
            self.arguments.get("train_file") or self.arguments.get("model_name_or_path")
        )


def read_run(folder: Path) -> RunRecord:
    """
    The record of a run from its output folder, or from one of its checkpoints.

    Raises:
        ValueError: a file of the run cannot be read, naming it.
    """
    run = RunRecord()
    card, output_dir, step = folder / "README.md", folder, None
    if match := re.fullmatch(r"checkpoint-(\d+)", folder.name):
        output_dir, step = folder.parent, int(match[1])
    states = [path for path in output_dir.glob(f"checkpoint-*/{STATE}") if step is None or path.parent == folder]
    path = card
    try:
        if card.is_file():
            run.card = ModelCard.load(card, ignore_metadata_errors=True)
        evaluated: dict[float, int] = {}  # the steps of checkpoints by their loss
        for path in states:
            progress = json.loads(path.read_text(encoding="utf-8"))
            if progress["step"] >= run.progress.get("step", 0):
                run.progress = progress
            if progress.get("eval_loss") is not None:
                evaluated[progress["eval_loss"]] = progress["step"]
        path = output_dir / LOG
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        entries = [json.loads(line) for line in lines]
        if not states:
            _read_end(run, [line for line in entries if step is None or line["step"] <= step])
        evaluations = [line for line in entries if "eval_loss" in line]
        if step is None and evaluated and run.arguments.get("load_best_model_at_end"):
            step = evaluated[min(evaluated)]
        if step is not None:
            evaluations = [line for line in evaluations if line["step"] == step]
        run.evaluation = evaluations[-1] if evaluations else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error or type(error).__name__}") from error
    return run


def _read_end(run: RunRecord, entries: Sequence[dict[str, Any]]) -> None:
    """What the log alone tells of how far the run came."""
    for line in entries:
        if "labels" in line:
            run.progress = {"step": line["step"], "labels": line["labels"], "seconds": 60 * line["minutes"]}
        run.ended = line.get("ended", run.ended)
