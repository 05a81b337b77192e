"""Which settings to sample a model with: those that are tried, what is found of each, and which are best."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from training.evaluation.soundness import ALL_BINS, LARGE_BINS
from training.evaluation.tables import cell, table

FACTORS = ("temperature", "top_k", "top_p", "min_p", "closing_strength", "mesh_grammar", "keep_order", "best_of")
DISTRIBUTION = ("one_nna", "coverage", "mmd")
LEAST_ENDED = 0.95  # of the share of the setting that ends most often
Setting = dict[str, Any]


def settings_to_try(base: Setting, values: Mapping[str, Sequence[Any]], product: bool) -> list[Setting]:
    """
    The base first, then one factor at a time changed to each of its values; or all combinations. None twice.

    Args:
        base: a value of each of FACTORS.
        values: of factors, those to try.
    """
    if product:
        names = list(values)
        combined = [dict(zip(names, each, strict=True)) for each in itertools.product(*values.values())]
    else:
        combined = [{name: value} for name, each in values.items() for value in each]
    tried: list[Setting] = []
    for change in [{}, *combined]:
        if (setting := {**base, **change}) not in tried:
            tried.append(setting)
    return tried


def described(setting: Setting, base: Setting) -> str:
    """What of a setting differs from the base."""
    changes = [f"{name} {value}" for name, value in setting.items() if value != base[name]]
    return ", ".join(changes) or "base"


def best_setting(rows: Sequence[Mapping[str, Any]], data: Mapping[str, Any]) -> int:
    """
    The place of the best of rows of figures.

    Rows without distances, and those that end less often than LEAST_ENDED times the share that ends most often, are
    out. The others are ranked by each figure: COV, MMD, and how far 1-NNA is from 50 %; and how far the shares of
    boundary edges, all and above LARGE faces, are from the data's (last where no mesh is that large). The smallest sum
    of the mean rank of the former and the mean rank of the latter wins: ranks need no weights between figures of
    different units. Of equal sums the one whose 1-NNA is nearer to 50 % wins, and then the first.

    Raises ValueError where no row has distances.
    """
    measured = [place for place, row in enumerate(rows) if row.get("one_nna") is not None]
    if not measured:
        raise ValueError("no setting gives enough meshes to choose by: try others, or a model trained for longer")
    most = max(rows[place]["ended"] for place in measured)
    left = [place for place in measured if rows[place]["ended"] >= LEAST_ENDED * most]

    def ranks(key: Any) -> np.ndarray:
        values = np.array([key(rows[place]) for place in left])
        return (values[None] < values[:, None]).sum(axis=1) + (values[None] <= values[:, None]).sum(axis=1)

    def from_half(row: Mapping[str, Any]) -> float:
        return abs(row["one_nna"] - 0.5)

    distribution = [ranks(from_half), ranks(lambda row: -row["coverage"]), ranks(lambda row: row["mmd"])]
    edges = [
        ranks(lambda row, name=name: np.inf if row[name] is None else abs(row[name] - data[name]))
        for name in ("boundary_edges", "large_boundary_edges")
        if data[name] is not None
    ]
    sums = np.mean(distribution, axis=0) + np.mean(edges, axis=0)
    order = sorted(range(len(left)), key=lambda each: (round(sums[each], 9), from_half(rows[left[each]])))
    return left[order[0]]


def of_meshes(faces: Sequence[int], sound: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a set that take no references: of its numbers of faces, and what `soundness` gives."""
    bins = {"": sound.get(ALL_BINS, {}), "large_": sound.get(LARGE_BINS, {})}
    return {
        **{f"{prefix}boundary_edges": found.get("boundary_edges") for prefix, found in bins.items()},
        "mean_faces": float(np.mean(faces)) if len(faces) else None,
        "median_faces": float(np.median(faces)) if len(faces) else None,
    }


_COLUMNS = (
    ("boundary_edges", "boundary edges %", 100, 2),
    ("large_boundary_edges", "above 200 faces %", 100, 2),
    ("ended", "ended %", 100, 1),
    ("mean_faces", "mean faces", 1, 0),
    ("median_faces", "median faces", 1, 0),
    ("coverage", "COV % ↑", 100, 1),
    ("one_nna", "1-NNA % (50 best)", 100, 1),
    ("mmd", "MMD × 1000 ↓", 1000, 3),
    ("log_probability", "nats a token", 1, 4),
    ("seconds", "seconds", 1, 0),
)


def choice_table(results: Mapping[str, Any]) -> str:
    """Rows of all settings, those of the base with other seeds, and those of the data."""
    rows = [(("**{}**" if each["is_best"] else "{}").format(each["name"]), each) for each in results["settings"]]
    rows += [("base, other seeds", results["again"]), ("data", results["data"])]
    body = [[name, *(cell(row.get(key), scale, digits) for key, _, scale, digits in _COLUMNS)] for name, row in rows]
    base = ", ".join(f"{name} {value}" for name, value in results["base"].items())
    protocol = results["protocol"]
    text = (
        f"Base: {base}. {results['num_samples']:,} samples of each setting; distances of {protocol['size']:,} of them "
        f"to as many references of the first half of the split {results['references']}, {protocol['points']:,} points "
        f"of each, normalised by {protocol['normalisation']}, mean of {protocol['repeats']} repeats. What the base "
        "with other seeds differs by is chance."
    )
    return "\n".join([text, "", *table(["setting", *(title for _, title, *_ in _COLUMNS)], body), ""])
