"""Loading a model and making meshes with it: the part of `iflame generate` and `iflame complete` that needs torch."""

import argparse
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, StoppingCriteria, pipeline
from transformers.utils import logging

from iflame_cli.errors import CommandError
from iflame_cli.models import check_model_type
from iflame_cli.reading import MeshFile
from iflame_hf import IFlameConfig, IFlameForCausalLM, IFlameTokenizer, MeshGenerationPipeline
from iflame_hf.conditions_iflame import asked_conditions
from iflame_hf.format_iflame import MeshFormat
from iflame_hf.mesh_errors_iflame import errors_name

SAMPLING = (
    *("best_of", "temperature", "top_p", "top_k", "closing_strength", "keep_order", "max_faces"),
    *("category", "num_faces", "guidance_scale"),
)


def check_device(name: str | None) -> None:
    """Raises CommandError for a device, such as cuda or cuda:1, that torch does not see here."""
    kind, _, number = (name or "cpu").partition(":")
    if kind == "cpu":
        return
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = torch.accelerator.device_count() if there else 0
    if there is None or there.type != kind or int(number or 0) >= count:
        names = ["cpu", *(f"{there.type}:{index}" for index in range(count))] if there else ["cpu"]
        built = "" if kind != "cuda" or torch.version.cuda or torch.version.hip else " (it was built without CUDA)"
        raise CommandError(f"--device {name}: torch{built} sees no such device here, only {', '.join(names)}")


def load_generator(
    model: str,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> MeshGenerationPipeline:
    """
    The pipeline of a model, from a folder or the Hub. With `trust_remote_code` network and tokenizer are those whose
    code lies beside the weights.

    Raises:
        CommandError: there is no such device or model, or it is no iFlame model, in one line.
    """
    check_device(device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of weights that go into a model; downloads show theirs
    try:
        settings, _ = IFlameConfig.get_config_dict(model, revision=revision)
        check_model_type(model, settings)
        options: dict[str, Any] = {"revision": revision}
        network, reader = IFlameForCausalLM, IFlameTokenizer
        if trust_remote_code:
            network, reader = AutoModel, AutoTokenizer
            options["trust_remote_code"] = True
        tokenizer = reader.from_pretrained(model, **options)
        if dtype:
            options["dtype"] = dtype
        weights, loading = network.from_pretrained(model, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"the model {model} cannot be loaded: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise CommandError(f"the model {model} cannot be used: its weights lack {', '.join(missing[:3])}")
    if device is not None:  # of several processes a pipeline leaves its model where it is
        weights = weights.to(device)
    return pipeline("mesh-generation", model=weights.eval(), tokenizer=tokenizer, device=device)


def check_request(generator: MeshGenerationPipeline, parts: list[MeshFile], options: argparse.Namespace) -> None:
    """Raises ValueError for what the model cannot be asked for, and ValueError or CommandError, naming the file, for a
    part that it cannot complete."""
    asked_conditions(generator.model.config, 1, options.category, options.num_faces)
    most = generator.most_faces(options.max_faces, options.num_faces)
    for part in parts:
        with errors_name(part.path):
            row = generator.preprocess((part.vertices, part.faces), prompt_up_axis=part.up_axis, **_placing(options))
        faces = generator.tokenizer.format.prompt_faces(len(row["input_ids"]))
        if faces >= most:
            raise CommandError(
                f"{part.path}: it has {faces} faces, and the completed mesh may have {most}: keep its lowest faces "
                f"only (--keep 0.5), simplify it (--decimate {max(most // 2, 4)}), or raise --max-faces"
            )
        if options.num_faces is not None and faces >= options.num_faces:
            raise CommandError(
                f"{part.path}: it has {faces} faces, and the completed mesh is to have {options.num_faces}: keep its "
                "lowest faces only (--keep 0.5), or raise --num-faces"
            )


def _placing(options: argparse.Namespace) -> dict[str, Any]:
    bounds = options.bounds and [options.bounds[:3], options.bounds[3:]]
    return {"room_above": options.room_above, "bounds": bounds, "keep": options.keep}


class Progress(StoppingCriteria):
    """Moves a bar as the rows of a batch come to their ends; stops nothing."""

    looks_once_a_face = True  # for a decode engine, which shows it the prompt alone

    def __init__(self, bar: tqdm, layout: MeshFormat):
        self.bar, self.layout = bar, layout
        self.begin()

    def begin(self) -> None:
        """Other meshes begin, after so many that the bar counts."""
        self.before, self.tokens, self.faces = self.bar.n, 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tokens, before = input_ids.shape[1], self.tokens
        self.tokens = tokens
        if not self.layout.is_whole(tokens) or self.bar.disable:
            return torch.tensor(False)
        if tokens == before:  # a decode engine has made another face
            self.faces += 1
        else:
            self.faces = self.layout.prompt_faces(tokens)
            self.bar.n = self.before + int((input_ids == self.layout.eos_token_id).any(dim=1).sum())
        self.bar.set_postfix(faces=self.faces, refresh=False)
        self.bar.refresh()
        return torch.tensor(False)  # of all rows, and on the CPU: no answer has to be waited for


def make_meshes(
    generator: MeshGenerationPipeline,
    parts: list[MeshFile | None],
    seed: int,
    options: argparse.Namespace,
    bar: tqdm,
) -> Iterator[tuple[int, Any]]:
    """A mesh for each part, or from nothing for None, as soon as it is finished, with the number of its part; its
    seed is the one given plus that number, unless it is the best of several."""
    sampling = {name: getattr(options, name) for name in SAMPLING}
    progress = Progress(bar, generator.tokenizer.format)
    first = done = 0
    for up_axis, group in groupby(parts, key=lambda part: part and part.up_axis):
        same = list(group)
        shared = sampling | {"batch_size": options.batch_size, "seed": seed + first, "stopping_criteria": [progress]}
        if up_axis is None:
            made = generator.as_finished(num_meshes=len(same), **shared)
        else:
            prompts = [(part.vertices, part.faces) for part in same]
            made = generator.as_finished(prompts, prompt_up_axis=up_axis, **_placing(options), **shared)
        for number, mesh in made:
            done += 1
            bar.n = done
            bar.refresh()
            progress.begin()
            yield first + number, mesh
        first += len(same)
