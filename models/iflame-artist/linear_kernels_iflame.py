"""
Linear attention in Triton, forward and backward, in time that is linear in the length.

A row is cut into segments and a segment into chunks (arXiv 2312.06635, section 4). One kernel computes what each
segment adds to the state; the other begins each segment with the state that those before it left, and goes through its
chunks: attention within a chunk, and what the state says of all before it. So a row is read twice, and as many
programs run side by side as the GPU has room for, however few rows there are.

The gradients are the same operator. With S the state, of o_t = q_t S_t and S_t = exp(-s) S_(t-1) + k_t v_t^T:

    dq = attention of (do, v, k)        dk = attention of (v, do, q)        dv = attention of (k, q, do)

the latter two from the end of the row to its start. Nothing is added up in an order that varies: results are the same
in every run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

from .kernels_iflame import jit, launch
from .layout_iflame import MeshBounds
from .ops_iflame import count_flops

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None

# B batch, T items of a level, H heads, D head size, N segments of a row

LARGEST_HEAD_SIZE = 128
# Items of a chunk for which operations are counted.
FLOPS_CHUNK = 32
# Rows are cut until there are so many programs for each multiprocessor of a GPU, of which two or three run at a time.
PROGRAMS_A_MULTIPROCESSOR = 6
# Every copy of this code, installed or from the Hub, has operators of its own.
NAMESPACE = re.sub(r"\W", "_", __name__)


# Which way a row is read, and how long it is, makes no other kernel.
_jit = jit("length", "segment", "origin", "direction", "row", "column")


@_jit
def _owner(mesh_ptr, item, origin, direction):
    """The mesh of an item that is counted in the direction of reading."""
    return tl.load(mesh_ptr + origin + direction * item).to(tl.int32)


@_jit
def _added_to_state(k, v, state, age, kept, PRECISION: tl.constexpr):
    """The state after a chunk: `kept` of that before it, and its keys and values weighted by their age at its end."""
    return kept * state + tl.dot(tl.trans((k * age[:, None]).to(k.dtype)), v, input_precision=PRECISION)


@_jit
def segment_states(
    k_ptr,  # (B, T, H, D), as v
    v_ptr,
    added_ptr,  # (B, H, N - 1, D, D) float32: the state after each segment but the last, were it zero before
    mesh_ptr,  # (B, T) int64, the mesh of each item
    slopes_ptr,  # (H,) float32
    length,
    segment,  # items
    origin,  # the item that is read first, and which way to go from there: 0, 1 or T - 1, -1
    direction,
    heads,
    k_batch,
    k_item,
    k_head,
    v_batch,
    v_item,
    v_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    BOUNDS: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, part = tl.program_id(0), tl.program_id(1)
    columns: tl.constexpr = (D + BV - 1) // BV
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    number = part // columns
    first = number * segment
    last = first + segment
    last = tl.where(last < length, last, first)  # with what the last segment leaves none begins
    item, d = tl.arange(0, CHUNK), tl.arange(0, BD)
    dv = (part % columns) * BV + tl.arange(0, BV)
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    slope = tl.load(slopes_ptr + head)
    state = tl.full((BD, BV), 0.0, tl.float32)
    owner = tl.full((), 0, tl.int32)
    if BOUNDS:
        mesh_ptr += batch * length
    for start in range(first, last, CHUNK):
        at = origin + direction * (start + item)
        k = tl.load(k_ptr + at[:, None] * k_item + d, mask=(d < D)[None, :], other=0.0).to(WORK)
        v = tl.load(v_ptr + at[:, None] * v_item + dv, mask=(dv < D)[None, :], other=0.0).to(WORK)
        age = tl.exp(-slope * (CHUNK - 1 - item))
        kept = tl.exp(-slope * CHUNK)
        if BOUNDS:
            mesh = tl.load(mesh_ptr + at).to(tl.int32)
            ends = _owner(mesh_ptr, start + CHUNK - 1, origin, direction)
            age = tl.where(mesh == ends, age, 0.0)
            kept = tl.where(ends == owner, kept, 0.0)
            owner = ends
        state = _added_to_state(k, v, state, age, kept, PRECISION)
    added_ptr += (batch_head.to(tl.int64) * (tl.num_programs(1) // columns) + number) * D * D
    tl.store(added_ptr + d[:, None] * D + dv, state, mask=(d < D)[:, None] & (dv < D))


@_jit
def attend_segments(
    q_ptr,  # (B, T, H, D), as k, v and o
    k_ptr,
    v_ptr,
    o_ptr,
    added_ptr,  # (B, H, N - 1, D, D) float32, of segment_states
    initial_ptr,  # (B, H, D, D) float32, of the first mesh of a row
    final_ptr,  # the same, after the last item
    mesh_ptr,
    slopes_ptr,
    length,
    segment,
    origin,
    direction,
    row,  # strides of the states that are read; exchanged, they are read transposed
    column,
    heads,
    q_batch,
    q_item,
    q_head,
    k_batch,
    k_item,
    k_head,
    v_batch,
    v_item,
    v_head,
    D: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    CHUNK: tl.constexpr,
    BOUNDS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    NEED_FINAL: tl.constexpr,
    WORK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch_head, part = tl.program_id(0), tl.program_id(1)
    columns: tl.constexpr = (D + BV - 1) // BV
    segments = tl.num_programs(1) // columns
    batch, head = (batch_head // heads).to(tl.int64), batch_head % heads
    number = part // columns
    first = number * segment
    last = tl.minimum(first + segment, length)
    if first >= length:
        return
    item, d = tl.arange(0, CHUNK), tl.arange(0, BD)
    dv = (part % columns) * BV + tl.arange(0, BV)
    q_ptr += batch * q_batch + head * q_head
    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    o_ptr += batch * length * heads * D + head * D
    slope = tl.load(slopes_ptr + head)

    state = tl.full((BD, BV), 0.0, tl.float32)
    in_state = (d < D)[:, None] & (dv < D)
    of_state = d[:, None] * row + dv * column
    added_ptr += batch_head.to(tl.int64) * (segments - 1) * D * D
    owner = tl.full((), 0, tl.int32)
    if BOUNDS:
        mesh_ptr += batch * length
        owner = _owner(mesh_ptr, tl.maximum(first - 1, 0), origin, direction)
    for before in range(0, number):
        end = (before + 1) * segment
        weight = tl.exp(-slope * (first - end))
        if BOUNDS:
            weight = tl.where(_owner(mesh_ptr, end - 1, origin, direction) == owner, weight, 0.0)
        # Of what is too old to count, nothing is read.
        added = tl.load(added_ptr + before * D * D + of_state, mask=tl.where(in_state, weight, 0.0) > 0, other=0.0)
        state += weight * added
    if HAS_INITIAL:
        weight = tl.exp(-slope * first)
        if BOUNDS:
            weight = tl.where(_owner(mesh_ptr, 0, origin, direction) == owner, weight, 0.0)
        state += weight * tl.load(initial_ptr + batch_head * D * D + of_state, mask=in_state, other=0.0)

    distance = item[:, None] - item[None, :]
    decay = tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0)), 0.0)
    for start in range(first, last, CHUNK):
        count = tl.minimum(CHUNK, last - start)
        real = item < count
        at = origin + direction * (start + item)
        q = tl.load(q_ptr + at[:, None] * q_item + d, mask=real[:, None] & (d < D), other=0.0).to(WORK)
        k = tl.load(k_ptr + at[:, None] * k_item + d, mask=real[:, None] & (d < D), other=0.0).to(WORK)
        v = tl.load(v_ptr + at[:, None] * v_item + dv, mask=real[:, None] & (dv < D), other=0.0).to(WORK)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay
        entering = tl.exp(-slope * (item + 1))
        age = tl.where(real, tl.exp(-slope * (count - 1 - item)), 0.0)
        kept = tl.exp(-slope * count)
        if BOUNDS:
            mesh = tl.load(mesh_ptr + at, mask=real, other=-1).to(tl.int32)
            ends = _owner(mesh_ptr, start + count - 1, origin, direction)
            scores = tl.where(mesh[:, None] == mesh[None, :], scores, 0.0)
            entering = tl.where(mesh == owner, entering, 0.0)
            age = tl.where(mesh == ends, age, 0.0)
            kept = tl.where(ends == owner, kept, 0.0)
            owner = ends
        o = entering[:, None] * tl.dot(q, state.to(WORK), input_precision=PRECISION)
        o = tl.dot(scores.to(WORK), v, o, input_precision=PRECISION)
        tl.store(o_ptr + at[:, None] * heads * D + dv, o, mask=real[:, None] & (dv < D))
        state = _added_to_state(k, v, state, age, kept, PRECISION)
    if NEED_FINAL:
        if last == length:
            tl.store(final_ptr + batch_head * D * D + d[:, None] * D + dv, state, mask=in_state)


class Tiles(NamedTuple):
    """How much a program of the kernels takes at a time."""

    chunk: int  # items
    columns: int  # of v and of the state
    warps: int = 4
    stages: int = 3


def choose_tiles(size: int, dtype: torch.dtype) -> Tiles:
    """
    Tiles for heads of `size` channels, a power of two, that fit 99 KB of shared memory and, but for float32 and 128
    channels, the registers.
    """
    if dtype != torch.bfloat16:
        return Tiles(32, min(size, 32), stages=2)
    if size <= 32:
        return Tiles(32, size, warps=1)
    return Tiles(64, 64 if size == 64 else 32, stages=2)


def _tiles_of(like: torch.Tensor) -> Tiles:
    return choose_tiles(max(16, 1 << (like.shape[-1] - 1).bit_length()), like.dtype)


def _segments(like: torch.Tensor) -> int:
    """Into how many segments rows are cut: enough of them to fill the GPU, and none where rows and heads do."""
    batch, length, heads, size = like.shape
    processors = 4
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
    tiles = _tiles_of(like)
    programs = batch * heads * -(-size // tiles.columns)
    wanted = torch.sym_max(processors * PROGRAMS_A_MULTIPROCESSOR // programs, 1)
    return torch.sym_min(wanted, -(-length // tiles.chunk))


def _precision(dtype: torch.dtype) -> str:
    """How products are computed whose operands are float32 to the kernel."""
    if dtype == torch.bfloat16:
        return "ieee"
    return "tf32" if dtype == torch.float16 else "tf32x3"


class _Row:
    """How the kernels are to read the rows of a call: in segments, forwards or backwards."""

    def __init__(self, like: torch.Tensor, slopes: torch.Tensor, meshes: torch.Tensor | None, segments: int):
        self.batch, self.length, self.heads, self.size = like.shape
        self.slopes, self.meshes, self.segments = slopes, meshes, segments
        tiles = _tiles_of(like)
        self.segment = -(-self.length // (tiles.chunk * segments)) * tiles.chunk
        self.parts = -(-self.size // tiles.columns)
        self.options = {
            "D": self.size,
            "BD": max(16, triton.next_power_of_2(self.size)),
            "BV": tiles.columns,
            "CHUNK": tiles.chunk,
            "BOUNDS": meshes is not None,
            # Products of half precision would overflow in it: its numbers are tf32's too.
            "WORK": tl.bfloat16 if like.dtype == torch.bfloat16 else tl.float32,
            "PRECISION": _precision(like.dtype),
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }

    def _way(self, backwards):
        return (self.length, self.segment, *((self.length - 1, -1) if backwards else (0, 1)))

    def added(self, k, v, backwards=False):
        """What each segment but the last adds to the state, (B, H, N - 1, D, D) float32."""
        states = _states(k, self.segments - 1)
        if self.segments > 1:
            launch(
                segment_states,
                (self.batch * self.heads, (self.segments - 1) * self.parts),
                *(k, v, states, self.meshes, self.slopes),
                *self._way(backwards),
                self.heads,
                *(*k.stride()[:3], *v.stride()[:3]),
                **self.options,
            )
        return states

    def attend(self, q, k, v, added, initial=None, need_final=False, backwards=False, transposed=False):
        """o (B, T, H, D) and the state after the last item, or None; of states (B, H, D, D) that may be transposed."""
        assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        final = _states(q) if need_final else None
        launch(
            attend_segments,
            (self.batch * self.heads, self.segments * self.parts),
            *(q, k, v, output, added, initial, final, self.meshes, self.slopes),
            *self._way(backwards),
            *((1, self.size) if transposed else (self.size, 1)),
            self.heads,
            *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
            HAS_INITIAL=initial is not None,
            NEED_FINAL=need_final,
            **self.options,
        )
        return output, final


def _states(like: torch.Tensor, *segments: int) -> torch.Tensor:
    batch, _, heads, size = like.shape
    return like.new_empty((batch, heads, *segments, size, size), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None,
    meshes: torch.Tensor | None,
    need_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """o, the state after the last item (empty if it is not wanted), and what each segment but the last adds to it."""
    row = _Row(q, slopes, meshes, _segments(q))
    with torch.cuda.device_of(q):
        added = row.added(k, v)
        output, final = row.attend(q, k, v, added, state, need_state)
    return output, q.new_empty(0, dtype=torch.float32) if final is None else final, added


@_attention.register_fake
def _(q, k, v, slopes, state, meshes, need_state):
    final = _states(q) if need_state else q.new_empty(0, dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), final, _states(q, _segments(q) - 1)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    grad_state: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None,
    meshes: torch.Tensor | None,
    added: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k, v and of the state before the first item (empty if there is none)."""
    row = _Row(q, slopes, meshes, added.shape[2] + 1)
    decay = torch.exp(-slopes)[:, None, None]
    # Read backwards, the gradient of the last state is a state before the first item, younger by one step.
    late = None if grad_state is None else (grad_state / decay).contiguous()
    with torch.cuda.device_of(q):
        added_backwards = row.added(q, grad, backwards=True)
        grad_q, _ = row.attend(grad, v, k, added, state, transposed=True)
        grad_k, _ = row.attend(v, grad, q, added_backwards, late, backwards=True, transposed=True)
        grad_v, early = row.attend(k, q, grad, added_backwards, late, need_final=state is not None, backwards=True)
    return grad_q, grad_k, grad_v, q.new_empty(0, dtype=torch.float32) if early is None else early * decay


