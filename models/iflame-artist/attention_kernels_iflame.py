"""
Kernels of a decoding step, in Triton: linear and full attention of one item a row. As kernels_iflame.py has them.
"""

from __future__ import annotations

from .kernels_iflame import _floats, _jit, _wait, _words

try:
    import triton.language as tl
except ImportError:  # optional
    tl = None

# B rows, C channels, H heads, D head size, N outputs, S splits of the keys, G groups of heads


@_jit
def _out_weights(w_ptr, outs, group, C: tl.constexpr, SIZE: tl.constexpr):
    """Of some outputs and the inputs of a group of heads, (BN, SIZE)."""
    inner = group * SIZE + tl.arange(0, SIZE)
    mask = (outs < C)[:, None] & (inner < C)[None, :]
    return tl.load(w_ptr + outs[:, None] * C + inner[None, :], mask=mask, other=0.0)


@_jit
def _linear_state(slopes_ptr, state_ptr, row, heads, C: tl.constexpr, D: tl.constexpr):
    """The state (heads, D, D) before an item, decayed, and where it lies. It was written for the token before, and so
    before the choice of this one: there is nothing to wait for."""
    dims = tl.arange(0, D)
    live = heads < C // D
    decay = tl.exp(-tl.load(slopes_ptr + heads, mask=live, other=0.0))
    places = (heads[:, None, None] * D + dims[None, :, None]) * D + dims[None, None, :]
    here = live[:, None, None] & (dims[None, :, None] < D) & (dims[None, None, :] < D)
    places += row.to(tl.int64) * (C * D)
    state = tl.load(state_ptr + places, mask=here, other=0.0)
    return state * decay[:, None, None], places, here


@_jit
def _linear_step(qkv_ptr, state, row, heads, C: tl.constexpr, D: tl.constexpr):
    """The state (heads, D, D) after an item, and what it reads from it (heads, D)."""
    dims = tl.arange(0, D)
    live = heads < C // D
    at = qkv_ptr + row * (3 * C) + heads[:, None] * D + dims[None, :]
    q = tl.load(at, mask=live[:, None], other=0.0)
    k = tl.load(at + C, mask=live[:, None], other=0.0)
    v = tl.load(at + 2 * C, mask=live[:, None], other=0.0)
    state = state + k[:, :, None] * v[:, None, :]
    return state, tl.sum(q[:, :, None] * state, axis=1)


