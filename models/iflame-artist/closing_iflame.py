"""
Which vertices the next face of a mesh should have so that no edge stays open: a bias of sampling to closed meshes.

A directed edge is pending as long as more faces run along it than the other way. Faces stand in the order of their
lowest, then of their middle vertex: so the lowest pending edge is the first one that can no longer be closed, and the
next face should begin with its lower vertex and run along it the other way. Its other vertex is free.

A face has one edge to its first vertex and one from it, so it closes an edge of that vertex by opening another, or
closes one of either direction. Where the lowest vertex has pending edges of one direction alone, one of them has to
stay open, and nothing is expected: else a fan of faces would go on for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# B rows, F faces, E edges; a rank is the place of a vertex in the order of vertices

NO_EDGE = -1
_ABOVE_ALL = np.iinfo(np.int64).max


def edge_keys(faces: np.ndarray, ranks: int) -> np.ndarray:
    """
    A number for each directed edge of faces (..., 3), which are ranks below `ranks` in the order of their winding:
    (..., 3) int64. They order edges by their lower vertex, then by their higher one; the last bit is set where an edge
    runs down, so that it alone differs between the two directions.
    """
    start, end = faces.astype(np.int64), np.roll(faces, -1, axis=-1).astype(np.int64)
    return (np.minimum(start, end) * ranks + np.maximum(start, end)) * 2 + (start > end)


def pending_edges(faces: np.ndarray, ranks: int) -> np.ndarray:
    """The keys of the pending edges of faces (F, 3), ascending, each as often as it is pending."""
    keys = edge_keys(faces, ranks).ravel()
    edges, place = np.unique(keys // 2, return_inverse=True)
    surplus = np.bincount(place, 1 - 2 * (keys % 2), minlength=len(edges)).astype(np.int64)
    return np.repeat(edges * 2 + (surplus < 0), np.abs(surplus))


def pending_of_rows(faces: np.ndarray, counts: np.ndarray, ranks: int) -> np.ndarray:
    """`pending_edges` of the last `counts` (B,) of faces (B, F, 3) of each row, filled up with NO_EDGE: (B, 3 x the
    largest count)."""
    counts = counts.clip(min=0)
    edges = np.full((len(faces), 3 * int(counts.max(initial=0))), NO_EDGE, dtype=np.int64)
    for row, (of_row, count) in enumerate(zip(faces, counts.tolist(), strict=True)):
        pending = pending_edges(of_row[len(of_row) - count :], ranks)
        edges[row, : len(pending)] = pending
    return edges


def follow_face(edges: np.ndarray, faces: np.ndarray, made: np.ndarray) -> None:
    """
    The edges of one more face of each row become pending, or close such as are.

    Args:
        edges: (B, E) keys of pending edges and NO_EDGE, changed in place; the edges of a row's face number n, from 0
            on, go to the three places from 3 n on.
        faces: (B,) faces of each row before this one.
        made: (B, 3) keys of its edges.
    """
    rows = np.arange(len(edges))
    for side, keys in enumerate(made.T):
        closed = edges == keys[:, None] ^ 1
        closes, place = closed.any(axis=1), closed.argmax(axis=1)
        edges[rows[closes], place[closes]] = NO_EDGE
        edges[rows, 3 * faces + side] = np.where(closes, NO_EDGE, keys)


def expected_vertices(edges: np.ndarray, last: np.ndarray, ranks: int) -> np.ndarray:
    """
    The ranks (B, 3) that the vertices of the next face should have, -1 where a vertex is free.

    Args:
        edges: (B, E) keys of pending edges and NO_EDGE.
        last: (B, 3) ranks of the last face in order; the first is -1 where there is none.
    """
    # Of a lower edge every face would stand before the last one.
    least = np.maximum(2 * (last[:, :1].astype(np.int64) * ranks + last[:, 1:2]), 0)
    up, down = (
        np.where((edges >= least) & (edges % 2 == way), edges, _ABOVE_ALL).min(axis=1, initial=_ABOVE_ALL)
        for way in (0, 1)
    )
    first = up // 2 // ranks
    may_close = (up < _ABOVE_ALL) & (first == down // 2 // ranks)
    second = np.where(down < up, down // 2 % ranks, -1)
    third = np.where(up < down, up // 2 % ranks, -1)
    return np.where(may_close[:, None], np.stack([first, second, third], axis=1), -1)


def expected_token(
    expected: Sequence[int], first: int, digits: int, place: int, interval: Sequence[int], levels: int
) -> int | None:
    """
    The token that leads to the expected vertex, or None where no vertex is expected, or not this one any more.

    Args:
        expected: three ranks, of `expected_vertices`.
        first: rank of the open face's first vertex; not read before it is known.
        digits: the number that the tokens of the open vertex make so far, the least significant first.
        place: of the token in its face, from 0 on.
        interval: low, high and excluded rank of the vertex, of `grammar_iflame.row_interval`.
        levels: coordinates of the grid.
    """
    vertex, digit = divmod(place, 3)
    rank, (low, high, excluded) = expected[vertex], interval
    if rank < 0 or (vertex and first != expected[0]) or not low <= rank <= high or rank == excluded:
        return None
    rest, so_far = divmod(rank, levels**digit)
    return rest % levels if so_far == digits else None
