"""What the benchmarks share: options and sizes, the clock, the table and its JSON."""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.oracle import WrongResult
from iflame_hf import IFlameConfig
from iflame_hf.configuration_iflame import LINEAR_ATTENTION_IMPLEMENTATIONS
from iflame_hf.format_iflame import known_format

# The published size, and one that a laptop's CPU measures in seconds.
SIZES = {
    "published": {"hidden_size": 512, "num_attention_heads": 16, "stage_layers": [4, 4, 8, 4, 4]},
    "demo": {"hidden_size": 128, "num_attention_heads": 4, "stage_layers": [4, 4, 8, 4, 4]},
}
SAMPLING = {"do_sample": True, "top_k": 50, "top_p": 0.95}
MOST_THREADS = 8  # beside a GPU
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Row = dict[str, Any]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is measured, where, and against what."""
    add_size_options(parser)
    parser.add_argument("--attn_implementation", nargs="+", default=["sdpa"], help="one or several, each measured")
    parser.add_argument(
        "--linear_attn_implementation",
        nargs="+",
        default=["auto"],
        choices=LINEAR_ATTENTION_IMPLEMENTATIONS,
        help="one or several, each measured",
    )
    parser.add_argument("--batch_size", type=int, nargs="+", help="one or several, each measured")
    parser.add_argument("--faces", type=int, help="faces of a mesh")
    parser.add_argument("--repeats", type=int, help="measured calls, of which the median counts; done twice")
    parser.add_argument("--reference", metavar="DIR", help="a folder of the original code, measured in the same run")


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every benchmark of a network has."""
    cuda = torch.cuda.is_available()
    parser.add_argument("--preset", choices=sorted(SIZES), default="demo", help="sizes, where they are not given")
    parser.add_argument("--hidden_size", type=int)
    parser.add_argument("--num_attention_heads", type=int)
    parser.add_argument("--stage_layers", type=int, nargs=5, metavar="BLOCKS", help="blocks of the five stages")
    parser.add_argument("--device", type=find_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--seed", type=int, default=0)


def parse_options(
    parser: argparse.ArgumentParser, presets: Mapping[str, Mapping[str, Any]], arguments: list[str] | None
) -> argparse.Namespace:
    """The options, with what was not given filled in from the preset."""
    options = parser.parse_args(arguments)
    for name, value in {**SIZES[options.preset], **presets[options.preset]}.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.device.type == "cuda":
        # What is right is computed on the CPU, in many small steps, which more threads make slower.
        torch.set_num_threads(min(torch.get_num_threads(), MOST_THREADS))
    return options


def memory_of(*holders: Any) -> int:
    """Bytes of all tensors and arrays that objects of this project, and lists and tuples of them, hold. What several
    share counts once."""
    found, seen, waiting = {}, set(), list(holders)
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, np.ndarray):
            waiting.append(each.base)
            if each.base is None:
                found[each.ctypes.data] = each.nbytes
        elif isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif type(each).__module__.startswith("iflame_hf."):
            waiting += vars(each).values()
    return sum(found.values())


def engine_memory(engine: Any) -> tuple[int, int]:
    """Bytes of the decoding state of all rows, the cache and all that steps keep besides weights; and of weights."""
    steps = engine.steps
    weights = memory_of(getattr(steps, "weights", None) or [steps.blocks, steps.embedding, steps.head])
    return memory_of(engine.cache, steps) - weights, weights


def find_device(name: str) -> torch.device:
    """The device of that name. Raises argparse's error for an option, which says what there is, if it is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(f"torch sees no device {name}, only {', '.join(present)}") from error
    return device


def build_config(options: argparse.Namespace) -> IFlameConfig:
    """Of the sizes in the options, for meshes as long as they say."""
    tokens = known_format().num_tokens(getattr(options, "faces", 0), start=True, end=True)
    return IFlameConfig(
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        stage_layers=options.stage_layers,
        max_position_embeddings=max(IFlameConfig().max_position_embeddings, tokens),
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    function: Callable[[], Any], device: torch.device, repeats: int, measurements: int = 2
) -> tuple[list[float], float | None]:
    """
    Times a function that has been warmed up.

    Returns:
        seconds: the median of `repeats` calls, by default measured twice: their difference is the noise.
        memory: the most bytes allocated on the GPU meanwhile; None on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    medians = []
    for _ in range(measurements):
        seconds = []
        for _ in range(repeats):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            seconds.append(time.perf_counter() - start)
        medians.append(statistics.median(seconds))
    return medians, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


@contextmanager
def reported(
    row: Row, rows: list[Row], device: torch.device, figure: str = "tokens_per_second", unit: str = "tokens/s"
) -> Iterator[None]:
    """
    Adds the row to the rows, says its main figure, and frees memory. A variant that is wrong, fails, or does not fit
    into memory becomes a row without figures, and the others are still measured.
    """
    started = time.perf_counter()
    sizes, reason = dict(row), {}
    try:
        yield
    except WrongResult as error:
        reason = {"wrong": str(error)}
    except torch.OutOfMemoryError:
        reason = {"failed": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        reason = {"wrong": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
    if reason:
        row.clear()
        row.update(sizes, **reason)
    rows.append(row)
    outcome = row.get("wrong") or row.get("failed") or f"{_cell(row.get(figure))} {unit}"
    print(f"{', '.join(map(str, sizes.values()))}: {outcome} ({time.perf_counter() - started:.0f} s)", flush=True)
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def machine(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the code, with a plus sign if files of it have been changed; `$COMMIT` where git does not know."""
    root = Path(__file__).resolve().parents[1]
    try:
        name, changes = (
            subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True, text=True).stdout.strip()
            for words in (
                ("rev-parse", "--short", "HEAD"),
                ("status", "--porcelain", "--untracked-files=no", "iflame_hf", "training", "benchmarks"),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "unknown")
    return name + ("+" if changes else "")


def table(rows: list[Row], columns: Mapping[str, str]) -> str:
    """
    Aligned text.

    Args:
        columns: heading of each key. A list of figures is joined by a slash, and a row without figures says why.
    """
    lines = [list(columns.values())]
    for row in rows:
        lines.append([_cell(row.get(name)) for name in columns])
        if reason := row.get("wrong") or row.get("failed"):
            lines[-1].append(reason)
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=False)).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " / ".join(map(_cell, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.{0 if abs(value) >= 100 else 2 if abs(value) >= 0.1 else 4}f}"


def report(
    benchmark: str, options: argparse.Namespace, rows: list[Row], columns: Mapping[str, str], notes: str
) -> int:
    """Prints the table and, as the last line, the same as JSON; returns the exit status: 1 if a variant was wrong."""
    settings = {
        name: str(value) if isinstance(value, torch.device) else value
        for name, value in vars(options).items()
        if name != "reference"
    }
    facts = machine(options.device)
    print(f"\n{notes}")
    print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None))
    print(table(rows, columns))
    print(json.dumps({"benchmark": benchmark, **facts, **settings, "rows": rows}))
    return int(any("wrong" in row for row in rows))


def gibibytes(size: float | None) -> float | None:
    return None if size is None else round(size / 2**30, 4)
