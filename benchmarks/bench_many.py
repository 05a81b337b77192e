"""
Many meshes of mixed lengths: rows that go on with the next mesh at once, against batches that wait for their longest.

    python benchmarks/bench_many.py [--preset published] [--meshes 10000] [--rows 64 512] [--lengths FILE]

The weights are random, so each mesh is made to end at a number of faces that is drawn for it, from those of meshes by
artists or of FILE. Both make the same meshes on the same engine. There are no figures unless every mesh came once and
whole, with as many faces as were drawn for it.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import numpy as np
import torch

from benchmarks import common
from benchmarks.common import Row, gibibytes
from benchmarks.models import build_model, draw_models
from benchmarks.oracle import WrongResult
from iflame_hf import IFlameForCausalLM, IFlameTokenizer, engine_iflame, many_iflame
from iflame_hf.decoding_iflame import DecodeRequest
from iflame_hf.engine_iflame import DecodeEngine
from iflame_hf.format_iflame import known_format
from iflame_hf.threads_iflame import spare_a_core
from training.run.ending import ends_in_words

FORMAT = known_format()

# F faces, T tokens

PRESETS = {"published": {"meshes": 10_000, "batch_size": [64, 512]}, "demo": {"meshes": 24, "batch_size": [8]}}
SCHEDULES = ("fixed", "refilled")
# Percentiles 0 to 100 of the faces of 8,815 low-poly objects by artists (Kenney, Quaternius, Kay Lousberg, The Base
# Mesh and others, openly licensed), as training/prepare_data.py counts them: triangles after quantisation to 128
# steps, of meshes of at most 800. Their mean is 233.
ARTIST_FACES = (
    4, 12, 18, 20, 24, 28, 29, 32, 35, 36, 40, 42, 44, 44, 48, 52, 53, 56, 60, 60, 64, 66, 68, 72, 76, 79, 82, 84,
    88, 92, 94, 96, 100, 104, 108, 110, 115, 118, 121, 124, 128, 132, 136, 140, 144, 148, 154, 158, 164, 168, 172,
    176, 180, 188, 192, 198, 204, 210, 216, 220, 226, 234, 240, 248, 256, 262, 270, 276, 284, 292, 300, 308, 316,
    324, 332, 340, 350, 360, 368, 379, 388, 400, 414, 428, 440, 452, 468, 486, 504, 522, 540, 560, 577, 600, 623,
    640, 668, 698, 724, 760, 800,
)  # fmt: skip
COLUMNS = {
    "schedule": "rows are",
    "dtype": "dtype",
    "batch_size": "rows",
    "meshes": "meshes",
    "mean_faces": "mean faces",
    "seconds": "seconds",
    "meshes_per_second": "meshes/s",
    "faces_per_second": "faces/s",
    "tokens_per_second": "tokens/s",
    "times_fixed": "times fixed",
    "occupancy": "occupancy",
    "same_meshes": "same meshes",
    "memory_gib": "GiB",
    "state_gib": "state GiB",
    "weights_gib": "weights GiB",
}
NOTES = """\
Sampled meshes, each to the number of faces that is drawn for it; tokens/s counts the coordinates of these faces alone.
Fixed: the next rows begin when all have ended; refilled: each row at once. Memory is the GPU's peak.
Occupancy: of the faces that the engine made, in all rows, the share that belongs to a mesh.
Same meshes: the share that is, token by token, what fixed batches made.
"""

Made = list[tuple[many_iflame._Job, torch.Tensor]]  # each with its ids (T,)


def draw_faces(counts: np.ndarray, meshes: int, seed: int) -> np.ndarray:
    """
    (meshes,) numbers of faces, as often as among `counts`: their quantiles, linearly interpolated, at random places.

    Args:
        counts: numbers of faces, or the quantiles of such at equal distances.
    """
    return np.rint(np.quantile(counts, np.random.default_rng(seed).random(meshes))).astype(np.int64)


def read_counts(path: str) -> np.ndarray:
    """The numbers of faces in a file, one a line. Raises ValueError for what is none."""
    try:
        counts = [int(word) for word in Path(path).read_text().split()]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise ValueError(f"{path} must hold numbers of faces from 1 on, one a line")
    return np.array(counts)


def request_for(model: IFlameForCausalLM, most_faces: int, kv_cache_dtype: str | None) -> DecodeRequest:
    """What sampling asks of an engine, with room for so many faces. Raises ValueError where no engine serves it."""
    request = many_iflame._request(
        model,
        many_iflame._Job(0, 0, torch.tensor(FORMAT.start_face)),
        {**common.SAMPLING, "max_faces": most_faces, "kv_cache_dtype": kv_cache_dtype},
    )
    if request is None:
        raise ValueError(f"no decode engine: {engine_iflame.why_no_engine(model) or 'this model has none'}")
    return request


def jobs_for(faces: np.ndarray, seed: int) -> list[many_iflame._Job]:
    """A mesh of each number of `faces` (meshes,), in the order given."""
    start = torch.tensor(FORMAT.start_face)
    return [many_iflame._Job(number, seed + number, start, faces=count) for number, count in enumerate(faces.tolist())]


def make_meshes(
    model: IFlameForCausalLM, request: DecodeRequest, rows: int, schedule: str, faces: np.ndarray, seed: int
) -> Made:
    """Those of `jobs_for`, in so many rows at a time."""
    jobs = jobs_for(faces, seed)
    together = len(jobs) if schedule == "refilled" else rows
    parts = [jobs[first : first + together] for first in range(0, len(jobs), together)]
    return [made for part in parts for made in many_iflame._refilled(model, part, rows, request)]


def require_meshes(made: Made, faces: np.ndarray) -> None:
    """Raises WrongResult unless each mesh came once, whole, and with its number of `faces` (meshes,)."""
    numbers = sorted(job.number for job, _ in made)
    if numbers != list(range(len(faces))):
        raise WrongResult(f"of {len(faces)} meshes came {len(set(numbers))}, and {len(numbers)} in all")
    tokenizer = IFlameTokenizer()
    for job, ids in made:
        drawn = int(faces[job.number])
        first, last = len(FORMAT.start_face), FORMAT.num_tokens(drawn, start=True)
        whole = ids[:first].tolist() == FORMAT.start_face and ids[last:].tolist() == FORMAT.end_face
        found = len(tokenizer.decode_arrays(ids)[1])
        if not whole or found != drawn:
            raise WrongResult(f"mesh {job.number} has {len(ids)} tokens with {found} faces, not {drawn} and its end")


@contextmanager
def engine_faces() -> Iterator[list[int]]:
    """A list of the rows of each face that engines make meanwhile."""
    made, original = [], DecodeEngine.next_face

    def next_face(engine, choice):
        made.append(engine.rows)
        return original(engine, choice)

    DecodeEngine.next_face = next_face
    try:
        yield made
    finally:
        DecodeEngine.next_face = original


def add_figures(row: Row, options: argparse.Namespace, model: IFlameForCausalLM, faces: np.ndarray) -> Made:
    """Measures, writes the figures into the row, and returns the meshes."""
    rows, schedule = row["batch_size"], row["schedule"]
    engine_iflame._idle.pop(model, None)  # of other rows
    request = request_for(model, int(faces.max()), options.kv_cache_dtype)
    # Rows of the same engine, each filled more than once.
    make_meshes(model, request, rows, schedule, np.arange(2 * rows + 1) % 3 + 1, options.seed)
    runs: list[Made] = []
    with engine_faces() as rows_of_faces:
        seconds, memory = common.measure(
            lambda: runs.append(make_meshes(model, request, rows, schedule, faces, options.seed)),
            options.device,
            repeats=1,
            measurements=options.repeats,
        )
    for run in runs:
        require_meshes(run, faces)
    total = int(faces.sum())
    row["mean_faces"] = float(faces.mean())
    row["seconds"] = seconds
    row["meshes_per_second"] = [len(faces) / each for each in seconds]
    row["faces_per_second"] = [total / each for each in seconds]
    row["tokens_per_second"] = [FORMAT.num_tokens(total) / each for each in seconds]
    row["occupancy"] = len(runs) * total / sum(rows_of_faces)
    row["memory_gib"] = gibibytes(memory)
    (engine,) = engine_iflame._idle.pop(model)
    row["state_gib"], row["weights_gib"] = map(gibibytes, common.engine_memory(engine))
    return runs[-1]


def compare(refilled: Row, fixed: Row, refilled_meshes: Made, fixed_meshes: Made) -> None:
    """Writes into the row of refilled rows how it does beside fixed batches, and which share of meshes is the same."""
    refilled["times_fixed"] = statistics.median(fixed["seconds"]) / statistics.median(refilled["seconds"])
    expected = {job.number: ids for job, ids in fixed_meshes}
    same = [torch.equal(ids, expected[job.number]) for job, ids in refilled_meshes]
    refilled["same_meshes"] = sum(same) / len(same)


@ends_in_words("bench_many")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_size_options(parser)
    parser.add_argument("--meshes", type=int, help="how many are made")
    parser.add_argument(
        "--rows", type=int, nargs="+", dest="batch_size", help="meshes at a time: one or several, each measured"
    )
    parser.add_argument("--lengths", metavar="FILE", help="numbers of faces, one a line, instead of artists'")
    parser.add_argument("--schedule", nargs="+", choices=SCHEDULES, default=list(SCHEDULES), help="both, or one")
    parser.add_argument("--kv_cache_dtype", choices=["int8"], help="of the engine's keys and values")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each")
    options = common.parse_options(parser, PRESETS, arguments)
    if min(options.meshes, options.repeats, *options.batch_size) < 1:
        parser.error("--meshes, --rows and --repeats must be at least 1")
    device = options.device
    try:
        counts = np.array(ARTIST_FACES) if options.lengths is None else read_counts(options.lengths)
        models = draw_models(common.build_config(options), options.seed, None, device)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    faces = draw_faces(counts, options.meshes, options.seed)

    rows: list[Row] = []
    with spare_a_core(device):
        dtype = common.DTYPES[options.dtype]
        model = build_model(models.config, models.weights, device, dtype, "sdpa", "auto")
        for batch in options.batch_size:
            measured: dict[str, Row] = {}
            made: dict[str, Made] = {}
            for schedule in options.schedule:
                row = {"schedule": schedule, "dtype": options.dtype, "batch_size": batch, "meshes": options.meshes}
                with common.reported(row, rows, device):
                    made[schedule] = add_figures(row, options, model, faces)
                    measured[schedule] = row
            if made.keys() == set(SCHEDULES):
                compare(measured["refilled"], measured["fixed"], made["refilled"], made["fixed"])
        options.lengths = None if options.lengths is None else Path(options.lengths).name
        return common.report("many", options, rows, COLUMNS, NOTES)


if __name__ == "__main__":
    sys.exit(main())
