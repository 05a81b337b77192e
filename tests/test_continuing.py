"""What may follow a filled cache: masks, positions and padding that agree with what it has seen, and no more tokens
than the model takes."""

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_model
from torch.nn import functional as F

from iflame_hf import IFlameCache


@pytest.fixture(scope="module")
def model():
    return small_model()


def filled(model, ids, **inputs):
    cache = IFlameCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache, **inputs)
    return cache


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
@pytest.mark.parametrize("masked_then", [0, 9])
@pytest.mark.parametrize("masked_now", [0, 9, 18])
def test_a_mask_must_agree_with_the_one_that_the_cache_was_filled_with(model, new_tokens, masked_then, masked_now):
    ids = mesh_rows(2, faces=3)
    then, now = ((torch.arange(36).expand(2, -1) >= masked).long() for masked in (masked_then, masked_now))
    cache = filled(model, ids[:, :27], attention_mask=then[:, :27])
    after = slice(27, 27 + new_tokens)
    if masked_now != masked_then:
        with pytest.raises(ValueError, match="contradicts what the cache was filled with"):
            model(ids[:, after], attention_mask=now[:, : after.stop], cache=cache)
        assert cache.get_seq_length() == 27
    else:
        logits = model(ids[:, after], attention_mask=now[:, : after.stop], cache=cache).logits
        expected = model(ids[:, masked_then : after.stop]).logits[:, -new_tokens:]
        assert relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("new_tokens", [1, 2])
def test_tokens_after_a_filled_cache_are_neither_padding_nor_at_other_positions(model, new_tokens):
    ids, after = mesh_rows(2, faces=3), 27 + new_tokens
    with pytest.raises(ValueError, match="cannot be padding"):
        mask = torch.ones(2, after)
        mask[1, -1] = 0
        model(ids[:, 27:after], attention_mask=mask, cache=filled(model, ids[:, :27]))
    for positions in (torch.arange(new_tokens), torch.arange(28, 28 + new_tokens)):
        with pytest.raises(ValueError, match="must count on"):
            model(ids[:, 27:after], position_ids=positions[None], cache=filled(model, ids[:, :27]))
    counting = torch.arange(27, after)[None]
    logits = model(ids[:, 27:after], position_ids=counting, cache=filled(model, ids[:, :27])).logits
    assert relative_error(logits, model(ids[:, :after]).logits[:, 27:]) < 1e-5


