"""How a run goes on from a checkpoint, and which options may change when it does."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LambdaLR

from training.rows.load import TrainingRows
from training.run.checkpoint import Checkpoints, Progress
from training.run.length import Length
from training.run.processes import Processes

# What cannot change, as the weights, the optimiser and the average of a checkpoint belong to it.
FIXED_OPTIONS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "stage_layers",
    "full_attention_interval",
    "optim",
)
# What decides how many steps a run does.
LENGTH_OPTIONS = {"max_steps", "num_train_epochs", "max_minutes"}
# Settings of the optimiser, which a checkpoint holds too.
OPTIMIZER_OPTIONS = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# Seconds that a run waits for a folder: processes of one that was killed let go of it late.
LOCK_TIMEOUT = 10


@contextmanager
def lock(folder: Path, processes: Processes) -> Iterator[None]:
    """
    Make a folder, and have it for the processes of one run until the main one ends, however it ends.

    Raises:
        OSError: it cannot be made.
        ValueError: another run trains in it.
    """
    with ExitStack() as held:
        failure = None
        if processes.accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(folder / ".lock").acquire(timeout=LOCK_TIMEOUT))
            except Timeout:
                failure = ValueError(
                    f"another process trains in {folder}: wait for its end or stop it, or choose another --output_dir"
                )
            except OSError as error:
                failure = error
        processes.raise_first(failure)
        yield


def choose_checkpoint(checkpoints: Checkpoints, wanted: str | None, accelerator: Accelerator) -> Path | None:
    """
    What a run goes on from, the same on all processes; None if it begins anew. What an earlier process left
    half-written is removed.

    Raises:
        ValueError: there is no such checkpoint, or the folder belongs to another run.
    """
    if accelerator.is_main_process:
        checkpoints.clean()
    accelerator.wait_for_everyone()
    checkpoint = None if wanted is None else checkpoints.find(wanted)
    if checkpoint is None:
        check_folder(checkpoints.output_dir, bool(checkpoints.folders()), may_go_on=wanted is not None)
    accelerator.wait_for_everyone()  # nobody changes the folder before all have checked it
    return checkpoint


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


def check_data(checkpoint: Path, saved_digest: str, digest: str) -> None:
    """Raises ValueError where a checkpoint was made with other training data."""
    if saved_digest != digest:
        raise ValueError(
            f"{checkpoint} belongs to other training data, or to another --row_length, --seed, --long_meshes, "
            "--balance or --streaming, so that its place in the data means nothing here. Give the same options, "
            f"or start a new run from its weights with --model_name_or_path {checkpoint} and another --output_dir"
        )


def check_options(checkpoint: Path, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Raises ValueError where the options given cannot go on from a checkpoint that was made with those saved."""
    changed = [name for name in FIXED_OPTIONS if name in saved and saved[name] != given[name]]
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


def resume(
    checkpoint: Path,
    progress: Progress,
    length: Length,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    rows: TrainingRows,
    rows_per_step: int,
) -> set[str]:
    """
    Restore everything that a checkpoint holds.

    Args:
        progress: of the run that goes on, with its options; it is made that of the checkpoint.
        rows_per_step: those that all processes together take for one step.

    Returns:
        the names of the options that have other values now.

    Raises:
        ValueError: the checkpoint belongs to other data, or to options that cannot change.
    """
    saved, options = Progress.read(checkpoint), progress.arguments
    check_data(checkpoint, saved.data_digest, progress.data_digest)
    check_options(checkpoint, saved.arguments, options)
    changed = {name for name, value in saved.arguments.items() if options.get(name) != value}
    if saved.max_steps and not changed & LENGTH_OPTIONS:
        length.set(saved.max_steps)
    if options["max_steps"] < 0 and rows_of_a_step(saved) not in (0, rows_per_step):
        epochs = options["num_train_epochs"] - max(map(rows.epochs, saved.places))
        left = max(0, round(epochs * rows.rows_in_epoch / rows_per_step))
        progress.planned_steps = saved.step + left
        length.set(progress.planned_steps)
    saved.arguments = options
    saved.max_steps, saved.planned_steps = progress.max_steps, progress.planned_steps
    settings = settings_of(optimizer)
    accelerator.load_state(str(checkpoint))
    length.schedule.load_state_dict(saved.scheduler)
    if changed & OPTIMIZER_OPTIONS:
        apply_settings(optimizer, length.schedule, settings)
    progress.take(saved)
    return changed - {"resume_from_checkpoint"}
