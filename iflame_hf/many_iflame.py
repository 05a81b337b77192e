"""Many meshes, as they are finished: a row whose mesh has ended goes on with the next one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .choosing_iflame import HostChooser
from .decoding_iflame import DecodeRequest, Unsupported, decoding_dtype, request_of, rows_begin
from .engine_iflame import give_engine, read_prompt, take_engine
from .sampling_iflame import row_numbers, row_seeds

# B rows, R of them, T tokens

DEFAULT_ROWS = {"cuda": 64, "cpu": 8}


class GeneratedMesh(NamedTuple):
    """A mesh that was generated."""

    number: int  # its place among the seeds
    seed: int
    ids: torch.Tensor  # (T,) from the start face to the end face, which is missing where the mesh was cut off


def generate_meshes(
    model: Any, seeds: Sequence[int], *, rows: int | None = None, prompt: torch.Tensor | None = None, **options: Any
) -> Iterator[GeneratedMesh]:
    """
    Samples a mesh for each seed and yields each as soon as it is finished, in whatever order they are.

    Args:
        model: an `IFlameForCausalLM`.
        seeds: whole numbers from 0 on. A seed gives the mesh that `generate(seed=...)` gives.
        rows: meshes at a time, 64 on a CUDA device and 8 elsewhere by default.
        prompt: ids (T,) of what all meshes begin with; by default the start face.
        options: of `generate`, as temperature, top_k, max_faces.

    Raises ValueError at once for what is no seed, no prompt or no option.
    """
    seeds = row_seeds(list(seeds), len(seeds)) if len(seeds) else []
    rows = DEFAULT_ROWS.get(model.device.type, 8) if rows is None else rows
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows must be a positive whole number, got {rows!r}")
    for name in ("seed", "num_return_sequences", "streamer", "inputs", "input_ids", "inputs_embeds"):
        if name in options:
            raise ValueError(f"generate_meshes() makes a mesh a seed: leave out {name}")
    options = {"do_sample": True, **options}
    if prompt is None:
        prompt = torch.full((model.config.tokens_per_face,), model.config.bos_token_id)
    prompt = torch.as_tensor(prompt, device=model.device)[None]
    # Raises for what cannot be, before the first mesh is asked for.
    request = _request(model, prompt, options)
    rows = min(rows, max(len(seeds), 1))
    if request is None:
        return _in_batches(model, seeds, rows, prompt, options)
    return _refilled(model, seeds, rows, prompt, request)


def _request(model: Any, prompt: torch.Tensor, options: dict[str, Any]) -> DecodeRequest | None:
    """What generate() would ask of an engine, or None."""
    found: list[DecodeRequest | None] = []

    def look(model, input_ids, logits_processor=None, stopping_criteria=None, generation_config=None, **kwargs):
        try:
            if input_ids.shape[1] % model.config.tokens_per_face:
                raise Unsupported("a prompt that ends inside a face")
            kwargs.pop("seed", None)
            asked = request_of(model, logits_processor, stopping_criteria, generation_config, kwargs, input_ids)
            found.append(asked if asked.stops_at is None and not asked.after_faces else None)
        except Unsupported:
            found.append(None)
        return input_ids

    model.generate(prompt, custom_generate=look, **options)
    return found[0]


def _in_batches(model, seeds, rows, prompt, options) -> Iterator[GeneratedMesh]:
    """As generate() makes them."""
    for first in range(0, len(seeds), rows):
        part = seeds[first : first + rows]
        sequences = model.generate(prompt.expand(len(part), -1), seed=part, **options).cpu()
        for offset, (seed, ids) in enumerate(zip(part, sequences, strict=True)):
            yield GeneratedMesh(first + offset, seed, _without_padding(model, ids))


def _without_padding(model: Any, ids: torch.Tensor) -> torch.Tensor:
    kept = (ids != model.config.pad_token_id).nonzero()
    return ids[: int(kept[-1]) + 1]


class _Row:
    """A mesh in work."""

    def __init__(self, number: int, seed: int, ids: list[int], first_face: int):
        self.number, self.seed, self.ids = number, seed, ids
        self.first_face = first_face  # of the engine: what it made before was of another mesh


def _refilled(model, seeds, rows, prompt, request: DecodeRequest) -> Iterator[GeneratedMesh]:
    config = model.config
    face, left = config.tokens_per_face, request.max_length - prompt.shape[1]
    dtype = decoding_dtype(model)
    waiting = iter(enumerate(seeds))
    engine = take_engine(model, rows, -(-request.max_length // face) + 1, dtype)
    try:
        with torch.inference_mode():
            engine.prepare(request.choice)
            engine.cache.reset()
            engine.steps.clear()
            engine.chooser.set(request.settings)
            begun = read_prompt(model, prompt, dtype)
        work: list[_Row | None] = [None] * rows
        ids = prompt.cpu().numpy()
        launched = 0
        pending: list[tuple[int, Any]] = []
        while True:
            # Rows without a mesh get the next ones.
            free = [row for row in range(rows) if work[row] is None]
            done, begin = [], []
            while len(begin) < len(free) and (job := next(waiting, None)):
                number, seed = job
                uniforms = row_numbers([seed], left)
                start = rows_begin(request, config, ids, 0, uniforms)
                token, state, seen = _first_token(request, config, begun.logits, start)
                row = _Row(number, seed, [*ids[0].tolist(), token], launched)
                if token == request.choice.end or left == 1:
                    done.append(row)
                else:
                    begin.append((row, start._replace(state=state, seen=seen), token))
            if begin:
                chosen = free[: len(begin)]
                for place, (row, _, _) in zip(chosen, begin, strict=True):
                    work[place] = row
                starts = [start for _, start, _ in begin]
                together = type(starts[0])(*(np.concatenate(parts) for parts in zip(*starts, strict=True)))
                with torch.inference_mode():
                    tokens = np.array([token for _, _, token in begin])
                    engine.begin_rows(chosen, begun, together, tokens, together.state)
            yield from (_finished(model, request, row) for row in done)
            active = any(row is not None for row in work)
            if not active and not pending:
                return
            if active:
                with torch.inference_mode():
                    pending.append((launched, engine.next_face(request.choice)))
                launched += 1
            # While the host reads a face, a GPU makes the next one.
            if len(pending) > (1 if engine.is_gpu and active else 0):
                number, tokens = pending.pop(0)
                columns = engine.read(tokens)
                finished = []
                for place, row in enumerate(work):
                    if row is not None and row.first_face <= number and _take(request, row, columns[:, place]):
                        finished.append(row)
                        work[place] = None
                yield from (_finished(model, request, row) for row in finished)
    finally:
        give_engine(model, engine)


def _first_token(
    request: DecodeRequest, config: Any, logits: np.ndarray, start: Any
) -> tuple[int, np.ndarray, np.ndarray]:
    """The token after the prompt, and the chooser's state and seen tokens after it."""
    chooser = HostChooser(1, start.uniforms.shape[1], config.vocab_size, config.tokens_per_face, torch.zeros(1))
    chooser.set(request.settings)
    chooser.begin(torch.zeros(1, dtype=torch.long), start)
    token = torch.zeros(1, dtype=torch.long)
    chooser.choose(request.choice, torch.from_numpy(logits), token, 0, False)
    return int(token), chooser.state, chooser.seen


def _take(request: DecodeRequest, row: _Row, column: np.ndarray) -> bool:
    """Adds a face's other tokens and the first one of the next; whether the mesh is finished."""
    for token in column.tolist():
        if len(row.ids) == request.max_length:
            return True
        row.ids.append(token)
        if token == request.choice.end:
            return True
    return len(row.ids) == request.max_length


def _finished(model: Any, request: DecodeRequest, row: _Row) -> GeneratedMesh:
    ids = row.ids
    if ids[-1] == request.choice.end and request.choice.grammar:
        # A whole end face, as far as there is room.
        face = model.config.tokens_per_face
        ids = [*ids, *[ids[-1]] * min(face - 1, request.max_length - len(ids))]
    return GeneratedMesh(row.number, row.seed, torch.tensor(ids))
