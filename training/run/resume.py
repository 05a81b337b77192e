"""What may change when a run goes on from a checkpoint, and what it takes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LambdaLR

from training.run.checkpoint import Progress

# What weights, optimiser and average of a checkpoint belong to.
FIXED = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "stage_layers",
    "full_attention_interval",
    "optim",
)
# Settings of the optimiser, which a checkpoint holds too.
OF_THE_OPTIMISER = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# Seconds in which processes of a run that was killed let go of its folder.
SECONDS_TO_DIE = 10


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """
    Make a folder, and have it for one run until its process ends, however it ends.

    Raises:
        ValueError: another process trains in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=SECONDS_TO_DIE)
    except Timeout:
        raise ValueError(
            f"another process trains in {folder}: wait for its end or stop it, or choose another --output_dir"
        ) from None
    with held:
        yield


def check_folder(folder: Path, has_checkpoints: bool, may_go_on: bool) -> None:
    """Raises ValueError if a run that begins anew would write over another in its folder."""
    if has_checkpoints and not may_go_on:
        raise ValueError(
            f"{folder} holds the checkpoints of another run: go on from them with --resume_from_checkpoint latest, "
            "delete the folder, or choose another --output_dir"
        )
    if not has_checkpoints and (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} holds a finished model and no checkpoint to go on from: choose another --output_dir, delete "
            "the folder, or start a new run from its weights with --model_name_or_path"
        )


def check_options(checkpoint: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError where the options given cannot go on from a checkpoint that was made with those saved."""
    changed = [name for name in FIXED if name in saved and saved[name] != given[name]]
    if (saved.get("ema_decay") is None) != (given["ema_decay"] is None):
        changed.append("ema_decay")
    if changed:
        values = ", ".join(f"{name} {given[name]} (was {saved.get(name)})" for name in changed)
        raise ValueError(
            f"{checkpoint} cannot go on with {values}: give what it was made with, or start a new run from its "
            f"weights with --model_name_or_path {checkpoint} and another --output_dir"
        )


def rows_of_a_step(saved: Progress) -> int:
    """Rows that all processes together took for one step."""
    options = saved.arguments
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * len(saved.places)


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group of parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def apply_settings(optimizer: torch.optim.Optimizer, schedule: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Give the groups other settings, and the schedule another highest learning rate, from its present step on."""
    for index, (group, new) in enumerate(zip(optimizer.param_groups, settings, strict=True)):
        group.update(new)
        schedule.base_lrs[index] = new["initial_lr"]
        group["lr"] = new["initial_lr"] * schedule.lr_lambdas[index](schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
