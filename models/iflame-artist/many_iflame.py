"""Many meshes, each as soon as it is finished: a row whose mesh has ended goes on with the next one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch

from .choosing_iflame import RowsBegin
from .conditions_iflame import UNKNOWN, GuidanceLogitsProcessor, asked_conditions, guided_pairs
from .decoding_iflame import DecodeRequest, Unsupported, decoding_types, request_of, rows_begin
from .engine_iflame import give_engine, read_prompt, take_engine
from .format_iflame import MeshFormat
from .grammar_iflame import check_prompts
from .host_choosing_iflame import HostChooser
from .sampling_iflame import row_numbers, row_seeds

# B rows, R of them, T tokens

# Meshes in work at a time, by the kind of device.
DEFAULT_ROWS = {"cuda": 64}
DEFAULT_ROWS_ELSEWHERE = 8
MOST_PROMPTS = 64  # whose decoding state is kept, of one beginning with different conditions

# What would count meshes or faces a second time, or leaves no mesh of a seed's own.
_REFUSED = {
    "seed": "each mesh has its seed in seeds",
    "num_return_sequences": "a mesh is made for each seed",
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
        ids: (T,) int64 on the CPU, from the start face to the end face, which is missing where the mesh was cut off;
            prompt included, padding not.
        ended: whether it came to its end before it had as many faces as it may have.
    """

    number: int
    seed: int
    ids: torch.Tensor
    ended: bool


class _Job(NamedTuple):
    """A mesh to make: its place, its seed, the ids that it begins with, the values of the conditions, and how many
    faces the grammar makes it have, those of the prompt included; None: as the request says."""

    number: int
    seed: int
    prompt: torch.Tensor
    conditions: dict[str, int] = {}
    faces: int | None = None


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
    category: Any = None,
    num_faces: Any = None,
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
        category, num_faces: what meshes are asked to be, as of `generate()`: one for all, or a list of one for each
            seed, in which None leaves it open.
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
    options = dict(generate_options)
    for name, value in options.items():
        if name in _REFUSED and value is not None:
            raise ValueError(f"leave out {name}: {_REFUSED[name]}")
    if not options.pop("do_sample", True) or (options.get("num_beams") or 1) != 1:
        raise ValueError("with a seed each, meshes are sampled one by one: leave out do_sample and num_beams")
    if max_faces is not None:
        options["max_faces"] = max_faces
    layout = model.config.mesh_layout
    prompts = _prompts(prompt, len(seeds), layout, max_faces)
    if not seeds:
        return iter(())
    asked = asked_conditions(model.config, len(seeds), category, num_faces)
    values = zip(*(each.tolist() for each in asked.values()), strict=True) if asked else [()] * len(seeds)
    conditions = [dict(zip(asked, each, strict=True)) for each in values]
    jobs = [_Job(*job) for job in zip(range(len(seeds)), seeds, prompts, conditions, strict=True)]
    most = max_faces or layout.most_faces(model.generation_config.max_length)
    made = _batches(model, jobs, min(rows or default_rows(model), len(jobs)), {"do_sample": True, **options})
    return _meshes(made, layout, max_faces, most)


def _batches(model: Any, jobs: list[_Job], rows: int, options: dict[str, Any]) -> Iterator[tuple[_Job, torch.Tensor]]:
    """Each job with its ids (T,) on the CPU, from its prompt on, without padding; in any order, with so many rows in
    work at a time at most. `options` are those of `generate()`, which raises at once for what cannot be."""
    request = _request(model, max(jobs, key=lambda job: len(job.prompt)), options)
    if request is None:
        return _in_batches(model, jobs, rows, options)
    if request.choice.grammar:  # generate() has looked at the longest prompt alone
        for prompt in {id(job.prompt): job.prompt for job in jobs}.values():
            begins, layout = np.zeros(1, dtype=np.int64), model.config.mesh_layout
            check_prompts(layout, prompt[None].numpy(), begins, request.choice.ordered)
    return _refilled(model, jobs, rows, request)


def _tensors(jobs: list[_Job], device: Any) -> dict[str, torch.Tensor]:
    """What the model is told of the meshes of jobs, (B,) each."""
    return {name: torch.tensor([job.conditions[name] for job in jobs], device=device) for name in jobs[0].conditions}


