"""The results of an evaluation as tables, ready for the page of a model."""

import json
from pathlib import Path
from typing import Any

from training.evaluation.likelihood import FAR_BELOW
from training.evaluation.soundness import ALL_BINS, LARGE_BINS, bin_names
from training.evaluation.tables import cell, table

_DISTRIBUTION = (
    ("coverage", "COV % ↑", 100, 1),
    ("mmd", "MMD × 1000 ↓", 1000, 3),
    ("one_nna", "1-NNA % (50 best)", 100, 1),
    ("jsd", "JSD × 1000 ↓", 1000, 2),
    ("emd_coverage", "COV-EMD % ↑", 100, 1),
    ("emd_mmd", "MMD-EMD × 1000 ↓", 1000, 2),
    ("emd_one_nna", "1-NNA-EMD % (50 best)", 100, 1),
)
_SOUNDNESS = (
    ("ended", "ended %", 100, 1),
    ("closed", "closed %", 100, 1),
    ("manifold_edges", "manifold edges %", 100, 1),
    ("boundary_edges", "boundary edges %", 100, 2),
    ("flipped_edges", "flipped edges %", 100, 2),
    ("repeated_faces", "repeated faces %", 100, 2),
    ("degenerate_faces", "degenerate faces %", 100, 2),
    ("small_angles", "angles below 1° %", 100, 2),
    ("pieces", "pieces", 1, 1),
)
_LIKELIHOOD = (
    ("loss", "nats a token", 1, 4),
    ("perplexity", "perplexity", 1, 3),
    ("bits_per_face", "bits a face", 1, 2),
    ("token_accuracy", "tokens right %", 100, 1),
    ("vertex_accuracy", "vertices right %", 100, 1),
    ("face_accuracy", "faces right %", 100, 1),
)
_ORACLE = (
    "The oracle is training meshes in the place of samples. No generator of this data can be expected to do better."
)
_UNLIKE = f"Unlike any training mesh: with none of them it has an overlap of {FAR_BELOW:g} in voxels, turned or not."


def markdown(results: dict[str, Any]) -> str:
    """The tables of what `training.evaluate.evaluate` returns."""
    settings = results["settings"]
    named = settings["samples"] or settings["model"]
    lines = [f"# Evaluation of {named}", "", _counts(results), ""]
    lines += _distribution(results) + _soundness(results) + _novelty(results) + _control(results)
    lines += _likelihood(results)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results["seconds_of"].items())
    lines += [
        f"Computed on {results['device']} in {results['seconds']:.0f} s ({parts}); {versions}.",
        "All settings and figures are in `evaluation.json`.",
        "",
    ]
    return "\n".join(lines)


