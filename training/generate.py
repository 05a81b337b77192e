"""
Generate many meshes into a folder, on all GPUs or machines of a launch.

    accelerate launch training/generate.py --model DIR --num 10000 --out DIR
    python training/generate.py --help

A run that was stopped goes on where it was, and a mesh's seed gives the same mesh however the run is split.
"""

import argparse
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from iflame_cli.errors import CommandError
from iflame_cli.models import check_model
from iflame_hf.export_iflame import EXPORT_SUFFIXES, export_mesh
from iflame_hf.many_iflame import GeneratedMesh, generate_meshes
from training.run.ending import ends_in_words
from training.run.interruption import Interruption
from training.sampling import record

SECONDS_BETWEEN_REPORTS = 5
# Meshes that wait for their files: more would be lost by a kill.
MOST_WAITING = 64
WRITERS = 2


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hub")
    parser.add_argument("--out", required=True, type=Path, help="folder of the meshes")
    parser.add_argument("--num", type=_positive, default=100, help="how many meshes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first mesh; the others have those that follow it")
    parser.add_argument("--max_faces", type=_positive, help="most faces of a mesh (default: as generate() has it)")
    parser.add_argument("--min_faces", type=int, default=0, help="fewest faces of a mesh (default: %(default)s)")
    parser.add_argument("--rows", type=_positive, help="meshes at a time on each device (default: 64, on a CPU 8)")
    parser.add_argument("--format", choices=[suffix[1:] for suffix in EXPORT_SUFFIXES], default="glb")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens (default: %(default)s)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that comes with the model")
    parser.add_argument("--overwrite", action="store_true", help="begin anew where --out holds other meshes")
    options = parser.parse_args(arguments)
    if options.temperature <= 0:
        parser.error("--temperature must be above 0")
    if not 0 < options.top_p <= 1:
        parser.error("--top_p must be above 0 and at most 1")
    if options.seed < 0 or options.min_faces < 0 or options.top_k < 0:
        parser.error("--seed, --min_faces and --top_k must not be negative")
    return options


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return number


@ends_in_words("generate")
def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    disable_progress_bar()
    check_model(options.model)
    state = PartialState(cpu=not torch.cuda.is_available())
    dtype = options.dtype or ("bfloat16" if state.device.type == "cuda" else "float32")
    sampling = {
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_faces": options.min_faces,
        "max_faces": options.max_faces,
    }
    settings = {"model": options.model, "seed": options.seed, "format": options.format, "dtype": dtype, **sampling}
    # What is wrong with the folder is said by the first process; the others wait, and then find it ready.
    if state.is_main_process:
        record.begin(options.out, settings, options.overwrite)
    state.wait_for_everyone()

    trust = {"trust_remote_code": True} if options.trust_remote_code else {}
    tokenizer = AutoTokenizer.from_pretrained(options.model, **trust)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype), **trust)
    model = model.to(state.device).eval()
    there = record.entries(options.out)
    numbers = [n for n in range(state.process_index, options.num, state.num_processes) if n not in there]
    interruption = Interruption("the meshes that are made are written")
    with interruption:
        _make(options, state, model, tokenizer, numbers, sampling, interruption)
    if interruption.asked:
        if state.is_main_process:
            print("stopped: the same command goes on from here", file=sys.stderr)
        return 0
    state.wait_for_everyone()
    if state.is_main_process:
        found = record.finish(options.out)
        without = sum(entry["file"] is None for entry in found.values())
        faces = sum(entry["faces"] for entry in found.values())
        print(f"{len(found)} meshes, {faces} faces in {options.out}" + (f"; {without} without a face" * (without > 0)))
    return 0


def _make(options, state, model, tokenizer, numbers, sampling, interruption) -> None:
    part = record.Part(options.out, state.process_index)
    seeds = [options.seed + number for number in numbers]
    meshes = generate_meshes(model, seeds, rows=options.rows, **sampling)
    before, began, reported = record.count(options.out), time.monotonic(), time.monotonic()
    waiting: list[Future] = []
    try:
        with ThreadPoolExecutor(WRITERS) as writers:
            for mesh in meshes:
                waiting.append(writers.submit(_write, options, tokenizer, numbers[mesh.number], mesh))
                while waiting and (waiting[0].done() or len(waiting) > MOST_WAITING):
                    part.add(waiting.pop(0).result())
                if interruption.asked:
                    break
                if state.is_main_process and time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
                    reported = time.monotonic()
                    _report(options, before, reported - began)
            for future in waiting:
                part.add(future.result())
    finally:
        meshes.close()
        part.close()


def _write(options: argparse.Namespace, tokenizer: Any, number: int, mesh: GeneratedMesh) -> dict[str, Any]:
    """Writes a mesh's file; returns its entry."""
    shape = tokenizer.decode_mesh(mesh.ids)
    name = f"mesh-{number:06d}.{options.format}" if len(shape.faces) else None
    if name is not None:
        extras = {"model": options.model, "seed": mesh.seed}
        try:
            export_mesh(shape, options.out / name, up_axis=tokenizer.up_axis, extras=extras)
        except OSError as error:
            raise CommandError(f"{options.out / name} cannot be written: {error.strerror or error}") from error
    most = options.max_faces or 2**31
    ended = tokenizer.format.has_ended(mesh.ids, most)
    return {"number": number, "seed": mesh.seed, "faces": len(shape.faces), "ended": ended, "file": name}


def _report(options: argparse.Namespace, before: tuple[int, int], seconds: float) -> None:
    meshes, faces = record.count(options.out)
    made, new_faces = meshes - before[0], faces - before[1]
    print(
        f"{meshes} of {options.num} meshes, {made / seconds:.1f} meshes/s, {new_faces / seconds:.0f} faces/s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
