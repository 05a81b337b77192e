"""What can be said of the name of a model before torch is imported and the Hub is asked."""

import json
from pathlib import Path

from iflame_cli.errors import CommandError
from iflame_hf.names import model_folder


def check_model(name: str) -> None:
    """Raises OSError or CommandError for a folder that is not there or holds no iFlame model. The Hub is not asked."""
    folder = model_folder(name)
    if folder is not None:
        _check_settings(folder)


def _check_settings(folder: Path) -> None:
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"the model {folder} cannot be loaded: {path} is no JSON ({error})") from error
    check_model_type(str(folder), settings)


def check_model_type(name: str, settings: object) -> None:
    """Raises CommandError where the settings in a config.json are not those of an iFlame model."""
    model_type = settings.get("model_type") if isinstance(settings, dict) else None
    if model_type != "iflame":
        raise CommandError(f"{name} is no iFlame model: its model_type is {model_type!r}")
