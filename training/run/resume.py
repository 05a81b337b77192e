"""How a run goes on from a checkpoint, and what may change then."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch.optim.lr_scheduler import LambdaLR

from training.rows.load import TrainingRows
from training.run.checkpoint import Checkpoints, Progress
from training.run.steps import Steps

# What weights, optimiser and average of a checkpoint belong to.
FIXED_OPTIONS = (
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "stage_layers",
    "full_attention_interval",
    "optim",
)
# What the state of the optimiser, in a checkpoint, holds too.
OPTIMIZER_OPTIONS = {"learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
# Seconds in which processes of a run that was killed let go of its folder.
RELEASE_SECONDS = 10


@contextmanager
def lock(folder: Path, accelerator: Accelerator, does: str = "trains", option: str = "--output_dir") -> Iterator[None]:
    """
    Make a folder, and have it for one run until its main process ends, however it ends.

    Args:
        does: what a run does in it.
        option: that names the folder.

    Raises:
        ValueError: another run is at work in it. Like an OSError, it is raised on all processes of this one.
    """
    with ExitStack() as stack:
        failure = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(_lock(folder, does, option))
            except (OSError, ValueError) as error:
                failure = error
        raise_on_all(failure)
        yield


def raise_on_all(failure: Exception | None) -> None:
    """Called on all processes together: raise what any of them failed with on every one."""
    if (failure := next(filter(None, gather_object([failure])), None)) is not None:
        raise failure


@contextmanager
def _lock(folder: Path, does: str, option: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=RELEASE_SECONDS)
    except Timeout:
        raise ValueError(
            f"another process {does} in {folder}: wait for its end or stop it, or choose another {option}"
        ) from None
    with held:
        yield


def find_checkpoint(checkpoints: Checkpoints, wanted: str | None) -> Path | None:
    """
    Called on all processes together: tidy the folder of a run, and find the checkpoint that it goes on from; None if
    it begins anew.

    Raises:
        ValueError: the checkpoint is not there or broken, or a new run would write over another.
    """
    accelerator = checkpoints.accelerator
    if accelerator.is_main_process:
        checkpoints.clean()
    accelerator.wait_for_everyone()
    checkpoint = None if wanted is None else checkpoints.find(wanted)
    if checkpoint is None:
        check_folder(checkpoints.output_dir, bool(checkpoints.folders()), may_go_on=wanted is not None)
    accelerator.wait_for_everyone()  # nobody changes the folder before every process has read it
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


def resume(
    checkpoint: Path,
    progress: Progress,
    steps: Steps,
    rows: TrainingRows,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    report: Callable[[str], None],
) -> None:
    """
    Restore everything that a checkpoint holds, but for what the options of this run, in `progress`, say otherwise.

    Raises:
        ValueError: the checkpoint belongs to other data, or to a model of other sizes.
    """
    saved = Progress.read(checkpoint)
    if saved.data_digest != progress.data_digest:
        raise ValueError(
            f"{checkpoint} belongs to other training data, or to another --row_length, --seed, --long_meshes, "
            "--balance, --balance_power, --condition_on, --min_category_meshes or --streaming, so that its place in "
            "the data means nothing here. Give the same options, or start a new run from its weights with "
            f"--model_name_or_path {checkpoint} and another --output_dir"
        )
    given = progress.arguments
    if saved.arguments.get("attn_implementation", "") is None:  # as "auto" was once called
        saved.arguments["attn_implementation"] = "auto"
    check_options(checkpoint, saved.arguments, given)
    changed = {name for name, value in saved.arguments.items() if given.get(name) != value}
    if saved.max_steps and not changed & {"max_steps", "num_train_epochs", "max_minutes"}:
        steps.end_after(saved.max_steps)
    if given["max_steps"] < 0 and rows_of_a_step(saved) not in (0, steps.rows_per_step):
        epochs = given["num_train_epochs"] - max(map(rows.epochs, saved.places))
        left = max(0, round(epochs * rows.rows_in_epoch / steps.rows_per_step))
        progress.planned_steps = saved.step + left
        steps.end_after(progress.planned_steps)
    saved.arguments = given
    saved.max_steps, saved.planned_steps = progress.max_steps, progress.planned_steps
    settings = settings_of(optimizer)
    accelerator.load_state(str(checkpoint))
    steps.schedule.load_state_dict(saved.scheduler)
    if changed & OPTIMIZER_OPTIONS:
        apply_settings(optimizer, steps.schedule, settings)
    progress.become(saved)
    changed -= {"resume_from_checkpoint"}
    report(f"resumed from {checkpoint}" + (f" with other {', '.join(sorted(changed))}" if changed else ""))


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
