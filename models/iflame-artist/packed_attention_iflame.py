"""
Causal softmax attention of packed rows, each mesh by itself: nothing is as large as the square of a row.

On a GPU that can, it is torch's flash attention of lengths laid end to end; elsewhere its scaled_dot_product_attention
of one mesh after the other.
"""

import inspect
import re
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .layout_iflame import MeshBounds
from .ops_iflame import count_flops, in_autocasts_dtype

# Code that is loaded from a model's folder is another module with the same name of the file.
NAMESPACE = re.sub(r"\W", "_", __name__)

# Earlier versions of torch return the sums of rows in another shape.
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None
# What the operators read on the host is of one batch: a CUDA graph would do the same with every other one.
TAGS = {}
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    TAGS = {"tags": (torch.Tag.cudagraph_unsafe,)}
# Queries whose scores with all keys before them the gradient holds at a time.
BLOCK = 512

# B batch, T items, H heads, D head size, M meshes of all rows


class Packing(NamedTuple):
    """
    The meshes of all rows laid end to end: of one shape for all batches of one size, however many they hold, so that a
    compiled graph serves them all.
    """

    offsets: torch.Tensor  # (most + 1,) int32: where each mesh begins, then B x T over and over
    offsets_on_host: torch.Tensor  # the same on the CPU
    limits: torch.Tensor  # (2,) int64, on the CPU: how many meshes there may be, and items of the longest

    @classmethod
    def of(cls, bounds: MeshBounds, most: int) -> "Packing":
        """Of bounds that are known on the CPU too, of at most so many meshes."""
        end, missing = bounds.meshes.numel(), most + 1 - len(bounds.offsets)
        offsets = (F.pad(each, (0, missing), value=end) for each in (bounds.offsets, bounds.offsets_on_host))
        return cls(*offsets, torch.tensor([len(bounds.offsets) - 1, bounds.longest]))


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """Causal attention within each mesh, of (B, T, H, D) items; o (B, T, H, D). Under autocast in its dtype."""
    query, key, value = map(in_autocasts_dtype, (query, key, value))
    if torch.compiler.is_compiling() or (_has_flash(query) and torch.backends.cuda.flash_sdp_enabled()):
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return _attention(query, key, value, *packing, scale)[0]
    return _mesh_after_mesh(query, key, value, _lengths(packing.offsets_on_host), scale)


def _has_flash(query: torch.Tensor) -> bool:
    return has_flash(query.device, query.dtype, query.shape[-1])


