"""
The folder of sampled meshes: `mesh-000123.glb` and so on, `generate.json` with what they are made with, and at the end
`meshes.jsonl`, a record a mesh. Until then each process appends its records to a file of its own in `.records`.

A record is written after its file, and is whole with the end of its line. So a run that is ended at any moment, and by
whatever means, leaves at most a mesh without a record, which is made again.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from iflame_hf.files_iflame import write_whole

SETTINGS = "generate.json"
INDEX = "meshes.jsonl"
RECORDS = ".records"
# What may differ between a run and the one that goes on from it.
FREE_SETTINGS = ("model", "revision")
# What the settings of earlier versions do not name, with what it was then.
ADDED_SETTINGS = {
    **{"kv_cache_dtype": None, "best_of": 1, "closing_strength": 0.0, "keep_order": True},
    **{"category": None, "num_faces": None, "guidance_scale": None},
}
_MESH = re.compile(r"mesh-\d{6,}\.(glb|obj|ply|stl)")
_LEFT_OVER = re.compile(r"\.mesh-\d{6,}\.\w+\.\d+\.partial")


@dataclass(frozen=True)
class MeshRecord:
    """What is known of a mesh; `file` is None where it has no face."""

    number: int
    seed: int
    faces: int
    ended: bool
    file: str | None


class MeshFolder:
    """The meshes in a folder that is there."""

    def __init__(self, path: Path):
        self.path = path

    def begin(self, settings: dict[str, Any], overwrite: bool) -> None:
        """
        Have the folder hold meshes of these settings alone: those that it holds already, or none.

        Raises:
            ValueError: its meshes are of other settings, or of another program, and are not to be overwritten.
        """
        path = self.path / SETTINGS
        names = os.listdir(self.path)
        if overwrite:
            (self.path / INDEX).unlink(missing_ok=True)
            shutil.rmtree(self.path / RECORDS, ignore_errors=True)
        elif path.exists():
            self._check(settings)
        elif INDEX in names or any(map(_MESH.fullmatch, names)):
            raise ValueError(f"{self.path} holds meshes of another program: choose another --out, or give --overwrite")
        for name in names:
            if _LEFT_OVER.fullmatch(name) or (overwrite and _MESH.fullmatch(name)):
                (self.path / name).unlink(missing_ok=True)
        (self.path / RECORDS).mkdir(exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1) + "\n")

    def _check(self, settings: dict[str, Any]) -> None:
        path = self.path / SETTINGS
        try:
            before = {**ADDED_SETTINGS, **json.loads(path.read_text(encoding="utf-8"))}
            changed = [name for name in settings if name not in FREE_SETTINGS and before[name] != settings[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} does not say what the meshes beside it are made with: choose another --out, or give "
                f"--overwrite to begin anew ({type(error).__name__}: {error})"
            ) from error
        if not changed:
            return
        if changed == ["weights"]:
            what = f"the weights of {before.get('model')} as they were; {settings['model']} has others"
        else:
            named = [name for name in changed if name != "weights"]
            what = ", ".join(f"--{name} {before[name]} (now {settings[name]})" for name in named)
        raise ValueError(
            f"{self.path} holds meshes made with {what}: give what they were made with to go on, choose another "
            "--out, or give --overwrite to begin anew"
        )

    def records(self) -> dict[int, MeshRecord]:
        """By number, of the meshes whose file is there, and of those that have none because they have no face."""
        names = set(os.listdir(self.path))
        paths = [self.path / INDEX] if INDEX in names else []
        paths += sorted((self.path / RECORDS).glob("*.jsonl"))
        found = (record for path in paths for record in read_records(path.read_bytes()))
        return {record.number: record for record in found if record.file is None or record.file in names}

    def finish(self, records: Iterable[MeshRecord]) -> None:
        """Write all records in one file, in the order of their numbers, in place of those of the processes."""
        lines = (json.dumps(asdict(record)) + "\n" for record in sorted(records, key=lambda record: record.number))
        write_whole(self.path / INDEX, "".join(lines))
        shutil.rmtree(self.path / RECORDS, ignore_errors=True)


class RecordWriter:
    """Appends records to a new file of this process."""

    def __init__(self, folder: Path, process: int):
        path = folder / RECORDS / f"{process:05d}-{secrets.token_hex(4)}.jsonl"
        path.parent.mkdir(exist_ok=True)  # on a machine that has not the main process
        self.file = path.open("xb", buffering=0)

    def append(self, record: MeshRecord) -> None:
        self.file.write(json.dumps(asdict(record)).encode() + b"\n")

    def close(self) -> None:
        self.file.close()


class RecordReader:
    """Reads what processes append to their records, a piece at a time."""

    def __init__(self, folder: Path):
        self.folder = folder / RECORDS
        self.places: dict[str, int] = {}
        self.read()  # of earlier runs

    def read(self) -> list[MeshRecord]:
        """Those that have come since the last time."""
        found: list[MeshRecord] = []
        for path in self.folder.glob("*.jsonl"):
            with path.open("rb") as file:
                file.seek(self.places.get(path.name, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self.places[path.name] = self.places.get(path.name, 0) + len(whole)
            found += read_records(whole)
        return found


def read_records(content: bytes) -> Iterator[MeshRecord]:
    """The records of lines that have come to their ends; a process may have been ended in the middle of its last."""
    for line in content.split(b"\n")[:-1]:
        try:
            yield MeshRecord(**json.loads(line))
        except (ValueError, TypeError):
            continue
