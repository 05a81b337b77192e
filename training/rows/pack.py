"""Rows of a fixed length from whole meshes: which meshes share a row, and what the row looks like.

Sizes and capacities are counted in faces, start and end face included; lengths in tokens, nine to a face.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

TOKENS_PER_FACE = 9
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


def pack_ids(
    sequences: Iterable[Sequence[int]], row_length: int, pad_token_id: int, dtype: Any = np.int64
) -> np.ndarray:
    """
    The token ids (row_length,) of a row: whole token sequences, one behind the other, then padding.

    Raises:
        ValueError: a sequence is not made of whole faces, or they do not fit into the row together.
    """
    ids, end = np.full(row_length, pad_token_id, dtype=dtype), 0
    for sequence in sequences:
        start, end = end, end + len(sequence)
        if len(sequence) % TOKENS_PER_FACE:
            raise ValueError(f"a mesh must be made of whole faces of nine tokens, got {len(sequence)} tokens")
        if end > row_length:
            raise ValueError(f"meshes of {end} tokens together do not fit into a row of {row_length}")
        ids[start:end] = sequence
    return ids


def row_inputs(ids: np.ndarray, bos_token_id: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """
    The model's inputs for rows of token ids (B, T), T a multiple of nine: `input_ids`, `position_ids` and `labels`,
    (B, T) int64.

    Positions restart at 0 at the start of every mesh and of the padding behind the last one, so that the padding is a
    segment of its own. Labels are the ids (the model shifts them), but -100 on start faces and padding: nothing is
    predicted across the border of two meshes.
    """
    first = ids[:, ::TOKENS_PER_FACE]  # (B, F), one id of every face
    padding = first == pad_token_id
    starts = first == bos_token_id
    starts[:, :1] = True
    starts[:, 1:] |= padding[:, 1:] & ~padding[:, :-1]
    place = np.arange(starts.shape[1])
    place = place - np.maximum.accumulate(np.where(starts, place, 0), axis=1)  # (B, F), of a face in its mesh
    positions = TOKENS_PER_FACE * place[:, :, None] + np.arange(TOKENS_PER_FACE)
    input_ids = ids.astype(np.int64)
    labels = input_ids.reshape(positions.shape).copy()
    labels[starts | padding] = IGNORED
    return {
        "input_ids": input_ids,
        "position_ids": positions.reshape(ids.shape),
        "labels": labels.reshape(ids.shape),
    }


def pack_row(sequences: Sequence[Sequence[int]], row_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """
    The inputs (row_length,) of one row, as `row_inputs` defines them, from the token sequences of its meshes.

    Raises:
        ValueError: a sequence is not made of whole faces, or they do not fit into the row together.
    """
    input_ids = pack_ids(sequences, row_length, pad_token_id)
    lengths = [len(sequence) for sequence in sequences]
    lengths.append(row_length - sum(lengths))
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    labels = np.full(row_length, IGNORED, dtype=np.int64)
    end = 0
    for length in lengths[:-1]:
        start, end = end, end + length
        labels[start + TOKENS_PER_FACE : end] = input_ids[start + TOKENS_PER_FACE : end]
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
