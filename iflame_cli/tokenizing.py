"""`iflame tokenize`: what tokens keep of a mesh."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from iflame_cli.errors import CommandError
from iflame_cli.reading import check_decimation, mesh_files, read_mesh
from iflame_hf.format_iflame import known_format
from iflame_hf.mesh_errors_iflame import errors_name
from iflame_hf.mesh_files_iflame import import_trimesh
from iflame_hf.mesh_iflame import (
    MAX_RESOLUTION,
    bounding_box,
    canonicalise,
    dequantise,
    has_equal_corners,
    normalise,
    quantise,
    turn,
)

DROPPED = {
    "faces_with_equal_corners": "had two equal corners",
    "faces_flattened_by_rounding": "became a line or a point when rounded",
    "faces_repeated": "lay on the vertices of another",
}
MERGED = {
    "vertices_welded": "were at the place of another",
    "vertices_merged_by_rounding": "fell together with another when rounded",
}


def run(options: argparse.Namespace) -> None:
    """
    Prints what becomes of each mesh, and for several a table in the end. Raises CommandError if one could not be read,
    after the others.
    """
    if options.resolution > MAX_RESOLUTION:
        raise CommandError(f"--resolution must be at most {MAX_RESOLUTION}, got {options.resolution}")
    check_decimation(options.decimate)
    paths, measured, missing = [], [], 0
    for source in options.meshes:
        try:
            paths += mesh_files([source])
        except CommandError as error:
            print(f"iflame: {error}", file=sys.stderr)
            missing += 1
    paths, failed = list(dict.fromkeys(paths)), missing
    with tqdm(paths, unit="mesh", disable=None if len(paths) > 1 else True) as bar:
        for path in bar:
            try:
                found = measure(path, options.resolution, options.up_axis, options.decimate)
            except (ValueError, OSError) as error:
                tqdm.write(f"iflame: {error}", file=sys.stderr)
                failed += 1
                continue
            tqdm.write(json.dumps(found) if options.json else describe(found))
            sys.stdout.flush()
            measured.append(found)
    if len(measured) > 1 and not options.json:
        print("\n" + table(measured))
    if failed:
        raise CommandError(f"{failed} of {len(paths) + missing} could not be tokenized")


def measure(
    path: Path, resolution: int = 128, up_axis: str | None = None, decimate: int | None = None
) -> dict[str, Any]:
    """
    Counts of a mesh file before and after tokenization, what was dropped by reason, and the errors of the round trip
    in the units of the file: distances (Euclidean) between the vertices and what their tokens stand for.

    Args:
        resolution: steps along the longest side.
        up_axis: the vertical axis of the file, by default that of its format.
        decimate: a mesh of more faces is simplified to so many beforehand; all counts but `faces_in_file` are then of
            the simplified mesh.

    Raises:
        ValueError: the file is no usable mesh, naming it.
    """
    mesh = read_mesh(path, up_axis, decimate)
    vertices, faces = turn(mesh.vertices, mesh.up_axis, "y"), mesh.faces
    size = float(np.ptp(bounding_box(vertices), axis=0).max())
    with errors_name(path):
        normalised = normalise(vertices)
        grid = quantise(normalised, resolution)
        kept_points, kept_faces = canonicalise(grid, faces)
        if len(kept_faces) == 0:
            raise ValueError(f"no face is left after rounding to {resolution} steps")

    exact = np.unique(vertices, axis=0, return_inverse=True)[1].reshape(-1)
    merged = np.unique(grid, axis=0, return_inverse=True)[1].reshape(-1)
    was_flat, is_flat = has_equal_corners(vertices[faces]), has_equal_corners(grid[faces])
    distances = np.linalg.norm(normalised - dequantise(grid, resolution), axis=1) * size
    return {
        "file": str(path),
        "up_axis": mesh.up_axis,
        "longest_side": size,
        "step": size / resolution,
        "faces_in_file": mesh.faces_in_file,
        "vertices": len(vertices),
        "faces": len(faces),
        "kept_vertices": len(kept_points),
        "kept_faces": len(kept_faces),
        "tokens": known_format().num_tokens(len(kept_faces), start=True, end=True),
        "vertices_welded": len(vertices) - int(exact.max()) - 1,
        "vertices_merged_by_rounding": int(exact.max()) - int(merged.max()),
        "faces_with_equal_corners": int(was_flat.sum()),
        "faces_flattened_by_rounding": int((is_flat & ~was_flat).sum()),
        "faces_repeated": int((~is_flat).sum()) - len(kept_faces),
        "lost_attributes": mesh.lost,
        "largest_error": float(distances.max()),
        "mean_error": float(distances.mean()),
        "closed_before": _is_closed(exact[faces]),
        "closed_after": _is_closed(kept_faces),
    }


def _is_closed(faces: np.ndarray) -> bool:
    return bool(import_trimesh().Trimesh(np.zeros((faces.max() + 1, 3)), faces, process=False).is_watertight)


def describe(found: dict[str, Any]) -> str:
    """What `measure` found, for people."""
    dropped = [f"{found[name]:,} {why}" for name, why in DROPPED.items() if found[name]]
    merged = [f"{found[name]:,} {why}" for name, why in MERGED.items() if found[name]]
    simplified = f", simplified from {found['faces_in_file']:,}" if found["faces_in_file"] > found["faces"] else ""
    closed = {True: "closed", False: "open"}
    lines = [
        found["file"],
        f"  read     {found['vertices']:,} vertices, {found['faces']:,} faces{simplified}, "
        f"{closed[found['closed_before']]}; longest side {found['longest_side']:.6g}, {found['up_axis']} up",
        f"  kept     {found['kept_vertices']:,} vertices, {found['kept_faces']:,} faces, "
        f"{closed[found['closed_after']]}; {found['tokens']:,} tokens",
        f"  faces    {'; '.join(dropped) + ': dropped' if dropped else 'none dropped'}",
        f"  vertices {'; '.join(merged) + ': merged' if merged else 'none merged'}",
        f"  besides  {', '.join(found['lost_attributes'])}: not kept" if found["lost_attributes"] else None,
        f"  error    at most {found['largest_error']:.3g}, {found['mean_error']:.3g} on average; "
        f"one step is {found['step']:.3g}",
    ]
    return "\n".join(line for line in lines if line is not None)


def table(measured: list[dict[str, Any]]) -> str:
    """A line of figures for each mesh, and one of all."""
    heads = ("faces", "kept", "dropped", "tokens", "error/step", "closed", "not kept", "file")
    rows = [
        (
            f"{found['faces']:,}",
            f"{found['kept_faces']:,}",
            f"{found['faces'] - found['kept_faces']:,}",
            f"{found['tokens']:,}",
            f"{found['largest_error'] / found['step']:.2f}",
            "yes" if found["closed_after"] else "no",
            f"{len(found['lost_attributes'])} kinds" if found["lost_attributes"] else "-",
            found["file"],
        )
        for found in measured
    ]
    faces, kept = (sum(found[name] for found in measured) for name in ("faces", "kept_faces"))
    closed = sum(found["closed_after"] for found in measured)
    worst = max(found["largest_error"] / found["step"] for found in measured)
    tokens = sum(found["tokens"] for found in measured)
    whole = f"all {len(measured)} meshes"
    total = (f"{faces:,}", f"{kept:,}", f"{faces - kept:,}", f"{tokens:,}", f"{worst:.2f}", f"{closed}", "", whole)
    rows = [heads, *rows, total]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads) - 1)]
    return "\n".join(
        "  ".join([*(cell.rjust(w) for cell, w in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )
