"""
Find out how to sample a model: tries settings, compares what comes with held-out meshes, and names the best.

    python training/choose_sampling.py --model models/iflame-artist --data data/mine --top_p 0.8 0.9 1
    python training/choose_sampling.py --help

Compared is with the first half of the references, so that training/evaluate.py --half second reports on meshes that
had no part in the choice. --write puts the best settings into the model's generation_config.json.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import numpy as np
from accelerate import Accelerator

from iflame_cli.making import load_generator
from iflame_cli.models import check_model
from iflame_hf.files_iflame import write_whole
from iflame_hf.names import model_folder
from iflame_hf.ranking_iflame import log_probabilities
from training.evaluation.choice import (
    DISTRIBUTION,
    FACTORS,
    Setting,
    best_setting,
    choice_table,
    described,
    of_meshes,
    settings_to_try,
)
from training.evaluation.distribution import LEAST_MESHES, Protocol, compare_sets
from training.evaluation.meshes import GridMesh, held_out_files, places_of, read_split
from training.evaluation.options import SPLITS
from training.evaluation.samples import Generated, generate
from training.evaluation.soundness import soundness
from training.rows.meshes import ParquetMeshes
from training.run.ending import ends_in_words
from training.sampling.options import DTYPES, Parser, number, scale, whole
from training.sampling.settings import digest_of

HALF = "first"
LEAST_USABLE = 0.5  # of a setting's samples: one with fewer meshes would leave few of all others to compare
say = partial(print, file=sys.stderr, flush=True)


@ends_in_words("choose_sampling")
def main(arguments: list[str] | None = None) -> int:
    """0 when the results are written, 1 on an error, 130 after Ctrl-C."""
    options = parse_options(arguments)
    split, files = held_out_files(options.data, [options.references] if options.references else SPLITS)
    check_model(options.model)
    folder = model_folder(options.model)
    if options.write and folder is None:
        raise ValueError(f"--write is for the folder of a model, and {options.model} is one on the Hub")
    options.output.mkdir(parents=True, exist_ok=True)
    results = choose(options, split, files)
    text = choice_table(results)
    write_whole(options.output / "sampling.json", json.dumps(results, indent=1) + "\n")
    write_whole(options.output / "sampling.md", f"# Sampling of {options.model}\n\n{text}")
    print(text)
    best = results["best"]
    say(f"best: {', '.join(f'{name} {value}' for name, value in best.items())}")
    if options.write:
        write_settings(folder, best)
        say(f"{folder / 'generation_config.json'} has them")
        if best["best_of"] > 1:
            say(f"but for one, which is given with each run: --best_of {best['best_of']}")
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("training/choose_sampling.py", __doc__)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR|NAME", help="folder of a model, or its name on the Hub")
    add("--data", type=Path, required=True, metavar="DIR", help="folder of a data set, as prepare_data writes it")
    add("--output", type=Path, required=True, metavar="DIR", help="where sampling.md and sampling.json go")
    several = {"nargs": "+", "default": []}
    add("--temperature", type=number(math.inf), metavar="T", **several, help="values to try")
    add("--top_k", type=whole(0), metavar="K", **several, help="values to try; 0: from all tokens")
    add("--top_p", type=number(1), metavar="P", **several, help="values to try")
    add("--min_p", type=_share, metavar="P", **several, help="values to try; 0: without")
    add("--closing_strength", type=scale, metavar="L", **several, help="values to try; 0: without")
    add("--mesh_grammar", type=_switch, metavar="on|off", **several, help="values to try")
    add("--keep_order", type=_switch, metavar="on|off", **several, help="values to try")
    add("--best_of", type=whole(1), metavar="N", **several, help="values to try: draw N meshes, keep the best")
    add("--product", action="store_true", help="all combinations (default: from the model's own settings on, which "
        "are the base, one at a time is changed)")  # fmt: skip
    add("--write", action="store_true", help="put the best into the model's generation_config.json")
    add("--num_samples", type=whole(2), default=200, metavar="N", help="of each setting (default 200)")
    add("--max_faces", type=whole(1), metavar="N", help="most faces of a mesh (by default the model's)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the first sample, and of all choices (default 0)")
    add("--references", choices=SPLITS, help="split to compare with (default: test, or validation if there is none)")
    add("--points", type=whole(1), default=2048, metavar="N", help="points of a mesh (default 2048)")
    add("--repeats", type=whole(1), default=3, metavar="N", help="with fresh points and choices (default 3)")
    add("--rows", type=whole(1), metavar="N", help="meshes in work at a time (default: 64 on CUDA, else 8)")
    add("--dtype", choices=DTYPES, help="precision (default: bfloat16 on CUDA, else float32)")
    add("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hub")
    add("--trust_remote_code", action="store_true", help="run the code in the model's folder, not this one's")
    add("--use_cpu", action="store_true", help="compute on the CPU even if there is a GPU")
    options = parser.parse_args(arguments)
    if not any(getattr(options, name) for name in FACTORS):
        named = ", ".join(f"--{name}" for name in FACTORS)
        parser.error(f"there is nothing to choose from: give values of some of {named}")
    return options


def choose(options: argparse.Namespace, split: str, files: list[str]) -> dict[str, Any]:
    """All figures, as JSON values, and the best setting."""
    device = Accelerator(cpu=options.use_cpu).device
    dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    generator = load_generator(options.model, options.revision, str(device), dtype, options.trust_remote_code)
    data = ParquetMeshes(files)
    places = places_of(data, HALF, seed=options.seed)
    references, _ = read_split(data, generator.tokenizer.coordinate_resolution, places)
    if len(references) < LEAST_MESHES:
        raise ValueError(
            f"the {HALF} half of the split {split} has {len(references)} usable meshes: it takes {LEAST_MESHES}"
        )
    base = base_setting(generator)
    values = {name: getattr(options, name) for name in FACTORS if getattr(options, name)}
    tried = settings_to_try(base, values, options.product)
    seeds = [range(options.seed + part * options.num_samples, options.seed + (part + 1) * options.num_samples)
             for part in range(2)]  # fmt: skip
    sets, rows = [], []
    for place, setting in enumerate([*tried, base]):
        is_again = place == len(tried)
        name = "base, other seeds" if is_again else described(setting, base)
        say(f"{place + 1} of {len(tried) + 1}: {name}")
        meshes, row = sampled(generator, setting, seeds[is_again], options)
        sets.append(meshes)
        rows.append({"name": name, "setting": setting, **row})
    protocol = add_distances(rows, sets, references, options, device)
    of_data = of_meshes([len(mesh.faces) for mesh in references], soundness(references))
    *rows, again = rows
    best = best_setting(rows, of_data)
    return {
        "model": options.model,
        "weights": digest_of(generator.model),
        "dtype": dtype,
        "device": str(device),
        "references": split,
        "half": HALF,
        "num_samples": options.num_samples,
        "seed": options.seed,
        "max_faces": options.max_faces or generator.default_max_faces,
        "protocol": protocol._asdict(),
        "base": base,
        "best": rows[best]["setting"],
        "settings": [{**row, "is_best": place == best} for place, row in enumerate(rows)],
        "again": again,
        "data": {"meshes": len(references), **of_data},
    }


def base_setting(generator: Any) -> Setting:
    """A value of each of FACTORS: the model's own, and one mesh of each seed."""
    own = generator.model.generation_config.to_diff_dict()
    defaults = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "closing_strength": 0.0,
        "mesh_grammar": False,
        "keep_order": True,
    }
    known = {name: default if own.get(name) is None else own[name] for name, default in defaults.items()}
    return {**known, "best_of": 1}


