"""Many meshes, each as soon as it is finished."""

import operator
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from .format_iflame import MeshFormat, known_format
from .sampling_iflame import row_seeds

# T tokens

# Meshes in work at a time, by the kind of device.
DEFAULT_ROWS = {"cuda": 64}
DEFAULT_ROWS_ELSEWHERE = 8

# What would count meshes or faces a second time, or leaves no mesh of a seed's own.
_REFUSED = {
    "seed": "each mesh has its seed in seeds",
    "num_return_sequences": "a mesh is made for each seed",
    "max_length": "faces are counted by max_faces",
    "max_new_tokens": "faces are counted by max_faces",
    "input_ids": "what a mesh begins with is its prompt",
    "inputs": "what a mesh begins with is its prompt",
    "inputs_embeds": "what a mesh begins with is its prompt, of ids",
    "attention_mask": "prompts are padded here",
    "streamer": "meshes come when they are finished; stream_faces gives the faces of one as they come",
    "return_dict_in_generate": "it gives meshes, and no scores",
}


class GeneratedMesh(NamedTuple):
    """One mesh of `generate_meshes`.

    Attributes:
        number: its place in `seeds`.
        seed: its own.
        ids: (T,) int64 on the CPU, from the start face to the end face, prompt included, padding not.
        ended: whether there is an end face: without one the mesh was cut off.
    """

    number: int
    seed: int
    ids: torch.Tensor
    ended: bool


class _Job(NamedTuple):
    """A mesh to make: its place, its seed, and the ids that it begins with."""

    number: int
    seed: int
    prompt: torch.Tensor


def default_rows(model: Any) -> int:
    """How many meshes are in work at a time where nobody says."""
    return DEFAULT_ROWS.get(torch.device(model.device).type, DEFAULT_ROWS_ELSEWHERE)


def generate_meshes(
    model: Any,
    seeds: Iterable[int],
    *,
    rows: int | None = None,
    max_faces: int | None = None,
    prompt: Any = None,
    **generate_options: Any,
) -> Iterator[GeneratedMesh]:
    """Samples a mesh for each seed and yields it when it is finished: in any order, so look at its `number`.

    A seed gives the same mesh again for the same prompt and options, whatever `rows` is and whichever other seeds
    there are; in half precision, where another number of rows may round a score otherwise, nearly always.

    Args:
        model: an `IFlameForCausalLM`.
        seeds: whole numbers from 0 on, one for each mesh: a list, a range.
        rows: most meshes in work at a time, by default 64 on a CUDA device and 8 elsewhere.
        max_faces: most faces of a mesh, those of the prompt included; by default as many as `generate()` makes.
        prompt: ids (T,) that every mesh begins with, from the start face on; or a list of such, one for each seed.
            By default the start face alone.
        generate_options: of `generate()`: temperature, top_k, top_p and the like.

    Raises ValueError at once for arguments that cannot be; while iterating whatever `generate()` raises.
    """
    if isinstance(seeds, (int, str)) or not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be whole numbers, one for each mesh, such as range(1000), got {seeds!r}")
    seeds = list(seeds)
    seeds = row_seeds(seeds, len(seeds))
    for name, value in (("rows", rows), ("max_faces", max_faces)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
    options = {name: value for name, value in generate_options.items() if value is not None}
    for name in options:
        if name in _REFUSED:
            raise ValueError(f"leave out {name}: {_REFUSED[name]}")
    if not options.pop("do_sample", True) or (options.get("num_beams") or 1) != 1:
        raise ValueError("with a seed each, meshes are sampled one by one: leave out do_sample and num_beams")
    if max_faces is not None:
        options["max_faces"] = max_faces
    layout = _layout_of(model)
    prompts = _prompts(prompt, len(seeds), layout, max_faces)
    jobs = (_Job(*job) for job in zip(range(len(seeds)), seeds, prompts, strict=True))
    rows = min(rows or default_rows(model), max(len(seeds), 1))
    return (
        _mesh(job, ids, layout, max_faces) for job, ids in _batches(model, jobs, rows, {"do_sample": True, **options})
    )


def _batches(
    model: Any, jobs: Iterator[_Job], rows: int, options: dict[str, Any]
) -> Iterator[tuple[_Job, torch.Tensor]]:
    """Each job with its ids (T,) on the CPU, from its prompt on, which may end in padding; in any order, with so many
    rows in work at a time at most. `options` are those of `generate()`."""
    pad = model.config.pad_token_id
    while batch := list(islice(jobs, rows)):
        longest = max(len(job.prompt) for job in batch)
        ids = torch.full((len(batch), longest), pad)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, longest - len(job.prompt) :] = job.prompt
            mask[row, longest - len(job.prompt) :] = 1
        seeds = [job.seed for job in batch]
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        sequences = model.generate(**inputs, seed=seeds, **options).cpu()
        for job, sequence in zip(batch, sequences, strict=True):
            yield job, sequence[longest - len(job.prompt) :]


