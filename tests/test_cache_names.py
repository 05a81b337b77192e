"""The state goes by two names: `cache`, and `past_key_values` as transformers called it before 5.24."""

import logging
import warnings

import pytest
import torch
from small_models import mesh_rows, small_model

from iflame_hf import IFlameCache

NAMES = ("cache", "past_key_values")


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_the_state_by_either_name(model, name):
    ids = mesh_rows(2, faces=3)
    with torch.no_grad():
        expected = model(ids).logits
        for network in (model, model.model):
            state = IFlameCache(model.config)
            network(ids[:, :20], **{name: state})
            network(ids[:, 20:30], **{name: state})
            assert state.get_seq_length() == 30
        state = IFlameCache(model.config)
        model(ids[:, :20], **{name: state})
        torch.testing.assert_close(model(ids[:, 20:], **{name: state}).logits, expected[:, 20:])


def test_both_names_at_once_are_refused(model):
    ids, state = mesh_rows(1, faces=1), IFlameCache(model.config)
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="give either cache or past_key_values"):
            call(ids, cache=state, past_key_values=state)


def test_outputs_answer_to_both_names(model):
    ids = mesh_rows(1, faces=1)
    for network in (model, model.model):
        output = network(ids, use_cache=True)
        assert isinstance(output.cache, IFlameCache)
        assert output.past_key_values is output.cache is output["cache"] is output["past_key_values"]
        assert [key for key, value in output.items() if value is output.cache] in (["cache"], ["past_key_values"])
        assert network(ids, use_cache=False).cache is None
        assert network(ids, use_cache=False).past_key_values is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "samples"])
def test_generate_goes_on_from_a_state_of_either_name(model, name, options):
    ids = mesh_rows(1, faces=3)[:, :31]

    def generated(**more):
        torch.manual_seed(0)
        return model.generate(
            ids,
            **{
                "do_sample": False,
                "eos_token_id": None,
                "max_new_tokens": 12,
                "mesh_grammar": False,
                **options,
                **more,
            },
        )

    state = IFlameCache(model.config)
    with torch.no_grad():
        model(ids[:, :20].repeat(options.get("num_beams", 1), 1), cache=state)
    assert torch.equal(generated(**{name: state}), generated())
    assert state.get_seq_length() == 31 + 12 - 1


def test_nothing_deprecated_is_said_on_the_way_of_a_user(model, caplog, tmp_path):
    ids = mesh_rows(2, faces=3)
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            warnings.simplefilter("error", DeprecationWarning)
            with torch.no_grad():
                output = model(ids[:, :20], use_cache=True)
                model(ids[:, 20:], past_key_values=output.past_key_values)
            model.generate(ids, max_new_tokens=9, do_sample=True, mesh_grammar=False)
            options = {"num_beams": 2, "do_sample": False, "prefill_chunk_size": 7, "mesh_grammar": False}
            model.generate(ids, max_new_tokens=9, **options)
            model.generate(max_new_tokens=9, return_dict_in_generate=True)
            model.save_pretrained(tmp_path)
            type(model).from_pretrained(tmp_path)
    finally:
        library.removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "deprecat" in record.getMessage().lower()]
