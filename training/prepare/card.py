"""The README.md of a prepared data set: what is in it and how it came about."""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from training.prepare.containers import HUB
from training.prepare.prepared_set import SPLITS
from training.rows.balance import FACE_BINS

_MOST_TABLE_ROWS = 60
# Of the Hub's identifiers of licences (huggingface.co/docs/hub/repositories-licenses) those that data sets have.
_HUB_LICENSES = {
    *("cc0-1.0", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0"),
    *("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
    *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "odc-by", "odbl", "pddl", "c-uda", "etalab-2.0"),
    *("cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "gfdl", "ofl-1.1", "artistic-2.0"),
    *("mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "bsl-1.0", "unlicense", "wtfpl"),
    *("gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "eupl-1.1", "eupl-1.2"),
    *("unknown", "other"),
}
# In Jinja2, as DatasetCard.from_template takes it.
_CARD_TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ meshes }} triangle meshes of {{ settings.min_faces }} to {{ settings.max_faces }} faces, {{ faces }} faces in all,
{{ meshes_of_splits }}. Made by `python -m training.prepare_data`; `settings.json` has its settings, `summary.json` its
figures, `rejected.jsonl` what was left out and why.

```python
from datasets import load_dataset

meshes = load_dataset("path/of/this/folder")["train"]
```

| column | type | meaning |
|---|---|---|
| name | string | unique in the set |
| category | string | null where not known |
| source | string | the file or row it came from |
| license | string | null where not known |
| pack | string | the collection it was published in; null where the source does not say |
| author | string | null where the source does not say |
| vertices | list of 3 x float32 | y up, box centred at 0, longest side 1, not quantised, no two equal |
| faces | list of 3 x int32 | indices of vertices, counter-clockwise seen from outside as in the source |
| num_faces | int32 | faces |
| num_faces_q | int32 | faces left after quantisation to {{ settings.resolution + 1 }} levels |
| nn_iou_train | float32 | overlap with the most similar training mesh; null where the source does not say |

## How it was made

- Sources: {{ sources }}; their vertical axis was {{ settings.up_axis }}, or what a dae file declared.
{% for line in how -%}
- {{ line }}
{% endfor %}
{% for line in tables -%}
{{ line }}
{% endfor %}"""
_SIZE_CATEGORIES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M")


def summary_of(counts: dict[str, Counter], shards: Counter, items: int) -> dict[str, Any]:
    """The figures of a run, as JSON values."""
    rejected = counts.get("rejected", Counter())
    return {
        "items": items,
        "meshes": {split: counts.get("split", Counter())[split] for split in SPLITS},
        "faces": sum(counts.get("total faces", Counter()).values()),
        "shards": {split: shards[split] for split in SPLITS},
        "rejected": dict(rejected.most_common()),
    }


def data_card(name: str, settings: dict[str, Any], summary: dict[str, Any], counts: dict[str, Counter]) -> str:
    """The text of README.md, with the front matter by which `datasets` finds the splits."""
    total = sum(summary["meshes"].values())
    licenses = counts.get("license", Counter())
    splits = [split for split in SPLITS if summary["meshes"][split]]
    size = next(
        (name for power, name in enumerate(_SIZE_CATEGORIES) if total < 10 ** (power + 3)), _SIZE_CATEGORIES[-1]
    )
    data = DatasetCardData(
        pretty_name=name,
        size_categories=size,
        license=_hub_licenses(licenses),
        tags=["3d", "mesh", "iflame"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
            }
        ],
    )
    binned = Counter({_bin_name(int(key)): n for key, n in sorted(counts.get("faces", {}).items(), key=_by_bin)})
    card = DatasetCard.from_template(
        data,
        template_str=_CARD_TEMPLATE,
        name=name,
        settings=settings,
        meshes=f"{total:,}",
        faces=f"{summary['faces']:,}",
        meshes_of_splits=" and ".join(f"{summary['meshes'][split]:,} for {split}" for split in splits),
        sources=", ".join(_code(_shown(source)) for source in settings["sources"]),
        how=how_prepared(settings),
        tables=[
            *_table("Faces after quantisation", "faces", binned, ranked=False),
            *_table("Categories", "category", counts.get("category", Counter())),
            *_table("Licences", "license", licenses),
            *_known_table("Packs", "pack", counts.get("pack", Counter())),
            *_known_table("Authors", "author", counts.get("author", Counter())),
            *_table("Left out", "reason", Counter(summary["rejected"])),
        ],
    )
    return str(card)


def _hub_licenses(licenses: Iterable[str]) -> str | list[str] | None:
    """The Hub's words for licences, None where that of a mesh is not known."""
    if "" in licenses:
        return None
    lowered = {name.lower() for name in licenses}
    found = sorted({name if name in _HUB_LICENSES else "other" for name in lowered})
    return found[0] if len(found) == 1 else found or None


def how_prepared(settings: dict[str, Any]) -> list[str]:
    """What was done to the meshes of a prepared set, by its settings: sentences of markdown."""
    lines = [
        "Scenes were flattened with their transforms, polygons cut into triangles, equal vertices merged; faces with "
        "repeated corners, or on the same three vertices as an earlier face, were dropped."
    ]
    if settings["decimate"]:
        lines.append(
            f"Meshes of more than {settings['max_faces']} faces were decimated, first where they are plane, then by "
            f"the quadric error, and left out where the surface moved by more than {settings['max_deviation']}."
        )
    if settings["deduplicate"]:
        lines.append("Of meshes that are equal after quantisation the first was kept.")
    share = settings["validation_share"]
    rule = f"A mesh is for validation if the first 8 bytes of SHA-1 of its name, over 2**64, are below {share}"
    lines.append(f"{rule}{', where the source did not say' if settings['splits'] == 'source' else ''}.")
    if settings["categories"]:
        lines.append(f"Only the categories {', '.join(settings['categories'])}.")
    return lines


def _table(title: str, head: str, counts: Counter, ranked: bool = True) -> list[str]:
    if not counts:
        return []
    rows = counts.most_common(_MOST_TABLE_ROWS) if ranked else list(counts.items())
    lines = [f"## {title}", "", f"| {head} | meshes |", "|---|---|"]
    lines += [f"| {table_cell(key)} | {number:,} |" for key, number in rows]
    if len(counts) > len(rows):
        lines.append(f"| {len(counts) - len(rows):,} others | {sum(counts.values()) - sum(n for _, n in rows):,} |")
    return [*lines, ""]


def _known_table(title: str, head: str, counts: Counter) -> list[str]:
    """As `_table`, but nothing where it is known of no mesh."""
    return _table(title, head, counts) if any(counts) else []


def _by_bin(entry: tuple[str, int]) -> int:
    return int(entry[0])


def _bin_name(index: int) -> str:
    low = FACE_BINS[index - 1] + 1 if index else 1
    return f"{low} to {FACE_BINS[index]}" if index < len(FACE_BINS) else f"{low} and more"


def table_cell(text: str) -> str:
    """Text that fits into a cell of a table; "not known" for none."""
    return " ".join(text.replace("|", "/").split()) or "not known"


def _shown(source: str) -> str:
    """A source without the folders of the machine it lay on."""
    return source if source.startswith(HUB) else os.path.basename(os.path.abspath(source))


def _code(text: str) -> str:
    return f"`{text.replace('`', ' ')}`"
