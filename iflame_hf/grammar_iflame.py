"""Which ids may follow in the sequence of a mesh, so that whatever is generated is a mesh in canonical order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria

from .closing_iflame import expected_token, expected_vertices, pending_edges
from .format_iflame import MeshFormat
from .layout_iflame import not_whole_faces

# B rows, T tokens, V token ids

# Where there is no face before.
NO_RANK = -1
NO_FACE = (NO_RANK,) * 3


def vertex_interval(
    previous: torch.Tensor, first: torch.Tensor, second: torch.Tensor, vertex: int, last: int, needed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The ranks that a vertex of a face may have, so that the face can be completed and follows the one before.

    The rank of a vertex orders vertices as meshes do. Faces stand by their ranks in order (a, m, M), strictly: so none
    comes twice. Within a face the lowest vertex comes first, the other two in either order, all of them different.

    Args:
        previous: (B, 3) the ranks of the face before in order; the first is -1 where there is none.
        first, second: (B,) the ranks of the face's vertices so far; not read before they are known.
        vertex: 0, 1 or 2: which one is asked for.
        last: the largest rank.
        needed: (B,) faces that must follow this one, for which the first vertex leaves room.

    Returns:
        low, high, excluded: (B,) each: all ranks from low to high but one are allowed; none where high < low.
    """
    lowest, middle, highest = previous.unbind(1)
    high = torch.full_like(lowest, last)
    excluded = torch.full_like(lowest, -1)
    if vertex == 0:
        # Another face with the same first vertex: a higher last one, or a higher middle one with one above it.
        another = (highest < last) | (middle <= last - 2)
        low = torch.where(another, lowest, lowest + 1).clamp(min=0)
        # There is a face for every first vertex that has two above it.
        high = torch.maximum(last - 2 - needed, low).clamp(max=last - 2)
    elif vertex == 1:
        low = torch.where(first == lowest, torch.where(highest < last, middle, middle + 1), first + 1)
    else:
        above = torch.where(second == middle, highest + 1, torch.where(second > highest, middle, middle + 1))
        low = torch.where(first == lowest, above, first + 1)
        excluded = second
    return low, high, excluded


def row_interval(
    previous: Sequence[int], first: int, second: int, vertex: int, last: int, needed: int
) -> tuple[int, int, int]:
    """`vertex_interval` of one row, in whole numbers on the host."""
    lowest, middle, highest = previous
    if vertex == 0:
        another = highest < last or middle <= last - 2
        low = max(lowest if another else lowest + 1, 0)
        return low, min(max(last - 2 - needed, low), last - 2), -1
    if first != lowest:
        low = first + 1
    elif vertex == 1:
        low = middle if highest < last else middle + 1
    elif second == middle:
        low = highest + 1
    else:
        low = middle if second > highest else middle + 1
    return low, last, second if vertex == 2 else -1


def allowed_digits(
    low: torch.Tensor, high: torch.Tensor, excluded: torch.Tensor, digits: torch.Tensor, digit: int, levels: int
) -> torch.Tensor:
    """
    Which coordinates a token of a vertex may be: those with which some allowed rank can still be reached. The tokens
    of a vertex are the digits of its rank, the least significant one first.

    Args:
        low, high, excluded: (B,) of `vertex_interval`.
        digits: (B,) the number that the vertex's tokens so far make.
        digit: 0, 1 or 2: which one is asked for.
        levels: coordinates of the grid.

    Returns:
        (B, levels) booleans.
    """
    step = levels**digit
    low, high, excluded, digits = (each[:, None] for each in (low, high, excluded, digits))
    tokens = torch.arange(levels, device=low.device)
    # The lowest rank from `low` on that ends in these digits; Python's remainder, which is never negative.
    rank = low + (digits + tokens * step - low) % (step * levels)
    rank = rank + (rank == excluded) * (step * levels)
    return rank <= high


