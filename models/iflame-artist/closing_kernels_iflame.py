"""How a GPU follows the pending edges of a mesh: what closing_iflame.py has in numpy, for one row by one program."""

from __future__ import annotations

from .kernels_iflame import _jit

try:
    import triton.language as tl
except ImportError:  # optional
    tl = None


@_jit
def _edge_key(start, end, RANKS: tl.constexpr):
    low, high = tl.minimum(start, end).to(tl.int64), tl.maximum(start, end).to(tl.int64)
    return (low * RANKS + high) * 2 + (start > end).to(tl.int64)


@_jit
def _close_one(keys, slots, key, is_closed):
    """One pending edge at most that runs the other way is none any more."""
    NOWHERE: tl.constexpr = 2147483647
    place = tl.min(tl.where(keys == (key ^ 1), slots, NOWHERE), axis=0)
    place = tl.where(is_closed != 0, NOWHERE, place)
    return tl.where(slots == place, -1, keys), tl.where(place < NOWHERE, 1, is_closed)


@_jit
def _lowest(keys, least, WAY: tl.constexpr):
    """The lowest key from `least` on of edges that run up (0) or down (1)."""
    ABOVE_ALL: tl.constexpr = 9223372036854775807
    return tl.where((keys >= least) & (keys % 2 == WAY), keys, ABOVE_ALL)


@_jit
def _follow_face(edges_ptr, expected_ptr, faces, first, second, third, RANKS: tl.constexpr):
    """`closing_iflame.follow_face` of one face more than `faces`, and then its `expected_vertices`."""
    BLOCK: tl.constexpr = 1024
    ABOVE_ALL: tl.constexpr = 9223372036854775807
    key_a, key_b = _edge_key(first, second, RANKS), _edge_key(second, third, RANKS)
    key_c = _edge_key(third, first, RANKS)
    least = (first.to(tl.int64) * RANKS + tl.minimum(second, third).to(tl.int64)) * 2
    up, down = tl.full((), ABOVE_ALL, tl.int64), tl.full((), ABOVE_ALL, tl.int64)
    closed_a, closed_b, closed_c = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for begin in range(0, 3 * faces, BLOCK):
        slots = begin + tl.arange(0, BLOCK)
        inside = slots < 3 * faces
        before = tl.load(edges_ptr + slots, mask=inside, other=-1)
        keys, closed_a = _close_one(before, slots, key_a, closed_a)
        keys, closed_b = _close_one(keys, slots, key_b, closed_b)
        keys, closed_c = _close_one(keys, slots, key_c, closed_c)
        tl.store(edges_ptr + slots, keys, mask=inside & (keys != before))
        up = tl.minimum(up, tl.min(_lowest(keys, least, 0), axis=0))
        down = tl.minimum(down, tl.min(_lowest(keys, least, 1), axis=0))
    key_a, key_b = tl.where(closed_a != 0, -1, key_a), tl.where(closed_b != 0, -1, key_b)
    key_c = tl.where(closed_c != 0, -1, key_c)
    to = edges_ptr + 3 * faces
    tl.store(to, key_a)
    tl.store(to + 1, key_b)
    tl.store(to + 2, key_c)
    up = tl.minimum(tl.minimum(up, _lowest(key_a, least, 0)), _lowest(key_b, least, 0))
    up = tl.minimum(up, _lowest(key_c, least, 0))
    down = tl.minimum(tl.minimum(down, _lowest(key_a, least, 1)), _lowest(key_b, least, 1))
    down = tl.minimum(down, _lowest(key_c, least, 1))
    begins = up // 2 // RANKS
    may_close = (up < ABOVE_ALL) & (begins == down // 2 // RANKS)
    tl.store(expected_ptr, tl.where(may_close, begins.to(tl.int32), -1))
    tl.store(expected_ptr + 1, tl.where(may_close & (down < up), (down // 2 % RANKS).to(tl.int32), -1))
    tl.store(expected_ptr + 2, tl.where(may_close & (up < down), (up // 2 % RANKS).to(tl.int32), -1))