@_attention_backward.register_fake
def _(grad, grad_state, q, k, v, slopes, state, meshes, added):
    early = q.new_empty(0, dtype=torch.float32) if state is None else _states(q)
    return (*(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)), early)


def _save(ctx, inputs, output):
    q, k, v, slopes, state, meshes, need_state = inputs
    ctx.save_for_backward(q, k, v, slopes, state, meshes, output[2])
    ctx.need_state = need_state
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, grad_state, _):
    q, k, v, slopes, state, meshes, added = ctx.saved_tensors
    grad = torch.zeros_like(q, memory_format=torch.contiguous_format) if grad is None else grad
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    late = grad_state if ctx.need_state else None
    *grads, early = _attention_backward(grad, late, q, k, v, slopes, state, meshes, added)
    return *grads, None, early if state is not None else None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _flops(q_shape, *_, **__) -> int:
    """Of scores and what they weight within a chunk, of what a state says, and of what is added to it, twice."""
    batch, length, heads, size = q_shape
    return 2 * batch * length * heads * size * (2 * FLOPS_CHUNK + 3 * size)


def _flops_backward(grad_shape, *_, **__) -> int:
    batch, length, heads, size = grad_shape
    return 2 * batch * length * heads * size * (6 * FLOPS_CHUNK + 7 * size)


count_flops(NAMESPACE, attention=_flops, attention_backward=_flops_backward)


def triton_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Linear attention by this module's kernels; as `recurrent_linear_attention`, on a GPU, for heads of up to 128
    channels. o has q's dtype. Products are summed up in float32; in bfloat16 scores, weighted keys and the state that
    queries read are rounded to it before they are multiplied. float16 is multiplied as tf32, which holds it, and
    float32 by three products of tf32.
    """
    if triton is None:
        raise ImportError("linear_attn_implementation='triton' needs the package triton: pip install triton")
    if q.numel() == 0:
        final = _states(q).zero_() if state is None else state
        return torch.empty_like(q), final if need_state else None
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k, v = k.to(q.dtype), v.to(q.dtype)
    meshes = None if bounds is None else bounds.meshes.contiguous()
    state = None if state is None else state.contiguous()
    output, final, _ = _attention(q, k, v, slopes.float().contiguous(), state, meshes, need_state)
    return output, final if need_state else None
