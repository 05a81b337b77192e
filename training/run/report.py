"""What a run says at its beginning, in its log of steps, and at its end."""

from typing import Any

import torch

from training.rows.load import TrainingRows
from training.run.card import RunRecord
from training.run.checkpoint import Progress
from training.run.log import RunLog, Window


def opening(
    parameters: int, rows: TrainingRows, row_length: int, max_steps: int, rows_per_step: int, where: str
) -> str:
    """
    The line on what is going to happen.

    Args:
        rows_per_step: those that all processes together take for one step.
        where: processes, their device and precision.
    """
    steps = f"{max_steps:,} steps of {rows_per_step} rows"
    if rows.rows_in_epoch is not None:
        steps += f", {max_steps * rows_per_step / rows.rows_in_epoch:.1f} epochs"
    return f"{parameters:,} parameters; {rows.describe()} of {row_length:,} tokens; {steps}; {where}"


def loss_line(
    loss: float,
    gradient_norm: float | None,
    learning_rate: float,
    epoch: float,
    progress: Progress,
    window: Window,
    row_length: int,
    device: torch.device,
) -> dict[str, Any]:
    """
    A line of the log on training.

    Args:
        loss: mean of the steps since the line before.
        gradient_norm: of the last step; None if it was left out.
        window: the steps since the line before.
    """
    line = {
        "loss": loss,
        "grad_norm": gradient_norm,
        "learning_rate": learning_rate,
        "epoch": epoch,
        "tokens_per_second": window.rows * row_length / window.seconds,
        "useful_tokens_per_second": window.labels / window.seconds,
        "labels": progress.labels,
        "minutes": progress.seconds / 60,
    }
    if device.type == "cuda":  # the most that this process's tensors have taken so far
        line["memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return line


def shortening(pace: Window, minutes: float, max_steps: int, planned_steps: int) -> str:
    """The line on a run that will do fewer steps than were planned."""
    return (
        f"a step takes {pace.seconds / pace.steps:.2g} s, so that max_minutes: {minutes:g} leaves time for "
        f"{max_steps:,} of {planned_steps:,} steps"
    )


def report_shortfall(record: RunRecord, log: RunLog, can_go_on: bool) -> None:
    """
    Tell what a run lacks at its end, if anything, and how it gets there.

    Args:
        can_go_on: whether it has checkpoints.
    """
    if shortfall := record.shortfall():
        log.report(shortfall)
        log.write(record.progress["step"], {"ended": shortfall, "planned_steps": record.progress["planned_steps"]})
    if record.missed_loss:
        option = "--max_minutes" if record.shortened else "--max_steps"
        resume = ", and --resume_from_checkpoint latest to go on from here" if can_go_on else ""
        log.report(f"its samples show meshes that it has not learnt: give the run a larger {option}{resume}")
