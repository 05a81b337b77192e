"""
Speed of the data loader: meshes a second, read, augmented, brought into canonical order, packed, and in the training
process as a batch.

    python benchmarks/bench_loader.py [--data FILE.parquet ...] [--num_workers 1]

Without --data the meshes are tori of 200 faces with random bumps. Before anything is timed, an epoch without
augmentation must hold every mesh of the data set once, triangle by triangle.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import datasets
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import torch

from benchmarks import common
from benchmarks.common import Row
from benchmarks.oracle import WrongResult
from iflame_hf import IFlameTokenizer
from training.rows.encode import MeshEncoder
from training.rows.load import TrainingRows
from training.rows.map import MappedRows, MeshRows, RowStream, mesh_sizes
from training.rows.meshes import ParquetMeshes
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE
from training.rows.stream import StreamedRows, open_stream
from training.run.ending import ends_in_words

COLUMNS = {
    "source": "source",
    "row_tokens": "tokens a row",
    "batch_size": "rows a batch",
    "meshes_per_second": "meshes/s",
    "loader_microseconds": "loader us",
    "training_process_microseconds": "training process us",
    "faces_per_mesh": "faces a mesh",
    "padding": "padding %",
}
NOTES = """\
Meshes that arrive in the training process a second, which does nothing else. Two figures are two measurements; us are
microseconds of CPU time a mesh, which other programs on the machine change less. Faces are those after quantisation;
meshes longer than a row are dropped.
"""
SOURCES = ("memory-mapped", "streaming")
# As training.prepare_data writes them.
ROW_GROUP = 256
SEED = 0
EVERYTHING = {"scale": 0.25, "shift": True, "turn": "any", "mirror": True}


def write_tori(path: Path, count: int, faces: int = 200) -> None:
    """A parquet file of bumpy tori of `faces` triangles, in a grid of 10 around the tube."""
    random = np.random.default_rng(SEED)
    around, along = np.meshgrid(np.arange(10), np.arange(faces // 20), indexing="ij")
    corners = [
        (around + a) % 10 * (faces // 20) + (along + b) % (faces // 20) for a, b in ((0, 0), (1, 0), (1, 1), (0, 1))
    ]
    a, b, c, d = (corner.ravel() for corner in corners)
    triangles = np.concatenate([np.stack([a, b, c], axis=1), np.stack([a, c, d], axis=1)]).astype(np.int32).tolist()
    u, v = 2 * np.pi * around.ravel() / 10, 2 * np.pi * along.ravel() / (faces // 20)
    vertices = []
    for _ in range(count):
        tube = random.uniform(0.2, 0.4, size=len(u))
        ring = 1 + tube * np.cos(u)
        vertices.append(np.stack([ring * np.cos(v), tube * np.sin(u), ring * np.sin(v)], axis=1).tolist())
    columns = {
        "vertices": pyarrow.array(vertices, pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
        "faces": pyarrow.array([triangles] * count, pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=ROW_GROUP)


def open_rows(source: str, files: list[str], row_length: int, augmented: bool) -> TrainingRows:
    tokenizer = IFlameTokenizer()
    varied = EVERYTHING if augmented else {}
    if source == "streaming":
        encode = MeshEncoder(tokenizer, row_length, SEED, **varied)
        return StreamedRows(open_stream(files), encode, "drop")
    meshes = ParquetMeshes(files)
    stream = RowStream(*mesh_sizes(meshes, row_length, "drop"), row_length // TOKENS_PER_FACE, SEED)
    return MappedRows(MeshRows(meshes, tokenizer, row_length, SEED, **varied), stream)


def triangles_of(corners: np.ndarray) -> tuple:
    """The triangles (F, 3, 3) of a mesh, in levels, as a sorted tuple; none flat, no two on the same corners."""
    triangles: dict[tuple, tuple] = {}
    for triangle in corners.tolist():
        first, second, third = map(tuple, triangle)
        if len({first, second, third}) == 3:
            turned = min((first, second, third), (second, third, first), (third, first, second))
            triangles.setdefault(tuple(sorted(turned)), turned)
    return tuple(sorted(triangles.values()))


def expected_meshes(files: list[str], row_length: int) -> Counter:
    """The meshes that rows must hold, from the files' columns alone."""
    expected: Counter = Counter()
    for file in files:
        table = pyarrow.parquet.read_table(file, columns=["vertices", "faces"])
        for vertices, faces in zip(table["vertices"].to_pylist(), table["faces"].to_pylist(), strict=True):
            if len(faces) + EXTRA_FACES <= row_length // TOKENS_PER_FACE:
                points = np.array(vertices)
                low, high = points.min(axis=0), points.max(axis=0)
                levels = np.rint(((points - (low + high) / 2) / (high - low).max() + 0.5) * 128).astype(int)
                expected[triangles_of(levels[np.array(faces)])] += 1
    return expected