def sampled(
    generator: Any, setting: Setting, seeds: range, options: argparse.Namespace
) -> tuple[list[GridMesh], dict[str, Any]]:
    """The meshes that a setting gives, and their figures without distances."""
    settings = {name: value for name, value in setting.items() if name != "best_of"}
    settings["max_faces"] = options.max_faces or generator.default_max_faces
    began = time.monotonic()
    made: Generated = generate(generator, seeds, options.rows, settings, setting["best_of"])
    seconds = time.monotonic() - began
    layout = generator.tokenizer.format
    most = settings["max_faces"]
    meshes = made.samples().meshes
    return meshes, {
        "usable": len(meshes),
        "ended": float(np.mean([layout.has_ended(ids, most) for ids in made.ids])),
        **of_meshes([len(mesh.faces) for mesh in meshes], soundness(meshes)),
        "log_probability": float(np.mean(log_probabilities(generator.model, made.ids))),
        "seconds": seconds,
    }


def add_distances(
    rows: list[dict[str, Any]],
    sets: list[list[GridMesh]],
    references: list[GridMesh],
    options: argparse.Namespace,
    device: Any,
) -> Protocol:
    """Puts DISTRIBUTION into the rows of sets with enough meshes, all compared by the same protocol."""
    least = max(LEAST_MESHES, math.ceil(LEAST_USABLE * options.num_samples))
    compared = {place: each for place, each in enumerate(sets) if len(each) >= least}
    size = min([len(references), *(len(each) for each in compared.values())])
    protocol = Protocol(size=size, points=options.points, repeats=options.repeats, seed=options.seed)
    found = compare_sets(compared, references, protocol, device, say) if compared else {}
    for place, row in enumerate(rows):
        figures = found.get(place)
        row.update({name: float(np.mean(figures[name])) if figures else None for name in DISTRIBUTION})
    return protocol


def write_settings(folder: Path, best: Setting) -> None:
    """Puts all of a setting that generate() knows into the generation_config.json of a model. Raises OSError where it
    cannot be written, which leaves the file as it was."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    settings |= {name: value for name, value in best.items() if name != "best_of"}
    settings |= {"do_sample": True, "min_p": best["min_p"] or None}
    write_whole(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _share(text: str) -> float:
    if not 0 <= (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text}")
    return text == "on"


if __name__ == "__main__":
    sys.exit(main())
