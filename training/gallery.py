"""
Show generated meshes: a picture of the first 64, and a page with a 3D viewer that is one file and needs no network.

    python training/gallery.py --samples outputs/meshes --output outputs/gallery
    python training/gallery.py --samples outputs/meshes --output outputs/gallery --pairs pairs.json

Samples are the mesh files of a folder, such as training/generate.py and `iflame generate` write, or an npz file with
the arrays NAME/vertices and NAME/faces of each mesh, y up. They are shown in the order of their names, none left out.
--pairs is a JSON list that says more of some of them, or adds meshes to the other sections:

    [{"file": "meshes/mesh-000007.glb", "section": "picked", "caption": "a chair",
      "nearest": "train/chair-12.glb", "distance": 0.031}]

Only "file" is required; paths are relative to the list's folder. Sections are "unpicked" (the default, and for one of
the samples), "picked" and "completions". "nearest" is the training mesh that is nearest to it, at this distance.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

from iflame_cli.reading import mesh_files
from iflame_cli.render import render_meshes
from iflame_hf.files_iflame import write_whole
from iflame_hf.mesh_files_iflame import load_mesh, up_axis_of
from iflame_hf.mesh_iflame import turn
from training.drawing.gallery_page import INTRODUCTIONS, Exhibit, Shape, build_gallery, shape_of
from training.run.ending import ends_in_words

PICTURE, PAGE = "samples.png", "index.html"
COLUMNS = 8
FIELDS = {"file": str, "section": str, "caption": str, "nearest": str, "distance": (int, float)}


@cache  # one training mesh may be nearest to several
def read_shape(path: Path) -> Shape:
    """Raises ValueError or FileNotFoundError for what is no mesh file, naming it."""
    vertices, faces = load_mesh(path)
    return shape_of(path.name, turn(vertices, up_axis_of(path), "y"), faces)


class Samples:
    """
    Generated meshes, by their paths or, in an npz file, by their names.

    Raises ValueError, or CommandError, where there is none.
    """

    def __init__(self, source: Path):
        self.arrays = None
        if source.suffix.lower() != ".npz":
            self.keys: list[Any] = [path.resolve() for path in mesh_files([source])]
            return
        with np.load(source) as arrays:
            self.arrays = dict(arrays)
        self.keys = sorted(key.removesuffix("/faces") for key in self.arrays if key.endswith("/faces"))
        if not self.keys or any(f"{name}/vertices" not in self.arrays for name in self.keys):
            raise ValueError(f"{source} must hold the arrays NAME/vertices and NAME/faces of each mesh")

    def shape(self, key: Any) -> Shape:
        if self.arrays is None:
            return read_shape(key)
        return shape_of(key, *load_mesh((self.arrays[f"{key}/vertices"], self.arrays[f"{key}/faces"])))

    def key_of(self, path: Path) -> Any:
        """Of the sample at this path, or of this name; None if it is none of them."""
        return next((key for key in (path, path.name) if key in self.keys), None)


def read_pairs(path: Path) -> list[dict[str, Any]]:
    """What a list says of meshes, its paths made whole. Raises ValueError for what is no such list."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f'{path} must be a list such as [{{"file": "mesh.glb", "nearest": "other.glb"}}]')
    for number, entry in enumerate(entries, 1):
        entry.setdefault("section", "unpicked")
        wrong = [key for key, value in entry.items() if key not in FIELDS or not isinstance(value, FIELDS[key])]
        wrong += ["distance"] * (not wrong and not math.isfinite(entry.get("distance", 0)))
        if wrong or "file" not in entry:
            raise ValueError(
                f"{path}, entry {number}: {wrong[0] if wrong else 'file'} is missing, unknown or no value"
            )
        if entry["section"] not in INTRODUCTIONS:
            raise ValueError(
                f"{path}, entry {number}: section must be one of {', '.join(INTRODUCTIONS)}, got {entry['section']!r}"
            )
        for key in ("file", "nearest"):
            if key in entry:
                entry[key] = (path.parent / entry[key]).resolve()
    return entries


def arrange(samples: Samples, most: int, entries: list[dict[str, Any]]) -> dict[str, list[Exhibit]]:
    """The sections of the page, with so many unpicked samples at most: what is said of later ones is left out. Raises
    ValueError for a file that is said to be unpicked and is none of the samples."""
    unpicked = {key: Exhibit(samples.shape(key)) for key in samples.keys[:most]}
    sections: dict[str, list[Exhibit]] = {name: [] for name in INTRODUCTIONS}
    for entry in entries:
        key = samples.key_of(entry["file"])
        is_unpicked = entry["section"] == "unpicked"
        if is_unpicked and key is None:
            raise ValueError(f"{entry['file']} is none of the samples: say with section that it is picked")
        if is_unpicked and key not in unpicked:
            continue
        shape = read_shape(entry["file"]) if key is None else samples.shape(key)
        nearest = read_shape(entry["nearest"]) if "nearest" in entry else None
        exhibit = Exhibit(shape, entry.get("caption", ""), nearest, entry.get("distance"))
        if is_unpicked:
            unpicked[key] = exhibit
        else:
            sections[entry["section"]].append(exhibit)
    sections["unpicked"] = list(unpicked.values())
    return sections


@ends_in_words("gallery")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="training/gallery.py"
    )
    parser.add_argument("--samples", type=Path, required=True, metavar="DIR|NPZ", help="generated meshes")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"for {PICTURE} and {PAGE}")
    parser.add_argument("--pairs", type=Path, metavar="JSON", help="what else to show, and nearest training meshes")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="samples to show at most (default 64)")
    parser.add_argument("--title", default="Generated meshes", help="of the page")
    options = parser.parse_args(argv)
    if options.num < 1:
        parser.error(f"--num must be at least 1, got {options.num}")
    entries = read_pairs(options.pairs) if options.pairs else []
    sections = arrange(Samples(options.samples), options.num, entries)
    page = build_gallery(options.title, sections)
    options.output.mkdir(parents=True, exist_ok=True)
    render_meshes([each.shape for each in sections["unpicked"]], options.output / PICTURE, columns=COLUMNS)
    write_whole(options.output / PAGE, page)
    print(options.output / PICTURE)
    print(options.output / PAGE)


if __name__ == "__main__":
    sys.exit(main())