def read_for_card(path: Path) -> tuple[str, dict[str, float]]:
    """
    The section of a card, and the metrics of the likelihood of all held-out meshes, of an evaluation.json.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file, naming it.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        section, likelihood = card_section(results), results["likelihood"]
        measured = {name: likelihood["all"][name] for name, *_ in _LIKELIHOOD} if likelihood else {}
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise ValueError(f"{path} is no evaluation.json of training/evaluate.py: {error!r}") from error
    return section, measured


def card_section(results: dict[str, Any]) -> str:
    """What the card of a model tells of its evaluation: how it was measured, and the tables without categories."""
    settings, generated = results["settings"], next(iter(results["samples"].values()))
    drawn = ", ".join(
        f"{name.replace('_', ' ')} {settings[name]:g}"
        for name in ("temperature", "top_p", "top_k", "min_p", "closing_strength", "guidance_scale")
        if settings.get(name)
    )
    drawn += "" if settings.get("keep_order", True) else ", keep order off"
    how = f"drawn with {drawn} in {settings['dtype']}" if settings["samples"] is None else "read from files"
    most = (
        f"at most {settings['max_faces']:,} faces, " if settings["samples"] is None and settings["max_faces"] else ""
    )
    data = results["data"]
    is_asked = settings.get("ask")
    asked = "each asked to be what a training mesh drawn at random is" if is_asked else "none asked to be anything"
    lines = [
        f"By `training/evaluate.py`: {generated['count']:,} meshes of the model, none chosen and {asked}, {most}{how};"
        f" {generated['usable']:,} of them are a mesh. They are set beside {data['references']['usable']:,} held-out "
        f"meshes and {data['training']['usable']:,} training meshes.",
        "",
        *_distribution(results),
        *([_ORACLE, ""] if "sets" in results["distribution"] else []),
        *_boundary(results["soundness"]),
        *_novelty(results),
        *_likelihood(results, categories=False),
        *([_UNLIKE] if "far" in (results["likelihood"] or {}) else []),
    ]
    return "\n".join(f"#{line}" if line.startswith("## ") else line for line in lines).strip()


def _boundary(found: dict[str, Any]) -> list[str]:
    """Edges with one face only, holes that is, of samples beside those of the data."""
    sets = ("samples", "references", "training")
    body = []
    for name in (ALL_BINS, *bin_names()):
        rows = {whose: found[whose].get(name) for whose in sets}
        if rows["samples"]:
            shares = [cell(row and row["boundary_edges"], 100, 2) for row in rows.values()]
            ended, closed = (cell(rows["samples"][key], 100, 1) for key in ("ended", "closed"))
            body.append([name, f"{rows['samples']['meshes']:,}", *shares, ended, closed])
    head = ["faces", "samples", "boundary edges %", "held-out %", "training %", "samples ended %", "samples closed %"]
    text = "Edges of one face only are rims and holes; what did not end was cut off. By the faces of a mesh:"
    return ["## Soundness", "", text, "", *table(head, body), ""]


def _counts(results: dict[str, Any]) -> str:
    parts = []
    for name, found in results["samples"].items():
        bad = f" ({', '.join(f'{kind}: {count}' for kind, count in found['unusable'].items())})"
        parts.append(
            f"{name}: {found['count']:,}, of which {found['usable']:,} are a mesh{bad if found['unusable'] else ''}"
        )
    data = results["data"]
    half = f"{results['settings']['half']} half of the " if results["settings"]["half"] else ""
    parts.append(
        f"references: {data['references']['usable']:,} of the {half}split {results['settings']['references']}"
    )
    parts.append(f"training set: {data['training']['usable']:,}")
    asked = "Samples were asked to be what training meshes drawn at random are. "
    parts[-1] += f". {asked if results['settings'].get('ask') else ''}What is no mesh takes part in no distance."
    return "; ".join(parts)


def _distribution(results: dict[str, Any]) -> list[str]:
    figures = results["distribution"]
    if "skipped" in figures:
        return ["## Distribution", "", f"Not measured: {figures['skipped']}.", ""]
    protocol, rows = figures["protocol"], figures["sets"]
    columns = [column for column in _DISTRIBUTION if column[0] in next(iter(rows.values()))]
    text = (
        f"{protocol['size']:,} meshes of each set against as many references, {protocol['points']:,} points of each, "
        f"normalised by {protocol['normalisation']}; mean and standard deviation of {protocol['repeats']} repeats."
    )
    if protocol["emd_meshes"]:
        text += f" EMD: {min(protocol['emd_meshes'], protocol['size'])} meshes, {protocol['emd_points']} points."
    body = [
        [name, *(_spread(row[key], scale, digits) for key, _, scale, digits in columns)] for name, row in rows.items()
    ]
    return ["## Distribution", "", text, "", *table(["set", *(title for _, title, *_ in columns)], body), ""]


def _soundness(results: dict[str, Any]) -> list[str]:
    found = results["soundness"]
    body = []
    for name in (ALL_BINS, LARGE_BINS, *bin_names()):
        for whose in ("samples", "references", "training"):
            if name in found[whose]:
                row = found[whose][name]
                body.append([name, whose, f"{row['meshes']:,}", *(cell(row[k], s, d) for k, _, s, d in _SOUNDNESS)])
    head = ["faces", "of", "meshes", *(title for _, title, *_ in _SOUNDNESS)]
    ratios = [
        f"{name}: {cell(found['boundary_ratio'][whose].get(name), 1, 2)} × that of the {whose}"
        for whose in ("references", "training")
        for name in (ALL_BINS, LARGE_BINS)
    ]
    return ["## Soundness", "", *table(head, body), "", f"Boundary edges of samples: {'; '.join(ratios)}.", ""]


def _novelty(results: dict[str, Any]) -> list[str]:
    found = results["novelty"]
    if "skipped" in found:
        return ["## Novelty", "", f"Not measured: {found['skipped']}.", ""]
    body = []
    for name, prefix in (("samples", ""), ("references", "held_out_")):
        distances = found[f"{prefix}distance"].values()
        body.append([name, *(cell(value, 1000, 3) for value in distances), cell(found[f"{prefix}copies"], 100, 1)])
    head = ["set", *(f"{share} × 1000" for share in found["distance"]), "copies %"]
    share = cell(found["nearer_than_held_out"], 100, 1)
    text = (
        "Chamfer distance to the nearest training mesh, turned and mirrored, in squared longest sides: quantiles of "
        f"the set. {share} % of samples are nearer than the median reference is."
    )
    return [
        "## Novelty",
        "",
        text,
        "",
        *table(head, body),
        "",
    ]


def _control(results: dict[str, Any]) -> list[str]:
    found = results.get("control")
    if found is None:
        return []
    lines = ["## Control", "", f"{found['asked']:,} samples a set, each asked to be what a held-out mesh is.", ""]
    if "faces" in found:
        body = []
        for name in (ALL_BINS, *bin_names()):
            for whose, rows in found["faces"].items():
                if name in rows:
                    row = rows[name]
                    figures = (cell(row[key], 100, 1) for key in ("median_error", "error_90", "near"))
                    body.append([name, whose, f"{row['meshes']:,}", *figures])
        head = ["faces asked for", "set", "meshes", "median error %", "90 % quantile %", "within 10 % %"]
        lines += [*table(head, body), ""]
    category = found.get("category", {})
    if "skipped" in category:
        lines += [f"Categories are not measured: {category['skipped']}.", ""]
    elif category:
        lines += [
            f"How often a classifier of {category['categories']} categories, trained on {category['points']:,} points "
            "of each training mesh, finds the category that was asked for.",
            "",
            *table(
                ["set", "meshes", "top 1 %", "top 3 %", "mean of categories, top 1 %"],
                [
                    [name, f"{row['meshes']:,}", *(cell(row[key], 100, 1) for key in ("top_1", "top_3", "macro"))]
                    for name, row in category["sets"].items()
                ],
            ),
            "",
        ]
    body = []
    for name, rows in found["soundness"].items():
        bins = [rows.get(each, {}) for each in (ALL_BINS, LARGE_BINS)]
        ended, *edges = bins[0].get("ended"), *(each.get("boundary_edges") for each in bins)
        body.append([name, cell(ended, 100, 1), *(cell(each, 100, 2) for each in edges)])
    return [*lines, *table(["set", "ended %", "boundary edges %", "above 200 faces %"], body), ""]


def _likelihood(results: dict[str, Any], categories: bool = True) -> list[str]:
    found = results["likelihood"]
    if found is None:
        return []
    rows = [("all", found["meshes"], found["all"])]
    if "told" in found:
        rows.append(("all, told category and number of faces", found["meshes"], found["told"]))
    if "far" in found:
        rows.append(("unlike any training mesh", found["far_meshes"], found["far"]))
    if categories:
        rows += [(name, figures["meshes"], figures) for name, figures in found["by_category"].items()]
    body = [[name, f"{count:,}", *(cell(row[k], s, d) for k, _, s, d in _LIKELIHOOD)] for name, count, row in rows]
    head = ["references", "meshes", *(title for _, title, *_ in _LIKELIHOOD)]
    left_out = f"{found['too_long']:,} longer than the model takes are left out." if found["too_long"] else ""
    return ["## Likelihood", "", *([left_out, ""] if left_out else []), *table(head, body), ""]


def _spread(found: dict[str, Any], scale: float, digits: int) -> str:
    mean = cell(found["mean"], scale, digits)
    return mean if found["deviation"] is None else f"{mean} ± {cell(found['deviation'], scale, digits)}"
