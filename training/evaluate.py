"""
Evaluate a model, or the meshes of any generator, against the held-out meshes of a data set.

    accelerate launch --num_processes 1 training/evaluate.py --model models/iflame-artist --data data/mine
    python training/evaluate.py --samples outputs/meshes --data data/mine --output outputs/compared
    python training/evaluate.py --help

Writes tables, figures and pictures: how samples are distributed, how sound they are, how new, and how likely held-out
meshes are to the model. One process computes all of it; `accelerate launch training/generate.py` makes samples on
several GPUs.
"""

import argparse
import json
import os
import platform
import sys
import time
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from accelerate import Accelerator
from torch.distributed.elastic.multiprocessing.errors import record

from iflame_cli.making import load_generator
from iflame_cli.models import check_model, model_settings
from iflame_hf.files_iflame import write_whole
from iflame_hf.format_iflame import known_format
from iflame_hf.names import model_folder
from training.evaluation.control import Asked, Controlled, asked_of, check_control, control, generate_asked
from training.evaluation.distribution import LEAST_MESHES, Protocol, compare_sets, summarised
from training.evaluation.likelihood import likelihood
from training.evaluation.meshes import GridMesh, held_out_files, places_of, read_split, split_files
from training.evaluation.novelty import nearest_training, novelty
from training.evaluation.options import SPLITS, parse_options
from training.evaluation.pictures import draw_pairs, draw_samples_sheet
from training.evaluation.report import markdown
from training.evaluation.samples import Samples, generated_sets, read_sets, sample_files
from training.evaluation.soundness import boundary_ratios, soundness
from training.rows.meshes import ParquetMeshes
from training.run.ending import ends_in_words
from training.sampling.settings import digest_of, sampling_settings

say = partial(print, file=sys.stderr, flush=True)


@ends_in_words("evaluate")
def main(arguments: list[str] | None = None) -> int:
    """0 when the results are written, 1 on an error, 130 after Ctrl-C."""
    options = parse_options(arguments, __doc__)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "evaluation is the work of one process: give accelerate launch --num_processes 1. training/generate.py "
            "makes samples on several GPUs, which --samples takes"
        )
    files = find_files(options)
    options.output = output_folder(options)
    results = evaluate(options, files)
    write_whole(options.output / "evaluation.json", json.dumps(results, indent=1) + "\n")
    write_whole(options.output / "evaluation.md", markdown(results))
    say(f"evaluation.md, evaluation.json and pictures are in {options.output}")
    return 0


def find_files(options: argparse.Namespace) -> dict[str, list[str]]:
    """The parquet files of `training` and `references`, whose split goes into the options. Raises ValueError or
    OSError where the data, the model or the samples are not there."""
    splits = [options.references] if options.references else SPLITS
    options.references, references = held_out_files(options.data, splits)
    if options.model is not None:
        check_model(options.model)
    for name in ("ask", "control"):
        if getattr(options, name):
            check_control(model_settings(options.model, options.revision), f"--{name}")
    if options.samples is not None:
        sample_files(options.samples)
    training = split_files(options.data, "train")
    if not training:
        raise ValueError(f"--data {options.data} has no parquet files of a split train")
    return {"training": training, "references": references}


