"""What `iflame` understands, and how it ends: 0 done, 1 could not, 2 used wrongly, 130 stopped by Ctrl-C."""

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iflame_cli.errors import CommandError

FORMATS = ("glb", "obj", "ply", "stl")
PIVOTS = ("ground", "centre")
DEVICES = ("cuda", "mps", "xpu", "npu", "hpu", "mlu", "musa", "mtia")  # as torch names them, beside the cpu
MODEL_HELP = "name on the Hugging Face Hub, such as user/name, or a folder"


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Examples keep their lines, options show their defaults."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class _Version(argparse.Action):
    """Looks the versions up only when they are asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        def find(name: str) -> str:
            try:
                return version(name)
            except PackageNotFoundError:
                return "not installed"

        others = ", ".join(f"{name} {find(name)}" for name in ("torch", "transformers", "trimesh"))
        print(f"iflame {find('iflame-hf')} ({others}, Python {sys.version.split()[0]})")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that `argv` (by default that of the process) asks for; returns the exit code."""
    options = build_parser().parse_args(argv)
    try:
        _run(options)
    except KeyboardInterrupt:
        print("iflame: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try to flush it
        return 1
    except (CommandError, ValueError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if options.debug:
            traceback.print_exc()
        print(f"iflame: {_in_words(error)}", file=sys.stderr)
        return 1
    return 0


def _run(options: argparse.Namespace) -> None:
    if options.command == "generate" and options.categories:
        from iflame_cli.conditions import run
    elif options.command in ("generate", "complete"):
        from iflame_cli.generating import run
    elif options.command == "tokenize":
        from iflame_cli.tokenizing import run
    else:
        from iflame_cli.viewing import run
    run(options)


def _in_words(error: BaseException) -> str:
    torch = sys.modules.get("torch")  # where it has not been imported, the error is none of its own
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return "the memory of the device does not suffice: try a smaller --batch-size, or --device cpu"
    if hasattr(error, "worded"):  # an OptionError
        return error.worded(lambda option: "--" + option.replace("_", "-"))
    return str(error) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="iflame",
        description="Generates, completes, measures and shows triangle meshes.",
        epilog="`iflame COMMAND --help` shows the options of a command, with examples.",
    )
    parser.add_argument("--version", action=_Version, help="show the versions of this and of what it needs, and exit")
    _add_debug(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_complete(commands)
    _add_tokenize(commands)
    _add_view(commands)
    return parser


def _add_command(commands, name: str, summary: str, details: str, examples: str) -> argparse.ArgumentParser:
    lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(),
        epilog=f"examples:\n{lines}",
        formatter_class=_Help,
    )
    _add_debug(parser, default=argparse.SUPPRESS)  # what was given before the command holds
    return parser


def _add_debug(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument(
        "--debug", action="store_true", default=default, help="show with an error where in the code it came from"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one line of JSON a mesh, and all else as errors")


def _add_decimate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--decimate", type=_whole(4), metavar="N", help="simplify a mesh with more than N faces to N beforehand"
    )


def _add_generate(commands) -> None:
    parser = _add_command(
        commands,
        "generate",
        "generate meshes from nothing",
        "Writes a file a mesh, and meshes.json, which says how each was made.",
        """
iflame generate user/name --num 8 --out chairs
iflame generate models/iflame-artist --num 4 --format obj --seed 7 --top-p 0.8 --max-faces 120
iflame generate models/iflame-artist --num 4 --height 0.9 --pivot ground --thumbnails
iflame generate user/name --categories
iflame generate user/name --category chair --num-faces 200 --guidance-scale 2 --num 4
""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--categories", action="store_true", help="show what the model can be asked for, and generate nothing"
    )
    _add_generation_options(parser, "meshes", "how many meshes")


def _add_complete(commands) -> None:
    parser = _add_command(
        commands,
        "complete",
        "complete parts of meshes",
        "A mesh is generated from its lowest vertex upwards: what is added lies above the part, or beside it. The "
        "result stands where the part stands, in its units. A part of a generated mesh lies within [-0.5, 0.5] and "
        "keeps its place; for any other say with --room-above or --bounds how large the whole may become. --keep "
        "takes the lowest faces of a mesh as the part.",
        """
iflame complete user/name half-a-chair.glb --num 4 --out chairs
iflame complete user/name legs.obj --room-above 1.0
iflame complete user/name corner.ply --bounds 0 0 0 10 8 10
iflame complete user/name chair.glb --keep 0.4 --num 4
iflame complete user/name scans --decimate 300 --keep 100
""",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "parts", metavar="PART", nargs="+", type=Path, help="mesh file with a part of a mesh, or folder of such files"
    )
    parser.add_argument(
        "--keep",
        type=_share_or_count,
        metavar="SHARE|N",
        help="complete only the lowest faces: a share of them, such as 0.5, or a number, such as 40",
    )
    _add_decimate(parser)
    room = parser.add_mutually_exclusive_group()
    room.add_argument(
        "--room-above",
        type=_number(0),
        metavar="HEIGHTS",
        help="how much higher than the part the whole may become, in heights of the part",
    )
    room.add_argument(
        "--bounds",
        type=float,
        nargs=6,
        metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="lowest and highest corner of the box that the whole fills, in the part's units",
    )
    _add_up_axis(parser)
    _add_generation_options(parser, "completed", "how many meshes for each part")


def _add_generation_options(parser: argparse.ArgumentParser, folder: str, num_help: str) -> None:
    parser.add_argument("--num", type=_whole(1), default=1, metavar="N", help=num_help)
    parser.add_argument("--out", type=Path, default=Path(folder), metavar="DIR", help="folder to write to")
    parser.add_argument("--format", choices=FORMATS, default="glb", help="of the files")
    parser.add_argument("--overwrite", action="store_true", help="write over files that are there")
    parser.add_argument(
        "--seed",
        type=_whole(0),
        metavar="N",
        help="of the first mesh, the next one has N + 1: gives the same again; printed if not given",
    )
    parser.add_argument(
        "--best-of", type=_whole(1), default=1, metavar="N", help="draw N meshes for each one, and keep the best"
    )
    parser.add_argument("--temperature", type=_number(0, above=True), metavar="T", help="below 1: more of the likely")
    parser.add_argument("--top-p", type=_number(0, 1, above=True), metavar="P", help="from the likeliest share P only")
    parser.add_argument("--top-k", type=_whole(0), metavar="K", help="from the likeliest K tokens only; 0: from all")
    parser.add_argument(
        "--closing-strength",
        type=_number(0),
        metavar="L",
        help="lower by L nats what leaves an edge open (4: fewer holes)",
    )
    parser.add_argument(
        "--keep-order",
        action=argparse.BooleanOptionalAction,
        help="keep faces in canonical order, also where the model would not",
    )
    parser.add_argument(
        "--max-faces",
        type=_whole(1),
        metavar="N",
        help="most faces of a mesh (by default the model's, or twice --num-faces where that is more)",
    )
    parser.add_argument("--category", metavar="NAME", help="what a mesh is to be, one of the model's categories")
    parser.add_argument(
        "--num-faces", type=_whole(1), metavar="N", help="how many faces a mesh is to have, about, a part's included"
    )
    parser.add_argument(
        "--guidance-scale",
        type=_number(0),
        metavar="S",
        help="above 1: more weight on --category and --num-faces, at twice the work",
    )
    parser.add_argument(
        "--batch-size", type=_whole(1), metavar="N", help="meshes in work at once; by default 64 on CUDA, else 8"
    )
    parser.add_argument(
        "--device",
        type=_device,
        metavar="NAME",
        help="such as cpu, cuda, cuda:1, mps; by default a GPU if there is one",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="precision; by default as saved")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--height", type=_number(0, above=True), metavar="METRES", help="scale each mesh so that it is so high"
    )
    parser.add_argument(
        "--pivot",
        choices=PIVOTS,
        help="put the origin under the centre of the mesh, on the ground, or at its centre; by default it stays",
    )
    parser.add_argument("--normals", action="store_true", help="write smooth normals; without, faces look flat")
    parser.add_argument(
        "--winding",
        choices=("outward", "kept"),
        default="outward",
        help="turn closed pieces outwards, or keep what was generated",
    )
    parser.add_argument("--license", metavar="ID", help="licence to note in the files, such as cc-by-4.0")
    parser.add_argument("--thumbnails", action="store_true", help="write a picture (png) beside each mesh")
    _add_json(parser)


def _add_tokenize(commands) -> None:
    parser = _add_command(
        commands,
        "tokenize",
        "show what tokens keep of meshes",
        "Counts vertices, faces and tokens, says what is dropped and why, and how far the round trip to tokens and "
        "back moves vertices.",
        """
iflame tokenize chair.glb
iflame tokenize models --decimate 800
iflame tokenize models/*.obj --resolution 256 --json
""",
    )
    parser.add_argument("meshes", metavar="DIR|MESH", nargs="+", type=Path, help="mesh file, or folder of mesh files")
    parser.add_argument(
        "--resolution", type=_whole(1), default=128, metavar="R", help="steps along the longest side of a mesh"
    )
    _add_decimate(parser)
    _add_up_axis(parser)
    _add_json(parser)


def _add_view(commands) -> None:
    parser = _add_command(
        commands,
        "view",
        "show meshes in a browser",
        "Writes one page with all meshes of a folder, each scaled to the same size, which needs no network and no "
        "server, and opens it. W shows the edges.",
        """
iflame view chairs
iflame view chairs/mesh-00.glb chair.obj --page two-chairs.html --no-browser
""",
    )
    parser.add_argument("sources", metavar="DIR|MESH", nargs="+", type=Path, help="folder of mesh files, or mesh file")
    parser.add_argument("--page", type=Path, metavar="FILE", help="page to write (default: view.html in the folder)")
    parser.add_argument("--overwrite", action="store_true", help="write over a page that is not of this command")
    parser.add_argument("--no-browser", action="store_true", help="only write the page and print its path")


def _add_up_axis(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--up-axis", choices=("y", "z"), help="vertical axis in the files (by default z in ply and stl, else y)"
    )


def _whole(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} on, got {text}")
        return value

    return whole_number


def _number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            limits = f"{'above' if above else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"must be {limits}, got {text}")
        return value

    return number


def _share_or_count(text: str) -> float | int:
    try:
        value = float(text) if "." in text else int(text)
    except ValueError:
        value = 0
    if not (0 < value < 1 or isinstance(value, int) and value >= 1):
        raise argparse.ArgumentTypeError(
            f"must be a share between 0 and 1, such as 0.5, or a number of faces, such as 40, got {text}"
        )
    return value


def _device(text: str) -> str:
    kind, _, number = text.partition(":")
    if text != "cpu" and not (kind in DEVICES and (number.isdecimal() or text == kind)):
        raise argparse.ArgumentTypeError(
            f"must be cpu, or a kind of GPU ({', '.join(DEVICES)}), as in cuda or cuda:1, got {text}"
        )
    return text
