"""Rows of a fixed length from whole meshes: which meshes share a row, and what the row looks like.

Sizes and capacities are counted in faces, start and end face included; lengths in tokens, nine to a face.
"""

from collections.abc import Iterable, Sequence

import numpy as np

TOKENS_PER_FACE = 9
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


def pack_row(sequences: Iterable[Sequence[int]], row_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """
    A row of the model's inputs from whole token sequences: `input_ids`, `position_ids`, `labels`, (row_length,) int64.

    Positions restart at 0 at the start of every mesh and of the padding behind the last one, so that the padding is a
    segment of its own. Labels are the ids (the model shifts them), but -100 on start faces and padding: nothing is
    predicted across the border of two meshes.

    Raises:
        ValueError: a sequence is not made of whole faces, or they do not fit into the row together.
    """
    input_ids = np.full(row_length, pad_token_id, dtype=np.int64)
    position_ids = np.empty(row_length, dtype=np.int64)
    labels = np.full(row_length, IGNORED, dtype=np.int64)
    end = 0
    for sequence in sequences:
        start, end = end, end + len(sequence)
        if len(sequence) % TOKENS_PER_FACE:
            raise ValueError(f"a mesh must be made of whole faces of nine tokens, got {len(sequence)} tokens")
        if end > row_length:
            raise ValueError(f"meshes of {end} tokens together do not fit into a row of {row_length}")
        input_ids[start:end] = sequence
        position_ids[start:end] = np.arange(len(sequence))
        labels[start + TOKENS_PER_FACE : end] = sequence[TOKENS_PER_FACE:]
    position_ids[end:] = np.arange(row_length - end)
    return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