def output_folder(options: argparse.Namespace) -> Path:
    """The folder for the results, made if need be. Raises ValueError where there is none to choose."""
    folder = options.output
    if folder is None:
        own = model_folder(options.model) if options.model else None
        if own is None:
            raise ValueError("give --output, a folder for the results: only the folder of a model has one by itself")
        folder = own / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evaluate(options: argparse.Namespace, files: dict[str, list[str]]) -> dict[str, Any]:
    """All figures, as JSON values; draws the pictures."""
    clock = Clock()
    is_half = (options.dtype or "bfloat16") != "float32" and not options.use_cpu and torch.cuda.is_available()
    precision = {"bfloat16": "bf16", "float16": "fp16"}[options.dtype or "bfloat16"] if is_half else "no"
    accelerator = Accelerator(cpu=options.use_cpu, mixed_precision=precision)
    device = accelerator.device
    data = {name: ParquetMeshes(found) for name, found in files.items()}
    held_out = places_of(data["references"], options.half)
    figures, resolution = None, options.resolution
    settings: dict[str, Any] = {}
    if options.model is not None:
        # As train.py evaluates: weights in float32, the precision is that of autocast.
        generator = _load(options, device, "float32")
        resolution = resolution or generator.tokenizer.coordinate_resolution
        settings["weights"] = digest_of(generator.model)
        say(f"likelihood of {len(held_out):,} meshes")
        figures = likelihood(
            generator, data["references"], files["references"], accelerator, options.eval_batch_size, held_out
        )
        del generator
        clock.lap("likelihood")
    resolution = resolution or known_format().coordinate_resolution
    say(f"putting {len(held_out):,} references and the training set on the grid")
    num_references = options.num_references or options.num_samples
    references, bad_references = read_split(
        data["references"], resolution, places_of(data["references"], options.half, num_references, options.seed)
    )
    training, bad_training = read_split(
        data["training"], resolution, places_of(data["training"], None, options.num_training, options.seed)
    )
    if not references or not training:
        raise ValueError(f"--data {options.data} has no usable meshes in the split train or {options.references}")
    clock.lap("reading data")
    sets, asked, controlled = sample(options, device, settings, references, training, resolution)
    named = dict(zip(["samples", *(f"samples, set {n}" for n in range(2, len(sets) + 1))], sets, strict=True))
    first = sets[0]
    named |= {name: each.samples() for name, each in controlled.items()}
    for name, each in named.items():
        say(f"{name}: {len(each.meshes):,} of {each.count:,} are a mesh")
    clock.lap("samples")
    results: dict[str, Any] = {
        "settings": {**_plain(vars(options)), **settings, "resolution": resolution},
        "samples": {
            n: {"count": s.count, "usable": len(s.meshes), "unusable": dict(s.unusable)} for n, s in named.items()
        },
        "data": {
            "references": {"usable": len(references), "unusable": dict(bad_references)},
            "training": {"usable": len(training), "unusable": dict(bad_training)},
        },
        "likelihood": figures,
    }
    results["distribution"] = distribution(options, named, references, training, device)
    clock.lap("distribution")
    results["soundness"] = soundness_of(first.meshes, references, training)
    clock.lap("soundness")
    results["novelty"] = novelty_of(options, first.meshes, references, training, device)
    clock.lap("novelty")
    if asked is not None:
        say("what was asked for, and what came")
        classifier = {
            "points": options.classifier_points, "epochs": options.classifier_epochs, "seed": options.seed
        }  # fmt: skip
        results["control"] = control(asked, controlled, first, training, device, classifier)
        clock.lap("control")
    if first.meshes:
        draw_samples_sheet(first.meshes, options.output / "samples.png")
        clock.lap("pictures")
    return {**results, **_conditions(device), "seconds": sum(clock.laps.values()), "seconds_of": clock.laps}


class Clock:
    """Seconds of each part of the work, those between its lap and the one before it."""

    def __init__(self) -> None:
        self.last, self.laps = time.monotonic(), {}

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.last, self.laps[name] = now, now - self.last


def _load(options: argparse.Namespace, device: torch.device, dtype: str) -> Any:
    return load_generator(options.model, options.revision, str(device), dtype, options.trust_remote_code)


