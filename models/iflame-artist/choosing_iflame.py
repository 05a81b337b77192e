"""
How a decode engine chooses tokens on the device: penalty, grammar, closing, temperature, top-k, top-p, min-p, and a
random number of the row's own. One kernel; host_choosing_iflame.py has the same in numpy.

They compute what transformers' processors and `MeshGrammarLogitsProcessor` compute, in transformers' order, from what
they carry of each row instead of its ids.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .closing_kernels_iflame import _follow_face
from .kernels_iflame import _jit, _wait, launch

try:
    import triton.language as tl
except ImportError:  # optional
    tl = None

# B rows, V token ids, L coordinates of the grid

# What is carried of each row, by column of a table (B, 11) int32: ranks of the last face's vertices in order, of the
# open face's first two vertices, the digits of its open vertex, whole faces, whether the mesh has ended, and from
# EXPECTED on three ranks of `closing_iflame.expected_vertices`.
LOWEST, MIDDLE, HIGHEST, FIRST, SECOND, DIGITS, FACES, ENDED, EXPECTED = range(9)
COLUMNS = 11


class Choice(NamedTuple):
    """What decides which code chooses, whatever the settings' values."""

    sample: bool  # else the likeliest token
    filters: bool  # top-k, top-p or min-p
    penalty: bool
    grammar: bool
    coordinates: int  # L
    end: int  # id of the end token; -1: nothing ends a row
    guided: bool = False  # each two rows are one mesh, with conditions and without
    closing: bool = False  # with the grammar: tokens that leave an edge open score lower
    ordered: bool = True  # with the grammar: faces stay in canonical order


@_jit
def _remainder(x, modulus):
    return (x % modulus + modulus) % modulus


@_jit
def _log_softmax(scores):
    scores -= tl.max(scores, axis=0)
    return scores - tl.log(tl.sum(tl.exp(scores), axis=0))


