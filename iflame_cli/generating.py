"""`iflame generate` and `iflame complete`: all that needs no model, so that errors come before torch is imported."""

import argparse
import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from iflame_cli.errors import CommandError
from iflame_cli.models import check_model
from iflame_cli.reading import MeshFile, check_decimation, mesh_files, read_mesh
from iflame_hf.files_iflame import write_whole
from iflame_hf.mesh_files_iflame import load_mesh, up_axis_of
from iflame_hf.mesh_iflame import turn

RECORD = "meshes.json"
RECORDED_OPTIONS = (
    "model",
    "revision",
    "batch_size",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "closing_strength",
    "keep_order",
    "max_faces",
    "category",
    "num_faces",
    "guidance_scale",
    "height",
    "pivot",
)


class Job(NamedTuple):
    """A mesh to make."""

    path: Path
    part: MeshFile | None


def run(options: argparse.Namespace) -> None:
    """Makes and writes the meshes, each as soon as it is finished; prints a line for each. Raises CommandError where
    none came of it."""
    _check_asked(options)
    part_paths = mesh_files(options.parts) if options.command == "complete" else []
    out_paths = _out_paths(options, part_paths)
    pictures = [_thumbnail(path) for path in out_paths] if options.thumbnails else []
    _refuse_to_overwrite([*out_paths, *pictures, options.out / RECORD], options.overwrite)
    if options.thumbnails and find_spec("PIL") is None:
        raise CommandError("--thumbnails needs the package pillow: pip install pillow")
    check_model(options.model)
    parts = _read_parts(part_paths, options) if part_paths else []
    jobs = [
        Job(path, part)
        for path, part in zip(out_paths, [part for part in parts or [None] for _ in range(options.num)], strict=True)
    ]

    from iflame_cli.making import check_request, load_generator, make_meshes
    from iflame_hf.many_iflame import default_rows

    generator = load_generator(options.model, options.revision, options.device, options.dtype)
    check_request(generator, parts, options)
    options.batch_size = options.batch_size or default_rows(generator.model)
    options.out.mkdir(parents=True, exist_ok=True)

    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    record = {name: getattr(options, name) for name in RECORDED_OPTIONS} | {"seed": seed}
    entries: dict[int, dict] = {}
    try:
        with tqdm(total=len(jobs), unit="mesh", disable=None) as bar:
            for number, mesh in make_meshes(generator, [job.part for job in jobs], seed, options, bar):
                job = jobs[number]
                entries[number] = _write(generator, job, mesh, options, record)
                _tell(job, entries[number], options.json)
    finally:
        if entries:
            record["meshes"] = [entries[number] for number in sorted(entries)]
            write_whole(options.out / RECORD, json.dumps(record, indent=1) + "\n")
    written = sum(entry["file"] is not None for entry in entries.values())
    if options.seed is None:
        print(f"seed {seed}: give --seed {seed} for the same meshes", file=sys.stderr)
    if written < len(jobs):
        print(f"iflame: {len(jobs) - written} of {len(jobs)} have no face and no file", file=sys.stderr)
    if written == 0:
        raise CommandError("nothing was written: try another --seed, or a model that has been trained for longer")


def _check_asked(options: argparse.Namespace) -> None:
    if options.guidance_scale not in (None, 1) and options.category is None and options.num_faces is None:
        raise CommandError("--guidance-scale is of a condition: give --category or --num-faces too, or leave it out")
    if options.num_faces is not None and options.max_faces is not None and options.num_faces > options.max_faces:
        raise CommandError(
            f"--num-faces {options.num_faces} is more than --max-faces {options.max_faces}: raise --max-faces, or "
            "leave it out"
        )


def _out_paths(options: argparse.Namespace, parts: list[Path]) -> list[Path]:
    width = max(2, len(str(options.num - 1)))
    stems = [f"{part.stem}-completed" for part in parts] or ["mesh"]
    if len(set(stems)) < len(stems):
        raise CommandError("two parts have the same name: complete them into different folders (--out)")
    return [
        options.out / f"{stem}-{number:0{width}d}.{options.format}" for stem in stems for number in range(options.num)
    ]


def _refuse_to_overwrite(paths: list[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise CommandError(f"{there[0]}{others} exists already: choose another --out, or give --overwrite")


def _read_parts(paths: list[Path], options: argparse.Namespace) -> list[MeshFile]:
    check_decimation(options.decimate)
    parts = [read_mesh(path, options.up_axis, options.decimate) for path in paths]
    for part in parts:
        # Normals say how the part is shaded, which --normals decides for the result.
        if lost := [name for name in part.lost if name != "normals"]:
            print(f"iflame: {part.path}: not in what is completed: {', '.join(lost)}", file=sys.stderr)
    return parts


def _write(generator: Any, job: Job, mesh: Any, options: argparse.Namespace, record: dict) -> dict[str, Any]:
    entry = {"file": None, "faces": len(mesh.faces), "vertices": len(mesh.vertices), **mesh.metadata}
    if job.part is not None:
        entry["part"] = str(job.part.path)
    if entry["faces"] == 0:
        for path in (job.path, _thumbnail(job.path)):  # of an earlier run, which was to be overwritten
            path.unlink(missing_ok=True)
        return entry
    generator.export(
        mesh,
        job.path,
        winding=options.winding,
        height=options.height,
        pivot=options.pivot,
        normals=options.normals,
        license=options.license,
        extras={"model": record["model"], "seed": entry["seed"], **entry.get("asked_for", {})},
    )
    entry |= {"file": job.path.name, "closed": bool(mesh.is_watertight)}
    if options.thumbnails:
        entry["thumbnail"] = _draw(job.path).name
    return entry


def _thumbnail(path: Path) -> Path:
    return path.with_suffix(".png")


def _draw(path: Path) -> Path:
    """Writes the picture of a mesh file beside it; returns its path."""
    from iflame_cli.render import render_meshes

    vertices, faces = load_mesh(path)
    picture = _thumbnail(path)
    render_meshes([(turn(vertices, up_axis_of(path), "y"), faces)], picture)
    return picture


def _tell(job: Job, entry: dict[str, Any], as_json: bool) -> None:
    """A line on the output: of JSON, with the path as `path`, or, where there is a file, for people."""
    if as_json:
        text = json.dumps({"path": None if entry["file"] is None else str(job.path), **entry})
    elif entry["file"] is None:
        return
    else:
        dropped = entry["dropped_faces"]
        why = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        text = f"{job.path}  {entry['faces']} faces" + (
            f", {sum(dropped.values())} more dropped ({why})" if why else ""
        )
        if not entry["ended"]:
            text += f"; not ended: cut off at {entry['faces'] + sum(dropped.values())} faces (--max-faces)"
    tqdm.write(text)
    sys.stdout.flush()
