"""What can be said of the name of a model before torch is imported and the Hub is asked."""

import json
from pathlib import Path
from typing import Any

from iflame_cli.errors import CommandError
from iflame_hf.names import model_folder


def check_model(name: str) -> None:
    """Raises OSError or CommandError for a folder that is not there or holds no iFlame model. The Hub is not asked."""
    folder = model_folder(name)
    if folder is not None:
        _read_settings(str(folder), folder / "config.json")


def model_settings(name: str, revision: str | None = None) -> dict[str, Any]:
    """What the config.json of a model says, which is a folder or one on the Hub.

    Raises OSError or CommandError where there is no iFlame model.
    """
    folder = model_folder(name)
    if folder is not None:
        return _read_settings(str(folder), folder / "config.json")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(name, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise CommandError(f"the model {name} cannot be loaded: {' '.join(str(error).split())}") from error
    return _read_settings(name, Path(path))


def _read_settings(name: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"the model {name} cannot be loaded: {path} is no JSON ({error})") from error
    check_model_type(name, settings)
    return settings


def check_model_type(name: str, settings: object) -> None:
    """Raises CommandError where the settings in a config.json are not those of an iFlame model."""
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type != "iflame":
        raise CommandError(f"{name} is no iFlame model: its model_type is {model_type!r}")
