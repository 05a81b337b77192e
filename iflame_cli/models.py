"""What can be said of the name of a model before torch is imported and the Hub is asked."""

import json
from pathlib import Path

from iflame_cli.errors import CommandError


def check_model(name: str) -> None:
    """Raises CommandError for a folder that is not there or holds no iFlame model. The Hub is not asked."""
    folder = Path(name)
    if folder.is_dir():
        _check_settings(folder)
    elif folder.exists():
        raise CommandError(f"{name} is a file: a model is a folder, or has a name on the Hub")
    elif name.count("/") > 1 or name.startswith((".", "/", "~")) or folder.parent != Path() and folder.parent.is_dir():
        raise CommandError(f"there is no folder {name}")


def _check_settings(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise CommandError(f"{folder} holds no model: there is no config.json in it")
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
