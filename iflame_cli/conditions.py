"""`iflame generate MODEL --categories`: what a model can be asked for."""

import argparse
import json

from iflame_cli.models import model_settings


def run(options: argparse.Namespace) -> None:
    """Prints a category a line and the numbers of faces, or one line of JSON. Raises OSError or CommandError where
    there is no model."""
    settings = model_settings(options.model, options.revision)
    categories, faces = settings.get("categories") or [], settings.get("num_faces_range")
    if options.json:
        print(json.dumps({"categories": categories, "num_faces_range": faces}))
        return
    for category in categories:
        print(category)
    if faces:
        print(f"from {faces[0]} to {faces[1]} faces (--num-faces)")
    if not categories and not faces:
        print("this model was trained without conditions: it can be asked for no category and no number of faces")
