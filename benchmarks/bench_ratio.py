"""
What the parts of iFlame are worth: the same size with full attention only, with one layer of full attention for one,
three or seven of linear attention, and with linear attention only, each with the hourglass and without.

    python benchmarks/bench_ratio.py [--preset published] [--data DIR --train_steps 400 --out DIR]

Training steps and generate() are timed as bench_train.py and bench_generate.py do, with the tests of the former. With
--data, a folder that training/prepare_data.py wrote, each variant is trained by training/train.py on the same rows for
as many steps, and its loss on the held-out meshes is told; with --measure loss nothing else is.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch

from benchmarks import bench_generate, bench_train, common
from benchmarks.common import Row, gibibytes, measure
from benchmarks.models import build_model, draw_models
from benchmarks.oracle import Oracle, WrongResult
from iflame_hf import IFlameConfig, engine_iflame
from iflame_hf.threads_iflame import spare_a_core
from training.run.ending import ends_in_words

ROOT = Path(__file__).resolve().parents[1]
PRESETS = {
    "published": {"batch_size": [8], "faces": 767, "repeats": 3, "sample_rows": 64, "sample_faces": 200},
    "demo": {"batch_size": [2], "faces": 60, "repeats": 2, "sample_rows": 2, "sample_faces": 10},
}
# Every so-manieth layer has full attention.
INTERVALS = {"full only": 1, "1:1": 2, "3:1": 4, "7:1": 8, "linear only": 1_000_000}
SHAPES = ("hourglass", "flat")
COLUMNS = {
    "layers": "linear : full",
    "shape": "shape",
    "dtype": "dtype",
    "batch_size": "rows",
    "row_tokens": "tokens a row",
    "tokens_per_second": "train tokens/s",
    "memory_gib": "train GiB",
    "sample_tokens_per_second": "generate tokens/s",
    "sampled_by": "by",
    "state_gib": "state GiB",
    "trained_tokens": "trained tokens",
    "eval_loss": "held-out loss",
}
NOTES = """\
Training: as bench_train.py, random weights. generate(): sampled, so many rows of so many faces; by the decode engine,
or by transformers' loop where a level has no blocks. State: of all these rows, at their end. Flat: all blocks at the
level of coordinates; the levels above, without blocks, still hand down the mean of the group before, scaled.
"""


def config_of(options: argparse.Namespace, layers: str, shape: str) -> IFlameConfig:
    stages = list(options.stage_layers)
    return IFlameConfig(
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        stage_layers=stages if shape == "hourglass" else [sum(stages), 0, 0, 0, 0],
        full_attention_interval=INTERVALS[layers],
    )


def state_bytes(config: IFlameConfig, rows: int, faces: int, dtype: torch.dtype) -> int:
    """Bytes of keys, values and states of linear attention of all blocks after so many faces, by their shapes."""
    total = 0
    for level, kind in zip(config.layer_levels(), config.layer_types, strict=True):
        if kind == "full_attention":
            items = (faces + 1) * config.tokens_per_face // config.level_strides[level]
            total += 2 * items * config.hidden_size * dtype.itemsize
        else:
            total += config.hidden_size * config.head_dim * 4
    return rows * total


def add_samples(row: Row, options: argparse.Namespace, oracle: Oracle) -> None:
    """Times generate(), and writes the figures into the row."""
    dtype = common.DTYPES[options.dtype]
    attention, linear_attention = options.attn_implementation[0], options.linear_attn_implementation[0]
    model = build_model(oracle.config, oracle.weights, options.device, dtype, attention, linear_attention)
    faces, rows, stride = options.sample_faces, options.sample_rows, oracle.config.tokens_per_face
    prompt = torch.full((rows, stride), oracle.config.bos_token_id, device=options.device)
    has_engine = 0 not in oracle.config.stage_layers
    loop = "engine" if has_engine else "plain loop"

    def generate() -> None:
        tokens = bench_generate.generate(model, prompt, faces * stride, sample=True, loop=loop, grammar=True)
        if tokens.shape != (rows, (faces + 1) * stride):
            raise WrongResult(f"generate() returned tokens of the shape {tuple(tokens.shape)}")

    with spare_a_core(options.device):
        generate()
        seconds, _ = measure(generate, options.device, 1)
    row["sample_tokens_per_second"] = [rows * faces * stride / each for each in seconds]
    row["sampled_by"] = "engine" if engine_iflame._idle.pop(model, []) else "transformers' loop"
    row["state_gib"] = gibibytes(state_bytes(oracle.config, rows, faces, dtype))


def add_loss(row: Row, options: argparse.Namespace, config: IFlameConfig) -> None:
    """Trains the variant as training/train.py does, and writes its loss on held-out meshes into the row."""
    out = Path(options.out) / f"{row['layers'].replace(' ', '-').replace(':', '-to-')}-{row['shape']}"
    data = Path(options.data) / "data"
    rows, faces = options.batch_size[0], options.faces
    command = [
        *(sys.executable, str(ROOT / "training" / "train.py"), "--output_dir", str(out)),
        *("--train_file", *map(str, sorted(data.glob("train-*.parquet")))),
        *("--validation_file", *map(str, sorted(data.glob("validation-*.parquet")))),
        *("--hidden_size", str(config.hidden_size), "--num_attention_heads", str(config.num_attention_heads)),
        *("--stage_layers", *map(str, config.stage_layers)),
        *("--full_attention_interval", str(config.full_attention_interval)),
        *("--row_length", str((faces + 2) * config.tokens_per_face), "--long_meshes", "drop"),
        *("--per_device_train_batch_size", str(rows), "--max_steps", str(options.train_steps)),
        *("--attn_implementation", options.attn_implementation[0]),
        *("--linear_attn_implementation", options.linear_attn_implementation[0]),
        *("--optim", options.optim, "--seed", str(options.seed)),
        *("--save_steps", "0", "--num_samples", "0", "--disable_tqdm", "true"),
        *options.train_options,
    ]
    command += ["--use_cpu", "true"] if options.device.type == "cpu" else []
    command += ["--bf16", "true"] if options.dtype == "bfloat16" else []
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise WrongResult(f"train.py ended with status {run.returncode}: {run.stderr.strip()[-300:]}")
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    row["eval_loss"] = [line["eval_loss"] for line in log if "eval_loss" in line][-1]
    row["trained_tokens"] = [line["labels"] for line in log if "labels" in line][-1]


@ends_in_words("bench_ratio")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_options(parser)
    parser.add_argument("--layers", nargs="+", choices=[*INTERVALS], default=[*INTERVALS], help="of linear and full")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--step", nargs=1, choices=bench_train.STEPS, default=["eager"], help="of training")
    parser.add_argument("--optim", default="muon", choices=bench_train.OPTIMIZERS)
    parser.add_argument("--mesh_faces", type=int, help="mean faces of the meshes that rows are packed with")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.set_defaults(profile=False, cuda_graphs=True, activation_memory_budget=1.0)
    parser.add_argument("--sample_rows", type=int, help="rows of generate()")
    parser.add_argument("--sample_faces", type=int, help="faces of each")
    parser.add_argument("--data", metavar="DIR", help="what training/prepare_data.py wrote: train each variant on it")
    parser.add_argument("--measure", nargs="+", choices=("speed", "loss"), help="both if there are data to train on")
    parser.add_argument("--train_steps", type=int, default=400, help="of each variant")
    parser.add_argument("--train_options", nargs=argparse.REMAINDER, default=[], help="last: more options of train.py")
    parser.add_argument("--out", metavar="DIR", help="folder for the trained variants")
    options = common.parse_options(parser, PRESETS, arguments)
    if (options.data is None) != (options.out is None):
        parser.error("--data and --out go together")
    if options.data is not None and not list(Path(options.data).glob("data/validation-*.parquet")):
        parser.error(f"--data {options.data} has no data/validation-*.parquet: training/prepare_data.py writes it")
    if options.measure is None:
        options.measure = ["speed"] if options.data is None else ["speed", "loss"]
    if "loss" in options.measure and options.data is None:
        parser.error("--measure loss needs --data and --out")
    if options.mesh_faces is not None and not 1 <= options.mesh_faces <= options.faces:
        parser.error(f"--mesh_faces must be from 1 to --faces ({options.faces}), got {options.mesh_faces}")
    device, rows = options.device, []
    figure = ("tokens_per_second", "tokens/s") if "speed" in options.measure else ("eval_loss", "held-out loss")
    for shape in options.shape:
        for layers in options.layers:
            row = {"layers": layers, "shape": shape, "dtype": options.dtype, "batch_size": options.batch_size[0]}
            with common.reported(row, rows, device, *figure):
                add_figures(row, options, config_of(options, layers, shape))
    for name in ("data", "out"):
        setattr(options, name, None if getattr(options, name) is None else Path(getattr(options, name)).name)
    return common.report("ratio", options, rows, COLUMNS, NOTES)


def add_figures(row: Row, options: argparse.Namespace, config: IFlameConfig) -> None:
    row |= {"row_tokens": (options.faces + 2) * config.tokens_per_face, "model": "iflame_hf", "step": options.step[0]}
    if "speed" in options.measure:
        add_speed(row, options, config)
    if "loss" in options.measure:
        add_loss(row, options, config)


def add_speed(row: Row, options: argparse.Namespace, config: IFlameConfig) -> None:
    device, seed = options.device, options.seed
    models = draw_models(config, seed, None, device)
    oracle = Oracle(config, models.weights, seed)
    tested = bench_train.draw_tested(oracle, options.mesh_faces is not None, seed)
    first = bench_train.draw_rows(config, row["batch_size"], options.faces, options.mesh_faces, seed).to(device)
    bench_train.ours(
        row,
        options,
        oracle,
        tested,
        bench_train.FirstStep(first),
        options.attn_implementation[0],
        options.linear_attn_implementation[0],
    )
    add_samples(row, options, oracle)


if __name__ == "__main__":
    sys.exit(main())
