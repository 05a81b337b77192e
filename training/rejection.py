"""Why a mesh is not taken: one exception, and the kinds of reasons that a summary counts."""

import os
import re

NOT_CHOSEN = "not chosen"
DUPLICATE = "duplicate"
TIME_LIMIT = "time limit"
MEMORY_LIMIT = "memory limit"
CRASH = "reader crashed"
UNREADABLE = "unreadable"
SOURCE_LOST = "source lost"  # not the fault of a file: the run cannot go on

# What the messages of iflame_hf.mesh_iflame, trimesh and the operating system say, and the kind it belongs to.
_KINDS = [
    (r"no such file|FileNotFoundError|No such file", "missing file"),
    (r"the file is empty", "empty file"),
    (r"Git LFS pointer", "Git LFS pointer"),
    (r"is compressed \(", "compressed geometry"),
    (r"not a binary glTF file", "wrong format"),
    (r"is not read; convert", "unknown format"),
    (r"NaN or infinite|extent is not a finite", "not finite"),
    (r"face indices run|index \S+ is out of bounds", "bad indices"),
    (r"has no (faces|vertices)", "no faces"),
    (r"lie in one point|have no area", "no area"),
    (r"needs another package", "missing package"),
    (r"Permission denied|PermissionError", "no permission"),
]


class Rejected(Exception):
    """A mesh, or a file that should hold meshes, is left out. `kind` is a few words that a summary counts by, `reason`
    a sentence for the one who wants to mend the file."""

    def __init__(self, kind: str, reason: str):
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def as_rejected(error: BaseException, path: str = "") -> Rejected:
    """The rejection that an exception of a reader amounts to. `path` is that of the file, of which the reason says
    nothing: the record names it anyway, and without the folders of this machine."""
    if isinstance(error, Rejected):
        return error
    message = f"{type(error).__name__}: {error}"
    if isinstance(error, (ValueError, OSError, ImportError)):
        message = getattr(error, "strerror", None) or str(error)
    message = " ".join(message.removeprefix(f"{path}: ").split())
    if os.path.dirname(path):
        message = message.replace(os.path.dirname(path) + os.sep, "")
    message = message if len(message) <= 500 else message[:497] + "..."
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, message)), UNREADABLE)
    return Rejected(kind, message or type(error).__name__)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a MemoryError is the exception, or what it was raised from."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MemoryError):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False
