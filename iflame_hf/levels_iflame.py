"""
What the three levels must know of a batch: positions, mesh boundaries, attention masks.

Padding on the left is treated as one more mesh in its row.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from .configuration_iflame import LEVEL_STRIDES, TOKENS_PER_FACE, IFlameConfig
from .ops_iflame import alibi_slopes, rotary_tables

# Queries, and keys, of a block of a torch BlockMask.
BLOCK_SIZE = 128

# B batch, T items of a level, P items of that level that a cache has seen, D head size


class LevelInputs(NamedTuple):
    """What the blocks of one level must know of the T items they are given."""

    cos: torch.Tensor  # (B or 1, T, 1, D / 2)
    sin: torch.Tensor
    slopes: torch.Tensor  # (H,) decay rates of linear attention
    positions: torch.Tensor | None  # (B, T) positions in the mesh; None: no mesh begins behind the start of its row
    segments: torch.Tensor | None  # (B, T) number of the mesh in its row; None: the T items of a row are of one mesh
    # (B,) False where no item of the mesh that ends the row is complete yet; None: the last item is of that mesh
    has_begun: torch.Tensor | None
    # (B or 1, 1, T, P + T), True where an item may look; (B, P + T) for flash; a BlockMask for flex attention
    attention_mask: torch.Tensor | None
    flash_bounds: tuple[torch.Tensor, int] | None  # bounds of the meshes of all rows laid end to end; the longest


def level_inputs(
    config: IFlameConfig,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values,
) -> list[LevelInputs | None]:
    """
    The inputs of the levels of coordinates, vertices and faces; None for a level at which no item is completed.

    Args:
        tokens: (B, T, …) whatever is given for the T new tokens; only its shape and device are read.
        attention_mask, position_ids, past_key_values: as in `IFlameModel.forward`. A fresh cache is told where
            the mesh that ends each row begins.

    Raises:
        ValueError: for masks and positions that the model cannot honour.
    """
    batch, length = tokens.shape[:2]
    seen = 0 if past_key_values is None else past_key_values.tokens_seen
    if attention_mask is not None and attention_mask.shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask must be of the shape (batch, tokens seen + new tokens) = {(batch, seen + length)}, got "
            f"{tuple(attention_mask.shape)}"
        )
    positions = segments = None
    if seen > 0:
        index = torch.arange(seen, seen + length, device=tokens.device)
        if past_key_values.mesh_starts is not None:
            positions = index - past_key_values.mesh_starts.to(tokens.device)[:, None]
        _check_continuation(index if positions is None else positions, attention_mask, position_ids, past_key_values)
    elif attention_mask is not None or position_ids is not None:
        positions, segments = _meshes_in_rows(tokens, attention_mask, position_ids, past_key_values)
        if past_key_values is not None and segments is not None:
            past_key_values.mesh_starts = (segments != segments[:, -1:]).sum(dim=1)
    if segments is None and seen + length > config.max_position_embeddings:
        raise ValueError(
            f"a sequence of {seen + length} tokens is longer than max_position_embeddings = "
            f"{config.max_position_embeddings}"
        )
    return [_one_level(config, stride, tokens, seen, positions, segments, past_key_values) for stride in LEVEL_STRIDES]


def _check_continuation(positions, attention_mask, position_ids, past_key_values):
    """Refuses what tokens behind a filled cache cannot be: padding, another mesh, or behind padding themselves."""
    if past_key_values.ends_in_padding:
        raise ValueError(
            "a cache filled with rows that end in padding cannot be continued: to generate, pad prompts on the left "
            "(padding_side='left')"
        )
    # A look at the values waits for the device: once for many tokens, but not in every single step.
    if torch.compiler.is_compiling() or positions.shape[-1] == 1:
        return
    if attention_mask is not None and not attention_mask[:, -positions.shape[-1] :].all():
        raise ValueError("attention_mask has zeros between ones: tokens behind a filled cache cannot be padding")
    if position_ids is not None and (position_ids.to(positions.device) != positions).any():
        raise ValueError("position_ids of tokens behind a filled cache must count on from those it has seen")


def _meshes_in_rows(tokens, attention_mask, position_ids, past_key_values):
    """Positions in the mesh and number of the mesh in its row, (B, T) each; None, None if every row is one mesh."""
    batch, length = tokens.shape[:2]
    index = torch.arange(length, device=tokens.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    begins = torch.zeros_like(real)
    if attention_mask is not None:
        real = attention_mask.to(tokens.device).bool()
        begins = real & ~F.pad(real[:, :-1], (1, 0))
    runs = begins.sum(dim=1)
    if position_ids is not None:
        position_ids = position_ids.to(tokens.device).expand(batch, length)
        begins = begins | (real & (position_ids == 0))
    begins = begins | (index == 0)
    starts = torch.where(begins, index, 0).cummax(dim=1).values
    positions, segments = index - starts, begins.cumsum(dim=1)
    # A compiled graph cannot look at values, and takes every row for a packed one.
    if torch.compiler.is_compiling():
        return positions, segments
    broken = (starts % TOKENS_PER_FACE != 0).any()
    uneven = real.new_zeros(()) if position_ids is None else (real & (position_ids != positions)).any()
    looked_at = [runs.max() > 1, ~real[:, -1].all(), broken, uneven, begins[:, 1:].any()]
    # A look waits for the device: one for all.
    has_gap, ends_in_padding, broken, uneven, several = torch.stack(looked_at).tolist()
    if has_gap:
        raise ValueError("attention_mask has zeros between ones: only padding at the ends of a row can be masked")
    if past_key_values is not None:
        past_key_values.ends_in_padding = ends_in_padding
    if broken:
        row, column = (starts % TOKENS_PER_FACE != 0).nonzero()[0].tolist()
        raise ValueError(
            f"a mesh must be padded, and packed behind others, by whole faces ({TOKENS_PER_FACE} tokens), got one "
            f"that begins at token {int(starts[row, column])} of row {row}"
        )
    if uneven:
        raise ValueError("position_ids must count tokens from 0 in every mesh, without a gap")
    return (positions, segments) if several else (None, None)


def _one_level(config, stride, tokens, seen, positions, segments, past_key_values):
    before, after = seen // stride, (seen + tokens.shape[1]) // stride
    count = after - before
    if count == 0:
        return None
    closing = slice(stride - 1 - seen % stride, None, stride)
    if positions is None:
        table_positions = torch.arange(before, after, device=tokens.device)[None]
    else:
        table_positions = positions = positions[:, closing] // stride
    cos, sin = rotary_tables(table_positions, config.head_dim, config.rope_base)

    implementation = config._attn_implementation or ""
    flash = "flash" in implementation
    mask = flash_bounds = has_begun = None
    if segments is not None:
        last = segments[:, -1]
        segments = segments[:, closing].contiguous()
        has_begun = segments[:, -1] == last
    if implementation == "flex_attention" and count > 1:
        if tokens.device.type == "cpu":
            raise ValueError(
                "attn_implementation='flex_attention' runs on a GPU only, and the model is on the CPU: use 'sdpa'"
            )
        mask = _block_mask(positions, before, after, tokens.device)
    elif segments is not None:
        if flash:
            flash_bounds = _bounds(segments)
        else:
            mask = (_causal(before, after, tokens) & (segments[:, :, None] == segments[:, None, :]))[:, None]
    elif positions is not None:
        first = past_key_values.mesh_starts.to(tokens.device) // stride
        visible = torch.arange(after, device=tokens.device) >= first[:, None]
        mask = visible if flash else (_causal(before, after, tokens) & visible[:, None, :])[:, None]
    elif before > 0 and count > 1 and not flash:
        mask = _causal(before, after, tokens)[None, None]
    slopes = alibi_slopes(config.num_attention_heads, tokens.device)
    return LevelInputs(cos, sin, slopes, positions, segments, has_begun, mask, flash_bounds)


def _causal(before, after, tokens):
    """(after - before, after) True where an item may look."""
    index = torch.arange(after, device=tokens.device)
    return index <= index[before:, None]


def _bounds(segments):
    """Bounds (meshes + 1,) of the meshes of all rows laid end to end, int32, and the length of the longest."""
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True).flatten()
    bounds = F.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
    return bounds, int(bounds.diff().max())


def _block_mask(positions, before, after, device):
    """
    The same masks as a torch BlockMask, which skips whole blocks of items that see nothing of each other.

    An item sees all from the start of its mesh to itself, so the blocks that a block of items sees lie between those
    of its first item's start and of its last item; those in which every item sees everything, between its last item's
    start and its first item. Torch's `create_block_mask` finds the same by looking at every pair of items, with a
    kernel that takes minutes to compile.

    Args:
        positions: (B, T) positions in the mesh, or None.
        before, after: items of the level before and behind the T new ones.
    """
    from torch.nn.attention.flex_attention import BlockMask

    last = torch.arange(before, after, device=device)  # the last item that each new item sees
    starts = torch.zeros_like(last)[None] if positions is None else last - positions  # the first one

    def may_look(row, head, query, key):
        allowed = key <= query + before
        return allowed if positions is None else allowed & (key >= starts[row, query])

    blocks = torch.arange(0, after, BLOCK_SIZE, device=device)  # the first item of each block of keys
    top = torch.arange(0, after - before, BLOCK_SIZE, device=device)  # and of queries
    bottom = (top + BLOCK_SIZE - 1).clamp(max=after - before - 1)
    seen = (blocks + BLOCK_SIZE > starts[:, top, None]) & (blocks <= last[bottom, None])  # (B or 1, blocks, blocks)
    whole = (blocks >= starts[:, bottom, None]) & (blocks + BLOCK_SIZE - 1 <= last[top, None])
    whole = whole & (bottom == top + BLOCK_SIZE - 1)[:, None]  # in an unfinished block the kernel has to look
    return BlockMask.from_kv_blocks(
        *_counted(seen & ~whole), *_counted(whole), BLOCK_SIZE, may_look, seq_lengths=(after - before, after)
    )


def _counted(blocks):
    """(B, N, M) booleans -> how many of each row are true, (B, 1, N), and their indices before the others'."""
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(dim=-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None].contiguous()