def _layout_of(model: Any) -> MeshFormat:
    config = model.config
    return known_format(
        config.mesh_format,
        coordinate_resolution=config.coordinate_resolution,
        special_ids=(config.pad_token_id, config.bos_token_id, config.eos_token_id),
    )


def _prompts(prompt: Any, meshes: int, layout: MeshFormat, max_faces: int | None) -> list[torch.Tensor]:
    """The ids that each mesh begins with. Raises ValueError for what is no beginning of a mesh."""
    if prompt is None:
        return [torch.tensor(layout.start_face)] * meshes
    if not isinstance(prompt, list) or (prompt and all(isinstance(each, int) for each in prompt)):
        return [_prompt(prompt, layout, max_faces)] * meshes
    if len(prompt) != meshes:
        raise ValueError(f"{meshes} seeds need as many prompts, got {len(prompt)}: give one for each, or one for all")
    different = {id(each): each for each in prompt}  # many meshes may begin with the same
    checked = {key: _prompt(each, layout, max_faces) for key, each in different.items()}
    prompts = [checked[id(each)] for each in prompt]
    places = {len(each) % layout.tokens_per_face for each in prompts}
    if len(places) > 1:
        raise ValueError("prompts are padded by whole faces: let all of them end in the same place of a face")
    return prompts


def _prompt(prompt: Any, layout: MeshFormat, max_faces: int | None) -> torch.Tensor:
    try:
        ids = torch.as_tensor(prompt).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a prompt is the ids of a mesh's beginning, (T,) whole numbers, got {prompt!r}") from None
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"a prompt is the ids of a mesh's beginning, (T,) whole numbers, got {ids.dtype} {tuple(ids.shape)}"
        )
    ids = ids.long()
    face = layout.tokens_per_face
    if ids[:face].tolist() != layout.start_face:
        raise ValueError(f"a prompt begins with the start face, {face} times the id {layout.bos_token_id}")
    if not layout.is_coordinate(ids[face:]).all():
        raise ValueError(
            f"after the start face a prompt holds coordinates alone, 0 to {layout.coordinate_resolution}: leave out "
            "padding and the end face"
        )
    faces = layout.prompt_faces(len(ids))
    if max_faces is not None and faces >= max_faces:
        raise ValueError(f"the prompt has {faces} faces already: max_faces must be more, not {max_faces}")
    return ids


def _mesh(job: _Job, ids: torch.Tensor, layout: MeshFormat, max_faces: int | None) -> GeneratedMesh:
    ends = (ids == layout.eos_token_id).nonzero()
    ended = len(ends) > 0
    if ended:
        first = operator.index(ends[0, 0])
        length = layout.num_tokens(layout.whole_faces(first) + 1)  # with the end face
    else:
        length = len(ids) if max_faces is None else layout.num_tokens(max_faces, start=True)
    ids = ids[:length]
    kept = (ids != layout.pad_token_id).nonzero()
    return GeneratedMesh(job.number, job.seed, ids[: operator.index(kept[-1, 0]) + 1].clone(), ended)
