"""From what generate() was asked for to what a decode engine is told, and the loop that reads what it makes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.generation import logits_process, stopping_criteria

from .choosing_iflame import (
    COLUMNS,
    DIGITS,
    FACES,
    FIRST,
    HIGHEST,
    LOWEST,
    SECOND,
    Choice,
    RowsBegin,
    Settings,
)
from .engine_iflame import DecodeEngine, give_engine, take_engine, why_no_engine
from .grammar_iflame import EndFaceCriteria, MeshGrammarLogitsProcessor
from .packing_iflame import what_cannot_be_packed
from .sampling_iflame import row_numbers

# B rows, T tokens, V token ids

NO_LIMIT = 2**31 - 1


class DecodeRequest(NamedTuple):
    """What an engine is asked for."""

    choice: Choice
    settings: Settings
    fewest_faces: int
    most_faces: int
    max_length: int  # tokens of a row, prompt and padding included
    end: int  # id that ends a row; -1: none
    pad: int
    whole_end: bool  # a row ends with its whole end face
    stops_at: float | None  # time.time() after which no other face begins
    after_faces: list[Callable[..., Any]]  # stopping criteria that look once a face


class Unsupported(Exception):
    """Something that only the plain loop does; the message names it."""


def request_of(
    model: Any, processors: Any, criteria: Any, config: Any, inputs: dict[str, Any], input_ids: torch.Tensor
) -> DecodeRequest:
    """
    What a call of generate() asks of an engine.

    Args:
        processors, criteria: the lists that transformers made.
        config: the generation config.
        inputs: the model's keyword arguments.

    Raises:
        Unsupported: for what an engine does not do.
    """
    if reason := why_no_engine(model) or what_cannot_be_packed(model):
        raise Unsupported(reason)
    for name in ("return_dict_in_generate", "output_scores", "output_logits", "output_attentions"):
        if getattr(config, name, None):
            raise Unsupported(name)
    if any(getattr(inputs.get(name), "_is_user_defined", False) for name in ("cache", "past_key_values")):
        raise Unsupported("a cache that is given")
    if config.prefill_chunk_size is not None:
        raise Unsupported("prefill_chunk_size")
    if not config.use_cache:
        raise Unsupported("use_cache=False")
    if inputs.get("inputs_embeds") is not None or input_ids.shape[1] == 0:
        raise Unsupported("inputs_embeds")
    layout = model.config
    settings, grammar = _settings(processors, config.do_sample)
    limits = _limits(criteria)
    end = limits["end"]
    if grammar is not None and end not in (-1, grammar.eos_token_id):
        raise Unsupported(f"eos_token_id={end} with the mesh grammar")
    if limits["max_length"] > layout.max_position_embeddings:
        raise Unsupported("a max_length above max_position_embeddings")
    choice = Choice(
        sample=config.do_sample,
        filters=bool(settings.top_k or settings.top_p < 1 or settings.min_p > 0),
        penalty=settings.repetition_penalty != 1,
        grammar=grammar is not None,
        coordinates=layout.coordinate_resolution + 1,
        end=end if grammar is None else grammar.eos_token_id,
    )
    pad = config._pad_token_tensor
    return DecodeRequest(
        choice,
        settings,
        fewest_faces=0 if grammar is None else grammar.min_faces,
        most_faces=NO_LIMIT if grammar is None or grammar.max_faces is None else grammar.max_faces,
        pad=end if pad is None else int(pad),
        **limits,
    )


def _settings(processors: Any, sample: bool) -> tuple[Settings, Any]:
    """Of the processors, which must stand in transformers' order."""
    known = [
        logits_process.RepetitionPenaltyLogitsProcessor,
        MeshGrammarLogitsProcessor,
        logits_process.TemperatureLogitsWarper,
        logits_process.TopKLogitsWarper,
        logits_process.TopPLogitsWarper,
        logits_process.MinPLogitsWarper,
    ]
    values, grammar, before = {}, None, -1
    for processor in processors:
        kind = type(processor)
        if kind not in known:
            raise Unsupported(f"the processor {kind.__name__}")
        if known.index(kind) <= before:
            raise Unsupported(f"the place of the processor {kind.__name__}")
        before = known.index(kind)
        if getattr(processor, "min_tokens_to_keep", 1) != 1:
            raise Unsupported(f"min_tokens_to_keep of {kind.__name__}")
        if kind is MeshGrammarLogitsProcessor:
            grammar = processor
        elif before == 0:
            if getattr(processor, "prompt_ignore_length", None):
                raise Unsupported("prompt_ignore_length of RepetitionPenaltyLogitsProcessor")
            values["repetition_penalty"] = float(processor.penalty)
        else:
            name = {2: "temperature", 3: "top_k", 4: "top_p", 5: "min_p"}[before]
            values[name] = getattr(processor, name)
    return Settings(**values), grammar


