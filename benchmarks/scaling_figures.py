"""What runs on one GPU and on several leave, as figures: the log of training, the files of meshes."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.oracle import WrongResult

# Shares of one GPU's speed that each of several is to have.
GOALS = {"ddp": 0.92, "fsdp2": 0.85, "generate": 0.95}
# Relative differences that rounding explains, of what is learnt from the same rows in another split: of the loss and
# the gradient's norm in the first step, whose weights are the same, and of the loss in the mean of the first steps.
LARGEST_DIFFERENCES = {
    "bfloat16": {"first_loss": 2e-3, "first_norm": 2e-2, "losses": 1e-2},
    "float16": {"first_loss": 2e-3, "first_norm": 2e-2, "losses": 1e-2},
    "float32": {"first_loss": 1e-5, "first_norm": 1e-4, "losses": 1e-4},
}
NAMES = {
    "first_loss": "the loss of the first step",
    "first_norm": "the gradient's norm in the first step",
    "losses": "the loss in the mean of {steps} steps",
}
# Steps whose mean is told as the loss of a run.
LAST_STEPS = 10

Log = dict[int, dict[str, Any]]


def read_log(path: Path, steps: int) -> Log:
    """The lines on training by step. Raises WrongResult unless there is one for each step."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    log = {line["step"]: line for line in lines if "loss" in line}
    if missing := [step for step in range(1, steps + 1) if step not in log]:
        raise WrongResult(f"{len(missing)} of {steps} steps are not in the log, the first of them {missing[0]}")
    return log


def training_speed(log: Log, first_step: int, last_step: int, tokens_per_step: int) -> float:
    """Tokens a second of all GPUs from after the first step given to after the last one, by the clock of the run."""
    seconds = 60 * (log[last_step]["minutes"] - log[first_step]["minutes"])
    return tokens_per_step * (last_step - first_step) / seconds


def training_figures(log: Log, steps: int) -> dict[str, float | None]:
    """The most memory that tensors of the first GPU took, and the loss of the last steps."""
    last = [log[step]["loss"] for step in range(max(1, steps - LAST_STEPS + 1), steps + 1)]
    return {"memory_gib": log[steps].get("memory_gib"), "loss": sum(last) / len(last)}


def differences(log: Log, expected: Log, steps: int) -> dict[str, float]:
    """
    How far a run is from one that learnt from the same rows in every step, see LARGEST_DIFFERENCES. Raises WrongResult
    where the rows were others, as the number of their labels shows.
    """
    others = [step for step in range(1, steps + 1) if log[step]["labels"] != expected[step]["labels"]]
    if others:
        raise WrongResult(f"step {others[0]} is learnt from other rows than one GPU's")
    losses = [_relative(log[step]["loss"], expected[step]["loss"]) for step in range(1, steps + 1)]
    norm = _relative(log[1]["grad_norm"], expected[1]["grad_norm"])
    return {"first_loss": losses[0], "first_norm": norm, "losses": sum(losses) / steps}


def too_different(found: Mapping[str, float], dtype: str, steps: int) -> str | None:
    """What of the differences is more than rounding, in words, or None."""
    allowed = LARGEST_DIFFERENCES[dtype]
    wrong = [name for name, value in found.items() if not value <= allowed[name]]
    if not wrong:
        return None
    said = (f"{NAMES[name].format(steps=steps)} by {found[name]:.2g} (at most {allowed[name]:g})" for name in wrong)
    return f"learns otherwise than one GPU from the same rows: {', '.join(said)}"


def _relative(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-12)


def read_meshes(folder: Path) -> tuple[dict[str, bytes], list[tuple[float, int]]]:
    """All files of generated meshes and their index by name; and when each mesh was written, with its faces."""
    index = folder / "meshes.jsonl"
    records = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
    paths = [(folder / record["file"], record["faces"]) for record in records if record["file"]]
    files = {path.name: path.read_bytes() for path in (index, *(path for path, _ in paths))}
    return files, [(path.stat().st_mtime_ns / 1e9, faces) for path, faces in paths]


def meshes_per_second(written: Sequence[tuple[float, int]], rows: int) -> float:
    """
    While all rows were full: without the start, and without the end, where rows have no next mesh. Faces are counted,
    and told as meshes of the mean size of all: which meshes come to their end in between is chance.

    Args:
        written: when, in seconds, and with how many faces; in any order.
        rows: meshes in work at a time, of all processes.
    """
    written = sorted(written)
    left_out = min(rows, len(written) // 4)
    between = written[left_out : len(written) - left_out]
    seconds = between[-1][0] - written[left_out - 1][0] if left_out else 0.0
    if not seconds > 0:
        raise WrongResult(f"{len(written)} meshes with faces are too few to measure")
    mean = sum(faces for _, faces in written) / len(written)
    return sum(faces for _, faces in between) / mean / seconds


def require_same_files(files: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Raises WrongResult unless both have the same files, byte for byte."""
    differing = sorted(name for name in files.keys() | expected.keys() if files.get(name) != expected.get(name))
    if differing:
        named = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        raise WrongResult(f"{len(differing)} of {len(expected)} files are not those of one GPU: {named}")


def add_ratio(row: dict[str, Any], figure: str, one: Mapping[str, Any] | None, goal: str) -> None:
    """Writes into the row each GPU's share of what one GPU does alone, and whether that is the goal."""
    row["goal"] = GOALS[goal]
    if one is None or one.get(figure) is None:
        return
    row["ratio"] = row[figure] / row["gpus"] / one[figure]
    row["reached"] = row["ratio"] >= row["goal"]


def markdown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """
    A table.

    Args:
        columns: heading of each key.
    """
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_cell(name, row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(name: str, value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return {"reached": ("missed", "reached")}.get(name, ("no", "yes"))[value]
    if name in ("ratio", "goal"):
        return f"{100 * value:.{1 if name == 'ratio' else 0}f} %"
    if name in LARGEST_DIFFERENCES["float32"]:
        return f"{100 * value:.2g} %"
    if name == "seconds":
        return f"{value:.0f}"
    if isinstance(value, float):
        return f"{value:,.{0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 4}f}"
    return str(value).replace("|", "/")
