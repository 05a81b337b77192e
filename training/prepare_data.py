"""
Turns collections of meshes into a data set that `datasets.load_dataset` and training/train.py read.

    python -m training.prepare_data SOURCE... --out DIR

A SOURCE is a folder, searched through for every format that trimesh reads; a mesh file; a zip or tar archive; a
parquet file with vertices and faces; or hub:user/name, a data set of the Hub.
Folders may hold all of these. Run the same command again to go on after an interruption.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iflame_cli.errors import CommandError
from iflame_hf.files_iflame import write_whole
from training.prepare.card import data_card, summary_of
from training.prepare.isolation import Limits, Pool, preload
from training.prepare.items import Selection, chosen_categories
from training.prepare.mesh_worker import Recipe, can_decimate, make_handler
from training.prepare.prepared_set import SUMMARY, UNPACKED, PreparedSet, remove_earlier
from training.prepare.rejection import NOT_CHOSEN, Rejected
from training.prepare.sources import SourceLostError, Sources
from training.run.ending import ends_in_words

_COMMIT_INTERVAL_SECONDS = 5
_RESOLUTION = 128  # of the published model
# Options that do not change the result: a run that goes on with others of these writes the same set.
_OPTIONS_WITHOUT_EFFECT = ("out", "num_workers", "overwrite", "disable_tqdm")


def prepare_data(options: argparse.Namespace) -> tuple[dict[str, Any], bool]:
    """
    Run with the options of `parse_options`, to the end, and return the figures of `summary.json`, and whether this run
    made them: a set that was finished already stays as it is.

    Raises:
        ValueError: options or sources that make no sense, a folder that cannot be written to or gone on with, or a
            finished set that lacks files.
        SourceLostError, OSError, sqlite3.Error: what may pass; the same run again goes on.
    """
    _check(options)
    listed = _read_ids(options.ids)
    categories = chosen_categories(options.categories) if options.categories else None
    limits = Limits(options.time_limit, int(options.memory_limit * 2**30))
    folder = Path(options.out)
    selection = Selection(categories, listed, options.category_level)
    sources = Sources(options.sources, selection, str(folder / UNPACKED), str(folder), limits)
    if options.overwrite:
        remove_earlier(folder)
    settings = {key: value for key, value in sorted(vars(options).items()) if key not in _OPTIONS_WITHOUT_EFFECT}
    settings |= {"ids": _name_ids(options.ids, listed), "resolution": _RESOLUTION}
    recipe = Recipe(
        options.min_faces, options.max_faces, options.up_axis, options.decimate, options.max_deviation, _RESOLUTION
    )
    prepared = PreparedSet(
        folder,
        settings,
        options.shard_size,
        options.validation_share,
        options.splits == "source",
        options.deduplicate,
        options.license,
        options.only_licenses,
    )
    if prepared.is_finished:
        return prepared.finished_summary(), False
    is_done = False
    try:
        with sources, Pool(partial(make_handler, recipe), options.num_workers, limits) as pool:
            _run(prepared, sources, pool, options.disable_tqdm)
        prepared.finish()
        summary = summary_of(prepared.counts, prepared.shards, prepared.items_done)
        write_whole(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        card = data_card(folder.resolve().name, settings, summary, prepared.counts)
        write_whole(folder / "README.md", card)
        is_done = True
    finally:
        prepared.close(remove_state=is_done)
    return summary, True


def _run(prepared: PreparedSet, sources: Sources, pool: Pool, disable_tqdm: bool) -> None:
    """Every item that is not done yet, to its end in the set or in the record of rejections."""
    with tqdm(total=sources.count_files(), unit="mesh", disable=disable_tqdm) as bar:

        def lengthen(count: int) -> None:
            bar.total += count
            bar.refresh()

        bar.update(prepared.items_done)
        taken, rejected, committed = 0, 0, time.monotonic()
        items = sources.items(prepared.items_done, prepared.digest, lengthen)
        for item, answer in pool.map(items, lambda item: item.payload if item.rejection is None else None):
            answer = item.rejection or answer
            if isinstance(answer, Rejected):
                prepared.reject(item, answer)
                rejected += answer.kind != NOT_CHOSEN
            elif prepared.add(item, answer):
                taken += 1
            else:
                rejected += 1
            _remove(item.temporary)
            bar.set_postfix(taken=taken, rejected=rejected, refresh=False)
            bar.update()
            if time.monotonic() - committed > _COMMIT_INTERVAL_SECONDS:
                prepared.commit()
                committed = time.monotonic()


def _remove(path: str | None) -> None:
    if path is not None and os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif path is not None and os.path.exists(path):
        os.unlink(path)


def _check(options: argparse.Namespace) -> None:
    for name in ("min_faces", "num_workers", "shard_size", "category_level"):
        least = 0 if name == "category_level" else 1
        if getattr(options, name) < least:
            raise ValueError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.max_faces < options.min_faces:
        raise ValueError(f"--max_faces {options.max_faces} is less than --min_faces {options.min_faces}")
    if not 0 <= options.validation_share < 1:
        raise ValueError(f"--validation_share must be at least 0 and less than 1, got {options.validation_share}")
    for name, least in (("time_limit", 0.1), ("memory_limit", 0.1), ("max_deviation", 0.0)):
        if not least <= getattr(options, name) < math.inf:
            raise ValueError(f"--{name} must be at least {least:g}, got {getattr(options, name)}")
    if options.decimate and not can_decimate():
        raise ValueError("--decimate needs two more packages: pip install fast-simplification scipy")


def _read_ids(path: str | None) -> frozenset[str] | None:
    """The file names in a list, one a line, without folders."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the list {path} cannot be read: {error}") from error
    names = frozenset(os.path.basename(line.strip()) for line in lines) - {""}
    if not names:
        raise ValueError(f"the list {path} is empty")
    return names


