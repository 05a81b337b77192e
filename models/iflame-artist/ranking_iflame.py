"""Which of several sampled meshes is the best: by how likely the model finds them, and by how few edges are open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from .conditions_iflame import asked_conditions
from .format_iflame import MeshFormat
from .layout_iflame import RowLayout
from .many_iflame import GeneratedMesh, generate_meshes
from .mesh_iflame import weld
from .sampling_iflame import row_seeds

# N sequences or meshes, T tokens, F faces

MAX_TOKENS = 2**15


def generate_best(
    model: Any,
    seeds: Sequence[int],
    best_of: int = 1,
    *,
    prompt: Sequence[Any] | None = None,
    category: Any = None,
    num_faces: Any = None,
    **options: Any,
) -> Iterator[GeneratedMesh]:
    """As `generate_meshes`, but the best of so many meshes for each seed, by `best`, when the last of them is made.

    The candidates of the seed s have the seeds from s x `best_of` on, so that those of two seeds are never the same.
    The mesh that is chosen has its own, with which `generate_meshes` makes it again.

    Args:
        prompt: ids that the meshes begin with, one sequence for each seed; by default the start face alone.
        category, num_faces, options: of `generate_meshes`.

    Raises as `generate_meshes` does.
    """
    seeds = row_seeds(seeds, len(seeds))
    if best_of == 1:
        return generate_meshes(model, seeds, prompt=prompt, category=category, num_faces=num_faces, **options)
    asked = asked_conditions(model.config, len(seeds), category, num_faces)
    candidates = [seed * best_of + place for seed in seeds for place in range(best_of)]
    given = [model.config.tokens_per_face] * len(seeds)
    if prompt is not None:
        given = [len(each) for each in prompt]
        prompt = [each for each in prompt for _ in range(best_of)]
    of_candidates = {name: values.repeat_interleave(best_of) for name, values in asked.items()}
    made = generate_meshes(model, candidates, prompt=prompt, **of_candidates, **options)
    return _best_of_each(model, made, best_of, given, asked)


def _best_of_each(
    model: Any, made: Iterator[GeneratedMesh], best_of: int, given: list[int], asked: Mapping[str, torch.Tensor]
) -> Iterator[GeneratedMesh]:
    waiting: dict[int, list[GeneratedMesh]] = defaultdict(list)

    def chosen(number: int) -> GeneratedMesh:
        candidates = sorted(waiting.pop(number))
        of_mesh = {name: int(values[number]) for name, values in asked.items()}
        return best(model, candidates, given[number], of_mesh)._replace(number=number)

    with closing(made):
        for mesh in made:
            number = mesh.number // best_of
            waiting[number].append(mesh)
            if len(waiting[number]) == best_of:
                yield chosen(number)
    for number in sorted(waiting):  # a stopping criterion has ended the rest
        yield chosen(number)


def best(
    model: Any, meshes: Sequence[GeneratedMesh], given: int, asked: Mapping[str, int] | None = None
) -> GeneratedMesh:
    """
    The best of meshes that begin with the same `given` tokens, and were asked to be the same: `asked` has the numbers
    of the conditions.

    One without a face is chosen last, and before it one that was cut off. Those that are left are ranked twice: by the
    mean log-probability of a token, and by the share of boundary edges. The smallest sum of both ranks wins, and of
    equal sums the likelier mesh. Ranks need no weight between nats and edges, whatever the model; both measures are
    means, so that a mesh loses nothing by being long.
    """
    layout = model.config.mesh_layout
    faces = [_faces(mesh.ids.numpy(), layout) for mesh in meshes]
    standing = [(len(each) > 0, mesh.ended) for each, mesh in zip(faces, meshes, strict=True)]
    left = [place for place, each in enumerate(standing) if each == max(standing)]
    if len(left) == 1:
        return meshes[left[0]]
    conditions = {name: torch.full((len(left),), value) for name, value in (asked or {}).items()}
    nats = log_probabilities(model, [meshes[place].ids for place in left], given=given, conditions=conditions)
    sums = _ranks(-nats) + _ranks(np.array([boundary_share(faces[place]) for place in left]))
    return meshes[left[np.lexsort((-nats, sums))[0]]]


@torch.no_grad()
def log_probabilities(
    model: Any,
    sequences: Sequence[torch.Tensor],
    max_tokens: int = MAX_TOKENS,
    given: int | None = None,
    conditions: Mapping[str, torch.Tensor] | None = None,
) -> np.ndarray:
    """
    The mean log-probability of a token of each sequence under the model, (N,) float64 in nats: at temperature 1, of
    all tokens, without the mesh grammar.

    Counted are the tokens after the first `given` up to the first end token: the rest of the end face follows from it.
    Sequences are read in one pass, laid end to end in rows of `max_tokens` at most, or of one longer sequence.

    Args:
        sequences: ids (T,) from the start face on, as of `generate_meshes`.
        given: tokens that were given and not chosen, by default the start face.
        conditions: (N,) numbers of each, as of `asked_conditions`, under which a sequence is likely or not.

    Raises ValueError for a sequence of which nothing is to be counted.
    """
    layout = model.config.mesh_layout
    given = layout.tokens_per_face if given is None else given
    if model.config._attn_implementation == "eager":
        max_tokens = 1  # its memory grows with the square of a row: one sequence each
    sequences = [_counted(each, layout) for each in sequences]
    if (shortest := min(map(len, sequences), default=given + 1)) <= given:
        raise ValueError(f"a sequence of {shortest} tokens has none after the {given} that were given")
    means: list[float] = []
    for row in _rows(sequences, max_tokens):
        of_row = slice(len(means), len(means) + len(row))
        attributes = {name: values[of_row] for name, values in (conditions or {}).items()}
        ids, layout_of_row, starts = _laid_end_to_end(row, layout, attributes)
        logits = model(input_ids=ids.to(model.device), layout=layout_of_row, use_cache=False).logits[0, :-1]
        chosen = ids[0, 1:, None].to(logits.device)
        # Of a cut in float32, so that the whole row never is.
        nats = [
            (part.float().gather(1, token) - part.float().logsumexp(dim=1, keepdim=True))[:, 0]
            for part, token in zip(logits.split(4096), chosen.split(4096), strict=True)
        ]
        nats = torch.cat(nats).cpu().double()
        for start, sequence in zip(starts, row, strict=True):
            means.append(float(nats[start + given - 1 : start + len(sequence) - 1].mean()))
    return np.array(means)


def _counted(ids: torch.Tensor, layout: MeshFormat) -> torch.Tensor:
    """Up to the first end token."""
    ends = (ids == layout.eos_token_id).nonzero()
    return ids[: int(ends[0]) + 1] if len(ends) else ids


def _rows(sequences: list[torch.Tensor], max_tokens: int) -> Iterator[list[torch.Tensor]]:
    row: list[torch.Tensor] = []
    length = 0
    for sequence in sequences:
        if row and length + len(sequence) > max_tokens:
            yield row
            row, length = [], 0
        row.append(sequence)
        length += len(sequence)
    if row:
        yield row


def _laid_end_to_end(
    sequences: list[torch.Tensor], layout: MeshFormat, attributes: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, RowLayout, list[int]]:
    """Ids (1, T) of sequences that are filled up to whole faces, what the model is told of them, and where each
    begins."""
    face = layout.tokens_per_face
    starts = np.cumsum([0, *[-(-len(each) // face) * face for each in sequences]]).tolist()
    ids = torch.full((1, starts[-1]), layout.pad_token_id)
    begins = torch.zeros(1, starts[-1] // face, dtype=torch.bool)
    for start, sequence in zip(starts, sequences, strict=False):
        ids[0, start : start + len(sequence)] = sequence
        begins[0, start // face] = True
    of_row = RowLayout.of_begins(begins, starts[-1], layout.level_strides, attributes=attributes)
    return ids, of_row, starts[:-1]


def _faces(ids: np.ndarray, layout: MeshFormat) -> np.ndarray:
    """Faces (F, 3) of the mesh that the ids become."""
    ids = ids[layout.tokens_per_face :]
    others = np.flatnonzero(~layout.is_coordinate(ids))
    _, faces = weld(layout.to_corners(ids[: others[0]] if len(others) else ids))
    return faces


def boundary_share(faces: np.ndarray) -> float:
    """The share of the edges that have one face alone, of faces (F, 3) of welded vertices; 0 without an edge."""
    sides = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=-1))  # (F, 3 sides, 2 vertices)
    _, count = np.unique(sides.reshape(-1, 2), axis=0, return_counts=True)
    return float((count == 1).mean()) if len(count) else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks (N,) from the smallest value on, from 1; equal values share the mean of theirs."""
    below, upto = values[None] < values[:, None], values[None] <= values[:, None]
    return (below.sum(axis=1) + upto.sum(axis=1) + 1) / 2
