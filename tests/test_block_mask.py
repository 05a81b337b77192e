"""The BlockMask of packed and padded rows is the one that torch finds by looking at every pair of items."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from iflame_hf.levels_iflame import BLOCK_SIZE, block_mask

LENGTH = 5 * BLOCK_SIZE + 70
# Meshes of a row begin here; some within a block, at its edge, and many in one block.
ROWS = {
    "one mesh": [[0], [0]],
    "meshes of all sizes": [[0, 5, 130, 256, 260, 600], [0, 384]],
    "a mesh at every edge": [list(range(0, LENGTH, BLOCK_SIZE)), [0, 127, 129, 255, 257]],
    "many small meshes": [list(range(0, LENGTH, 3)), list(range(0, LENGTH, 40))],
}


def positions_of(rows):
    index = torch.arange(LENGTH)
    return torch.stack([index - max_start(index, torch.tensor(starts)) for starts in rows])


def max_start(index, starts):
    return starts[torch.searchsorted(starts, index, right=True) - 1]


def mask_of(positions, before, after):
    return block_mask(positions, before, after, torch.device("cpu"))


def of_torch(positions, before, after):
    starts = None if positions is None else torch.arange(before, after) - positions

    def may_look(row, head, query, key):
        allowed = key <= query + before
        return allowed if starts is None else allowed & (key >= starts[row, query])

    rows = None if positions is None else len(positions)
    return create_block_mask(may_look, rows, None, after - before, after, "cpu", BLOCK_SIZE)


def lists(numbers, indices):
    """The blocks of each row of blocks, as sets."""
    return [
        set(row[:count].tolist()) for count, row in zip(numbers.flatten().tolist(), indices.flatten(0, 2), strict=True)
    ]


def assert_same(found, expected):
    assert found.shape == expected.shape and found.BLOCK_SIZE == expected.BLOCK_SIZE
    for numbers, indices in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
        ("full_q_num_blocks", "full_q_indices"),
    ):
        ours = lists(getattr(found, numbers), getattr(found, indices))
        assert ours == lists(getattr(expected, numbers), getattr(expected, indices)), numbers


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_packed_rows_skip_and_fill_the_blocks_that_torch_does(rows):
    positions = positions_of(rows)
    found, expected = mask_of(positions, 0, LENGTH), of_torch(positions, 0, LENGTH)
    assert_same(found, expected)
    assert 0 < int(found.full_kv_num_blocks.sum() + found.kv_num_blocks.sum())


def test_rows_of_one_mesh_need_no_positions():
    assert_same(mask_of(None, 0, LENGTH), of_torch(None, 0, LENGTH))


@pytest.mark.parametrize("before", [1, 100, BLOCK_SIZE, 2 * BLOCK_SIZE + 3])
def test_items_after_a_filled_cache_see_what_the_cache_holds_of_their_mesh(before):
    assert_same(mask_of(None, before, LENGTH), of_torch(None, before, LENGTH))
    starts = torch.tensor([[0], [min(before, 90)]])
    positions = torch.arange(before, LENGTH) - starts
    assert_same(mask_of(positions, before, LENGTH), of_torch(positions, before, LENGTH))


def test_attention_through_it_is_softmax_over_the_mesh_so_far():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 1, LENGTH, 8) for _ in range(3))
    positions = positions_of(ROWS["meshes of all sizes"])
    starts = torch.arange(LENGTH) - positions
    index = torch.arange(LENGTH)
    mask = (index <= index[:, None]) & (index >= starts[..., None])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask_of(positions, 0, LENGTH)), expected)
