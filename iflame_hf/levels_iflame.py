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
    positions: torch.Tensor | None  # (B, T) positions in the mesh; None: no mesh begins after the start of its row
    segments: torch.Tensor | None  # (B, T) number of the mesh in its row; None: the T items of a row are of one mesh
    # (B,) False where no item of the mesh that ends the row is complete yet; None: the last item is of that mesh
    has_begun: torch.Tensor | None
    # (B or 1, 1, T, P + T), True where an item may look; (B, P + T) for flash; a BlockMask for flex attention
    attention_mask: torch.Tensor | None
    flash_bounds: tuple[torch.Tensor, int] | None  # bounds of the meshes of all rows laid end to end; the longest


class Rows(NamedTuple):
    """Where the T new items of each row stand. All None: every row is one mesh that goes on from its start."""

    positions: torch.Tensor | None = None  # (B, T) positions in the mesh
    segments: torch.Tensor | None = None  # (B, T) number of the mesh in its row, padding on the left being one too
    has_begun: torch.Tensor | None = None  # (B,) False where the row is padding so far


def level_inputs(
    config: IFlameConfig,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache,
) -> list[LevelInputs | None]:
    """
    The inputs of the levels of coordinates, vertices and faces; None for a level at which no item is completed.

    Args:
        tokens: (B, T, …) whatever is given for the T new tokens; only its shape and device are read.
        attention_mask, position_ids, cache: as in `IFlameModel.forward`. The cache is told where in each row padding
            ends and the mesh that ends the row begins.

    Raises:
        ValueError: for masks and positions that the model cannot honour.
    """
    batch, length = tokens.shape[:2]
    seen = 0 if cache is None else cache.tokens_seen
    if attention_mask is not None:
        if attention_mask.shape != (batch, seen + length):
            raise ValueError(
                "attention_mask must be of the shape (batch, tokens seen + new tokens) = "
                f"{(batch, seen + length)}, got {tuple(attention_mask.shape)}"
            )
        attention_mask = attention_mask.to(tokens.device).bool()
    if position_ids is not None:
        position_ids = position_ids.to(tokens.device).expand(batch, length)
    if seen > 0:
        rows = _continued_rows(config, tokens, attention_mask, position_ids, cache)
    elif attention_mask is not None or position_ids is not None:
        rows = _fresh_rows(config, tokens, attention_mask, position_ids, cache)
    else:
        rows = Rows()
        _check_length(config, length)
    return [_one_level(config, stride, tokens, seen, rows) for stride in LEVEL_STRIDES]


def _check_length(config, tokens, positions=None, attention_mask=None):
    """Raises ValueError if a mesh of rows of so many tokens is longer than the model takes; padding does not count."""
    longest = tokens
    if longest > config.max_position_embeddings and positions is not None:
        if torch.compiler.is_compiling():
            return
        if attention_mask is not None:
            positions = positions.masked_fill(~attention_mask[:, -positions.shape[1] :], -1)
        longest = int(positions.max()) + 1
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than max_position_embeddings = {config.max_position_embeddings}"
        )


def _continued_rows(config, tokens, attention_mask, position_ids, cache):
    """Rows whose tokens follow those that a cache has seen: of the same meshes, or the first ones after padding."""
    if cache.ends_in_padding:
        raise ValueError(
            "a cache filled with rows that end in padding cannot be continued: to generate, pad prompts on the left "
            "(padding_side='left')"
        )
    seen, (batch, length), device = cache.tokens_seen, tokens.shape[:2], tokens.device
    index = torch.arange(seen, seen + length, device=device)
    padding = (
        torch.zeros(batch, dtype=torch.long, device=device) if cache.padding is None else cache.padding.to(device)
    )
    starts = None if cache.mesh_starts is None else cache.mesh_starts.to(device)
    rows, still_padding = Rows(), False
    if cache.is_padding_so_far:
        waiting = padding == seen
        pads = torch.zeros_like(padding)
        if attention_mask is not None:
            pads = _leading_zeros(attention_mask[:, seen:])
        padding = torch.where(waiting, seen + pads, padding)
        starts = torch.where(waiting, padding, starts)
        is_mesh = index >= padding[:, None]
        rows = Rows(torch.where(is_mesh, index - starts[:, None], index), is_mesh.long(), padding < seen + length)
        still_padding = not rows.has_begun.all()
    elif starts is not None:
        rows = Rows(index - starts[:, None])
    # On a GPU a check of values waits for the device: once for many tokens, but not in every single step.
    if not torch.compiler.is_compiling() and (length > 1 or device.type == "cpu"):
        _check_continuation(index, rows, padding, attention_mask, position_ids)
    _check_length(config, seen + length, rows.positions, attention_mask)
    if cache.is_padding_so_far:
        cache.padding, cache.mesh_starts, cache.is_padding_so_far = padding, starts, still_padding
    return rows


