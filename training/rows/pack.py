"""Rows of a fixed length from whole meshes: which meshes share a row, and what the row looks like.

Sizes and capacities are counted in faces, start and end face included; lengths in tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from iflame_hf.format_iflame import known_format
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.tokenization_iflame import IFlameTokenizer

TOKENS_PER_FACE = known_format().tokens_per_face
# Start and end face.
EXTRA_FACES = 2
# Label that no loss counts, as everywhere in torch and transformers.
IGNORED = -100


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """
    Rows of indices into `sizes`, each row's sum at most `capacity`: every item, in the order given, goes into the
    fullest row that still has room for it, else into a new one. Takes time proportional to the number of items.

    Raises:
        ValueError: an item is empty or larger than a row.
    """
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where some row has room for r faces
    for index, size in enumerate(sizes):
        if not 0 < size <= capacity:
            raise ValueError(f"an item of size {size} does not fit into a row of {capacity}")
        wide_enough = rooms >> size
        if wide_enough:
            room = size + (wide_enough & -wide_enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        room -= size
        if room:
            rows_with_room[room].append(row)
            rooms |= 1 << room
    return rows


def plan_rows(sizes: np.ndarray, capacity: int, rng: np.random.Generator, window: int = 256) -> list[np.ndarray]:
    """
    Rows of mesh indices in random order, packed by best fit; a function of its arguments and the generator's state.

    Meshes are shuffled, each window of them is sorted from large to small, and the rows are shuffled again: taking
    large meshes first packs tightly, and the window lets a mesh's company in its row change from epoch to epoch.

    Args:
        sizes: (N,) size of every mesh in faces.
        window: 1 keeps the random order.

    Raises:
        ValueError: a mesh is larger than a row.
    """
    order = rng.permutation(len(sizes))
    windows = [order[first : first + window] for first in range(0, len(order), window)]
    order = np.concatenate([part[np.argsort(-sizes[part], kind="stable")] for part in windows])
    rows = best_fit(sizes[order].tolist(), capacity)
    return [order[rows[row]] for row in rng.permutation(len(rows))]


class PackedRows(NamedTuple):
    """
    Rows of meshes as they go from process to process: everything else follows from their ids, and a row in full takes
    many times the bytes of its ids in one byte each.
    """

    ids: np.ndarray  # (N, T) in the smallest type that holds them
    meshes: np.ndarray  # (N,) meshes in each row
    attributes: dict[str, np.ndarray]  # (M,) what is known of each mesh, row after row

    def __getitem__(self, rows: slice) -> "PackedRows":
        """Some rows that follow one another."""
        ends = np.concatenate([[0], np.cumsum(self.meshes)])
        first, last, _ = rows.indices(len(self.ids))
        own = slice(ends[first], ends[max(first, last)])
        attributes = {name: values[own] for name, values in self.attributes.items()}
        return PackedRows(self.ids[rows], self.meshes[rows], attributes)

    @classmethod
    def joined(cls, parts: Sequence["PackedRows"]) -> "PackedRows":
        """The rows of several, which know the same of their meshes."""
        names = parts[0].attributes
        return cls(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.meshes for part in parts]),
            {name: np.concatenate([part.attributes[name] for part in parts]) for name in names},
        )


def count_faces(ids: Sequence[int] | np.ndarray, tokenizer: IFlameTokenizer) -> int:
    """Faces of one mesh's token ids, start and end face not counted."""
    form = tokenizer.format
    return form.prompt_faces(len(ids)) - int(ids[-1] == form.eos_token_id)


def pack(
    rows: Sequence[Sequence[np.ndarray]],
    row_length: int,
    tokenizer: IFlameTokenizer,
    attributes: Mapping[str, Sequence[int]] | None = None,
    dtype: Any = np.int64,
) -> PackedRows:
    """
    Rows of whole token sequences, one after the other, then padding.

    Args:
        rows: for each row the token sequences of its meshes, each (tokens,).
        attributes: what is known of each mesh, whole numbers from 0 on or -1, row after row.

    Raises:
        ValueError: a sequence is not made of whole faces, or they do not fit into the row together.
    """
    ids = np.full((len(rows), row_length), tokenizer.pad_token_id, dtype=dtype)
    form = tokenizer.format
    for row, sequences in zip(ids, rows, strict=True):
        end = 0
        for sequence in sequences:
            start, end = end, end + len(sequence)
            if not form.is_whole(len(sequence)):
                raise ValueError(
                    f"a mesh must be made of whole faces of {form.tokens_per_face} tokens, got {len(sequence)} tokens"
                )
            if end > row_length:
                raise ValueError(f"meshes of {end} tokens together do not fit into a row of {row_length}")
            row[start:end] = sequence
    return PackedRows(
        ids,
        np.array([len(sequences) for sequences in rows], dtype=np.int64),
        {name: np.asarray(values, dtype=np.int64) for name, values in (attributes or {}).items()},
    )


def row_inputs(rows: PackedRows, tokenizer: IFlameTokenizer) -> dict[str, Any]:
    """
    The model's inputs for rows of T tokens, T a multiple of nine: `input_ids` and `labels`, (B, T) int64, and their
    `layout`, whose attributes are those of the rows.

    A mesh begins at each start face, and the padding after the last one is a mesh of its own, whose attributes are -1.
    Labels are the ids (the model shifts them), but -100 on start faces and padding: nothing is predicted across the
    border of two meshes.
    """
    form = tokenizer.format
    first = rows.ids[:, :: form.tokens_per_face]  # (B, F), one id of every face
    padding = first == form.pad_token_id
    begins = first == form.bos_token_id
    begins[:, :1] = True
    begins[:, 1:] |= padding[:, 1:] & ~padding[:, :-1]
    input_ids = rows.ids.astype(np.int64)
    labels = input_ids.reshape(*first.shape, form.tokens_per_face).copy()
    labels[begins | padding] = IGNORED
    is_mesh = ~padding[begins]
    attributes = {}
    for name, values in rows.attributes.items():
        attributes[name] = torch.full(is_mesh.shape, -1)
        attributes[name][torch.from_numpy(is_mesh)] = torch.from_numpy(values)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels.reshape(rows.ids.shape)),
        "layout": RowLayout.of_begins(
            torch.from_numpy(begins), rows.ids.shape[1], form.level_strides, attributes=attributes
        ),
    }
