"""Why a mesh is not taken: one exception, and the kinds of reasons that a summary counts."""

import os

from iflame_hf.mesh_errors_iflame import MeshError

NOT_CHOSEN = "not chosen"
DUPLICATE = "duplicate"
TIME_LIMIT = "time limit"
MEMORY_LIMIT = "memory limit"
CRASH = "reader crashed"
SOURCE_LOST = "source lost"  # not the fault of a file: the run cannot go on
UNREADABLE = "unreadable"
# Of errors without a kind of their own; whatever else a reader raises is UNREADABLE.
_KIND_OF_ERROR = {FileNotFoundError: "missing file", PermissionError: "no permission", ImportError: "missing package"}


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
    """The rejection that an exception of a reader amounts to: that of a MeshError is of the same kind, the underscores
    left out; of others the type tells the kind. `path` is that of the file, of which the reason says
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
    if isinstance(error, MeshError):
        kind = error.kind.replace("_", " ")
    else:
        kind = next((kind for type_, kind in _KIND_OF_ERROR.items() if isinstance(error, type_)), UNREADABLE)
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
