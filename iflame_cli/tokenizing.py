"""`iflame tokenize`: what tokens keep of a mesh."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from iflame_cli.command_line import CommandError
from iflame_hf import IFlameTokenizer
from iflame_hf.mesh_iflame import bounding_box, import_trimesh, load_mesh, normalise, quantise, turn, up_axis_of


def run(options: argparse.Namespace) -> None:
    """Prints what becomes of each mesh. Raises CommandError if one could not be read, after the others."""
    tokenizer = IFlameTokenizer(coordinate_resolution=options.resolution)
    failed = 0
    for path in options.meshes:
        try:
            found = measure(path, tokenizer, options.up_axis)
        except (ValueError, OSError) as error:
            print(f"iflame: {error}", file=sys.stderr)
            failed += 1
            continue
        print(json.dumps(found) if options.json else describe(found))
    if failed:
        raise CommandError(f"{failed} of {len(options.meshes)} could not be tokenized")


def measure(path: Path, tokenizer: IFlameTokenizer, up_axis: str | None = None) -> dict[str, Any]:
    """
    Counts of a mesh file before and after tokenization, what was dropped by reason, and the errors of the round trip
    in the units of the file: distances (Euclidean) between the vertices and what their tokens stand for.

    Raises:
        ValueError: the file is no usable mesh, naming it.
    """
    vertices, faces = load_mesh(path)
    up_axis = up_axis or up_axis_of(path)
    vertices = turn(vertices, up_axis, tokenizer.up_axis)
    ids = tokenizer.encode_mesh((vertices, faces))
    decoded = tokenizer.decode_mesh(ids)

    resolution, size = tokenizer.coordinate_resolution, float(np.ptp(bounding_box(vertices), axis=0).max())
    exact = np.unique(vertices, axis=0, return_inverse=True)[1].reshape(-1)
    levels = quantise(normalise(vertices), resolution)
    merged = np.unique(levels, axis=0, return_inverse=True)[1].reshape(-1)
    was_flat, is_flat = _has_equal_corners(exact[faces]), _has_equal_corners(merged[faces])
    distances = np.linalg.norm(normalise(vertices) - (levels / resolution - 0.5), axis=1) * size
    original = import_trimesh().Trimesh(vertices, exact_faces(vertices, faces), process=False)
    return {
        "file": str(path),
        "up_axis": up_axis,
        "longest_side": size,
        "step": size / resolution,
        "vertices": len(vertices),
        "faces": len(faces),
        "kept_vertices": len(decoded.vertices),
        "kept_faces": len(decoded.faces),
        "tokens": len(ids),
        "vertices_welded": len(vertices) - int(exact.max()) - 1,
        "vertices_merged_by_rounding": int(exact.max()) - int(merged.max()),
        "faces_with_equal_corners": int(was_flat.sum()),
        "faces_flattened_by_rounding": int((is_flat & ~was_flat).sum()),
        "faces_repeated": int((~is_flat).sum()) - len(decoded.faces),
        "largest_error": float(distances.max()),
        "mean_error": float(distances.mean()),
        "closed_before": bool(original.is_watertight),
        "closed_after": bool(decoded.is_watertight),
    }


def exact_faces(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Faces (F, 3) whose vertices of equal position are one."""
    _, first, which = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
    return first[which.reshape(-1)][faces]


def _has_equal_corners(faces: np.ndarray) -> np.ndarray:
    return (faces == np.roll(faces, 1, axis=1)).any(axis=1)


def describe(found: dict[str, Any]) -> str:
    """What `measure` found, for people."""
    dropped = [
        f"{found[name]:,} {why}"
        for name, why in (
            ("faces_with_equal_corners", "had two equal corners"),
            ("faces_flattened_by_rounding", "became a line or a point when rounded"),
            ("faces_repeated", "lay on the vertices of another"),
        )
        if found[name]
    ]
    merged = [
        f"{found[name]:,} {why}"
        for name, why in (
            ("vertices_welded", "were at the place of another"),
            ("vertices_merged_by_rounding", "fell together with another when rounded"),
        )
        if found[name]
    ]
    closed = {True: "closed", False: "open"}
    lines = [
        found["file"],
        f"  read     {found['vertices']:,} vertices, {found['faces']:,} faces, {closed[found['closed_before']]}; "
        f"longest side {found['longest_side']:.6g}, {found['up_axis']} up",
        f"  kept     {found['kept_vertices']:,} vertices, {found['kept_faces']:,} faces, "
        f"{closed[found['closed_after']]}; {found['tokens']:,} tokens",
        f"  faces    {'; '.join(dropped) + ': dropped' if dropped else 'none dropped'}",
        f"  vertices {'; '.join(merged) + ': merged' if merged else 'none merged'}",
        f"  error    at most {found['largest_error']:.3g}, {found['mean_error']:.3g} on average; "
        f"one step is {found['step']:.3g}",
    ]
    return "\n".join(lines)