def sample(
    options: argparse.Namespace,
    device: torch.device,
    settings: dict[str, Any],
    references: list[GridMesh],
    training: list[GridMesh],
    resolution: int,
) -> tuple[list[Samples], Asked | None, dict[str, Controlled]]:
    """The sets of samples; with --control also what is asked for, and the sets of what comes. What the model's are
    sampled with goes into `settings`."""
    sets, asked, controlled = [], None, {}
    if options.samples is not None:
        sets = read_sets(options.samples, options.num_samples, options.num_sets, options.seed, resolution)
        if not options.control:
            return sets, asked, controlled
    generator = _load(options, device, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    chosen = sampling_settings(options, generator)
    chosen |= {
        name: getattr(options, name) for name in ("min_p", "mesh_grammar") if getattr(options, name) is not None
    }
    settings.update(chosen, dtype=str(generator.model.dtype).removeprefix("torch."))
    if options.samples is None:
        say(f"{options.num_samples * options.num_sets:,} samples to make with {device.type}")
        folder = options.output / "samples" if options.save_samples else None
        made_with = dict(chosen)
        if options.ask:
            count = options.num_samples * options.num_sets
            drawn = asked_of(generator.model.config, training, count, options.seed, options.max_faces)
            made_with |= drawn.conditions
            made_with["max_faces"] = settings["max_faces"] = generator.most_faces(options.max_faces, drawn.most_faces)
            settings["guidance_scale"] = generator.model.generation_config.guidance_scale
        sets = generated_sets(
            generator, options.num_samples, options.num_sets, options.seed, options.rows, made_with, folder
        )
    if options.control:
        asked = asked_of(generator.model.config, references, options.num_samples, options.seed, options.max_faces)
        scales = options.guidance_scales
        say(f"{len(asked.meshes) * len(scales):,} samples to make of what is asked for")
        controlled = generate_asked(generator, asked, scales, options.seed, options.rows, chosen, options.max_faces)
    return sets, asked, controlled


def distribution(
    options: argparse.Namespace,
    sets: dict[str, Samples],
    references: list[GridMesh],
    training: list[GridMesh],
    device: torch.device,
) -> dict[str, Any]:
    compared = {name: each.meshes for name, each in sets.items()} | {"training set (oracle)": training}
    protocol = Protocol(
        size=min(len(references), options.num_samples, *(len(each) for each in compared.values())),
        points=options.points,
        normalisation=options.normalisation.replace("_", " "),
        repeats=options.repeats,
        seed=options.seed,
        emd_meshes=options.emd_meshes if options.emd else 0,
        emd_points=options.emd_points,
    )
    if protocol.size < LEAST_MESHES:
        return {"skipped": f"it takes {LEAST_MESHES} meshes of each set"}
    found = compare_sets(compared, references, protocol, device, say)
    rows = {name: {figure: summarised(values) for figure, values in row.items()} for name, row in found.items()}
    return {"protocol": protocol._asdict(), "sets": rows}


def soundness_of(samples: list[GridMesh], references: list[GridMesh], training: list[GridMesh]) -> dict[str, Any]:
    say("soundness of samples, references and training meshes")
    found = {"samples": soundness(samples), "references": soundness(references), "training": soundness(training)}
    ratios = {whose: boundary_ratios(found["samples"], found[whose]) for whose in ("references", "training")}
    return {**found, "boundary_ratio": ratios}


def novelty_of(
    options: argparse.Namespace,
    samples: list[GridMesh],
    references: list[GridMesh],
    training: list[GridMesh],
    device: torch.device,
) -> dict[str, Any]:
    """The figures, and for each sample its nearest training mesh; draws the pairs."""
    if not samples:
        return {"skipped": "no sample is a mesh"}
    count = len(samples)
    found = nearest_training(
        [*samples, *references],
        training,
        options.points,
        options.search_points,
        seed=options.seed,
        device=device,
        say=say,
    )
    own, held_out = found.part(slice(count)), found.part(slice(count, None))
    draw_pairs(samples, training, own, options.output / "pairs.png")
    nearest = [
        {"sample": mesh.name, "nearest": training[index].name, "distance": float(distance), "copy": bool(is_copy)}
        for mesh, index, distance, is_copy in zip(samples, own.index, own.distance, own.copies, strict=True)
    ]
    return {**novelty(own, held_out), "nearest": nearest}


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}


def _conditions(device: torch.device) -> dict[str, Any]:
    packages = ("torch", "transformers", "accelerate", "trimesh", "numpy")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), **{package: metadata.version(package) for package in packages}}
    return {"device": f"{device.type} ({name})", "versions": versions}


if __name__ == "__main__":
    sys.exit(record(main)())  # a process that fails tells the launcher, which names it
