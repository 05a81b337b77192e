"""Runs of training.prepare_data that several tests make, and what they look at afterwards."""

import json
from pathlib import Path

import bad_files
import numpy as np
import pyarrow
import pyarrow.parquet

from training import prepare_data
from training.prepare import prepared_set


def prepare(*arguments: object) -> int:
    return prepare_data.main([str(argument) for argument in (*arguments, "--disable_tqdm")])


def rows(out: Path, split: str = "*") -> list[dict]:
    files = sorted((out / "data").glob(f"{split}-*.parquet"))
    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def rejected(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a finished data set."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_boxes(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"box {number:03d}.obj").write_text(
            bad_files.box(0.1 + 0.05 * (number % 16), 0.1 + 0.05 * (number // 16))
        )
    return folder


def write_rows(path: Path, count: int, faces: int) -> Path:
    """A parquet file of `count` different surfaces of `faces` triangles."""
    rng = np.random.default_rng(0)
    schema = pyarrow.schema([prepared_set.SCHEMA.field(name) for name in ("name", "vertices", "faces")])

    def lists(numbers: np.ndarray) -> pyarrow.Array:
        """(N, M, 3) as N lists of M lists of three."""
        inner = np.arange(0, numbers.size + 1, 3, dtype=np.int32)
        outer = np.arange(0, len(inner), numbers.shape[1], dtype=np.int32)
        nested = pyarrow.ListArray.from_arrays(inner, pyarrow.array(numbers.reshape(-1)))
        return pyarrow.ListArray.from_arrays(outer, nested)

    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 100):
            names = [f"soup {number}" for number in range(first, min(first + 100, count))]
            vertices = rng.random((len(names), 3 * faces, 3), dtype=np.float32)
            indices = np.tile(np.arange(3 * faces, dtype=np.int32).reshape(1, -1, 3), (len(names), 1, 1))
            columns = [pyarrow.array(names), lists(vertices), lists(indices)]
            writer.write_table(pyarrow.table(columns, schema=schema))
    return path
