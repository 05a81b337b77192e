"""`iflame view`: one page with all meshes of a folder."""

import argparse
import html
import json
import sys
import webbrowser
from base64 import b64encode
from pathlib import Path
from string import Template

import numpy as np

from iflame_cli.errors import CommandError
from iflame_cli.reading import mesh_files
from iflame_hf.files_iflame import write_whole
from iflame_hf.mesh_files_iflame import load_mesh, up_axis_of
from iflame_hf.mesh_iflame import normalise, turn

MARK = "<!-- written by iflame view -->"
VIEWER_FOLDER = Path(__file__).with_name("viewer")


def run(options: argparse.Namespace) -> None:
    """Writes the page, prints its path, opens it. Raises CommandError where there is nothing to see."""
    paths = mesh_files(options.sources)
    first = options.sources[0]
    page = options.page or (first if first.is_dir() else first.parent) / "view.html"
    if page.exists() and not options.overwrite and MARK not in page.read_text(encoding="utf-8", errors="replace"):
        raise CommandError(f"{page} exists and was not written by this command: choose another --page, or --overwrite")
    meshes = {}
    for path in paths:
        try:
            vertices, faces = load_mesh(path)
            meshes[path] = normalise(turn(vertices, up_axis_of(path), "y")), faces
        except (ValueError, OSError) as error:
            print(f"iflame: left out: {error}", file=sys.stderr)
    if not meshes:
        raise CommandError("none of the meshes can be read")
    text = build_page(meshes, title=first.name or str(first))
    write_whole(page, text)
    print(page)
    if not options.no_browser and not webbrowser.open(page.resolve().as_uri()):
        print("iflame: no browser could be opened: open the page yourself", file=sys.stderr)


def build_page(meshes: dict[Path, tuple[np.ndarray, np.ndarray]], title: str) -> str:
    """
    A page of HTML that shows meshes, vertices (V, 3) with y up within half a unit of the origin, and faces (F, 3), by
    the names of their files.
    """
    shown = []
    for path, (vertices, faces) in meshes.items():
        corners = vertices[faces].astype("<f4")  # (F, 3 corners, 3)
        encoded = b64encode(corners.tobytes()).decode()
        shown.append({"faces": encoded, "given": 0, "ended": True, "seed": None, "name": path.name})
    value = {"run": title, "meshes": shown, "is_over": True, "is_still": True, "hint": None}
    page, viewer, css, js = (
        (VIEWER_FOLDER / name).read_text(encoding="utf-8")
        for name in ("page.html", "viewer.html", "viewer.css", "viewer.js")
    )
    return Template(page).substitute(
        mark=MARK,
        title=html.escape(title),
        summary=f"{len(shown)} {'mesh' if len(shown) == 1 else 'meshes'}",
        css=css,
        viewer=viewer,
        value=json.dumps(value).replace("<", "\\u003c"),  # so that no name ends the script
        js=js,
    )
