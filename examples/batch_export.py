"""
Fills a game engine's folder: glb files that stand on the ground, in metres, and an index.json that names them.

    python examples/batch_export.py --num 24 --out Assets/Furniture --prefix chair --height 0.9

glTF's y axis is up. Vertices are welded and have smooth normals; meshes that did not come to their end are left out.
"""

import argparse
import json
import os
from pathlib import Path

from transformers import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/iflame-artist", help="folder or Hub name, whose code is run")
    parser.add_argument("--out", type=Path, default=Path("outputs/exported"), help="folder to write to")
    parser.add_argument("--num", type=int, default=16, help="how many meshes to generate")
    parser.add_argument("--prefix", default="mesh", help="names are PREFIX_000, PREFIX_001, ...")
    parser.add_argument("--height", type=float, help="metres of every mesh; by default its longest side is 1")
    parser.add_argument("--max-faces", type=int, default=120, help="most faces of a mesh")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same meshes")
    parser.add_argument("--license", help="noted in every file, such as cc0-1.0")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir() and Path(options.model).parent.is_dir():
        parser.error(f"there is no folder {options.model}, and a model on the Hub has a name like user/name")

    generator = pipeline("mesh-generation", model=options.model, trust_remote_code=True)
    meshes = generator(num_meshes=options.num, max_faces=options.max_faces, top_p=0.9, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, mesh in enumerate(meshes):
        name = f"{options.prefix}_{number:03d}"
        if len(mesh.faces) == 0 or not mesh.metadata["ended"]:
            print(f"{name} is left out: it did not end within {options.max_faces} faces")
            continue
        place(mesh, options.height)
        extras = {"model": options.model, "seed": options.seed}
        path = generator.export(
            mesh, options.out / f"{name}.glb", normals=True, name=name, license=options.license, extras=extras
        )
        entries.append(
            {
                "name": name,
                "file": path.name,
                "vertices": len(mesh.vertices),
                "faces": len(mesh.faces),
                "size": mesh.extents.tolist(),  # metres along x, y, z
                "closed": bool(mesh.is_watertight),
            }
        )
    beside = options.out / "index.json.partial"
    beside.write_text(json.dumps({"up_axis": "y", "unit": "metre", "meshes": entries}, indent=1) + "\n")
    os.replace(beside, options.out / "index.json")
    print(f"{options.out}: {len(entries)} meshes and index.json")


def place(mesh, height: float | None) -> None:
    """Put the middle of a mesh's base at the origin, and give it its height, or a longest side of 1."""
    (low, high), extents = mesh.bounds, mesh.extents
    mesh.apply_translation([-(low[0] + high[0]) / 2, -low[1], -(low[2] + high[2]) / 2])
    size = extents.max() if height is None or extents[1] == 0 else extents[1] / height
    mesh.apply_scale(1 / size)


if __name__ == "__main__":
    main()
