"""
Generates meshes and writes them as glb files.

    python examples/sample.py --num 8 --seed 1
"""

import argparse
from pathlib import Path

from transformers import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/iflame-artist", help="folder or Hub name, whose code is run")
    parser.add_argument("--out", type=Path, default=Path("outputs/sampled"), help="folder to write to")
    parser.add_argument("--num", type=int, default=8, help="how many meshes")
    parser.add_argument("--max-faces", type=int, default=120, help="most faces of a mesh")
    parser.add_argument("--category", help="what meshes are to be, one of the model's categories")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1: more of the likely")
    parser.add_argument("--top-p", type=float, default=0.9, help="from the likeliest share only")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same meshes")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir() and Path(options.model).parent.is_dir():
        parser.error(f"there is no folder {options.model}, and a model on the Hub has a name like user/name")

    generator = pipeline("mesh-generation", model=options.model, trust_remote_code=True)
    meshes = generator(
        num_meshes=options.num,
        max_faces=options.max_faces,
        category=options.category,  # None: any
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    for number, mesh in enumerate(meshes):
        if len(mesh.faces) == 0:
            print(f"mesh {number} has no face")
            continue
        path = generator.export(mesh, options.out / f"mesh-{number:02d}.glb")
        state = "whole" if mesh.metadata["ended"] else "cut off at --max-faces"
        print(f"{path}: {len(mesh.vertices)} vertices, {len(mesh.faces)} faces, {state}")


if __name__ == "__main__":
    main()
