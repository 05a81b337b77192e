"""torch.compile around a whole model that generates; generate() compiles nothing by itself."""

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_model


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_a_compiled_model_goes_on_from_padded_rows_as_the_other_one_does():
    model, ids = small_model(stage_layers=(1, 0, 2, 0, 1)), mesh_rows(2, faces=2)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[:, -1]
        for last in (compiled, model):
            first = compiled(ids[:, :-1], attention_mask=mask[:, :-1])
            continued = last(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
            assert relative_error(continued.logits[:, -1], expected) < 1e-5


def test_generate_of_a_compiled_model_gives_the_tokens_of_the_other_one():
    model, ids = small_model(), mesh_rows(2, faces=2)
    options = {"max_new_tokens": 20, "do_sample": False, "mesh_grammar": False}
    expected = model.generate(ids, **options)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled.generate(ids, **options), expected)