def _limits(criteria: Any) -> dict[str, Any]:
    limits = {"max_length": None, "end": -1, "whole_end": False, "stops_at": None, "after_faces": []}
    for criterion in criteria:
        kind = type(criterion)
        if kind is stopping_criteria.MaxLengthCriteria:
            limits["max_length"] = criterion.max_length
        elif kind is stopping_criteria.MaxTimeCriteria:
            limits["stops_at"] = criterion.initial_timestamp + criterion.max_time
        elif isinstance(criterion, stopping_criteria.EosTokenCriteria):
            ids = torch.as_tensor(criterion.eos_token_id).flatten().tolist()
            if len(ids) != 1:
                raise Unsupported("several eos_token_id")
            limits["end"], limits["whole_end"] = ids[0], kind is EndFaceCriteria
        elif getattr(criterion, "looks_once_a_face", False):
            limits["after_faces"].append(criterion)
        else:
            raise Unsupported(f"the stopping criterion {kind.__name__}")
    if limits["max_length"] is None:
        raise Unsupported("a generation without max_length")
    return limits


def decode(
    model: Any,
    request: DecodeRequest,
    input_ids: torch.Tensor,
    inputs: dict[str, Any],
    seeds: list[int],
    streamer: Any = None,
) -> torch.Tensor:
    """
    The rows (B, T) with what follows them, as generate() returns them.

    Args:
        inputs: of the model, for the prompt: attention_mask, position_ids.
        seeds: one for each row.
    """
    face, (rows, length) = model.config.tokens_per_face, input_ids.shape
    prompt = input_ids.to(model.lm_head.weight.device)
    left = request.max_length - length
    if left <= 0:
        return input_ids
    engine = take_engine(model, rows, -(-request.max_length // face) + 1, decoding_dtype(model))
    reader = _Reader(request, rows, length % face, left, streamer)
    try:
        with torch.inference_mode():
            engine.prepare(request.choice)
            _begin(engine, model, request, prompt, inputs, seeds, left)
            waiting = [engine.first(request.choice, length % face)]
            asked = len(waiting[0].places)
            # While the host reads a face, a GPU makes the next one.
            ahead = 2 if engine.is_gpu else 1
            while waiting:
                while len(waiting) < ahead and asked < left and not reader.done:
                    waiting.append(engine.next_face(request.choice))
                    asked += face
                reader.take(engine.read(waiting.pop(0)))
                if request.stops_at is not None and time.time() > request.stops_at:
                    reader.done = True
                for criterion in request.after_faces:
                    reader.done |= bool(torch.as_tensor(criterion(prompt, None)).all())
                if reader.done:
                    break
                if not waiting and asked < left:
                    waiting.append(engine.next_face(request.choice))
                    asked += face
            if engine.is_gpu:
                torch.cuda.current_stream(engine.device).synchronize()
    finally:
        give_engine(model, engine)
    if streamer is not None:
        streamer.end()
    new = torch.from_numpy(reader.tokens()).to(input_ids)
    return torch.cat([input_ids, new], dim=1)


def decoding_dtype(model: Any) -> torch.dtype:
    """Of weights, keys and values: on a GPU the model's, or that of the caller's autocast; on a CPU float32, which is
    fast on all."""
    device, dtype = model.lm_head.weight.device.type, model.lm_head.weight.dtype
    if device == "cpu":
        return dtype if dtype == torch.float64 else torch.float32
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def _begin(engine: DecodeEngine, model: Any, request: DecodeRequest, input_ids, inputs, seeds, left: int) -> None:
    cache = engine.cache
    cache.reset()
    inputs = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
    inputs = {name: value.to(input_ids.device) for name, value in inputs.items()}
    output = model(input_ids, **inputs, cache=cache, use_cache=True, logits_to_keep=1, return_dict=True)
    if cache.is_padding_so_far or cache.ends_in_padding:
        raise ValueError("a row of the prompt is padding to its end: a mesh begins with the start face")
    padding = 0 if cache.padding is None else cache.padding.cpu().numpy()
    begin = rows_begin(request, model.config, input_ids.cpu().numpy(), padding, row_numbers(seeds, left))
    engine.begin(output.logits[:, -1], request.settings, begin)


def rows_begin(
    request: DecodeRequest, config: Any, ids: np.ndarray, padding: np.ndarray | int, uniforms: np.ndarray
) -> RowsBegin:
    """What rows with the prompts `ids` (B, T), after `padding` (B,) tokens, begin with."""
    face = config.tokens_per_face
    rows, length = ids.shape
    state = np.zeros((rows, COLUMNS), dtype=np.int64)
    state[:, LOWEST] = -1
    open_tokens = length % face
    whole = length - open_tokens
    levels = config.coordinate_resolution + 1
    ranks = levels ** np.arange(3)
    padding = np.broadcast_to(padding, (rows,))
    state[:, FACES] = (whole - padding) // face - 1
    if request.choice.grammar:
        last = ids[:, whole - face : whole].reshape(rows, -1, 3) @ ranks
        is_face = (ids[:, whole - face : whole] < levels).all(axis=1)
        state[:, LOWEST : HIGHEST + 1] = np.where(is_face[:, None], np.sort(last, axis=1), [-1, 0, 0])
        for vertex, column in enumerate((FIRST, SECOND)):
            if open_tokens >= 3 * (vertex + 1):
                first = whole + 3 * vertex
                state[:, column] = ids[:, first : first + 3] @ ranks
        digits = open_tokens % 3
        state[:, DIGITS] = ids[:, length - digits :] @ ranks[:digits] if digits else 0
    fitting = (request.max_length - padding) // face - 1
    limits = np.stack([np.full(rows, request.fewest_faces), np.minimum(fitting, request.most_faces)], axis=1)
    seen = np.zeros((rows, config.vocab_size), dtype=bool)
    np.put_along_axis(seen, np.where(ids < config.vocab_size, ids, 0), True, axis=1)
    return RowsBegin(state, limits, uniforms, seen)


class _Reader:
    """Puts together what comes of the engine, as transformers' loop would have."""

    def __init__(self, request: DecodeRequest, rows: int, place: int, left: int, streamer: Any):
        self.request, self.place, self.left, self.streamer = request, place, left, streamer
        self.going = np.ones(rows, dtype=bool)
        self.columns: list[np.ndarray] = []
        self.done = False

    def take(self, columns: np.ndarray) -> None:
        request = self.request
        for column in columns:
            if self.done:
                return
            column = np.where(self.going, column, request.pad)
            self.columns.append(column)
            if self.streamer is not None:
                self.streamer.put(torch.from_numpy(column))
            self.place = (self.place + 1) % 9
            if request.end >= 0 and (self.place == 0 or not request.whole_end):
                self.going &= column != request.end
            self.done = len(self.columns) == self.left or not self.going.any()

    def tokens(self) -> np.ndarray:
        return np.stack(self.columns, axis=1)
