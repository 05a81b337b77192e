"""The results of an evaluation as tables, ready for the page of a model."""

from collections.abc import Iterable, Sequence
from typing import Any

from training.evaluation.soundness import ALL_BINS, LARGE_BINS, bin_names

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
_NONE = "–"


def markdown(results: dict[str, Any]) -> str:
    """The tables of what `training.evaluate.evaluate` returns."""
    settings = results["settings"]
    named = settings["samples"] or settings["model"]
    lines = [f"# Evaluation of {named}", "", _counts(results), ""]
    lines += _distribution(results) + _soundness(results) + _novelty(results) + _likelihood(results)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += [
        f"Computed on {results['device']} in {results['seconds']:.0f} s; {versions}.",
        "All settings and figures are in `evaluation.json`.",
        "",
    ]
    return "\n".join(lines)


def _counts(results: dict[str, Any]) -> str:
    parts = []
    for name, found in results["samples"].items():
        bad = f" ({', '.join(f'{kind}: {count}' for kind, count in found['unusable'].items())})"
        parts.append(
            f"{name}: {found['count']:,}, of which {found['usable']:,} are a mesh{bad if found['unusable'] else ''}"
        )
    data = results["data"]
    parts.append(f"references: {data['references']['usable']:,} of the split {results['settings']['references']}")
    parts.append(f"training set: {data['training']['usable']:,}")
    return "; ".join(parts) + ". What is no mesh takes part in no distance."


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
    return ["## Distribution", "", text, "", *_table(["set", *(title for _, title, *_ in columns)], body), ""]


def _soundness(results: dict[str, Any]) -> list[str]:
    found = results["soundness"]
    body = []
    for name in (ALL_BINS, LARGE_BINS, *bin_names()):
        for whose in ("samples", "references", "training"):
            if name in found[whose]:
                row = found[whose][name]
                body.append([name, whose, f"{row['meshes']:,}", *(_cell(row[k], s, d) for k, _, s, d in _SOUNDNESS)])
    head = ["faces", "of", "meshes", *(title for _, title, *_ in _SOUNDNESS)]
    ratios = [
        f"{name}: {_cell(found['boundary_ratio'][whose].get(name), 1, 2)} × that of the {whose}"
        for whose in ("references", "training")
        for name in (ALL_BINS, LARGE_BINS)
    ]
    return ["## Soundness", "", *_table(head, body), "", f"Boundary edges of samples: {'; '.join(ratios)}.", ""]


def _novelty(results: dict[str, Any]) -> list[str]:
    found = results["novelty"]
    if "skipped" in found:
        return ["## Novelty", "", f"Not measured: {found['skipped']}.", ""]
    body = []
    for name, prefix in (("samples", ""), ("references", "held_out_")):
        distances = found[f"{prefix}distance"].values()
        body.append([name, *(_cell(value, 1000, 3) for value in distances), _cell(found[f"{prefix}copies"], 100, 1)])
    head = ["set", *(f"{share} × 1000" for share in found["distance"]), "copies %"]
    share = _cell(found["nearer_than_held_out"], 100, 1)
    text = (
        "Chamfer distance to the nearest training mesh, turned and mirrored, in squared longest sides: quantiles of "
        f"the set. {share} % of samples are nearer than the median reference is."
    )
    return [
        "## Novelty",
        "",
        text,
        "",
        *_table(head, body),
        "",
    ]


def _likelihood(results: dict[str, Any]) -> list[str]:
    found = results["likelihood"]
    if found is None:
        return []
    rows = [("all", found["meshes"], found["all"])]
    if "told" in found:
        rows.append(("all, told category and number of faces", found["meshes"], found["told"]))
    if "far" in found:
        rows.append(("unlike any training mesh", found["far_meshes"], found["far"]))
    rows += [(name, figures["meshes"], figures) for name, figures in found["by_category"].items()]
    body = [[name, f"{count:,}", *(_cell(row[k], s, d) for k, _, s, d in _LIKELIHOOD)] for name, count, row in rows]
    head = ["references", "meshes", *(title for _, title, *_ in _LIKELIHOOD)]
    left_out = f"{found['too_long']:,} longer than the model takes are left out." if found["too_long"] else ""
    return ["## Likelihood", "", *([left_out, ""] if left_out else []), *_table(head, body), ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows),
    ]


def _cell(value: float | None, scale: float, digits: int) -> str:
    return _NONE if value is None else f"{value * scale:.{digits}f}"


def _spread(found: dict[str, Any], scale: float, digits: int) -> str:
    mean = _cell(found["mean"], scale, digits)
    return mean if found["deviation"] is None else f"{mean} ± {_cell(found['deviation'], scale, digits)}"
