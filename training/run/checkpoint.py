"""Checkpoints that are whole or not there.

A checkpoint is written to a hidden folder, listed in a manifest with the size and hash of every file, flushed to the
disk and renamed to `checkpoint-STEP`. Whatever ends the process in between leaves the checkpoints before it untouched.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LEFT_OVER = re.compile(r"\.checkpoint-\d+\.(partial|deleted)")


@dataclass
class Progress:
    """Where a run stands, besides the states of model, optimiser and random numbers."""

    step: int = 0  # steps of the optimiser that are done
    places: list[list[int]] = field(default_factory=list)  # where each process goes on in the data
    labels: int = 0  # tokens with a label that were learnt from
    seconds: float = 0.0  # of training
    max_steps: int = 0  # to which the run was shortened; 0 if it was not
    planned_steps: int = 0  # which it would do with time enough
    loss_sum: float = 0.0  # of the steps since the last line of the log
    loss_steps: int = 0
    eval_loss: float | None = None  # if this very step was evaluated
    due: list[str] = field(default_factory=list)  # "evaluation", "samples": what is still to be done after this step
    data_digest: str = ""
    scheduler: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, checkpoint: Path) -> "Progress":
        content = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        names = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in names})

    def become(self, other: "Progress") -> None:
        """Take over all that another holds, so that whoever holds this one goes on from there."""
        vars(self).update(vars(other))

    def write(self, folder: Path) -> None:
        (folder / STATE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class Checkpoints:
    """
    The checkpoints of one run.

    Args:
        output_dir: the folder they lie in, which every process must see.
        limit: how many to keep; None keeps all.
        report: shows a line to the user.
    """

    def __init__(
        self, output_dir: Path, limit: int | None, accelerator: Accelerator, report: Callable[[str], None] = print
    ):
        self.output_dir = output_dir
        self.limit = limit
        self.accelerator = accelerator
        self.report = report

    def folders(self) -> list[Path]:
        """All checkpoints, whole or not, the latest last."""
        found = [path for path in self.output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step)

    def save(self, step: int, write: Callable[[Path], None]) -> bool:
        """
        Make `checkpoint-STEP` of what `write(folder)`, called on every process, puts into a folder.

        A checkpoint that cannot be written, for example because the disk is full, is removed and reported, and those
        before it stay; returns whether it was written, the same on every process. Then old ones are pruned.
        """
        partial = self.output_dir / f".checkpoint-{step}.partial"
        failure = self._on_main(lambda: _make_empty(partial))
        if failure is None:
            failure = self._together(lambda: write(partial))
        if failure is None:
            failure = self._on_main(lambda: self._finish(partial, step))
        if failure is not None:
            self._on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
            self.report(f"checkpoint-{step} could not be written: {failure}")
            return False
        failure = self._on_main(lambda: self.prune(self._folder(step)))
        if failure is not None:
            self.report(f"old checkpoints could not be deleted: {failure}")
        return True

    def find(self, wanted: str) -> Path | None:
        """
        The checkpoint to resume from: the folder `wanted`, or for "latest" the latest that is whole, if there is any.
        Broken ones are named and passed over.

        Raises:
            ValueError: the folder that was asked for is no checkpoint, or broken.
        """
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = self._find(wanted)
            except ValueError as error:
                found[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def best(self) -> Path | None:
        """The checkpoint with the lowest evaluation loss, among those that were evaluated and have all their files."""
        losses = {}
        for path in self.folders():
            try:
                losses[path] = None if find_defect(path, contents=False) else Progress.read(path).eval_loss
            except (OSError, ValueError, TypeError):
                continue
        losses = {path: loss for path, loss in losses.items() if loss is not None}
        return min(losses, key=losses.__getitem__) if losses else None

    def prune(self, newest: Path) -> None:
        """Delete the oldest checkpoints beyond the limit, but never the one just written or the best."""
        if self.limit is None:
            return
        kept = {newest, self.best()} - {None}
        for path in reversed(self.folders()):
            if path in kept:
                continue
            if len(kept) < self.limit:
                kept.add(path)
            else:
                _delete(path)

    def set_aside(self, step: int) -> None:
        """
        On the main process: rename checkpoints of later steps than `step`, from where a run goes on. They are broken,
        or of a run that this one replaces, and must be neither taken for the latest nor kept in the place of new ones.
        """
        for path in self.folders():
            if _step(path) > step:
                aside = path.with_name(f"{path.name}.aside")
                number = 1
                while aside.exists():
                    number += 1
                    aside = path.with_name(f"{path.name}.aside-{number}")
                os.replace(path, aside)
                self.report(f"{path} is of a later step than the run goes on from: it is {aside.name} now")

    def clean(self) -> None:
        """Remove what an earlier process left half-written or half-deleted."""
        for path in self.output_dir.glob(".checkpoint-*"):
            if _LEFT_OVER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _find(self, wanted: str) -> Path | None:
        if wanted != "latest":
            path = Path(wanted)
            if not path.is_dir():
                raise ValueError(f"there is no checkpoint folder {path}")
            defect = find_defect(path)
            if defect is not None:
                raise ValueError(f"{path} cannot be resumed from: {defect}")
            return path
        for path in reversed(self.folders()):
            defect = find_defect(path)
            if defect is None:
                return path
            self.report(f"{path} is broken and passed over: {defect}")
        return None

    def _finish(self, partial: Path, step: int) -> None:
        _write_manifest(partial)
        final = self._folder(step)
        if final.exists():
            _delete(final)
        os.replace(partial, final)
        _flush(self.output_dir)

    def _folder(self, step: int) -> Path:
        return self.output_dir / f"checkpoint-{step}"

    def _on_main(self, action: Callable[[], None]) -> str | None:
        return self._together(action if self.accelerator.is_main_process else lambda: None)

    def _together(self, action: Callable[[], None]) -> str | None:
        """Run an action on every process; the first failure on any of them, on all of them."""
        failure = None
        try:
            action()
        except Exception as error:  # who writes decides if a full disk is an OSError, RuntimeError or SafetensorError
            failure = f"{type(error).__name__}: {error}"
        failures = gather_object([failure]) if self.accelerator.num_processes > 1 else [failure]
        return next((failure for failure in failures if failure is not None), None)


def find_defect(checkpoint: Path, contents: bool = True) -> str | None:
    """
    What is wrong with a checkpoint, in words; None if every file is as it was written or, where `contents` are not
    read, as long.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
        if contents and _hash(path) != expected["sha256"]:
            return f"the content of {name} has changed"
    return None


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _hash(path)}
        _flush(path)
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    _flush(folder / MANIFEST)
    _flush(folder)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows has no way to, and needs none
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _delete(checkpoint: Path) -> None:
    """Rename first: a checkpoint that is deleted in part must not look like one."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    os.replace(checkpoint, hidden)
    shutil.rmtree(hidden)


def _step(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])