def _name_ids(path: str | None, names: frozenset[str] | None) -> str | None:
    if path is None or names is None:
        return None
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    return f"{os.path.basename(path)}: {len(names)} names, sha256 {digest[:16]}"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.prepare_data",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    flag = {"action": argparse.BooleanOptionalAction}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("sources", nargs="+", metavar="SOURCE", help="folder, file, archive, parquet, or hub:user/name")
    add("--out", required=True, metavar="DIR", help="folder to write, new or of the same run")
    add("--ids", metavar="FILE", help="take only the files in this list, one name a line, wherever they lie")
    add("--categories", nargs="+", metavar="NAME", help="take only these, by name or by ShapeNet's synset id")
    add(
        "--category_level",
        type=int,
        default=1,
        help="which folder below a source names the category, where none is a synset id; 0 for none (default 1)",
    )
    add("--min_faces", type=int, default=4, help="fewest faces after quantisation (default 4)")
    add("--max_faces", type=int, default=800, help="most faces (default 800)")
    add("--decimate", **flag, default=False, help="reduce larger meshes to --max_faces instead of rejecting them")
    add(
        "--max_deviation",
        type=float,
        default=0.05,
        help="reject what decimation moves by more than this part of its longest side (default 0.05)",
    )
    add("--deduplicate", **flag, default=True, help="reject what equals an earlier mesh after quantisation (default)")
    add("--validation_share", type=float, default=0.05, help="share held out, by a hash of names (default 0.05)")
    add(
        "--splits",
        choices=("hash", "source"),
        default="hash",
        help="source: keep the splits of sources that have some, and hash the rest (default hash)",
    )
    add(
        "--up_axis",
        choices=("y", "z"),
        default="y",
        help="vertical axis of the sources, but of dae files that declare theirs; written is y (default y)",
    )
    add("--license", metavar="NAME", help="licence of meshes whose source does not tell theirs")
    add(
        "--only_licenses",
        nargs="+",
        metavar="NAME",
        help="take only meshes of these licences, such as CC0-1.0; what is known of none is left out",
    )
    add("--num_workers", type=int, default=cores, help="processes that read meshes (default: as many as cores)")
    add("--time_limit", type=float, default=60.0, help="seconds that reading one mesh may take (default 60)")
    add("--memory_limit", type=float, default=4.0, help="GiB that reading one mesh may take (default 4)")
    add("--shard_size", type=int, default=4096, help="meshes in a file of the data set (default 4096)")
    add("--overwrite", action="store_true", help="discard what an earlier run wrote to DIR")
    add("--disable_tqdm", action="store_true", help="show no progress bar")
    return parser.parse_args(arguments)


@ends_in_words("prepare_data")
def main(arguments: Sequence[str] | None = None) -> int:
    """0 when the set is finished, 1 on an error or if it has no mesh, 130 and 143 after Ctrl-C and SIGTERM."""
    options = parse_options(arguments)
    preload("training.prepare.mesh_worker", "training.prepare.containers")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    before = signal.signal(signal.SIGTERM, _terminate)
    again = "run the same command again to go on"
    try:
        summary, is_new = prepare_data(options)
    except KeyboardInterrupt:
        print(f"\nprepare_data: interrupted; {again}", file=sys.stderr)
        return 130
    except _Terminated:
        print(f"\nprepare_data: ended by a signal; {again}", file=sys.stderr)
        return 143
    except (SourceLostError, RuntimeError, OSError, sqlite3.Error) as error:
        raise CommandError(f"{error}; {again} when that is mended") from error
    finally:
        signal.signal(signal.SIGTERM, before)
    total = sum(summary["meshes"].values())
    if is_new:
        print(_report(options.out, summary))
    else:
        print(
            f"{options.out} is finished already ({total:,} meshes; sources that changed since were not read); "
            "--overwrite makes it anew"
        )
    return 0 if total else 1


class _Terminated(BaseException):
    pass


def _terminate(*_: Any) -> None:
    raise _Terminated


def _report(out: str, summary: dict[str, Any]) -> str:
    meshes, shards, rejected = summary["meshes"], summary["shards"], dict(summary["rejected"])
    lines = [
        f"{out}: {sum(meshes.values()):,} meshes ({meshes['train']:,} train, {meshes['validation']:,} validation) of "
        f"{summary['faces']:,} faces, in {sum(shards.values())} files"
    ]
    if meshes["train"] and not meshes["validation"]:
        lines.append(
            "none is held out: train without --validation_file, or prepare anew with a larger --validation_share"
        )
    if others := rejected.pop(NOT_CHOSEN, 0):
        lines.append(f"{others:,} not asked for")
    if rejected:
        lines.append(f"{sum(rejected.values()):,} rejected, see rejected.jsonl:")
        width = len(f"{max(rejected.values()):,}")
        lines += [f"  {number:>{width},} {kind}" for kind, number in rejected.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