def require_all_meshes(rows: TrainingRows, expected: Counter, batch_size: int, num_workers: int) -> None:
    """Raises WrongResult unless the rows of the first epoch decode to the expected meshes, each once."""
    tokenizer, found = IFlameTokenizer(), Counter()
    for batch, place in rows.batches([], batch_size, num_workers=num_workers):
        for ids, positions in zip(batch["input_ids"].numpy(), batch["layout"].positions().numpy(), strict=True):
            for sequence in np.split(ids, np.flatnonzero(positions == 0)[1:]):
                if sequence[0] != tokenizer.pad_token_id and found.total() < expected.total():
                    coordinates = sequence[TOKENS_PER_FACE:-TOKENS_PER_FACE].reshape(-1, 3, 3)
                    found[triangles_of(coordinates[:, :, [1, 2, 0]])] += 1  # z, x, y to x, y, z
        if found.total() == expected.total() or rows.epochs(place) > 2:
            break
    if found != expected:
        wrong = (expected - found).total()
        raise WrongResult(f"{wrong} of {expected.total()} meshes are missing in an epoch, or changed")


def cpu_seconds() -> tuple[float, float]:
    """CPU time that the loader processes, and this one, have taken so far."""
    spent = []
    for processes in (psutil.Process().children(), [psutil.Process()]):
        times = [process.cpu_times() for process in processes]
        spent.append(sum(each.user + each.system for each in times))
    return spent[0], spent[1]


def measure(rows: TrainingRows, row: Row, options: argparse.Namespace) -> None:
    """Writes the figures into the row."""
    pad, bos = IFlameTokenizer().pad_token_id, IFlameTokenizer().bos_token_id
    batches = rows.batches([], row["batch_size"], num_workers=options.num_workers)
    # The consumer is the faster one: what was made before the clock starts is used up by then.
    end = time.perf_counter() + options.warmup
    while time.perf_counter() < end:
        next(batches)
    tokens = padding = meshes = 0
    row["meshes_per_second"], row["loader_microseconds"], row["training_process_microseconds"] = [], [], []
    for _ in range(2):
        taken, start, spent = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() < start + options.seconds:
            batch, _ = next(batches)
            padded = batch["input_ids"][:, ::TOKENS_PER_FACE] == pad
            taken += int((batch["input_ids"][:, ::TOKENS_PER_FACE] == bos).sum())
            tokens += padded.numel()
            padding += int(padded.sum())
        row["meshes_per_second"].append(taken / (time.perf_counter() - start))
        loader, own = (1e6 * (after - before) / taken for before, after in zip(spent, cpu_seconds(), strict=True))
        row["loader_microseconds"].append(loader if options.num_workers else None)
        row["training_process_microseconds"].append(own)
        meshes += taken
    row["tokens_per_second"] = [TOKENS_PER_FACE * tokens / meshes * each for each in row["meshes_per_second"]]
    row["faces_per_mesh"] = (tokens - padding) / meshes - EXTRA_FACES
    row["padding"] = 100 * padding / tokens


@ends_in_words("bench_loader")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="FILE", help="parquet files, instead of tori")
    parser.add_argument("--meshes", type=int, default=4096, help="number of tori")
    parser.add_argument(
        "--row_length", type=int, nargs="+", default=[6921, 1818], help="one or several, each measured"
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 8], help="one or several, each measured")
    parser.add_argument("--num_workers", type=int, default=1, help="loader processes")
    parser.add_argument("--seconds", type=float, default=8, help="of a measurement")
    parser.add_argument("--warmup", type=float, default=3, help="seconds before the clock starts")
    options = parser.parse_args(arguments)
    options.device = torch.device("cpu")
    datasets.disable_progress_bars()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = options.data or [f"{folder}/tori.parquet"]
        if not options.data:
            write_tori(Path(files[0]), options.meshes)
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for row_length in options.row_length:
            expected = expected_meshes(files, row_length)
            for source in SOURCES:
                for batch_size in options.batch_size:
                    row = {"source": source, "row_tokens": row_length, "batch_size": batch_size}
                    with common.reported(row, rows, options.device):
                        plain = open_rows(source, files, row_length, augmented=False)
                        require_all_meshes(plain, expected, batch_size, options.num_workers)
                        measure(open_rows(source, files, row_length, augmented=True), row, options)
    options.data = None if options.data is None else [Path(file).name for file in options.data]
    return common.report("loader", options, rows, COLUMNS, NOTES)


if __name__ == "__main__":
    sys.exit(main())