@_jit
def attend_linear_project(
    qkv_ptr,  # (B, 3C) float32
    slopes_ptr,  # (H,) float32
    state_ptr,  # (B, H, D, D) float32
    next_state_ptr,  # the same, which is written
    norm_ptr,  # (C,)
    w_ptr,  # (C, C)
    partial_ptr,  # (B, G, C) float32: products of the heads of each group, without the norm's factor
    square_ptr,  # (B, G) float32: sums of the squares of their outputs
    C: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # of a group
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Linear attention and its output projection, of few rows: each program takes some heads and some outputs."""
    row, group, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    outs = block * BN + tl.arange(0, BN)
    inner = group * HEADS * D + tl.arange(0, HEADS * D)
    valid = inner < C
    w = _out_weights(w_ptr, outs, group, C, HEADS * D)
    norm = tl.load(norm_ptr + inner, mask=valid, other=0.0).to(tl.float32)
    heads = group * HEADS + tl.arange(0, HEADS)
    state, places, here = _linear_state(slopes_ptr, state_ptr, row, heads, C, D)
    _wait(PDL)
    state, read = _linear_step(qkv_ptr, state, row, heads, C, D)
    groups = tl.num_programs(1)
    if block == 0:
        tl.store(next_state_ptr + places, state, mask=here)
        tl.store(square_ptr + row * groups + group, tl.sum(tl.sum(read * read, axis=1), axis=0))
    read = tl.reshape(read, (HEADS * D,)) * norm
    partial = tl.sum(w.to(tl.float32) * read[None, :], axis=1)
    tl.store(partial_ptr + (row * groups + group) * C + outs, partial, mask=outs < C)


@_jit
def attend_linear(
    qkv_ptr,  # (B, 3C) float32
    slopes_ptr,
    state_ptr,  # (B, H, D, D) float32, becomes that after the item
    out_ptr,  # (B, C) float32
    C: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A step of linear attention."""
    row = tl.program_id(0)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    state, places, here = _linear_state(slopes_ptr, state_ptr, row, heads, C, D)
    _wait(PDL)
    state, read = _linear_step(qkv_ptr, state, row, heads, C, D)
    tl.store(state_ptr + places, state, mask=here)
    to = row * C + heads[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(out_ptr + to, read, mask=(heads < C // D)[:, None])


@_jit
def _quantized(x):
    """Of one head's values (D,): whole numbers within -127 and 127, and what they are to be multiplied by; as
    `states_iflame.quantize`."""
    scale = (tl.max(tl.abs(x), axis=0) / 127).to(tl.float16)
    wide = scale.to(tl.float32)
    whole = tl.floor(x / tl.where(wide > 0, wide, 1.0) + 0.5)
    return tl.minimum(tl.maximum(whole, -127.0), 127.0), scale


@_jit
def _keys(key_ptr, at, start, live, D: tl.constexpr, QUANTIZED: tl.constexpr):
    """Keys or values at some places (R, L) of a row's head: (R, L, D), or words (R, L, D / 4)."""
    # Read once a token: they are not to take the place of weights in the cache.
    if QUANTIZED:
        offset = (start + at[:, :, None]) * (D // 4) + tl.arange(0, D // 4)[None, None, :]
        key = tl.load(_words(key_ptr) + offset, mask=live[:, :, None], other=0, eviction_policy="evict_first")
    else:
        offset = (start + at[:, :, None]) * D + tl.arange(0, D)[None, None, :]
        key = tl.load(key_ptr + offset, mask=live[:, :, None], other=0.0, eviction_policy="evict_first")
    return key


@_jit
def _scales(scale_ptr, at, start, live, QUANTIZED: tl.constexpr):
    """Words (R, L), each the scales of a key and of its value."""
    if QUANTIZED:
        scale = tl.load(_words(scale_ptr) + start + at, mask=live, other=0, eviction_policy="evict_first")
    else:
        scale = at
    return scale


@_jit
def _half(word, last: tl.constexpr):
    """The first or last float16 of words, in float32."""
    return ((word >> 16) if last else word).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@_jit
def _wide(read, QUANTIZED: tl.constexpr):
    """What `_keys` has read, in float32."""
    if QUANTIZED:
        read = _floats(read)
    return read.to(tl.float32)


@_jit
def attend_keys(
    qkv_ptr,  # (B, 3C) float32
    key_ptr,  # (B, H, room, D), or int8 of that shape, if QUANTIZED
    value_ptr,
    scale_ptr,  # (B, H, room, 2) float16, of key and value, if QUANTIZED
    slot_ptr,  # (B,) int32: where the newest item goes, and how many there are before
    most_ptr,  # (B, H, S) float32: the largest score of each split, in units of log 2
    sum_ptr,  # (B, H, S) float32: of exponentials
    read_ptr,  # (B, H, S, D) float32: their sums of values; of one split (B, C), divided by the sum
    room,
    factor,  # D ** -0.5 / log(2)
    C: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,  # L: each has a softmax of its own, so that nothing is reduced across threads within the loop
    TURNS: tl.constexpr,  # R: keys of a lane at a time
    QUANTIZED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Softmax attention of one query a row over the keys so far, in splits that run side by side. The newest key and
    value are added to the others by the first split."""
    H: tl.constexpr = C // D
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dims = tl.arange(0, D)
    places = tl.arange(0, TURNS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    start_of_keys = (row.to(tl.int64) * H + head) * room
    # Where the item goes was written before the phase before; the keys before it, when these were new.
    slot = tl.load(slot_ptr + row)
    part = tl.cdiv(tl.cdiv(slot, SPLITS), 16) * 16
    start = split * part
    stop = tl.minimum(start + part, slot)
    live = start + places < stop
    key = _keys(key_ptr, start + places, start_of_keys, live, D, QUANTIZED)
    value = _keys(value_ptr, start + places, start_of_keys, live, D, QUANTIZED)
    scale = _scales(scale_ptr, start + places, start_of_keys, live, QUANTIZED)
    _wait(PDL)
    at = qkv_ptr + row * (3 * C) + head * D + dims
    query, new_key, new_value = tl.load(at) * factor, tl.load(at + C), tl.load(at + 2 * C)
    kind = key_ptr.dtype.element_ty
    if QUANTIZED:
        new_key, new_key_scale = _quantized(new_key)
        new_value, new_value_scale = _quantized(new_value)
    to = start_of_keys + slot
    if split == 0:
        tl.store(key_ptr + to * D + dims, new_key.to(kind))
        tl.store(value_ptr + to * D + dims, new_value.to(kind))
        if QUANTIZED:
            tl.store(scale_ptr + 2 * to, new_key_scale)
            tl.store(scale_ptr + 2 * to + 1, new_value_scale)
    if QUANTIZED:
        new_key, new_value = new_key * new_key_scale.to(tl.float32), new_value * new_value_scale.to(tl.float32)
    else:
        new_key, new_value = new_key.to(kind).to(tl.float32), new_value.to(kind).to(tl.float32)
    # One lane begins with the newest.
    newest = (tl.arange(0, LANES) == 0) & (split == 0)
    most = tl.where(newest, tl.sum(new_key * query, axis=0), float("-inf"))
    total = tl.where(newest, 1.0, 0.0)
    read = tl.where(newest[:, None], new_value[None, :], 0.0)
    for first in range(start, stop, TURNS * LANES):
        # The next ones are on their way while these are at work.
        following = first + TURNS * LANES + places
        next_live = following < stop
        next_key = _keys(key_ptr, following, start_of_keys, next_live, D, QUANTIZED)
        next_value = _keys(value_ptr, following, start_of_keys, next_live, D, QUANTIZED)
        next_scale = _scales(scale_ptr, following, start_of_keys, next_live, QUANTIZED)
        score = tl.sum(_wide(key, QUANTIZED) * query[None, None, :], axis=2)
        if QUANTIZED:
            score *= _half(scale, False)
        score = tl.where(live, score, float("-inf"))
        now = tl.maximum(most, tl.max(score, axis=0))
        finite = tl.where(now == float("-inf"), 0.0, now)
        before = tl.exp2(most - finite)
        weight = tl.exp2(score - finite[None, :])
        total = total * before + tl.sum(weight, axis=0)
        if QUANTIZED:
            weight *= _half(scale, True)
        read = read * before[:, None] + tl.sum(weight[:, :, None] * _wide(value, QUANTIZED), axis=0)
        most = now
        live, key, value, scale = next_live, next_key, next_value, next_scale
    highest = tl.max(most, axis=0)
    share = tl.exp2(most - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(total * share, axis=0)
    read = tl.sum(read * share[:, None], axis=0)
    if SPLITS == 1:
        tl.store(read_ptr + row * C + head * D + dims, read / total)
    else:
        at = (row * H + head) * SPLITS + split
        tl.store(most_ptr + at, highest)
        tl.store(sum_ptr + at, total)
        tl.store(read_ptr + at * D + dims, read)


@_jit
def combine_project(
    most_ptr,  # of attend_keys
    sum_ptr,
    read_ptr,
    w_ptr,  # (C, C)
    partial_ptr,  # (B, G, C) float32
    C: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """The splits of softmax attention together, and the output projection, as `attend_linear_project`."""
    H: tl.constexpr = C // D
    row, group, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    outs = block * BN + tl.arange(0, BN)
    w = _out_weights(w_ptr, outs, group, C, HEADS * D)
    _wait(PDL)
    heads = group * HEADS + tl.arange(0, HEADS)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D)
    at = (row * H + heads)[:, None] * SPLITS + splits[None, :]
    live = (heads < H)[:, None] & (splits < SPLITS)[None, :]
    most = tl.load(most_ptr + at, mask=live, other=0.0)
    factor = tl.exp2(most - tl.max(most, axis=1)[:, None])
    total = tl.sum(factor * tl.load(sum_ptr + at, mask=live, other=1.0), axis=1)
    read = tl.load(read_ptr + at[:, :, None] * D + dims[None, None, :], mask=live[:, :, None], other=0.0)
    read = tl.sum(read * factor[:, :, None], axis=1) / total[:, None]
    read = tl.reshape(read, (HEADS * D,))
    partial = tl.sum(w.to(tl.float32) * read[None, :], axis=1)
    tl.store(partial_ptr + (row * tl.num_programs(1) + group) * C + outs, partial, mask=outs < C)
