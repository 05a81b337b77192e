"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write_whole(path: str | os.PathLike, content: bytes | str) -> None:
    """Writes a file, text as UTF-8, over one of that name. Whoever opens the path meanwhile, or after a program that
    was stopped, finds the earlier file or the new one, never a part of it. Raises OSError where it cannot be
    written."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
