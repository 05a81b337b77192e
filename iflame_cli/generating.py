"""`iflame generate` and `iflame complete`."""

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import StoppingCriteria, pipeline
from transformers.utils import logging

from iflame_cli.command_line import CommandError
from iflame_hf import IFlameConfig, IFlameForCausalLM, IFlameTokenizer, MeshGenerationPipeline
from iflame_hf.configuration_iflame import TOKENS_PER_FACE

RECORD = "meshes.json"
SAMPLING = ("temperature", "top_p", "top_k", "max_faces")


class Job(NamedTuple):
    """A mesh to make."""

    path: Path
    part: Path | None


def run(options: argparse.Namespace) -> None:
    """Makes and writes the meshes; prints a line for each. Raises CommandError where none came of it."""
    jobs = _jobs(options)
    _refuse_to_overwrite([*(job.path for job in jobs), options.out / RECORD], options.overwrite)
    for part in {job.part: None for job in jobs if job.part is not None}:
        if not part.is_file():
            raise CommandError(f"{part}: no such file")
    generator = load_generator(options.model, options.revision, options.device, options.dtype)
    placing = _placing(options)
    for part in {job.part: None for job in jobs if job.part is not None}:
        generator.preprocess(part, **placing)  # all are looked at before the first is completed
    options.out.mkdir(parents=True, exist_ok=True)

    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    record = {"model": options.model, "revision": options.revision, "seed": seed, "batch_size": options.batch_size}
    record |= {name: getattr(options, name) for name in SAMPLING} | {"meshes": []}
    torch.manual_seed(seed)
    try:
        with tqdm(total=len(jobs), unit="mesh", disable=None) as bar:
            for job, mesh in _make(generator, jobs, options, bar):
                entry = _write(generator, job, mesh, options, record)
                record["meshes"].append(entry)
                if entry["file"] is not None:
                    ended = "" if entry["ended"] else ", not ended: cut off at --max-faces"
                    tqdm.write(f"{job.path}  {entry['faces']} faces{ended}")
    finally:
        if record["meshes"]:
            _write_record(options.out / RECORD, record)
    written = sum(entry["file"] is not None for entry in record["meshes"])
    if options.seed is None:
        print(f"seed {seed}: give --seed {seed} for the same meshes")
    if written < len(jobs):
        print(f"iflame: {len(jobs) - written} of {len(jobs)} have no face and no file", file=sys.stderr)
    if written == 0:
        raise CommandError("nothing was written: try another --seed, or a model that has been trained for longer")


def load_generator(
    model: str, revision: str | None = None, device: str | None = None, dtype: str | None = None
) -> MeshGenerationPipeline:
    """
    The pipeline of a model, from a folder or the Hub.

    Raises:
        CommandError: there is none, or it is no iFlame model, in one line.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of weights that go into a model; downloads show theirs
    is_folder = Path(model).is_dir()
    if not is_folder and (Path(model).exists() or model.count("/") > 1 or model.startswith((".", "/", "~"))):
        raise CommandError(f"there is no folder {model}")
    if is_folder and not (Path(model) / "config.json").is_file():
        raise CommandError(f"{model} holds no model: there is no config.json in it")
    try:
        settings, _ = IFlameConfig.get_config_dict(model, revision=revision)
        if settings.get("model_type") != "iflame":
            raise CommandError(f"{model} is no iFlame model: its model_type is {settings.get('model_type')!r}")
        options = {"revision": revision} | ({"dtype": dtype} if dtype else {})
        weights, loading = IFlameForCausalLM.from_pretrained(model, output_loading_info=True, **options)
        tokenizer = IFlameTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"the model {model} cannot be loaded: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CommandError(f"the model {model} cannot be used: its weights lack {', '.join(missing[:3])}")
    return pipeline("mesh-generation", model=weights.eval(), tokenizer=tokenizer, device=device)


def _jobs(options: argparse.Namespace) -> list[Job]:
    width = max(2, len(str(options.num - 1)))
    parts = options.parts if options.command == "complete" else [None]
    if len({part.stem for part in parts if part}) < len([part for part in parts if part]):
        raise CommandError("two parts have the same name: complete them into different folders (--out)")
    stems = ["mesh" if part is None else f"{part.stem}-completed" for part in parts]
    return [
        Job(options.out / f"{stem}-{number:0{width}d}.{options.format}", part)
        for stem, part in zip(stems, parts, strict=True)
        for number in range(options.num)
    ]


def _refuse_to_overwrite(paths: list[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise CommandError(f"{there[0]}{others} exists already: choose another --out, or give --overwrite")


def _placing(options: argparse.Namespace) -> dict[str, Any]:
    if options.command == "generate":
        return {}
    bounds = options.bounds and [options.bounds[:3], options.bounds[3:]]
    return {"room_above": options.room_above, "bounds": bounds, "prompt_up_axis": options.up_axis}


class Progress(StoppingCriteria):
    """Moves a bar as the rows of a batch come to their ends; stops nothing."""

    def __init__(self, bar: tqdm, eos_token_id: int):
        self.bar, self.eos_token_id = bar, eos_token_id
        self.before = bar.n

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] % TOKENS_PER_FACE == 0 and not self.bar.disable:
            self.bar.set_postfix(faces=input_ids.shape[1] // TOKENS_PER_FACE - 1, refresh=False)
            self.bar.n = self.before + int((input_ids == self.eos_token_id).any(dim=1).sum())
            self.bar.refresh()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _make(
    generator: MeshGenerationPipeline, jobs: list[Job], options: argparse.Namespace, bar: tqdm
) -> Iterator[tuple[Job, Any]]:
    """Each job with its mesh, as soon as its batch is done."""
    sampling, placing = {name: getattr(options, name) for name in SAMPLING}, _placing(options)
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        progress = Progress(bar, generator.tokenizer.eos_token_id)
        shared = {**sampling, "stopping_criteria": [progress], "batch_size": len(batch)}
        if options.command == "complete":
            meshes = [each[0] for each in generator([job.part for job in batch], **placing, **shared)]
        else:
            meshes = generator(num_meshes=len(batch), **shared)
        bar.n = start + len(batch)
        bar.refresh()
        yield from zip(batch, meshes, strict=True)


def _write(
    generator: MeshGenerationPipeline, job: Job, mesh: Any, options: argparse.Namespace, record: dict
) -> dict[str, Any]:
    entry = {"file": None, "faces": len(mesh.faces), "vertices": len(mesh.vertices), **mesh.metadata}
    if job.part is not None:
        entry["part"] = str(job.part)
    if entry["faces"] == 0:
        job.path.unlink(missing_ok=True)  # of an earlier run, which was to be overwritten
        return entry
    generator.export(
        mesh,
        job.path,
        winding=options.winding,
        normals=options.normals,
        license=options.license,
        extras={"model": record["model"], "seed": record["seed"]},
    )
    return entry | {"file": job.path.name, "closed": bool(mesh.is_watertight)}


def _write_record(path: Path, record: dict) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
