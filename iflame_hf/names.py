"""
What the name of a model means to a program: a folder on this machine, or a repository on the Hugging Face Hub. The
model itself does not need this file, which is not published with it.
"""

import difflib
import os
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

# Where this project's programs write unless they are told otherwise: no user of the Hub.
OUTPUTS = "outputs"


def model_folder(name: str | os.PathLike) -> Path | None:
    """
    The folder that a model's name means, or None where it means a repository on the Hub, which is not asked.

    A name is one of the Hub if it has the form user/name, no such folder exists, and `user` is no folder here.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        NotADirectoryError: it is a file.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{name} holds no model: there is no config.json in it")
        return path
    if path.exists():
        raise NotADirectoryError(f"{name} is a file: give the folder of a model")
    if _can_be_on_the_hub(str(name)):
        return None
    raise FileNotFoundError(
        f"there is no folder {name}{_proposal(path)}; a model on the Hub has a name like user/name"
    )


def _can_be_on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    user, slash, _ = name.partition("/")
    return bool(slash) and user != OUTPUTS and not Path(user).exists()


def _proposal(path: Path) -> str:
    folders = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, folders, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""
