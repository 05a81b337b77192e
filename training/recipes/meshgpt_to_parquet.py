"""
MeshGPT's processed ShapeNet, one pickle, as parquet files that training.prepare_data and training/train.py read.

    python -m training.recipes.meshgpt_to_parquet shapenet.pkl --out data/meshgpt
    python -m training.prepare_data data/meshgpt --splits source --out data/mine

The pickle is a dictionary of lists: name_, vertices_ and faces_ of each of train and val. It is read whole, in a
process with limits, and anything in it but containers, numbers, text and numpy arrays is refused: nothing of it runs.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from training.prepare.isolation import LimitedProcess, Limits
from training.prepare.items import printable
from training.prepare.rejection import Rejected
from training.prepare.synsets import synset_category
from training.recipes.safe_pickle import UnsafePickleError, safe_load
from training.run.ending import CommandError, ends_in_words

SPLITS = {"train": "train", "val": "validation"}  # the pickle's words, and those of prepare_data
SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("source", pyarrow.string()),
        ("category", pyarrow.string()),
        ("vertices", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
        ("faces", pyarrow.list_(pyarrow.list_(pyarrow.int32()))),  # polygons are triangulated where they are read
    ]
)
MESHES_IN_A_ROW_GROUP = 256


class Converted(NamedTuple):
    """How many meshes each file has, by its name, and why others are left out."""

    meshes: dict[str, int]
    left_out: list[str]


def convert(path: Path, folder: Path) -> Converted:
    """
    Write train-00000.parquet and validation-00000.parquet into `folder`, from the pickle at `path`. Neither time nor
    memory is limited.

    Raises:
        Rejected: the pickle asks for something that is not data.
        ValueError: it is no pickle, or not MeshGPT's.
    """
    try:
        with open(path, "rb") as file:
            content = safe_load(file)
    except UnsafePickleError as error:
        raise Rejected("unsafe pickle", str(error)) from error
    if not isinstance(content, dict) or not any(f"vertices_{split}" in content for split in SPLITS):
        raise ValueError("not MeshGPT's data: no dictionary with name_train, vertices_train and faces_train")
    converted = Converted({}, [])
    for split, name in SPLITS.items():
        parts = [content.get(f"{part}_{split}", []) for part in ("name", "vertices", "faces")]
        if not all(isinstance(part, (list, tuple, np.ndarray)) for part in parts) or len(set(map(len, parts))) != 1:
            raise ValueError(f"not MeshGPT's data: name_{split}, vertices_{split} and faces_{split} do not match")
        target = folder / f"{name}-00000.parquet"
        with pyarrow.parquet.ParquetWriter(target, SCHEMA) as writer:
            tables, count = [], 0
            for table in _tables(parts, f"{printable(path.name)}#{split}", converted.left_out):
                tables.append(table)
                count += 1
                if len(tables) == MESHES_IN_A_ROW_GROUP:
                    writer.write_table(pyarrow.concat_tables(tables).combine_chunks())
                    tables = []
            if tables:
                writer.write_table(pyarrow.concat_tables(tables).combine_chunks())
        if count:
            converted.meshes[target.name] = count
        else:
            target.unlink()
    return converted


def _tables(parts: list[Sequence[Any]], label: str, left_out: list[str]) -> Iterator[pyarrow.Table]:
    """A table of one row for each mesh that is vertices and faces."""
    for index, (name, vertices, faces) in enumerate(zip(*parts, strict=True)):
        source = f"{label}/{index}"
        name = printable(str(name)) or source
        row = {"name": name, "source": source, "category": synset_category(name)}
        try:
            row |= {"vertices": list(vertices), "faces": list(faces)}
            yield pyarrow.Table.from_pylist([row], SCHEMA)
        except (TypeError, ValueError, pyarrow.ArrowException) as error:
            left_out.append(f"{source} ({name}): {' '.join(str(error).split())}")


def make_converter() -> Callable[[tuple[Path, Path]], Converted]:
    return lambda request: convert(*request)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m training.recipes.meshgpt_to_parquet",
        description=__doc__.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pickle", type=Path, help="the file of MeshGPT's authors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the parquet files")
    parser.add_argument("--time_limit", type=float, default=600.0, help="seconds that reading may take (default 600)")
    parser.add_argument("--memory_limit", type=float, default=4.0, help="GiB that reading may take (default 4)")
    return parser.parse_args(arguments)


@ends_in_words("meshgpt_to_parquet")
def main(arguments: Sequence[str] | None = None) -> int:
    """0 when there are meshes in the files, 1 on an error."""
    options = parse_options(arguments)
    if not options.pickle.is_file():
        raise CommandError(f"there is no file {options.pickle}")
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise CommandError(f"{options.out} exists and is not an empty folder: choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    limits = Limits(options.time_limit, int(options.memory_limit * 2**30))
    with tempfile.TemporaryDirectory(prefix=".meshgpt-", dir=options.out) as scratch:
        process = LimitedProcess(make_converter, limits)
        try:
            answer = process.call((options.pickle, Path(scratch)))
        except Rejected as rejection:
            answer = rejection
        else:
            process.kill()
        if isinstance(answer, Rejected):
            raise CommandError(f"{options.pickle} cannot be read: {answer}")
        for reason in answer.left_out:
            print(f"meshgpt_to_parquet: left out: {reason}", file=sys.stderr)
        if not answer.meshes:
            raise CommandError(f"{options.pickle} holds no meshes")
        for name, count in answer.meshes.items():
            os.replace(Path(scratch) / name, options.out / name)
            print(f"{options.out / name}: {count:,} {'mesh' if count == 1 else 'meshes'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
