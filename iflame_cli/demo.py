"""
What `make demo` shows: sixteen meshes of a trained model, a part of one of them completed, and a picture of all.

    python -m iflame_cli.demo --model models/iflame-artist --out outputs/demo
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from iflame_cli.errors import CommandError
from iflame_cli.models import check_model

MODEL, FOLDER = "models/iflame-artist", "outputs/demo"
MESHES, COMPLETIONS, COLUMNS = 16, 3, 4
# What the model is asked for, as far as it knows it, and of how many faces: such as many of its training meshes have.
WANTED = {
    **{"chair": 168, "table": 128, "tree": 117, "building": 78, "lamp": 120, "sign": 61, "fence": 90, "stairs": 68},
    **{"rock": 57, "wall": 52, "tile": 56, "container": 132, "door": 67, "brick": 34, "food": 122, "boat": 145},
}
MOST_FACES = 240
SAMPLING = {"max_faces": MOST_FACES, "guidance_scale": 1.0}  # half the work; the rest as the model says
PICTURE = "meshes.png"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--model", default=MODEL, help=f"folder of a model, or its name on the Hub (default: {MODEL})")
    parser.add_argument("--out", type=Path, default=Path(FOLDER), help=f"folder to write to (default: {FOLDER})")
    parser.add_argument("--seed", type=int, default=0, help="other meshes for another number")
    options = parser.parse_args(argv)
    try:
        run(options.model, options.out, options.seed)
    except KeyboardInterrupt:
        print("demo: stopped", file=sys.stderr)
        return 130
    except (CommandError, ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


def run(model: str, out: Path, seed: int) -> None:
    """Writes glb files and a picture to `out`. Raises CommandError or OSError where there is no such model."""
    began = time.monotonic()
    check_model(model)
    print(f"loading {model} ...", flush=True)
    from iflame_cli.making import load_generator  # torch takes seconds
    from iflame_cli.render import render_meshes

    generator = load_generator(model)
    out.mkdir(parents=True, exist_ok=True)
    wanted = requests_for(generator.model.config)
    made: list[Any] = [None] * MESHES
    for number, mesh in generator.as_finished(num_meshes=MESHES, seed=seed, **SAMPLING, **wanted):
        made[number] = mesh
        path = out / f"mesh-{number:02d}.glb"
        if len(mesh.faces):
            generator.export(mesh, path)
        print(f"{path}: {title_of(mesh)}", flush=True)
    part, completed = complete(generator, made, out, seed + MESHES)
    titles = [title_of(mesh) for mesh in made]
    if part is not None:
        titles.append(f"a part, {len(part.faces)} faces")
    titles += [f"completed, {len(mesh.faces)} faces" for mesh in completed]
    render_meshes([*made, *([part] if part is not None else []), *completed], out / PICTURE, COLUMNS, titles)
    seconds = time.monotonic() - began
    print(
        f"{seconds:.0f} seconds. Open {out / PICTURE}; the glb files beside it open in Blender, and in a browser by:"
    )
    print(f"iflame view {out}")


def requests_for(config: Any) -> dict[str, Any]:
    """What the sixteen meshes are asked to be, as far as the model takes it."""
    asked: dict[str, Any] = {}
    known = [name for name in WANTED if name in (config.categories or ())]
    if config.categories:
        asked["category"] = list(islice(cycle(known or config.categories), MESHES))
    if config.num_faces_range is not None:
        fewest, most = config.num_faces_range
        numbers = cycle([WANTED[name] for name in known] or WANTED.values())
        asked["num_faces"] = [min(max(faces, fewest), most) for faces in islice(numbers, MESHES)]
    return asked


def complete(generator: Any, made: Sequence[Any], out: Path, seed: int) -> tuple[Any, list[Any]]:
    """The lower half of one of the meshes, and what the model makes of it; None and nothing if none has two faces."""
    most = max(WANTED.values())
    whole = max(made, key=lambda mesh: (mesh.metadata["ended"], len(mesh.faces) <= most, len(mesh.faces)))
    if len(whole.faces) < 2:
        return None, []
    tokenizer = generator.tokenizer
    kept = len(whole.faces) // 2
    ids = tokenizer.encode_mesh(whole, add_end=False, normalise=False)
    part = tokenizer.decode_mesh(ids[: tokenizer.format.num_tokens(kept, start=True)])
    generator.export(part, out / "part.glb", winding="kept")
    print(f"{out / 'part.glb'}: the lower half of mesh-{list(made).index(whole):02d}", flush=True)
    asked: dict[str, Any] = {}
    if generator.model.config.categories:
        asked["category"] = whole.metadata["asked_for"]["category"]
    if (span := generator.model.config.num_faces_range) is not None and span[0] <= len(whole.faces) <= span[1]:
        asked["num_faces"] = len(whole.faces)
    completed = generator(part, num_meshes=COMPLETIONS, seed=seed, **SAMPLING, **asked)
    for number, mesh in enumerate(completed):
        path = generator.export(mesh, out / f"completed-{number}.glb")
        print(f"{path}: {len(mesh.faces) - kept} faces more", flush=True)
    return part, completed


def title_of(mesh: Any) -> str:
    """What a mesh was asked to be, and how large it is."""
    category = mesh.metadata.get("asked_for", {}).get("category", "mesh")
    return f"{category}, {len(mesh.faces)} faces{'' if mesh.metadata['ended'] else ', cut off'}"


if __name__ == "__main__":
    sys.exit(main())
