"""The sections of a model card on the data it was trained on: how it was prepared, and whose work it is."""

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet

from training.prepare.card import how_prepared, table_cell
from training.prepare.prepared_set import SETTINGS, SPLITS, SUMMARY, shard_name

_COLUMNS = ("author", "license", "source", "pack")
# As prepare_data's sources of meshes collected from repositories have it.
_IN_REPOSITORY = re.compile(r"github:(?P<repository>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]+)/")
_CREATIVE_COMMONS = re.compile(r"CC-(?P<kind>BY(?:-NC)?(?:-SA|-ND)?)-(?P<version>\d\.\d)", re.IGNORECASE)
_PUBLIC_DOMAIN = ("cc0-1.0", "pddl-1.0", "unlicense", "mit-0", "0bsd")  # they ask for no credit


class Origin(NamedTuple):
    """Whose meshes they are, and where they were found; "" for what is not known."""

    author: str
    license: str
    place: str  # of a repository github:owner/name@commit, else the first folder or the file


def data_sections(folder: Path) -> dict[str, str]:
    """
    Markdown on a data set that prepare_data finished, by the title of the section.

    Raises:
        ValueError: the folder is none, or lacks files of meshes, naming what is missing.
    """
    try:
        summary, settings = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (SUMMARY, SETTINGS))
        shards = [shard_name(split, number) for split in SPLITS for number in range(summary["shards"][split])]
        prepared = _prepared(summary, settings)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} is no data set that python -m training.prepare_data has finished: {error or type(error)}"
        ) from error
    found = origins([folder / name for name in shards])
    return {"Data": prepared, "Licences and credits of the data": credits_of(found)}


def _prepared(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    meshes = summary["meshes"]
    rejected = ", ".join(f"{reason}: {number:,}" for reason, number in summary["rejected"].items())
    only = settings.get("only_licenses")
    return "\n".join(
        [
            f"{sum(meshes.values()):,} triangle meshes of {settings['min_faces']:,} to {settings['max_faces']:,} "
            f"faces, {summary['faces']:,} faces in all: {meshes['train']:,} to learn from and "
            f"{meshes['validation']:,} held out. How they were prepared (`python -m training.prepare_data`):",
            "",
            *(f"- {line}" for line in how_prepared(settings)),
            *([f"- Only meshes under {', '.join(only)}."] if only else []),
            *([f"- Left out: {rejected}."] if rejected else []),
        ]
    )


def origins(files: list[Path]) -> dict[Origin, Counter[str]]:
    """
    The meshes of parquet files by their origin, for each the number of meshes of each pack, most meshes first.

    Raises:
        ValueError: a file is missing or cannot be read, or lacks a column.
    """
    found: dict[Origin, Counter[str]] = defaultdict(Counter)
    for path in files:
        try:
            columns = pyarrow.parquet.read_table(path, columns=list(_COLUMNS)).select(_COLUMNS).to_pydict()
        except (OSError, KeyError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        for author, license, source, pack in zip(*columns.values(), strict=True):
            found[Origin(author or "", license or "", _place(source or ""))][pack or ""] += 1
    ranked = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    return {origin: packs for origin, packs in ranked}


def _place(source: str) -> str:
    if match := _IN_REPOSITORY.match(source):
        return match[0].removesuffix("/")
    return source.partition("/")[0]


def credits_of(found: dict[Origin, Counter[str]]) -> str:
    """The licences with what they ask for, the credits that are due, and every origin in a table."""
    by_license: Counter[str] = Counter()
    by_author: Counter[str] = Counter()
    for origin, packs in found.items():
        by_license[origin.license] += packs.total()
        by_author[origin.author or "authors not known"] += packs.total()
    lines = [f"- {_licence_line(license, number)}" for license, number in by_license.most_common()]
    authors = ", ".join(f"{table_cell(author)} ({number:,})" for author, number in by_author.most_common())
    lines += ["", f"The meshes are by {authors}. Thank you."]
    due = {origin: packs for origin, packs in found.items() if not _is_public_domain(origin.license)}
    if due:
        lines += [
            "",
            "Credits that these licences ask for; all meshes were scaled, welded, triangulated and quantised:",
        ]
        lines += ["", *(f"- {_credit(origin, packs)}" for origin, packs in due.items())]
    lines += ["", f"<details><summary>All {len(found):,} places that meshes came from</summary>", ""]
    lines += ["| author | licence | from | packs | meshes |", "|---|---|---|---|---:|"]
    for origin, packs in found.items():
        cells = (origin.author, origin.license, _link(origin.place), _packs(packs))
        lines.append(f"| {' | '.join(table_cell(cell) for cell in cells)} | {packs.total():,} |")
    return "\n".join([*lines, "", "</details>"])


def _is_public_domain(license: str) -> bool:
    return license.lower() in _PUBLIC_DOMAIN


def _licence_line(license: str, number: int) -> str:
    count = f"{number:,} {'mesh' if number == 1 else 'meshes'}"
    if not license:
        return f"**Licence not known**: {count}. Whoever uses the model must clear that up."
    if _is_public_domain(license):
        return f"{_licence_link(license)}: {count}. It asks for no credit; the authors are named all the same."
    if not _CREATIVE_COMMONS.fullmatch(license):
        return f"{_licence_link(license)}: {count}. Its notices stand in the places named below."
    kind = license.upper()
    asks = ["credit", *(["no commercial use"] if "-NC" in kind else [])]
    asks += [what for part, what in (("-SA", "the same licence"), ("-ND", "no adaptations")) if part in kind]
    return f"{_licence_link(license)}: {count}. It asks for {', '.join(asks)}."


def _licence_link(license: str) -> str:
    if license.lower() == "cc0-1.0":
        address = "https://creativecommons.org/publicdomain/zero/1.0/"
    elif match := _CREATIVE_COMMONS.fullmatch(license):
        address = f"https://creativecommons.org/licenses/{match['kind'].lower()}/{match['version']}/"
    elif re.fullmatch(r"[\w.+-]+", license):
        address = f"https://spdx.org/licenses/{license}.html"
    else:
        return table_cell(license)
    return f"[{license}]({address})"


def _credit(origin: Origin, packs: Counter[str]) -> str:
    named = ", ".join(f'"{table_cell(pack)}"' for pack in packs if pack) or "meshes"
    license = _licence_link(origin.license) if origin.license else "licence not known"
    return f"{named} by {table_cell(origin.author)}, {license}, {_link(origin.place)}"


def _link(place: str) -> str:
    if match := _IN_REPOSITORY.match(f"{place}/"):
        return f"[{match['repository']}](https://github.com/{match['repository']}/tree/{match['commit']})"
    return place


def _packs(packs: Counter[str]) -> str:
    return ", ".join(f"{pack} ({number:,})" for pack, number in sorted(packs.items()) if pack)