@_jit
def choose(
    logits_ptr,  # (B, V) float32
    uniform_ptr,  # (B, numbers) float32 within [0, 1)
    settings_ptr,  # (7,) float32
    state_ptr,  # (B, 11) int32
    limits_ptr,  # (B, 2) int32: fewest and most faces
    edges_ptr,  # (B, edges) int64: keys of pending edges or -1, three for each face
    seen_ptr,  # (B, VB) int8: whether a token is among the ids so far
    count_ptr,  # (B,) int32: tokens chosen so far
    position_ptr,  # (B,) int64: place of the token that went in, which becomes that of the choice
    cos_ptr,  # (items, D / 2) float32
    sin_ptr,
    room_ptr,  # (3,) int64: slots of the caches of the levels
    slot_ptr,  # (3, B) int32: receives the items' places
    rotary_ptr,  # (3, B, D) float32: receives their cosines and sines
    token_ptr,  # (B,) int64: receives the choice
    face_ptr,  # (B, 10) int32: receives it at its place in the face; the last becomes 1 where logits are no numbers
    numbers,
    edges,
    place,  # of the chosen token in its face
    face,  # columns of face_ptr
    D: tl.constexpr,  # size of a head
    V: tl.constexpr,
    VB: tl.constexpr,
    L: tl.constexpr,
    END: tl.constexpr,
    ADVANCE: tl.constexpr,  # whether a token went in before
    SAMPLE: tl.constexpr,
    FILTERS: tl.constexpr,
    PENALISE: tl.constexpr,
    GRAMMAR: tl.constexpr,
    GUIDED: tl.constexpr,
    CLOSING: tl.constexpr,
    ORDERED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, VB)
    valid = lane < V
    # Of all that is read here the phase before writes the logits alone; and nothing reads the places any more.
    position = tl.load(position_ptr + row)
    if ADVANCE:
        position += 1
        tl.store(position_ptr + row, position)
    # Where the items of this position stand, for the levels' next steps.
    half = tl.arange(0, D // 2)
    for level in tl.static_range(3):
        # Rows whose mesh has ended go on beyond the room; what they make is not read.
        item = tl.minimum(position // (3**level), tl.load(room_ptr + level) - 1)
        tl.store(slot_ptr + level * tl.num_programs(0) + row, item.to(tl.int32))
        to = rotary_ptr + (level * tl.num_programs(0) + row) * D + half
        tl.store(to, tl.load(cos_ptr + item * (D // 2) + half))
        tl.store(to + D // 2, tl.load(sin_ptr + item * (D // 2) + half))
    count = tl.load(count_ptr + row)
    uniform = tl.load(uniform_ptr + row.to(tl.int64) * numbers + tl.minimum(count, numbers - 1))
    table = state_ptr + row * 11
    ended = tl.load(table + 7)
    lowest, middle, highest = tl.load(table), tl.load(table + 1), tl.load(table + 2)
    first, second, digits = tl.load(table + 3), tl.load(table + 4), tl.load(table + 5)
    faces = tl.load(table + 6)
    temperature, top_k = tl.load(settings_ptr), tl.load(settings_ptr + 1).to(tl.int32)
    top_p, min_p, penalty = tl.load(settings_ptr + 2), tl.load(settings_ptr + 3), tl.load(settings_ptr + 4)
    fewest, most = tl.load(limits_ptr + row * 2), tl.load(limits_ptr + row * 2 + 1)
    if CLOSING:
        expected, expected_first = tl.load(table + 8 + place // 3), tl.load(table + 8)
        strength = tl.load(settings_ptr + 6)
    _wait(PDL)
    if GUIDED:
        pair = logits_ptr + row // 2 * 2 * V + lane
        scores = _log_softmax(tl.load(pair, mask=valid, other=float("-inf")))
        without = _log_softmax(tl.load(pair + V, mask=valid, other=float("-inf")))
        guidance = tl.load(settings_ptr + 5)
        scores = tl.where(valid, without + guidance * (scores - without), float("-inf"))
    else:
        scores = tl.load(logits_ptr + row * V + lane, mask=valid, other=float("-inf"))
    wrong = tl.sum(tl.where(valid & ((scores != scores) | (scores == float("inf"))), 1, 0), axis=0)
    if not GRAMMAR:
        wrong = tl.where(tl.max(scores, axis=0) == float("-inf"), 1, wrong)
    if PENALISE:
        seen = tl.load(seen_ptr + row * VB + lane) != 0
        scores = tl.where(seen, tl.where(scores < 0, scores * penalty, scores / penalty), scores)

    digit = place % 3
    step = tl.where(digit == 0, 1, tl.where(digit == 1, L, L * L))
    last: tl.constexpr = L * L * L - 1
    digits = tl.where(digit == 0, 0, digits)
    if GRAMMAR:
        # The ranks that the vertex may have lie between low and high.
        low_first, low_later = lowest * 0, first + 1
        if ORDERED:
            another = (highest < last) | (middle <= last - 2)
            low_first = tl.maximum(tl.where(another, lowest, lowest + 1), 0)
            low_second = tl.where(highest < last, middle, middle + 1)
            low_third = tl.where(second == middle, highest + 1, tl.where(second > highest, middle, middle + 1))
            low_later = tl.where(first == lowest, tl.where(place < 6, low_second, low_third), low_later)
        high_first = tl.maximum(last - 2 - tl.maximum(fewest - faces - 1, 0), low_first)
        low = tl.where(place < 3, low_first, low_later)
        high = tl.where(place < 3, tl.minimum(high_first, last - 2), last)
        excluded = tl.where(place < 6, -1, second)
        if CLOSING:
            leads = (expected >= low) & (expected <= high) & (expected != excluded) & (expected >= 0)
            leads = leads & ((place < 3) | (first == expected_first)) & (expected % step == digits)
            scores = tl.where(leads & (lane != expected // step % L), scores - strength, scores)
        candidate = low + _remainder(digits + lane * step - low, step * L)
        candidate = tl.where(candidate == excluded, candidate + step * L, candidate)
        allowed = (lane < L) & (candidate <= high)
        none = tl.sum(allowed.to(tl.int32), axis=0) == 0
        begins = place == 0
        allowed = allowed & ((place > 0) | (faces < most))
        allowed = allowed | ((lane == END) & begins & ((faces >= fewest) | (faces >= most) | none))
        left = tl.where(allowed, scores, float("-inf"))
        nothing = tl.max(left, axis=0) == float("-inf")
        scores = tl.where(allowed, tl.where(nothing, 0.0, scores), float("-inf"))
    if SAMPLE:
        scores = scores / temperature
        if FILTERS:
            ordered = tl.sort(scores, descending=True)
            least = tl.max(tl.where(lane == top_k - 1, ordered, float("-inf")), axis=0)
            weight = tl.where(ordered >= least, tl.exp(ordered - tl.max(ordered, axis=0)), 0.0)
            # What stands before each, of all; the likeliest is kept in any case.
            before = tl.cumsum(weight, axis=0) - weight
            kept = (weight > 0) & ((before < top_p * tl.sum(weight, axis=0)) | (lane == 0))
            least = tl.min(tl.where(kept, ordered, float("inf")), axis=0)
            scores = tl.where(scores >= least, scores, float("-inf"))
            weight = tl.exp(scores - tl.max(scores, axis=0))
            scores = tl.where(weight < min_p, float("-inf"), scores)
        weight = tl.exp(scores - tl.max(scores, axis=0))
        reached = tl.cumsum(weight, axis=0)
        total = tl.max(reached, axis=0)
        token = tl.sum((reached <= uniform * total).to(tl.int32), axis=0)
        # Rounding must not choose what has no share.
        token = tl.minimum(token, tl.max(tl.where(weight > 0, lane, 0), axis=0))
    else:
        token = tl.argmax(scores, axis=0).to(tl.int32)
    token = tl.where(ended != 0, END if END >= 0 else 0, token)

    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(face_ptr + row * face + place, token)
    tl.store(count_ptr + row, count + 1)
    if wrong > 0:
        tl.store(face_ptr + row * face + face - 1, 1)
    if PENALISE:
        tl.store(seen_ptr + row * VB + token, tl.full((), 1, tl.int8))
    if END >= 0:
        ended = tl.where(token == END, 1, ended)
        tl.store(table + 7, ended)
    if GRAMMAR:
        digits = tl.where(ended != 0, digits, digits + token * step)
        tl.store(table + 5, digits)
        if place == 2:
            tl.store(table + 3, digits)
        if place == 5:
            tl.store(table + 4, digits)
        if place == 8:
            whole = ended == 0
            tl.store(table + 0, tl.where(whole, first, lowest))
            tl.store(table + 1, tl.where(whole, tl.minimum(second, digits), middle))
            tl.store(table + 2, tl.where(whole, tl.maximum(second, digits), highest))
            tl.store(table + 6, tl.where(whole, faces + 1, faces))
            if CLOSING:
                if whole:
                    of_row = edges_ptr + row.to(tl.int64) * edges
                    _follow_face(of_row, table + 8, faces, first, second, digits, L * L * L)


class Settings(NamedTuple):
    """Of sampling, as transformers names them; these leave the scores as they are."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    guidance_scale: float = 1.0
    closing_strength: float = 0.0  # nats


class RowsBegin(NamedTuple):
    """What rows begin with."""

    state: np.ndarray  # (R, 11), as the columns above say
    limits: np.ndarray  # (R, 2): fewest and most faces
    uniforms: np.ndarray  # (R, numbers) float64 within [0, 1): what chooses each token
    seen: np.ndarray  # (R, V) whether a token is among the ids so far
    edges: np.ndarray  # (R, E) of `closing_iflame.follow_face`, E at most 3 places for each face so far


class Places:
    """
    Where the items of the rows' next tokens stand, at every level.

    Args:
        rooms: slots of the cache of each level.
        cos, sin: of `rotary_tables`, (items, D / 2).
    """

    def __init__(self, rows: int, rooms: list[int], cos: torch.Tensor, sin: torch.Tensor):
        device = cos.device
        self.cos, self.sin = cos.contiguous(), sin.contiguous()
        self.rooms = torch.tensor(rooms, device=device)
        self.slots = torch.zeros(len(rooms), rows, dtype=torch.int32, device=device)
        self.rotary = torch.zeros(len(rooms), rows, 2 * cos.shape[1], device=device)

    def put(self, positions: torch.Tensor, strides: tuple[int, ...]) -> None:
        """Those of the tokens at `positions` (B,) in their meshes; the kernel does the same."""
        for level, stride in enumerate(strides):
            items = torch.minimum(positions // stride, self.rooms[level] - 1)
            self.slots[level] = items
            self.rotary[level] = torch.cat([self.cos[items], self.sin[items]], dim=1)


class KernelChooser:
    """
    Chooses the tokens of all rows on a GPU.

    Args:
        rows: B.
        numbers: tokens that a row may choose.
        vocabulary: V.
        face: tokens of a face.
        places: of the network's next step, kept up with the positions (B,).
        pdl: as of the network.
    """

    def __init__(
        self,
        rows: int,
        numbers: int,
        vocabulary: int,
        face: int,
        places: Places,
        positions: torch.Tensor,
        pdl: bool,
    ):
        self.device, self.places, self.positions, self.pdl = positions.device, places, positions, pdl

        def table(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.numbers = numbers
        self.uniforms = table(rows, numbers, dtype=torch.float32)
        self.settings = table(len(Settings()), dtype=torch.float32)
        self.state = table(rows, COLUMNS)
        self.limits = table(rows, 2)
        self.edges = table(rows, 3 * (numbers // face), dtype=torch.int64)
        self.lanes = 1 << (vocabulary - 1).bit_length()
        self.seen = table(rows, self.lanes, dtype=torch.int8)
        self.counts = table(rows)
        # The choices of a face by their place in it, and whether logits were no numbers.
        self.face = table(rows, face + 1)

    def set(self, settings: Settings) -> None:
        values = [
            settings.temperature,
            settings.top_k or self.lanes,
            settings.top_p if settings.top_p < 1 else 2.0,
            settings.min_p,
            settings.repetition_penalty,
            settings.guidance_scale,
            settings.closing_strength,
        ]
        self.settings.copy_(torch.tensor(values, dtype=torch.float32))

    def begin(self, rows: torch.Tensor, begin: RowsBegin, chosen: int = 0) -> None:
        """`rows` (R,) begin, indices on the device, of which so many tokens have been chosen."""
        # The nearest float32 of a number below 1 may be 1.
        uniforms = np.minimum(begin.uniforms, 1 - 2.0**-24)
        for table, values in (
            (self.state, begin.state),
            (self.limits, begin.limits),
            (self.uniforms, uniforms),
            (self.seen, begin.seen),
            (self.edges, begin.edges),
        ):
            values = torch.from_numpy(np.ascontiguousarray(values)).to(table.dtype)
            if self.device.type == "cuda":
                values = values.pin_memory()
            table[rows, : values.shape[1]] = values.to(self.device, non_blocking=True)
        self.counts[rows] = chosen
        self.face[rows] = 0

    def choose(self, choice: Choice, logits: torch.Tensor, tokens: torch.Tensor, place: int, advance: bool) -> None:
        """The token at `place` of a face for each row, from `logits` (B, V) into `tokens` (B,); `advance`: after a
        step, whose position is then over."""
        places, launched = self.places, {"launch_pdl": True} if self.pdl else {}
        launch(
            choose, (len(tokens),),
            logits, self.uniforms, self.settings, self.state, self.limits, self.edges, self.seen, self.counts,
            self.positions, places.cos, places.sin, places.rooms, places.slots, places.rotary, tokens, self.face,
            self.numbers, self.edges.shape[1], place, self.face.shape[1], D=places.rotary.shape[2],
            V=logits.shape[1], VB=self.lanes, L=choice.coordinates, END=choice.end, ADVANCE=advance,
            SAMPLE=choice.sample, FILTERS=choice.sample and choice.filters, PENALISE=choice.penalty,
            GRAMMAR=choice.grammar, GUIDED=choice.guided, CLOSING=choice.grammar and choice.closing,
            ORDERED=choice.ordered, PDL=self.pdl, num_warps=4, **launched,
        )  # fmt: skip
