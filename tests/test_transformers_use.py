"""What users of transformers do with a causal model, done with this one."""

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_model

from iflame_hf import IFlameCache


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_on_the_right_changes_no_logit_before_it(use_cache):
    model, ids = small_model(), mesh_rows(2, faces=3)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    padded = ids.masked_fill(mask == 0, PAD)
    with torch.no_grad():
        expected = model(ids).logits
        logits = model(padded, attention_mask=mask, use_cache=use_cache).logits
    torch.testing.assert_close(logits[0], expected[0])
    torch.testing.assert_close(logits[1, :18], expected[1, :18])


def test_a_row_padded_on_the_right_is_not_continued():
    model, ids = small_model(), mesh_rows(2, faces=2)
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(ids, attention_mask=mask, max_new_tokens=1)
    cache = IFlameCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="padding_side='left'"):
        model(ids[:, :1], past_key_values=cache)
    cache.reset()
    assert model(ids[:, :1], past_key_values=cache).logits.shape[:2] == (2, 1)


def test_tokens_behind_a_filled_cache_are_neither_padding_nor_another_mesh():
    model, ids = small_model(), mesh_rows(2, faces=2)
    counting = torch.arange(27).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0

    def continued(**inputs):
        cache = IFlameCache(model.config)
        model(ids[:, :18], past_key_values=cache)
        return model(ids[:, 18:], past_key_values=cache, **inputs).logits

    with torch.no_grad():
        expected = model(ids).logits[:, 18:]
        torch.testing.assert_close(
            continued(position_ids=counting[:, 18:], attention_mask=mask.clamp(min=1)), expected
        )
    with pytest.raises(ValueError, match="cannot be padding"):
        continued(attention_mask=mask)
    with pytest.raises(ValueError, match="count on"):
        continued(position_ids=counting[:, :9])


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_a_prompt_may_end_anywhere_in_its_first_face_behind_padding_or_another_mesh(kind):
    model, alone = small_model(), mesh_rows(1, faces=2)
    before = torch.full((1, 18), PAD) if kind == "padded" else mesh_rows(1, faces=1, seed=1)
    ids = torch.cat([before, alone], dim=1)
    options = {
        "padded": {"attention_mask": (torch.arange(45) >= 18)[None].long()},
        "packed": {"position_ids": torch.cat([torch.arange(18), torch.arange(27)])[None]},
    }[kind]
    with torch.no_grad():
        expected = model(alone).logits
        for first in range(19, 28):
            cache = IFlameCache(model.config)
            model(ids[:, :first], **{name: each[:, :first] for name, each in options.items()}, past_key_values=cache)
            logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(first, 45)]
            assert relative_error(torch.cat(logits, dim=1), expected[:, first - 18 :]) < 1e-5, f"split at {first}"
