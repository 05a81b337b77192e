"""The options of training/generate.py, and those of them that every program with samples has."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from training.run.ending import is_first_to_say

FORMATS = ("glb", "obj", "ply", "stl")
DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    def __init__(self, prog: str, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description.strip(), formatter_class=formatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """As argparse does, but of all processes of a launch one says it."""
        if not is_first_to_say(message):
            self.exit(2)
        super().error(message)


def parse_options(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = Parser("training/generate.py", description)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|NAME", help="folder of a model, or its name on the Hub")
    # torchrun takes --num for a beginning of its own --numa-binding
    add("--num", "--num_meshes", type=whole(1), required=True, metavar="N", help="how many meshes")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to, new or of the same run")
    add("--seed", type=whole(0), default=0, metavar="N", help="of mesh 0, mesh i has N + i (default 0)")
    add("--best_of", type=whole(1), default=1, metavar="N", help="draw N meshes for each, keep the best (default 1)")
    add("--format", choices=FORMATS, default="glb", help="of the files (default glb)")
    add("--category", metavar="NAME", help="what meshes are to be, one of the model's categories (default: any)")
    add("--num_faces", type=whole(1), metavar="N", help="how many faces meshes are to have, about (default: any)")
    add("--guidance_scale", type=scale, metavar="S", help="above 1: more weight on these, at twice the work")
    add_sampling_options(parser)
    add("--overwrite", action="store_true", help="discard what an earlier run wrote to DIR, and begin anew")
    options = parser.parse_args(arguments)
    check_sampling_options(parser, options)
    if options.guidance_scale not in (None, 1) and options.category is None and options.num_faces is None:
        parser.error("--guidance_scale is of a condition: give --category or --num_faces too, or leave it out")
    if options.num_faces is not None and options.max_faces is not None and options.num_faces > options.max_faces:
        parser.error(f"--num_faces {options.num_faces} is more than --max_faces {options.max_faces}")
    return options


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How meshes are sampled from a model, and where that is computed."""
    add = parser.add_argument
    add("--min_faces", type=whole(0), default=0, metavar="N", help="fewest faces of a mesh (default 0)")
    add("--max_faces", type=whole(1), metavar="N", help="most faces of a mesh (by default the model's)")
    add("--rows", type=whole(1), metavar="N", help="meshes that a process has in work (default: 64 on CUDA, else 8)")
    add("--temperature", type=number(math.inf), metavar="T", help="below 1: more of the likely")
    add("--top_k", type=whole(0), metavar="K", help="from the likeliest K tokens only; 0: from all")
    add("--top_p", type=number(1), metavar="P", help="from the likeliest share P only")
    add(
        "--closing_strength", type=scale, metavar="L", help="lower by L nats what leaves an edge open (4: fewer holes)"
    )
    add("--keep_order", action=argparse.BooleanOptionalAction, default=None, help="keep faces in canonical order")
    add("--dtype", choices=DTYPES, help="precision (default: bfloat16 on CUDA, else float32)")
    add("--kv_cache_dtype", choices=("int8",), help="keys and values on a GPU in half the memory: more meshes/s")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    add("--trust_remote_code", action="store_true", help="run the code in the model's folder, not this one's")
    add("--use_cpu", action="store_true", help="compute on the CPU even if there is a GPU")


def check_sampling_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.max_faces is not None and options.min_faces > options.max_faces:
        parser.error(f"--min_faces {options.min_faces} is more than --max_faces {options.max_faces}")


def whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return value

    return whole_number


def scale(text: str) -> float:
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def number(most: float) -> Callable[[str], float]:
    def checked(text: str) -> float:
        value: Any = float(text)
        if not 0 < value <= most or math.isinf(value):
            limit = "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be above 0{limit}, got {text}")
        return value

    return checked
