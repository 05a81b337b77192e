"""
What of a set of generated meshes is there. Each process appends a line a mesh to a file of its own, once the mesh's
file is written whole, so that a run that was stopped in any way goes on where it was, in any number of processes.
"""

import json
from pathlib import Path
from typing import Any

from iflame_cli.errors import CommandError
from iflame_hf.files_iflame import write_whole

SETTINGS = "generate.json"
LIST = "meshes.jsonl"
PARTS = "meshes-of-process-*.jsonl"


def begin(folder: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """
    Makes the folder that of a run with such settings: a new one, or one that goes on.

    Raises:
        CommandError: the folder holds meshes of other settings, or something else.
    """
    path = folder / SETTINGS
    if path.exists() and not overwrite:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CommandError(f"{path} is no JSON ({error}): give --overwrite to begin anew") from error
        changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            told = ", ".join(
                f"{name} was {before.get(name)!r}, now {settings.get(name)!r}" for name in sorted(changed)
            )
            raise CommandError(
                f"{folder} holds meshes of other settings ({told}): choose another --out, or --overwrite"
            )
    elif folder.exists() and any(folder.iterdir()) and not overwrite:
        raise CommandError(f"{folder} is not empty and holds no {SETTINGS}: choose another --out, or give --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for entry in entries(folder).values():
            if entry["file"]:
                (folder / entry["file"]).unlink(missing_ok=True)
        for old in (*folder.glob(PARTS), folder / LIST):
            old.unlink(missing_ok=True)
    write_whole(path, json.dumps(settings, indent=1) + "\n")


def entries(folder: Path) -> dict[int, dict[str, Any]]:
    """The meshes that are there, by number: those whose file is, and those without a face, which have none."""
    found = {}
    for path in sorted(folder.glob(PARTS)):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the last line of a process that was killed
                continue
            if entry["file"] is None or (folder / entry["file"]).exists():
                found[entry["number"]] = entry
    return found


class Part:
    """The file to which a process appends its meshes."""

    def __init__(self, folder: Path, process: int):
        path = folder / PARTS.replace("*", str(process))
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if torn:
            self._file.write("\n")

    def add(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def count(folder: Path) -> tuple[int, int]:
    """Meshes and faces that are there."""
    found = entries(folder).values()
    return len(found), sum(entry["faces"] for entry in found)


def finish(folder: Path) -> dict[int, dict[str, Any]]:
    """Writes the list of all meshes by number; returns them."""
    found = dict(sorted(entries(folder).items()))
    write_whole(folder / LIST, "".join(json.dumps(entry) + "\n" for entry in found.values()))
    return found
