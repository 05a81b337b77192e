"""
Causal softmax attention of packed rows, each mesh by itself: nothing is as large as the square of a row.

On a GPU that can, it is torch's flash attention of lengths laid end to end; elsewhere its scaled_dot_product_attention
of one mesh after the other.
"""

import re
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .layout_iflame import MeshBounds

# Code that is loaded from a model's folder is another module with the same name of the file.
NAMESPACE = re.sub(r"\W", "_", __name__)

# Earlier versions of torch return the sums of rows in another shape.
HAS_VARLEN = find_spec("torch.nn.attention.varlen") is not None

# B batch, T items, H heads, D head size, M meshes of all rows


class Packing(NamedTuple):
    """
    The meshes of all rows laid end to end: of one shape for all batches of one size, however many they hold, so that a
    compiled graph serves them all.
    """

    offsets: torch.Tensor  # (most + 1,) int32: where each mesh begins, then B x T over and over
    offsets_on_host: torch.Tensor  # the same on the CPU

    @classmethod
    def of(cls, bounds: MeshBounds, most: int) -> "Packing":
        """Of bounds that are known on the CPU too, of at most so many meshes."""
        end, missing = bounds.meshes.numel(), most + 1 - len(bounds.offsets)
        return cls(*(F.pad(each, (0, missing), value=end) for each in (bounds.offsets, bounds.offsets_on_host)))


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, scale: float
) -> torch.Tensor:
    """Causal attention within each mesh, of (B, T, H, D) items; o (B, T, H, D). Under autocast in its dtype."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    if torch.compiler.is_compiling() or _has_flash(query):
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        return _attention(query, key, value, packing.offsets, packing.offsets_on_host, scale)[0]
    return _mesh_after_mesh(query, key, value, _lengths(packing.offsets_on_host), scale)


def _has_flash(query: torch.Tensor) -> bool:
    """Whether torch has flash attention of lengths laid end to end, with gradients, for such a query."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and HAS_VARLEN
        and not torch.version.hip
        and torch.cuda.get_device_capability(query.device)[0] >= 8
    )


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
    """An operator's implementation is below autograd, so here is the gradient of softmax(scale QK^T) V spelled out."""
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    parts = (x.flatten(0, 1).split(lengths) for x in (grad, query, key, value, output, *grads))
    for mesh in zip(*parts, strict=True):
        g, q, k, v, o, *made = (x.transpose(0, 1) for x in mesh)
        unseen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
        shares = (q @ k.mT * scale).masked_fill(unseen, float("-inf")).softmax(dim=-1)
        # The sum over what a query reads of share x gradient is the gradient's part along the output.
        scores = shares * (g @ v.mT - (g * o).sum(dim=-1, keepdim=True)) * scale
        for place, values in zip(made, (scores @ k, scores.mT @ q, shares.mT @ g), strict=True):
            place.copy_(values)
    return tuple(grads)


def _laid_end_to_end(offsets: torch.Tensor, offsets_on_host: torch.Tensor):
    """What flash attention is told of the meshes; the host knows it, so that nothing waits for the device."""
    lengths = offsets_on_host.diff()
    meshes, longest = 1 + int(lengths.nonzero()[-1]), int(lengths.max())
    offsets = offsets[: meshes + 1]
    return offsets, offsets, longest, longest, 0.0, True


def _flash(query, key, value, offsets, offsets_on_host, scale):
    flat = (x.flatten(0, 1) for x in (query, key, value))
    packing = _laid_end_to_end(offsets, offsets_on_host)
    output, sums, *_ = torch.ops.aten._flash_attention_forward(*flat, *packing, False, scale=scale)
    return output.view(query.shape), sums


def _flash_backward(grad, query, key, value, output, sums, offsets, offsets_on_host, scale):
    flat = (x.flatten(0, 1) for x in (grad, query, key, value, output))
    packing = _laid_end_to_end(offsets, offsets_on_host)
    # Of random numbers, which nothing here draws.
    unused = torch.zeros(2, dtype=torch.uint64, device=query.device), torch.empty(0, device=query.device)
    grads = torch.ops.aten._flash_attention_backward(*flat, sums, *packing, *unused, scale=scale)
    return tuple(each.view(query.shape) for each in grads)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: torch.Tensor,
    offsets_on_host: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o (B, T, H, D), and for flash attention's backward pass the logarithms of sums (H, B x T), else nothing."""
    if not _has_flash(query):
        output = _mesh_after_mesh(query, key, value, _lengths(offsets_on_host), scale)
        return output, query.new_empty(0, dtype=torch.float32)
    return _flash(query, key, value, offsets, offsets_on_host, scale)


@_attention.register_fake
def _(query, key, value, offsets, offsets_on_host, scale):
    sums = (query.shape[2], query.shape[0] * query.shape[1]) if _has_flash(query) else (0,)
    return torch.empty_like(query, memory_format=torch.contiguous_format), query.new_empty(sums, dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    offsets: torch.Tensor,
    offsets_on_host: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    if not _has_flash(query):
        return _mesh_after_mesh_backward(grad, query, key, value, output, _lengths(offsets_on_host), scale)
    return _flash_backward(grad, query, key, value, output, sums, offsets, offsets_on_host, scale)


@_attention_backward.register_fake
def _(grad, query, key, value, output, sums, offsets, offsets_on_host, scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))


def _save(ctx, inputs, output):
    query, key, value, offsets, offsets_on_host, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, offsets, offsets_on_host)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    grads = _attention_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale)
    return *grads, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)