def _check_continuation(index, rows, padding, attention_mask, position_ids):
    """Raises ValueError for a mask or positions that contradict what a cache has seen, or that leave tokens out."""
    seen, after = int(index[0]), int(index[-1]) + 1
    broken = (padding % TOKENS_PER_FACE != 0) & (padding >= seen) & (padding < after)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(_not_whole_faces(int(padding[row]), row))
    if attention_mask is not None:
        differs = attention_mask != (torch.arange(after, device=index.device) >= padding[:, None])
        if differs[:, :seen].any():
            raise ValueError(
                "attention_mask contradicts what the cache was filled with: of the tokens that it has seen those must "
                "be masked that were masked then, and no others"
            )
        if differs.any():
            raise ValueError("attention_mask has zeros between ones: tokens after a filled cache cannot be padding")
    if position_ids is not None:
        uneven = position_ids != (index if rows.positions is None else rows.positions)
        if (uneven & (index >= padding[:, None])).any():
            raise ValueError("position_ids of tokens after a filled cache must count on from those it has seen")


def _fresh_rows(config, tokens, attention_mask, position_ids, cache):
    """Rows from their start, of one mesh or of several, padded or not."""
    batch, length = tokens.shape[:2]
    index = torch.arange(length, device=tokens.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    begins = torch.zeros_like(real)
    if attention_mask is not None:
        real = attention_mask
        begins = real & ~F.pad(real[:, :-1], (1, 0))
    runs = begins.sum(dim=1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0))
    begins = begins | (index == 0)
    starts = torch.where(begins, index, 0).cummax(dim=1).values
    positions, segments = index - starts, begins.cumsum(dim=1)
    has_begun = real.any(dim=1)
    padding = _leading_zeros(real)
    mesh_starts = torch.where(has_begun, (segments != segments[:, -1:]).sum(dim=1), length)
    # A compiled graph cannot look at values, and takes every row for a packed one.
    if torch.compiler.is_compiling():
        if cache is not None:
            cache.mesh_starts, cache.padding = mesh_starts, padding
        return Rows(positions, segments)
    broken = (starts % TOKENS_PER_FACE != 0).any()
    uneven = real.new_zeros(()) if position_ids is None else (real & (position_ids != positions)).any()
    facts = [
        runs.max() > 1,
        (has_begun & ~real[:, -1]).any(),
        broken,
        uneven,
        begins[:, 1:].any(),
        ~has_begun.all(),
        (padding > 0).any(),
    ]
    # Reading a value waits for the device: once for all.
    has_gap, ends_in_padding, broken, uneven, several, is_padding, is_padded = torch.stack(facts).tolist()
    if has_gap:
        raise ValueError("attention_mask has zeros between ones: only padding at the ends of a row can be masked")
    if broken:
        row, column = (starts % TOKENS_PER_FACE != 0).nonzero()[0].tolist()
        raise ValueError(_not_whole_faces(int(starts[row, column]), row))
    if uneven:
        raise ValueError("position_ids must count tokens from 0 in every mesh, without a gap")
    is_apart = several or (is_padding and cache is not None)
    _check_length(config, length, positions if is_apart else None, attention_mask)
    if cache is not None:
        cache.mesh_starts = mesh_starts if is_apart else None
        cache.padding = padding if is_padded else None
        cache.ends_in_padding, cache.is_padding_so_far = ends_in_padding, is_padding
    return Rows(positions, segments, has_begun) if is_apart else Rows()


def _leading_zeros(real):
    """(B, T) booleans -> (B,) how many of each row are False before the first that is True."""
    return (real.cumsum(dim=1) == 0).sum(dim=1)


def _not_whole_faces(token, row):
    return (
        f"a mesh must be padded, and packed after others, by whole faces ({TOKENS_PER_FACE} tokens), got one that "
        f"begins at token {token} of row {row}"
    )


def _one_level(config, stride, tokens, seen, rows):
    before, after = seen // stride, (seen + tokens.shape[1]) // stride
    count = after - before
    if count == 0:
        return None
    positions, segments, _ = rows
    closing = slice(stride - 1 - seen % stride, None, stride)
    index = torch.arange(before, after, device=tokens.device)
    table_positions = index[None]
    if positions is not None:
        table_positions = positions = positions[:, closing] // stride
    cos, sin = rotary_tables(table_positions, config.head_dim, config.rope_base)

    implementation = config._attn_implementation or ""
    flash = "flash" in implementation
    mask = flash_bounds = has_begun = None
    if segments is not None:
        last = segments[:, -1]
        segments = segments[:, closing].contiguous()
        has_begun = segments[:, -1] == last
        if rows.has_begun is not None:
            has_begun = has_begun & rows.has_begun
    if implementation == "flex_attention" and count > 1:
        if tokens.device.type == "cpu":
            raise ValueError(
                "attn_implementation='flex_attention' runs on a GPU only, and the model is on the CPU: use 'sdpa'"
            )
        mask = _block_mask(positions, before, after, tokens.device)
    elif segments is not None and before == 0:
        if flash:
            flash_bounds = _bounds(segments)
        else:
            mask = (_causal(before, after, tokens) & (segments[:, :, None] == segments[:, None, :]))[:, None]
    elif positions is not None:
        # An item sees its mesh from its start on; flash attention is told of the mesh that ends the row only.
        starts = index - positions
        keys = torch.arange(after, device=tokens.device)
        mask = keys >= starts[:, -1:] if flash else ((keys <= index[:, None]) & (keys >= starts[..., None]))[:, None]
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