def has_flash(device: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether torch has flash attention of lengths laid end to end, with gradients, for heads of such a size."""
    if not (HAS_VARLEN and device.type == "cuda" and torch.backends.cuda.is_flash_attention_available()):
        return False
    if dtype not in (torch.float16, torch.bfloat16) or size % 8 or torch.version.hip:
        return False
    capability = torch.cuda.get_device_capability(device)
    # The backward pass of larger heads needs the shared memory of a data centre's GPU.
    return capability >= (8, 0) and (size <= 192 or (size <= 256 and capability in ((8, 0), (9, 0))))


def _lengths(offsets_on_host: torch.Tensor) -> list[int]:
    """Items of each mesh, in order; those without any are left out."""
    return [length for length in offsets_on_host.diff().tolist() if length]


def _mesh_after_mesh(query, key, value, lengths, scale):
    parts = (x.flatten(0, 1).split(lengths) for x in (query, key, value))
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in mesh), is_causal=True, scale=scale)
        for mesh in zip(*parts, strict=True)
    ]
    return torch.cat([output[0].transpose(0, 1) for output in outputs]).view(query.shape)


def _mesh_after_mesh_backward(grad, query, key, value, output, lengths, scale):
    """An operator's implementation is below autograd, so here is the gradient of softmax(scale QK^T) V spelled out, in
    float32 at least and for a block of queries at a time."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    work = torch.promote_types(query.dtype, torch.float32)
    parts = (x.flatten(0, 1).split(lengths) for x in (grad, query, key, value, output, *grads))
    for *mesh, to_query, to_key, to_value in zip(*parts, strict=True):
        g, q, k, v, o = (x.transpose(0, 1).to(work) for x in mesh)  # (H, L, D)
        q, sums = q * scale, (g * o).sum(dim=-1, keepdim=True)
        index = torch.arange(q.shape[1], device=q.device)
        of_query, of_key, of_value = (torch.zeros_like(q) for _ in range(3))
        for first in range(0, q.shape[1], BLOCK):
            rows, seen = slice(first, first + BLOCK), slice(0, min(first + BLOCK, q.shape[1]))
            unseen = index[seen] > index[rows, None]
            shares = (q[:, rows] @ k[:, seen].mT).masked_fill(unseen, float("-inf")).softmax(dim=-1)
            # The sum over what a query reads of share x gradient is the gradient's part along the output.
            scores = shares * (g[:, rows] @ v[:, seen].mT - sums[:, rows])
            of_query[:, rows] = scores @ k[:, seen] * scale
            of_key[:, seen] += scores.mT @ q[:, rows]
            of_value[:, seen] += shares.mT @ g[:, rows]
        for place, values in ((to_query, of_query), (to_key, of_key), (to_value, of_value)):
            place.copy_(values.transpose(0, 1))
    return tuple(grads)


def _laid_end_to_end(offsets: torch.Tensor, limits: torch.Tensor):
    """What flash attention is told of the meshes; the host knows it, so that nothing waits for the device."""
    meshes, longest = limits.tolist()
    offsets = offsets[: meshes + 1]
    return offsets, offsets, longest, longest, 0.0, True


def _flash(query, key, value, offsets, limits, scale):
    flat = (x.flatten(0, 1) for x in (query, key, value))
    packing = _laid_end_to_end(offsets, limits)
    output, sums, *_ = torch.ops.aten._flash_attention_forward(*flat, *packing, False, scale=scale)
    return output.view(query.shape), sums


def _flash_backward(grad, query, key, value, output, sums, offsets, limits, scale):
    flat = (x.flatten(0, 1) for x in (grad, query, key, value, output))
    packing = _laid_end_to_end(offsets, limits)
    # Of random numbers, which nothing here draws.
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(*flat, sums, *packing, *unused, scale=scale)
    return tuple(each.view(query.shape) for each in grads)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=(), **TAGS)
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    offsets_on_host: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, T, H, D), and for flash attention's backward pass the logarithms of sums (H, B x T), else nothing."""
    if not _has_flash(query):
        output = _mesh_after_mesh(query, key, value, _lengths(offsets_on_host), scale)
        return output, query.new_empty(0, dtype=torch.float32)
    return _flash(query, key, value, offsets, limits, scale)


@_attention.register_fake
def _(query, key, value, offsets, offsets_on_host, limits, scale):
    sums = (query.shape[2], query.shape[0] * query.shape[1]) if _has_flash(query) else (0,)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=(), **TAGS)
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    offsets: torch.Tensor,
    offsets_on_host: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    if not _has_flash(query):
        return _mesh_after_mesh_backward(grad, query, key, value, output, _lengths(offsets_on_host), scale)
    return _flash_backward(grad, query, key, value, output, sums, offsets, limits, scale)


@_attention_backward.register_fake
def _(grad, query, key, value, output, sums, offsets, offsets_on_host, limits, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, *packing, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, *packing)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _flops(query_shape, *_, **__) -> int:
    """Of two products of all pairs, at most: shapes do not say how long meshes are."""
    batch, length, heads, size = query_shape
    return 2 * batch * heads * length * length * size


def _flops_backward(grad_shape, *_, **__) -> int:
    batch, length, heads, size = grad_shape
    return 5 * batch * heads * length * length * size


count_flops(NAMESPACE, attention=_flops, attention_backward=_flops_backward)
