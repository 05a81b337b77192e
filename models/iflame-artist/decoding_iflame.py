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
    EXPECTED,
    FACES,
    FIRST,
    HIGHEST,
    LOWEST,
    SECOND,
    Choice,
    RowsBegin,
    Settings,
)
from .closing_iflame import expected_vertices, pending_of_rows
from .conditions_iflame import CONDITIONS, GuidanceLogitsProcessor
from .engine_iflame import DecodeEngine, Types, give_engine, take_engine, why_no_engine
from .grammar_iflame import EndFaceCriteria, MeshGrammarLogitsProcessor
from .packing_iflame import what_cannot_be_packed
from .sampling_iflame import row_numbers

# B rows, T tokens, V token ids

NO_LIMIT = 2**31 - 1
FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
ATTENTION = (None, "eager", "sdpa", *FLASH, "flex_attention")


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
    kv_cache_dtype: str | None  # of an engine on a GPU


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
    # The kinds of attention that transformers knows compute the same; what a user has registered may not.
    if model.config._attn_implementation not in ATTENTION:
        raise Unsupported(f"attn_implementation={model.config._attn_implementation!r}")
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
    settings, grammar = _settings(processors)
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
        guided=settings.guidance_scale != 1,
        closing=settings.closing_strength > 0,
        ordered=grammar is None or grammar.keep_order,
    )
    pad = config._pad_token_tensor
    return DecodeRequest(
        choice,
        settings,
        fewest_faces=0 if grammar is None else grammar.min_faces,
        most_faces=NO_LIMIT if grammar is None or grammar.max_faces is None else grammar.max_faces,
        pad=end if pad is None else int(pad),
        kv_cache_dtype=config.kv_cache_dtype,
        **limits,
    )


def _settings(processors: Any) -> tuple[Settings, Any]:
    """Of the processors, which must stand in transformers' order."""
    known = [
        GuidanceLogitsProcessor,
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
            grammar, values["closing_strength"] = processor, float(processor.closing_strength)
        elif kind is GuidanceLogitsProcessor:
            values["guidance_scale"] = float(processor.scale)
        elif kind is logits_process.RepetitionPenaltyLogitsProcessor:
            ignored = getattr(processor, "prompt_ignore_length", None)  # of padded rows a tensor
            if ignored is not None and torch.as_tensor(ignored).any():
                raise Unsupported("prompt_ignore_length of RepetitionPenaltyLogitsProcessor")
            values["repetition_penalty"] = float(processor.penalty)
        else:
            name = {3: "temperature", 4: "top_k", 5: "top_p", 6: "min_p"}[before]
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
        elif kind in (stopping_criteria.EosTokenCriteria, EndFaceCriteria):
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
        inputs: of the model, for the prompt: attention_mask, position_ids, conditions.
        seeds: one for each row.
    """
    face, (rows, length) = model.config.tokens_per_face, input_ids.shape
    choice, prompt = request.choice, input_ids.cpu()
    reader = _Reader(request, prompt.numpy(), face, streamer)
    faces = -(-request.max_length // face) + 1
    engine = take_engine(model, rows, faces, decoding_types(model, request))
    try:
        with engine.at_work():
            engine.prepare(choice)
            _begin(engine, model, request, prompt, inputs, seeds)
            tokens = engine.first(choice, length % face)
            while True:
                # While the host reads a face, a GPU makes the next one.
                following = None
                if engine.is_gpu and reader.length + len(tokens.places) < request.max_length:
                    following = engine.next_face(choice)
                reader.take(engine.read(tokens))
                if reader.is_done or _is_stopped(request, reader.whole_faces()):
                    break
                tokens = engine.next_face(choice) if following is None else following
    finally:
        give_engine(model, engine)
    if streamer is not None:
        streamer.end()
    return torch.from_numpy(reader.ids[:, : reader.length].copy()).to(input_ids)


def _is_stopped(request: DecodeRequest, ids: torch.Tensor) -> bool:
    """Whether time is up, or a criterion that looks once a face says so of all rows."""
    if request.stops_at is not None and time.time() > request.stops_at:
        return True
    return any([bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in request.after_faces])


def decoding_types(model: Any, request: DecodeRequest) -> Types:
    """Of weights, keys and values: on a GPU the model's, or that of the caller's autocast, and of keys and values what
    was asked for; on a CPU float32, which is fast on all."""
    device, dtype = model.lm_head.weight.device.type, model.lm_head.weight.dtype
    if device == "cpu":
        return Types(dtype if dtype == torch.float64 else torch.float32)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    return Types(dtype, request.kv_cache_dtype)


def _begin(
    engine: DecodeEngine,
    model: Any,
    request: DecodeRequest,
    prompt: torch.Tensor,
    inputs: dict[str, Any],
    seeds: list[int],
) -> None:
    """Reads the prompt (B, T), which is on the host."""
    cache = engine.cache
    cache.reset()
    names = ("attention_mask", "position_ids", *CONDITIONS)
    inputs = {name: inputs[name] for name in names if inputs.get(name) is not None}
    inputs = {name: value.to(engine.device) for name, value in {"input_ids": prompt, **inputs}.items()}
    output = model(**inputs, cache=cache, use_cache=True, logits_to_keep=1, return_dict=True)
    if cache.is_padding_so_far or cache.ends_in_padding:
        raise ValueError("a row of the prompt is padding to its end: a mesh begins with the start face")
    padding = 0 if cache.padding is None else cache.padding.cpu().numpy()
    numbers = row_numbers(seeds, request.max_length - prompt.shape[1])
    engine.begin(
        output.logits[:, -1], request.settings, rows_begin(request, model.config, prompt.numpy(), padding, numbers)
    )


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
        state[:, LOWEST : HIGHEST + 1] = np.where(is_face[:, None], np.sort(last, axis=1), -1)
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
    edges = np.zeros((rows, 0), dtype=np.int64)
    if request.choice.closing:
        faces = ids[:, : length - open_tokens].reshape(rows, -1, 3, 3) @ ranks
        edges = pending_of_rows(faces, state[:, FACES], levels**3)
        state[:, EXPECTED:] = expected_vertices(edges, state[:, LOWEST : HIGHEST + 1], levels**3)
    return RowsBegin(state, limits, uniforms, seen, edges)


class _Reader:
    """Puts together what comes of the engine, as transformers' loop would have.

    Args:
        prompt: (B, T) ids.
        face: tokens of a face.
    """

    def __init__(self, request: DecodeRequest, prompt: np.ndarray, face: int, streamer: Any):
        rows, self.length = prompt.shape
        self.request, self.face, self.streamer = request, face, streamer
        self.ids = np.empty((rows, request.max_length), dtype=np.int64)
        self.ids[:, : self.length] = prompt
        self.going = np.ones(rows, dtype=bool)
        self.is_done = False

    def take(self, columns: np.ndarray) -> None:
        """Adds tokens (places, B), until all rows have ended or are as long as they may be."""
        request = self.request
        for column in columns:
            column = np.where(self.going, column, request.pad)
            self.ids[:, self.length] = column
            self.length += 1
            if self.streamer is not None:
                self.streamer.put(torch.from_numpy(column))
            if request.end >= 0 and (self.length % self.face == 0 or not request.whole_end):
                self.going &= column != request.end
            self.is_done = self.length == request.max_length or not self.going.any()
            if self.is_done:
                return

    def whole_faces(self) -> torch.Tensor:
        """The rows up to their last whole face, (B, T)."""
        return torch.from_numpy(self.ids[:, : self.length // self.face * self.face])