@pytest.mark.parametrize("pieces", [[1] * 54, [4, 5, 9, 13, 23], [9, 27, 18], [10, 26, 1, 17], [26, 28]])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_on_the_left_may_come_in_pieces(implementation, pieces):
    model = small_model()
    model.set_attn_implementation(implementation)
    pads = (0, 9, 27)
    rows = [mesh_rows(1, faces=5, seed=pad)[:, : 54 - pad] for pad in pads]
    ids = torch.cat([F.pad(row, (pad, 0), value=PAD) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([torch.arange(54) >= pad for pad in pads]).long()
    cache, logits, seen = IFlameCache(model.config), [], 0
    with torch.no_grad():
        for piece in pieces:
            seen += piece
            logits.append(model(ids[:, seen - piece : seen], attention_mask=mask[:, :seen], cache=cache).logits)
        for row, alone, pad in zip(torch.cat(logits, dim=1), rows, pads, strict=True):
            assert relative_error(row[None, pad:], model(alone).logits) < 1e-5


def test_padding_in_pieces_ends_at_a_whole_face(model):
    ids, mask = mesh_rows(2, faces=3), torch.ones(2, 27)
    mask[1, :12] = 0
    cache = filled(model, ids[:, :10], attention_mask=mask[:, :10])
    with pytest.raises(ValueError, match=r"by whole faces \(9 tokens\), got one that begins at token 12 of row 1"):
        model(ids[:, 10:27], attention_mask=mask, cache=cache)


def test_rows_that_are_padding_so_far_follow_their_beam(model):
    ids, mask = mesh_rows(2, faces=3), torch.ones(2, 36)
    mask[0, :18] = 0
    cache = filled(model, ids[:, :9], attention_mask=mask[:, :9])
    cache.reorder_cache(torch.tensor([1, 0, 0]))
    order = [1, 0, 0]
    with torch.no_grad():
        logits = model(ids[order, 9:], attention_mask=mask[order], cache=cache).logits
        assert relative_error(logits[:1], model(ids[1:]).logits[:, 9:]) < 1e-5
        for row in (1, 2):
            assert relative_error(logits[row : row + 1, 9:], model(ids[:1, 18:]).logits) < 1e-5


@pytest.mark.parametrize("pads", [9, 63])
def test_the_longest_sequence_is_counted_without_padding_and_whatever_else_is_padded(pads):
    model = small_model(max_position_embeddings=36)
    ids = F.pad(mesh_rows(2, faces=4), (pads, 0), value=PAD)  # 45 real tokens a row
    mask = (torch.arange(pads + 45).expand(2, -1) >= pads).long()
    with pytest.raises(ValueError, match="45 tokens is longer than max_position_embeddings = 36"):
        model(ids, attention_mask=mask)
    fits = pads + 36
    assert model(ids[:, :fits], attention_mask=mask[:, :fits]).logits.shape[1] == fits
    cache = filled(model, ids[:, : fits - 2], attention_mask=mask[:, : fits - 2])
    for last in (fits - 1, fits):
        model(ids[:, last - 1 : last], attention_mask=mask[:, :last], cache=cache)
    with pytest.raises(ValueError, match="37 tokens is longer than max_position_embeddings = 36"):
        model(ids[:, fits : fits + 1], attention_mask=mask[:, : fits + 1], cache=cache)


def test_one_padded_row_does_not_lift_the_limit_of_another():
    model, mask = small_model(max_position_embeddings=36), torch.ones(2, 99)
    mask[0, :72] = 0
    with pytest.raises(ValueError, match="99 tokens is longer"):
        model(mesh_rows(2, faces=10), attention_mask=mask)


def test_meshes_of_a_packed_row_are_counted_one_by_one():
    model = small_model(max_position_embeddings=36)
    positions = torch.cat([torch.arange(36), torch.arange(27)])[None]
    assert model(mesh_rows(1, faces=6), position_ids=positions).logits.shape[1] == 63
    with pytest.raises(ValueError, match="45 tokens is longer"):
        model(mesh_rows(1, faces=7), position_ids=torch.cat([torch.arange(45), torch.arange(27)])[None])


def test_generate_stops_counting_padding_against_the_limit():
    model = small_model(max_position_embeddings=36)
    ids = F.pad(mesh_rows(2, faces=2), (18, 0), value=PAD)
    mask = (torch.arange(45).expand(2, -1) >= 18).long()
    options = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None, "mesh_grammar": False}
    generated = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[:, 18:], **options)
    assert torch.equal(generated[:, 18:], alone)


def test_a_refused_call_leaves_a_fresh_cache_as_it_was(model):
    cache = IFlameCache(small_model(max_position_embeddings=18).config)
    mask = (torch.arange(45) >= 9)[None].long()
    with pytest.raises(ValueError, match="longer than"):
        small_model(max_position_embeddings=18)(mesh_rows(1, faces=4), attention_mask=mask, cache=cache)
    with torch.no_grad():
        logits = model(mesh_rows(1, faces=1), cache=cache).logits
        torch.testing.assert_close(logits, model(mesh_rows(1, faces=1)).logits)


@torch.no_grad()
def test_a_compiled_prefill_tells_the_cache_where_padding_ends(model):
    ids, mask = mesh_rows(2, faces=3), torch.ones(2, 36, dtype=torch.long)
    mask[0, :18] = 0
    cache = IFlameCache(model.config)
    torch.compile(model, backend="eager")(ids[:, :27], attention_mask=mask[:, :27], cache=cache)
    logits = model(ids[:, 27:], attention_mask=mask, cache=cache).logits
    assert relative_error(logits[:1], model(ids[:1, 18:]).logits[:, 9:]) < 1e-5
    assert relative_error(logits[1:], model(ids[1:]).logits[:, 27:]) < 1e-5
