"""
What the blocks of the three levels are given beside hidden states: rotary tables, mesh bounds, attention masks, and
how attention is computed.
"""

import warnings
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .configuration_iflame import IFlameConfig
from .implementations_iflame import LinearAttentionCall, choose_linear_attention
from .layout_iflame import MeshBounds, RowLayout, fresh_rows, leading_zeros, not_whole_faces
from .ops_iflame import alibi_slopes, rotary_tables
from .packed_attention_iflame import Packing
from .states_iflame import Slots

# Queries, and keys, of a block of a torch BlockMask.
BLOCK_SIZE = 128

# B batch, T items of a level, P items of that level that a cache has seen, D head size


class LevelInputs(NamedTuple):
    """What the blocks of one level must know of the T items they are given."""

    cos: torch.Tensor  # (B or 1, T, 1, D / 2)
    sin: torch.Tensor
    slopes: torch.Tensor  # (H,) decay rates of linear attention
    positions: torch.Tensor | None  # (B, T) places in the mesh; None: no mesh begins after the start of its row
    bounds: MeshBounds | None  # None: the T items of a row are of one mesh
    # (B,) False where no item of the mesh that ends the row is complete yet; None: the last item is of that mesh
    has_begun: torch.Tensor | None
    # (B or 1, 1, T, keys), True where an item may look; (B, keys) for flash; a BlockMask for flex attention
    attention_mask: torch.Tensor | None
    attention_implementation: str | None  # transformers' name; None: "eager"
    attention_kwargs: dict  # more arguments of it
    packing: Packing | None  # of rows whose meshes attend one by one, without a mask; None: as said above
    linear_implementation: str
    has_state: bool  # items of this level were seen before
    slots: Slots | None  # where a StaticIFlameCache keeps the items


class LevelRows(NamedTuple):
    """Where the T new items of a level stand in their rows. All None: each row is one mesh that goes on."""

    positions: torch.Tensor | None = None
    bounds: MeshBounds | None = None
    has_begun: torch.Tensor | None = None


def level_inputs(
    config: IFlameConfig,
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache=None,
    layout: RowLayout | None = None,
) -> list[LevelInputs | None]:
    """
    The inputs of the levels of coordinates, vertices and faces; None for a level at which no item is completed.

    Args:
        tokens: (B, T, …) whatever is given for the T new tokens; only its shape and device are read.
        attention_mask, position_ids, cache, layout: as in `IFlameModel.forward`. The cache is told where in each row
            padding ends and the mesh that ends the row begins.

    Raises:
        ValueError: for masks, positions and layouts that the model cannot honour.
    """
    batch, length = tokens.shape[:2]
    seen = 0 if cache is None else cache.tokens_seen
    if cache is not None:
        cache.check_room(batch, length)
    if attention_mask is not None:
        if attention_mask.shape != (batch, seen + length):
            raise ValueError(
                "attention_mask must be of the shape (batch, tokens seen + new tokens) = "
                f"{(batch, seen + length)}, got {tuple(attention_mask.shape)}"
            )
        attention_mask = attention_mask.to(tokens.device).bool()
    if position_ids is not None:
        position_ids = position_ids.to(tokens.device).expand(batch, length)
    if layout is not None:
        layout = _checked(layout, tokens, attention_mask, position_ids, seen)
    if layout is not None:
        rows = _laid_out_rows(config, layout, cache)
    elif seen > 0:
        rows = _continued_rows(config, tokens, attention_mask, position_ids, cache)
    elif attention_mask is not None or position_ids is not None:
        rows = _described_rows(config, tokens, attention_mask, position_ids, cache)
    else:
        rows = [LevelRows()] * len(config.level_strides)
        _check_length(config, length)
        if cache is not None:
            cache.begin_rows(batch, tokens.device)
    return [_one_level(config, level, tokens, seen, rows[level], cache) for level in range(len(rows))]


def _checked(layout, tokens, attention_mask, position_ids, seen):
    """A layout that fits the tokens; None where position_ids have to take its place."""
    if seen > 0:
        raise ValueError("a layout describes rows from their start: leave it out for tokens after a filled cache")
    if attention_mask is not None:
        raise ValueError("a layout says what is padding: leave attention_mask out")
    if layout.shape != tokens.shape[:2]:
        message = f"the layout is of {layout.shape[0]} rows of {layout.shape[1]} tokens, got {tuple(tokens.shape[:2])}"
        if position_ids is None:
            raise ValueError(message)
        # As where torch's DataParallel deals out the rows of a batch.
        warnings.warn(f"{message}: position_ids are read instead, which waits for the device", stacklevel=2)
        return None
    return layout


