"""`iflame view`: one page with all meshes of a folder."""

import argparse
import html
import math
import sys
import webbrowser
from pathlib import Path

import numpy as np
import trimesh
from trimesh.viewer import scene_to_html

from iflame_cli.errors import CommandError
from iflame_cli.light.files_iflame import write_whole
from iflame_cli.light.mesh_iflame import load_mesh, normalise, turn, up_axis_of
from iflame_cli.reading import mesh_files

MARK = "<!-- written by iflame view -->"
SPACING = 1.35  # between the middles of neighbours; a mesh is 1 long
# The names, and a switch; `scene` and `render` are those of trimesh's page.
OVERLAY = """{mark}
<div style="position:fixed;left:0;top:0;max-height:100vh;overflow:auto;padding:8px;font:13px sans-serif;color:#333">
<b>{title}</b><br>drag to turn, wheel to zoom, W for edges<br><br>{names}</div>
<script>
document.addEventListener("keydown", function (event) {{
  if (event.key.toLowerCase() !== "w") return;
  scene.traverse(function (object) {{
    if (object.isMesh) object.material.wireframe = !object.material.wireframe;
  }});
  render();
}});
</script>
</body>"""


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
    """A page of HTML that shows meshes, vertices (V, 3) of size 1 with y up and faces (F, 3), in rows on a floor."""
    material = trimesh.visual.material.PBRMaterial(
        baseColorFactor=[112, 132, 160, 255], metallicFactor=0.0, roughnessFactor=0.9, doubleSided=True
    )
    scene, columns = trimesh.Scene(), math.ceil(math.sqrt(len(meshes)))
    for number, (path, (vertices, faces)) in enumerate(meshes.items()):
        row, column = divmod(number, columns)
        place = [column * SPACING, -vertices[:, 1].min(), row * SPACING]
        mesh = trimesh.Trimesh(vertices + place, faces, process=False)
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        scene.add_geometry(mesh, node_name=f"{number}-{path.name}", geom_name=f"{number}-{path.name}")
    scene.set_camera(
        angles=(math.radians(-30), math.radians(20), 0),
        distance=1.3 * scene.scale,
        center=scene.centroid,
        fov=(50, 40),
    )
    rows = math.ceil(len(meshes) / columns)
    names = "<br>".join(html.escape(f"{path.name}, {len(faces)} faces") for path, (_, faces) in meshes.items())
    order = f"{len(meshes)} meshes, {columns} a row, from left to right and from back to front" if rows > 1 else title
    overlay = OVERLAY.format(mark=MARK, title=html.escape(f"{title}: {order}" if rows > 1 else title), names=names)
    page = scene_to_html(scene)
    start, end = page.rsplit("</body>", 1)
    return (
        start.replace("<title>trimesh: threejs viewer</title>", f"<title>{html.escape(title)}</title>") + overlay + end
    )