class MeshGrammarLogitsProcessor(LogitsProcessor):
    """
    Leaves only tokens that keep a row a mesh: faces in canonical order, none degenerate, none twice, and a whole end
    face between faces; never padding and start tokens.

    Everything follows from the last ids, so that rows may be reordered as beam search does. It comes after
    repetition penalty and the user's own processors, and before temperature, top-k, top-p and min-p, which choose
    among what it leaves; their softmax makes the rest sum up to one. Where the processors before it leave none of the
    tokens that it allows, all of these are equally likely.

    What decides on the order of faces is the last coordinate of a vertex: a model that is sure of a vertex that is not
    in order is made to end it at another place. With `keep_order=False` it gets it, and a face may come twice.

    Args:
        layout: of the sequences.
        vocab_size: V.
        begins: (B,) where the start face of each row begins, behind padding.
        min_faces, max_faces: fewest and most faces of a mesh.
        max_length: tokens at which rows are cut off: the end comes before a face that would not be whole.
        closing_strength: nats by which scores of tokens are lowered that leave the lowest open edge open, where it can
            be closed (`closing_iflame`).
        keep_order: whether faces stay in canonical order. The vertices of a face always do.
    """

    def __init__(
        self,
        layout: MeshFormat,
        vocab_size: int,
        begins: torch.Tensor,
        min_faces: int = 0,
        max_faces: int | None = None,
        max_length: int | None = None,
        closing_strength: float = 0.0,
        keep_order: bool = True,
    ):
        self.layout, self.vocab_size, self.begins = layout, vocab_size, begins
        self.min_faces, self.max_faces, self.max_length = min_faces, max_faces, max_length
        self.closing_strength, self.keep_order = closing_strength, keep_order
        self.levels = layout.coordinate_resolution + 1
        self.eos_token_id = layout.eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) with -inf for what must not follow the ids (B, T)."""
        allowed = self.allowed(input_ids)
        if self.closing_strength:
            scores = self._closing(input_ids, scores)
        left = scores.masked_fill(~allowed, -torch.inf)
        nothing = (left.amax(dim=1, keepdim=True) == -torch.inf) & allowed
        return left.masked_fill(nothing, 0.0)

    def allowed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, V) whether each id may follow the ids (B, T)."""
        face, levels = self.layout.tokens_per_face, self.levels
        rows, length = input_ids.shape
        open_tokens = length % face
        whole = length - open_tokens
        # In beam search there are several rows for each of `begins`.
        begins = self.begins.repeat_interleave(rows // len(self.begins))
        faces = (whole - begins) // face - 1
        vertex, digit = divmod(open_tokens, 3)
        digits_of = levels ** torch.arange(3, device=input_ids.device)
        previous = input_ids[:, whole - face : whole]
        is_face = (previous < levels).all(dim=1)
        ranks = (previous.view(rows, 3, 3) * digits_of).sum(dim=2).sort(dim=1).values
        # Before the first face there is none: no rank is as low as its.
        ranks = ranks.masked_fill(~is_face[:, None], NO_RANK)
        made = input_ids[:, whole:]
        first, second = (
            (made[:, 3 * each : 3 * each + 3] * digits_of).sum(dim=1) if vertex > each else ranks[:, 0]
            for each in (0, 1)
        )
        digits = (made[:, 3 * vertex :] * digits_of[:digit]).sum(dim=1)
        needed = (self.min_faces - faces - 1).clamp(min=0)
        after = ranks if self.keep_order else torch.full_like(ranks, NO_RANK)
        interval = vertex_interval(after, first, second, vertex, levels**3 - 1, needed)
        coordinates = allowed_digits(*interval, digits, digit, levels)

        allowed = torch.zeros(rows, self.vocab_size, dtype=torch.bool, device=input_ids.device)
        if open_tokens:
            ended = (made[:, 0] == self.eos_token_id) | (made[:, 0] == self.layout.pad_token_id)
            allowed[:, :levels] = coordinates & ~ended[:, None]
            allowed[:, self.eos_token_id] = ended
            return allowed
        ended = (previous[:, -1] == self.eos_token_id) | (previous[:, -1] == self.layout.pad_token_id)
        is_last = ended
        if self.max_faces is not None:
            is_last = is_last | (faces >= self.max_faces)
        if self.max_length is not None and self.max_length - length < face:
            is_last = torch.ones_like(ended)
        coordinates = coordinates & ~is_last[:, None]
        allowed[:, :levels] = coordinates
        allowed[:, self.eos_token_id] = is_last | (faces >= self.min_faces) | ~coordinates.any(dim=1)
        return allowed

    def _closing(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V), lower where a token leaves the lowest open edge open."""
        face, levels, ids = self.layout.tokens_per_face, self.levels, input_ids.cpu().numpy()
        rows, length = ids.shape
        place, last_rank = length % face, levels**3 - 1
        begins = self.begins.cpu().numpy().repeat(rows // len(self.begins))
        lowered = scores.clone()
        for row, begin in enumerate(begins):
            sequence, made = np.split(ids[row, begin + face :], [length - place - begin - face])
            if len(sequence) == 0 or (sequence >= levels).any():
                continue
            faces = sequence.reshape(-1, 3, 3) @ (levels ** np.arange(3))
            last = np.sort(faces[-1])
            edges = pending_edges(faces, last_rank + 1)
            expected = expected_vertices(edges[None], last[None], last_rank + 1)[0]
            first, second = (_number(made[at : at + 3].tolist(), levels) for at in (0, 3))
            needed = max(self.min_faces - len(faces) - 1, 0)
            after = last.tolist() if self.keep_order else NO_FACE
            interval = row_interval(after, first, second, place // 3, last_rank, needed)
            digits = _number(made[place // 3 * 3 :].tolist(), levels)
            token = expected_token(expected.tolist(), first, digits, place, interval, levels)
            if token is not None:
                lowered[row] -= self.closing_strength
                lowered[row, token] = scores[row, token]
        return lowered


class EndFaceCriteria(EosTokenCriteria):
    """Ends a row with its whole end face."""

    def __init__(self, layout: MeshFormat, eos_token_id: Any):
        super().__init__(eos_token_id)
        self.tokens_per_face = layout.tokens_per_face

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] % self.tokens_per_face:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        return super().__call__(input_ids, scores, **kwargs)


def check_prompts(layout: MeshFormat, ids: np.ndarray, begins: np.ndarray, keep_order: bool = True) -> None:
    """
    Raises ValueError for a prompt that no mesh begins with, in words that say where and how to make one.

    Args:
        ids: (B, T) of the prompts, padded on the left.
        begins: (B,) where the start face of each begins.
        keep_order: whether its faces have to stand in canonical order.
    """
    face, levels = layout.tokens_per_face, layout.coordinate_resolution + 1
    for row, begin in enumerate(begins.tolist()):
        if begin % face and (ids[row, :begin] == layout.pad_token_id).all():
            raise ValueError(not_whole_faces(begin, row, face))
        sequence = ids[row, begin:]
        if (
            (ids[row, :begin] != layout.pad_token_id).any()
            or begin % face
            or list(sequence[:face]) != layout.start_face
        ):
            raise _no_prompt(row, f"it does not begin with a start face of {face} tokens {layout.bos_token_id}")
        tokens = sequence[face:]
        bad = np.flatnonzero(~layout.is_coordinate(tokens))
        if len(bad):
            what = "has ended" if tokens[bad[0]] == layout.eos_token_id else f"has the id {tokens[bad[0]]}"
            raise _no_prompt(row, f"it {what} in face {bad[0] // face + 1}, where only coordinates may stand")
        previous = NO_FACE
        for number, start in enumerate(range(0, len(tokens), face), start=1):
            part = tokens[start : start + face]
            ranks = [int(vertex @ (levels ** np.arange(3))) for vertex in part[: len(part) // 3 * 3].reshape(-1, 3)]
            order = (ranks[0], *sorted(ranks[1:])) if len(ranks) == 3 else None
            if len(set(ranks)) < len(ranks):
                raise _no_prompt(row, f"two vertices of face {number} are the same")
            if order and (order[0] > order[1] or order <= previous):
                why = "repeats the one before" if order == previous else "is not in order"
                raise _no_prompt(row, f"face {number} {why}")
            if order:
                previous = order if keep_order else NO_FACE
            elif len(part) and not _may_go_on(layout, previous, part):
                raise _no_prompt(row, f"no face can begin as face {number} does after the one before")


def _may_go_on(layout: MeshFormat, previous: tuple[int, ...], part: np.ndarray) -> bool:
    """Whether a face that begins with these tokens may come after the one before."""
    levels, tokens = layout.coordinate_resolution + 1, part.tolist()
    ranks = [_number(tokens[at : at + 3], levels) for at in (0, 3)]
    for index, token in enumerate(tokens):
        vertex, digit = divmod(index, 3)
        low, high, excluded = row_interval(previous, *ranks, vertex, levels**3 - 1, 0)
        period = levels ** (digit + 1)
        rank = low + (_number([*tokens[index - digit : index], token], levels) - low) % period
        if rank + (rank == excluded) * period > high:
            return False
    return True


def _number(digits: Sequence[int], levels: int) -> int:
    return sum(digit * levels**place for place, digit in enumerate(digits))


def _no_prompt(row: int, reason: str) -> ValueError:
    return ValueError(
        f"the prompt of row {row} is not the beginning of a mesh: {reason}. A prompt is the lowest faces of a mesh, "
        "tokenizer.encode_mesh(mesh, add_end=False)[: 9 * (1 + faces)], padded on the left by whole faces; "
        "mesh_grammar=False takes any ids"
    )
