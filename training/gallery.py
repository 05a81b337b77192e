"""
Show generated meshes: a picture of the first 64, and a page with a 3D viewer that is one file and needs no network.
Where meshes are picked, a picture of these too, each beside the training mesh that is nearest to it.

    python training/gallery.py --samples outputs/meshes --output outputs/gallery
    python training/gallery.py --samples outputs/meshes --output outputs/gallery --pairs pairs.json

Samples are the mesh files of a folder, such as training/generate.py and `iflame generate` write, or an npz file with
the arrays NAME/vertices and NAME/faces of each mesh, y up. They are shown in the order of their names, none left out.
--pairs is a JSON list that says more of some of them, or adds meshes to the other sections:

    [{"file": "meshes/mesh-000007.glb", "section": "picked", "caption": "a chair",
      "nearest": "train/chair-12.glb", "distance": 0.031}]

Only "file" is required; paths are relative to the list's folder. Sections are "unpicked" (the default, and for one of
the samples), "picked" and "completions". "nearest" is the training mesh that is nearest to it, at this distance.
"given" says how many of its first faces the model was given: the viewer shows them in another colour.
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
from training.drawing.gallery_page import INTRODUCTIONS, Exhibit, Shape, build_gallery, count_of, shape_of
from training.run.ending import ends_in_words

PICTURE, PICKED_PICTURE, PAGE = "samples.png", "picked.png", "index.html"
COLUMNS = 8  # an even number: pairs stay together
CELL = 208  # pixels: 64 meshes make a PNG of about half a megabyte
FIELDS = {"file": str, "section": str, "caption": str, "nearest": str, "distance": (int, float), "given": int}


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
        given = entry.get("given", 0)
        if not 0 <= given <= len(shape.faces):
            raise ValueError(f"{entry['file']} has {len(shape.faces):,} faces, of which {given:,} cannot be given")
        exhibit = Exhibit(shape, entry.get("caption", ""), nearest, entry.get("distance"), given)
        if is_unpicked:
            unpicked[key] = exhibit
        else:
            sections[entry["section"]].append(exhibit)
    sections["unpicked"] = list(unpicked.values())
    return sections


def draw_picked(exhibits: Sequence[Exhibit], path: Path) -> None:
    """Each mesh and on its right the training mesh that is nearest to it, or nothing where that is not known."""
    shapes, titles = [], []
    for shape, _, nearest, distance, _ in exhibits:
        shapes += [shape, nearest]
        titles += [count_of(len(shape.faces)), "" if nearest is None else "nearest"]
        if nearest is not None and distance is not None:
            titles[-1] += f", {distance:.1e}"
    render_meshes(shapes, path, columns=COLUMNS, titles=titles, size=CELL)


@ends_in_words("gallery")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="training/gallery.py"
    )
    parser.add_argument("--samples", type=Path, required=True, metavar="DIR|NPZ", help="generated meshes")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help=f"for the pictures and {PAGE}")
    parser.add_argument("--pairs", type=Path, metavar="JSON", help="what else to show, and nearest training meshes")
    parser.add_argument("--num", type=int, default=64, metavar="N", help="samples to show at most (default 64)")
    parser.add_argument("--title", default="Generated meshes", help="of the page")
    parser.add_argument("--note", default="", help="below the title, such as how the meshes were made")
    options = parser.parse_args(argv)
    if options.num < 1:
        parser.error(f"--num must be at least 1, got {options.num}")
    entries = read_pairs(options.pairs) if options.pairs else []
    sections = arrange(Samples(options.samples), options.num, entries)
    page = build_gallery(options.title, sections, options.note)
    options.output.mkdir(parents=True, exist_ok=True)
    render_meshes([each.shape for each in sections["unpicked"]], options.output / PICTURE, columns=COLUMNS, size=CELL)
    written = [PICTURE, PAGE]
    if sections["picked"]:
        draw_picked(sections["picked"], options.output / PICKED_PICTURE)
        written.insert(1, PICKED_PICTURE)
    write_whole(options.output / PAGE, page)
    for name in written:
        print(options.output / name)


if __name__ == "__main__":
    sys.exit(main())