def _laid_out_rows(config, layout, cache):
    """Rows that a layout describes."""
    is_packed = layout.num_meshes != layout.shape[0]
    longest = layout.length
    if is_packed and layout.longest is not None:
        longest = layout.longest[0]
    _check_length(config, longest)
    if cache is not None:
        cache.begin_rows(layout.shape[0], layout.face_positions.device, layout.last_starts() if is_packed else None)
    return [_rows_of_a_level(layout, level) if is_packed else LevelRows() for level in range(len(layout.strides))]


def _rows_of_a_level(layout, level, has_begun=None):
    bounds = layout.bounds(level)
    if bounds.meshes.shape[1] == 0:
        return LevelRows()
    # The last mesh of a row may have no complete item of this level yet.
    ends = bounds.meshes[:, -1] == layout.face_meshes[:, -1]
    return LevelRows(layout.positions(level), bounds, ends if has_begun is None else ends & has_begun)


def _described_rows(config, tokens, attention_mask, position_ids, cache):
    """Rows from their start, whose mask and positions say which meshes they hold."""
    batch, length = tokens.shape[:2]
    fresh = fresh_rows(tokens, config.level_strides, attention_mask, position_ids, cache is not None)
    layout = fresh.layout
    _check_length(config, length, layout, attention_mask)
    if cache is not None:
        starts = None if layout is None else layout.last_starts()
        if fresh.has_begun is not None:
            starts = torch.where(fresh.has_begun, starts, length)
        cache.begin_rows(
            batch, tokens.device, starts, fresh.padding, fresh.ends_in_padding, fresh.has_begun is not None
        )
    if layout is None:
        return [LevelRows()] * len(config.level_strides)
    return [_rows_of_a_level(layout, level, fresh.has_begun) for level in range(len(config.level_strides))]


def _check_length(config, tokens, layout=None, attention_mask=None):
    """Raises ValueError if a mesh of rows of so many tokens is longer than the model takes; padding does not count."""
    longest = tokens
    if longest > config.max_position_embeddings and layout is not None:
        if torch.compiler.is_compiling():
            return
        positions = layout if isinstance(layout, torch.Tensor) else layout.positions()
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
    positions = meshes = has_begun = None
    still_padding = False
    if cache.is_padding_so_far:
        waiting = padding == seen
        pads = torch.zeros_like(padding)
        if attention_mask is not None:
            pads = leading_zeros(attention_mask[:, seen:])
        padding = torch.where(waiting, seen + pads, padding)
        starts = torch.where(waiting, padding, seen - cache.positions.to(device))
        meshes = (index >= padding[:, None]).long()
        positions = torch.where(meshes > 0, index - starts[:, None], index)
        has_begun = padding < seen + length
        still_padding = not has_begun.all()
    elif cache.has_apart_rows or cache.is_static:
        positions = cache.positions.to(device)[:, None] + torch.arange(length, device=device)
    # On a GPU a check of values waits for the device: once for many tokens, but not in every single step.
    if not torch.compiler.is_compiling() and (length > 1 or device.type == "cpu"):
        _check_continuation(config, index, positions, padding, attention_mask, position_ids)
    _check_length(config, seen + length, positions, attention_mask)
    if cache.is_padding_so_far:
        cache.continue_padding(starts, padding, still_padding)
    return [_closing_rows(stride, seen, positions, meshes, has_begun) for stride in config.level_strides]


def _check_continuation(config, index, positions, padding, attention_mask, position_ids):
    """Raises ValueError for a mask or positions that contradict what a cache has seen, or that leave tokens out."""
    seen, after = int(index[0]), int(index[-1]) + 1
    broken = (padding % config.tokens_per_face != 0) & (padding >= seen) & (padding < after)
    if broken.any():
        row = int(broken.nonzero()[0])
        raise ValueError(not_whole_faces(int(padding[row]), row, config.tokens_per_face))
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
        uneven = position_ids != (index if positions is None else positions)
        if (uneven & (index >= padding[:, None])).any():
            raise ValueError("position_ids of tokens after a filled cache must count on from those it has seen")


