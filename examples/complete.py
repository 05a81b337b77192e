"""
Takes the lowest part of a mesh away from the rest, and lets the model finish it in several ways.

    python examples/complete.py outputs/demo/mesh-00.glb --keep 0.4 --num 4

The file's y axis is up (glb and obj). For a part that is all there is, and for other files: iflame complete --help.
"""

import argparse
from pathlib import Path

from transformers import pipeline


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mesh", type=Path, help="mesh file")
    parser.add_argument("--model", default="models/iflame-artist", help="folder or Hub name, whose code is run")
    parser.add_argument("--out", type=Path, default=Path("outputs/completed"), help="folder to write to")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the faces to keep, the lowest first")
    parser.add_argument("--num", type=int, default=4, help="how many completions")
    parser.add_argument("--max-faces", type=int, default=120, help="most faces of a mesh, the kept ones included")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same meshes")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir() and Path(options.model).parent.is_dir():
        parser.error(f"there is no folder {options.model}, and a model on the Hub has a name like user/name")
    if not 0 < options.keep < 1:
        parser.error(f"--keep must be between 0 and 1, got {options.keep}")

    generator = pipeline("mesh-generation", model=options.model, trust_remote_code=True)
    tokenizer = generator.tokenizer
    # The start face, then all faces from the lowest on: a beginning of this sequence is a part the model goes on from.
    ids = tokenizer.encode_mesh(options.mesh, add_end=False)
    faces = tokenizer.format.prompt_faces(len(ids))
    kept = max(1, round(options.keep * faces))
    part = tokenizer.decode_mesh(ids[: tokenizer.format.num_tokens(kept, start=True)])

    options.out.mkdir(parents=True, exist_ok=True)
    generator.export(part, options.out / "part.glb", winding="kept")
    print(f"{options.out / 'part.glb'}: the {kept} lowest of {faces} faces")
    meshes = generator(part, num_meshes=options.num, max_faces=options.max_faces, top_p=0.9, seed=options.seed)
    for number, mesh in enumerate(meshes):
        path = generator.export(mesh, options.out / f"completed-{number:02d}.glb")
        state = "whole" if mesh.metadata["ended"] else "cut off at --max-faces"
        print(f"{path}: {len(mesh.faces) - kept} faces more, {state}")


if __name__ == "__main__":
    main()
