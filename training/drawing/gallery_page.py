"""One page of HTML that shows meshes as pictures and, where there is WebGL, in three dimensions."""

import html
import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from string import Template
from typing import NamedTuple

import numpy as np
from PIL import Image

from iflame_cli.render import render_mesh
from iflame_cli.viewing import VIEWER_FOLDER
from iflame_hf.mesh_iflame import dequantise, normalise, quantise, weld

GRID = 128  # what models write; any other mesh is laid on the finest grid of bytes that has a middle
FINEST_GRID = 254
MOST_VERTICES = 2**16
PICTURE_SIZE = 168
COLOURS = 48
INTRODUCTIONS = {
    "unpicked": "Unpicked: the first samples, none left out",
    "picked": "Picked",
    "completions": "Completions",
}


class Shape(NamedTuple):
    """A mesh as a page holds it."""

    name: str
    grid: np.ndarray  # (V, 3) uint8, y up
    faces: np.ndarray  # (F, 3) uint16

    @property
    def vertices(self) -> np.ndarray:
        """(V, 3) float64, in units of the grid."""
        return self.grid.astype(np.float64)


class Exhibit(NamedTuple):
    """A mesh of a section, what is nearest to it, and how many of its first faces were given to the model."""

    shape: Shape
    caption: str = ""
    nearest: Shape | None = None
    distance: float | None = None
    given: int = 0


def shape_of(name: str, vertices: np.ndarray, faces: np.ndarray) -> Shape:
    """
    The shape of vertices (V, 3), y up, in any unit, and faces (F, 3). One on the grid of a model stays as it is; of
    any other a vertex moves on an axis by 1/508 of the longest side at most, and faces that lose a corner are dropped.

    Raises ValueError where no face is left, or vertices are more than two bytes count.
    """
    grid = quantise(vertices, GRID)
    if np.abs(dequantise(grid, GRID) - vertices).max() * GRID > 1e-3:
        grid = quantise(normalise(vertices), FINEST_GRID)
    grid, faces = weld(grid[faces])
    if not len(faces):
        raise ValueError(f"{name}: no face is left of it on a grid of {FINEST_GRID} steps")
    if len(grid) > MOST_VERTICES:
        raise ValueError(
            f"{name}: it has {len(grid):,} vertices, and a page shows meshes of {MOST_VERTICES:,} at most"
        )
    return Shape(name, grid.astype(np.uint8), faces.astype(np.uint16))


def build_gallery(title: str, sections: Mapping[str, Sequence[Exhibit]], note: str = "") -> str:
    """A page that needs no other file and no network; `note` stands below its title, `sections` go by the names in
    `INTRODUCTIONS`, empty ones are left out. Raises ValueError where all are."""
    places: dict[int, int] = {}  # of shapes, by their identity: one that is nearest to several is written once
    shapes: list[Shape] = []
    pictures: list[str] = []

    def place_of(shape: Shape) -> int:
        if id(shape) not in places:
            places[id(shape)] = len(shapes)
            shapes.append(shape)
            pictures.append(_picture(shape))
        return places[id(shape)]

    parts = []
    for name, exhibits in sections.items():
        if exhibits:
            buttons = "\n".join(_button(exhibit, place_of, pictures) for exhibit in exhibits)
            parts.append(f'<h2>{INTRODUCTIONS[name]}</h2>\n<div class="shapes" id="{name}">\n{buttons}\n</div>')
    if not parts:
        raise ValueError("there are no meshes to show")
    count = sum(map(len, sections.values()))
    css, viewer, viewer_js, js, page = (
        (VIEWER_FOLDER / name).read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.html", "viewer.js", "gallery.js", "gallery.html")
    )
    return Template(page).substitute(
        title=html.escape(title),
        note=f"<p>{html.escape(note)}</p>" if note else "",
        summary=f"{count} {'mesh' if count == 1 else 'meshes'} · choose one with the mouse, or with Tab and the arrow "
        "keys; drag to turn, wheel to zoom",
        css=css,
        sections="\n".join(parts),
        viewer=viewer,
        shapes=json.dumps([_encoded(shape) for shape in shapes]).replace("<", "\\u003c"),  # no name ends the script
        viewer_js=viewer_js,
        js=js,
    )


def _encoded(shape: Shape) -> dict[str, str]:
    return {
        "name": shape.name,
        "vertices": b64encode(shape.grid.tobytes()).decode(),
        "faces": b64encode(shape.faces.astype("<u2").tobytes()).decode(),
    }


def _button(exhibit: Exhibit, place_of, pictures: list[str]) -> str:
    shown = [exhibit.shape] + [exhibit.nearest] * (exhibit.nearest is not None)
    lines = [[shape.name, count_of(len(shape.faces))] for shape in shown]
    if exhibit.given:
        lines[0].append(f"{exhibit.given:,} of them given")
    if exhibit.caption:
        lines[0].insert(0, exhibit.caption)
    if exhibit.nearest is not None:
        lines[1][0] = f"nearest: {lines[1][0]}"
        if exhibit.distance is not None:
            lines[1].append(f"distance {exhibit.distance:.4g}")
    captions = [" · ".join(each) for each in lines]
    places = [place_of(shape) for shape in shown]
    images = "".join(
        f'<img width="{PICTURE_SIZE}" height="{PICTURE_SIZE}" alt="{html.escape(shape.name)}" src="{pictures[place]}">'
        for shape, place in zip(shown, places, strict=True)
    )
    texts = "".join(f"<span>{html.escape(caption)}</span>" for caption in captions)
    kind = ' class="pair"' if len(shown) > 1 else ""
    return (
        f'<button type="button"{kind} aria-pressed="false" data-shapes="{" ".join(map(str, places))}" '
        f'data-given="{exhibit.given}" '
        f'title="{html.escape("; ".join(captions))}">{images}{texts}</button>'
    )


def count_of(faces: int) -> str:
    """In words."""
    return f"{faces:,} {'face' if faces == 1 else 'faces'}"


def _picture(shape: Shape) -> str:
    """A PNG as a data URI, of few colours: there is one for each mesh."""
    image = Image.fromarray(render_mesh(shape.vertices, shape.faces, PICTURE_SIZE)).quantize(COLOURS)
    file = BytesIO()
    image.save(file, format="PNG", optimize=True)
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