def _closing_rows(stride, seen, positions, meshes, has_begun):
    """Where the items stand that these tokens complete, at the level of which an item spans `stride` tokens."""
    closing = slice(stride - 1 - seen % stride, None, stride)
    bounds = None
    if positions is not None:
        positions = positions[:, closing] // stride
    if meshes is not None and positions.shape[1] > 0:
        last = meshes[:, -1]
        meshes = meshes[:, closing].contiguous()
        has_begun = has_begun & (meshes[:, -1] == last)
        bounds = MeshBounds(meshes)
    return LevelRows(positions, bounds, has_begun)


def _one_level(config, level, tokens, seen, rows, cache):
    stride = config.level_strides[level]
    before, after = seen // stride, (seen + tokens.shape[1]) // stride
    count, device = after - before, tokens.device
    if count == 0:
        return None
    positions, bounds, has_begun = rows
    index = torch.arange(before, after, device=device)
    cos, sin = rotary_tables(index[None] if positions is None else positions, config.head_dim, config.rope_base)

    implementation, mask, kwargs, slots, packing = config._attn_implementation, None, {}, None, None
    if implementation == "flex_attention" and count == 1:
        # A compiled kernel for every length of the cache is no way to take single steps.
        implementation = "sdpa"
    if cache is not None and cache.is_static:
        slots = cache.slots(level, index, positions, bounds, before)
    if slots is not None and slots.are_read:
        # All slots are keys, and a mesh's own are those up to the item.
        implementation = "eager" if implementation in (None, "eager") else "sdpa"
        places = index[None] if positions is None else positions
        mask = (torch.arange(cache.room(level), device=device) <= places[..., None])[:, None]
    elif implementation == "flex_attention":
        if device.type == "cpu":
            raise ValueError(
                "attn_implementation='flex_attention' runs on a GPU only, and the model is on the CPU: use 'sdpa'"
            )
        mask = block_mask(positions, before, after, device)
    elif implementation == "sdpa" and before == 0 and bounds is not None and bounds.offsets is not None:
        packing = Packing.of(bounds, tokens.shape[0] * -(-tokens.shape[1] // config.level_strides[-1]))
    else:
        mask, kwargs = _mask(bounds, positions, index, before, "flash" in (implementation or ""))
    call = LinearAttentionCall(
        device_type=device.type,
        head_dim=config.head_dim,
        length=count,
        has_state=before > 0,
        bounds=bounds,
        need_state=cache is not None,
    )
    return LevelInputs(
        cos,
        sin,
        alibi_slopes(config.num_attention_heads, device),
        positions,
        bounds,
        has_begun,
        mask,
        implementation,
        kwargs,
        packing,
        choose_linear_attention(config.linear_attn_implementation, call),
        before > 0,
        slots,
    )


def _mask(bounds, positions, index, before, flash):
    """An attention mask as `LevelInputs` describes it, and what flash attention is told beside it."""
    after = before + len(index)
    keys = torch.arange(after, device=index.device)
    if bounds is not None and before == 0:
        if flash:
            return None, _packing(bounds)
        causal = keys <= index[:, None]
        return (causal & (bounds.meshes[:, :, None] == bounds.meshes[:, None, :]))[:, None], {}
    if positions is not None:
        # An item sees its mesh from its start on; flash attention is told of the mesh that ends the row only.
        starts = index - positions
        if flash:
            return keys >= starts[:, -1:], {}
        return ((keys <= index[:, None]) & (keys >= starts[..., None]))[:, None], {}
    if before > 0 and len(index) > 1 and not flash:
        return (keys <= index[:, None])[None, None], {}
    return None, {}


def _packing(bounds):
    """The bounds of meshes as transformers' flash attention takes them."""
    offsets, longest = bounds.offsets, bounds.longest
    if offsets is None:  # in a graph that is compiled as a whole
        begins = F.pad(bounds.meshes[:, 1:] != bounds.meshes[:, :-1], (1, 0), value=True).flatten()
        offsets = F.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
        longest = int(offsets.diff().max())
    return {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": longest, "max_length_k": longest}


def block_mask(positions, before, after, device):
    """
    The same masks as a torch BlockMask, which skips whole blocks of items that see nothing of each other.

    An item sees all from the start of its mesh to itself, so the blocks that a block of items sees lie between those
    of its first item's start and of its last item; those in which every item sees everything, between its last item's
    start and its first item. Torch's `create_block_mask` finds the same by looking at every pair of items, with a
    kernel that takes minutes to compile.

    Args:
        positions: (B, T) positions in the mesh, or None.
        before, after: items of the level before the T new ones and with them.
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