def _request(model: Any, job: _Job, options: dict[str, Any]) -> DecodeRequest | None:
    """What generate() would ask of an engine, or None."""
    found: list[DecodeRequest | None] = []

    def look(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        try:
            if input_ids.shape[1] % model.config.tokens_per_face:
                raise Unsupported("a prompt that ends inside a face")
            if generation_config.cache_implementation is not None:
                raise Unsupported("cache_implementation")
            if guided_pairs(generation_config, kwargs):
                guidance = GuidanceLogitsProcessor(generation_config.guidance_scale)
                logits_processor = [guidance, *logits_processor]
            asked = request_of(model, logits_processor, stopping_criteria, generation_config, kwargs, input_ids)
            found.append(asked if asked.stops_at is None else None)
        except Unsupported:
            found.append(None)
        return input_ids

    inputs = {"inputs": job.prompt[None].to(model.device), **_tensors([job], model.device)}
    model.generate(**inputs, custom_generate=look, **options)
    return found[0]


def _in_batches(
    model: Any, jobs: list[_Job], rows: int, options: dict[str, Any]
) -> Iterator[tuple[_Job, torch.Tensor]]:
    """As generate() makes them."""
    pad = model.config.pad_token_id
    for first in range(0, len(jobs), rows):
        batch = jobs[first : first + rows]
        longest = max(len(job.prompt) for job in batch)
        ids = torch.full((len(batch), longest), pad)
        for row, job in zip(ids, batch, strict=True):
            row[longest - len(job.prompt) :] = job.prompt
        inputs = {"input_ids": ids.to(model.device), "attention_mask": (ids != pad).long().to(model.device)}
        inputs |= _tensors(batch, model.device)
        sequences = model.generate(**inputs, seed=[job.seed for job in batch], **options).cpu()
        for job, sequence in zip(batch, sequences, strict=True):
            sequence = sequence[longest - len(job.prompt) :]
            kept = (sequence != pad).nonzero()
            yield job, sequence[: int(kept[-1]) + 1]


class _Row:
    """A mesh in work."""

    def __init__(self, job: _Job, token: int, first_face: int):
        self.job, self.ids = job, [*job.prompt.tolist(), token]
        self.first_face = first_face  # of the engine: what it made before was of another mesh


class _Prompts:
    """What meshes begin with, as the model has read it: with the conditions, and if guided without them too."""

    def __init__(self, model: Any, types: Any, guided: bool):
        self.model, self.types, self.guided = model, types, guided
        self.ids: torch.Tensor | None = None  # that were read last
        self._read: dict[tuple[int, ...], Any] = {}

    def read(self, job: _Job) -> list[Any]:
        if job.prompt is not self.ids:
            self.ids, self._read = job.prompt, {}
        nothing = {name: UNKNOWN for name in job.conditions}
        return [self._one(job, each) for each in ((job.conditions, nothing) if self.guided else (job.conditions,))]

    def _one(self, job: _Job, conditions: dict[str, int]) -> Any:
        key = tuple(conditions.values())
        if key not in self._read:
            if len(self._read) >= MOST_PROMPTS:
                self._read.clear()
            asked = _tensors([job._replace(conditions=conditions)], self.model.device)
            self._read[key] = read_prompt(self.model, job.prompt[None].to(self.model.device), self.types, asked)
        return self._read[key]


def _refilled(model: Any, jobs: list[_Job], rows: int, request: DecodeRequest) -> Iterator[tuple[_Job, torch.Tensor]]:
    config, types = model.config, decoding_types(model, request)
    waiting = iter(jobs)
    width = 2 if request.choice.guided else 1  # rows of the engine for each mesh
    engine = take_engine(model, rows * width, -(-request.max_length // config.tokens_per_face) + 1, types)
    prompts = _Prompts(model, types, guided=request.choice.guided)
    try:
        with engine.at_work():
            engine.prepare(request.choice)
            engine.cache.reset()
            engine.steps.begin()
            engine.chooser.set(request.settings)
        work: list[_Row | None] = [None] * rows
        launched = 0
        pending: list[tuple[int, Any]] = []
        while True:
            # Rows without a mesh get the next ones.
            free = [row for row in range(rows) if work[row] is None]
            done: list[_Row] = []
            begin: list[tuple[Any, int, RowsBegin, int]] = []
            while len(begin) < len(free) * width and (job := next(waiting, None)):
                with engine.at_work():
                    begun = prompts.read(job)
                left = request.max_length - len(job.prompt)
                start = rows_begin(request, config, job.prompt[None].numpy(), 0, row_numbers([job.seed], left))
                if job.faces is not None:
                    start = start._replace(limits=np.full_like(start.limits, job.faces))
                logits = np.concatenate([each.logits for each in begun])
                token, state, seen = _first_token(request, config, logits, start)
                row = _Row(job, token, launched)
                if token == request.choice.end or left == 1:
                    done.append(row)
                else:
                    place = free[len(begin) // width]
                    work[place] = row
                    start = start._replace(state=state, seen=seen)
                    begin += [(each, place * width + index, start, token) for index, each in enumerate(begun)]
            begin.sort(key=lambda each: id(each[0]))
            for _, group in groupby(begin, key=lambda each: id(each[0])):
                begins, places, starts, tokens = zip(*group, strict=True)
                together = RowsBegin(*(np.concatenate(parts) for parts in zip(*starts, strict=True)))
                with engine.at_work():
                    engine.begin_rows(list(places), begins[0], together, np.array(tokens))
            yield from (_finished(config, request, row) for row in done)
            active = any(row is not None for row in work)
            if not active and not pending:
                return
            if active:
                with engine.at_work():
                    pending.append((launched, engine.next_face(request.choice)))
                launched += 1
            # While the host reads a face, a GPU makes the next one.
            if len(pending) > (1 if engine.is_gpu and active else 0):
                number, tokens = pending.pop(0)
                columns = engine.read(tokens)
                finished = []
                for place, row in enumerate(work):
                    if row is not None and row.first_face <= number and _take(request, row, columns[:, place * width]):
                        finished.append(row)
                        work[place] = None
                stops = [bool(torch.as_tensor(look(prompts.ids[None], None)).all()) for look in request.after_faces]
                yield from (_finished(config, request, row) for row in finished)
                if any(stops):
                    yield from (_finished(config, request, row) for row in work if row is not None)
                    return
    finally:
        give_engine(model, engine)


def _first_token(
    request: DecodeRequest, config: Any, logits: np.ndarray, start: RowsBegin
) -> tuple[int, np.ndarray, np.ndarray]:
    """The token after the prompt, and the chooser's state and seen tokens after it."""
    rows = len(logits)
    chooser = HostChooser(rows, start.uniforms.shape[1], config.vocab_size, config.tokens_per_face, torch.zeros(rows))
    chooser.set(request.settings)
    start = start._replace(edges=start.edges[:, :0])  # what they lead to stands in the state
    chooser.begin(torch.arange(rows), RowsBegin(*(np.repeat(each, rows, axis=0) for each in start)))
    tokens = torch.zeros(rows, dtype=torch.long)
    chooser.choose(request.choice, torch.from_numpy(logits), tokens, 0, False)
    return int(tokens[0]), chooser.state[:1], chooser.seen[:1]


def _take(request: DecodeRequest, row: _Row, column: np.ndarray) -> bool:
    """Adds a face's other tokens and the first one of the next; whether the mesh is finished."""
    for token in column.tolist():
        if len(row.ids) == request.max_length:
            return True
        row.ids.append(token)
        if token == request.choice.end:
            return True
    return len(row.ids) == request.max_length


def _finished(config: Any, request: DecodeRequest, row: _Row) -> tuple[_Job, torch.Tensor]:
    ids = row.ids
    if ids[-1] == request.choice.end and request.choice.grammar:
        # A whole end face, as far as there is room.
        face = config.tokens_per_face
        ids = [*ids, *[ids[-1]] * min(face - 1, request.max_length - len(ids))]
    return row.job, torch.tensor(ids)


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


def _meshes(
    made: Iterator[tuple[_Job, torch.Tensor]], layout: MeshFormat, max_faces: int | None, most: int
) -> Iterator[GeneratedMesh]:
    with closing(made):
        for job, ids in made:
            ended = layout.has_ended(ids, most)
            if max_faces is not None:
                # Without the mesh grammar the tokens of an end face may be of another face.
                room = layout.num_tokens(max_faces, start=True)
                if not (ids[: room + 1] == layout.eos_token_id).any():
                    ids = ids[:room]
            yield GeneratedMesh(job.number, job.seed, ids, ended)
