"""generate(): the start face, every mode transformers offers, prompts of all kinds, and what a step costs."""

import copy

import pytest
import torch
from small_models import BOS, EOS, PAD, mesh_rows, relative_error, small_model, switch_checkpointing
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from iflame_hf import IFlameCache, IFlameForCausalLM


@pytest.fixture(scope="module", params=[{}, {"heads": 6, "hidden_size": 48}], ids=["4 heads", "6 heads"])
def model(request):
    return small_model(**request.param)


def greedy(model, ids, count):
    """The argmax of a full forward pass, token by token, without a cache."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids


def generate(model, *args, **options):
    """What transformers does with any ids: they need not be a mesh."""
    return model.generate(*args, **{"do_sample": False, "eos_token_id": None, "mesh_grammar": False, **options})


@pytest.mark.parametrize("length", [9, 18, 20, 22, 31])
def test_greedy_tokens_are_the_argmax_of_full_passes_for_prompts_that_end_anywhere(model, length):
    prompt = mesh_rows(3, faces=3)[:, :length]
    ids = generate(model, prompt, max_new_tokens=40)
    assert torch.equal(ids, greedy(model, prompt, 40))
    assert len(set(ids[0, length:].tolist())) > 3, "a model that repeats one token shows nothing"
    assert torch.equal(ids, generate(model, prompt, max_new_tokens=40, use_cache=False))


def test_without_a_prompt_it_starts_from_nine_bos(model):
    ids = generate(model, max_new_tokens=30)
    assert ids.shape == (1, 39) and (ids[:, :9] == BOS).all()
    assert torch.equal(ids, greedy(model, torch.full((1, 9), BOS), 30))
    assert torch.equal(ids, generate(model, torch.full((1, 9), BOS), max_new_tokens=30))
    assert generate(model, max_length=30).shape == (1, 30)
    three = model.generate(
        do_sample=True, num_return_sequences=3, max_new_tokens=20, eos_token_id=None, mesh_grammar=False
    )
    assert three.shape == (3, 29) and (three[:, :9] == BOS).all() and not torch.equal(three[0], three[1])


def test_a_prompt_of_one_token_is_left_as_it_is(model):
    for one in ({"inputs": torch.tensor([[BOS]])}, {"input_ids": torch.tensor([[BOS]])}):
        assert torch.equal(generate(model, max_new_tokens=5, **one), greedy(model, torch.tensor([[BOS]]), 5))


@pytest.mark.parametrize(("longest", "expected"), [(90000, 7218), (54, 54)])
def test_the_default_length_is_a_mesh_of_800_faces_or_all_that_the_model_takes(longest, expected):
    model = small_model(max_position_embeddings=longest)
    assert model.generation_config.max_length == expected
    if longest == 54:
        assert generate(model).shape == (1, 54)
        assert generate(model, mesh_rows(2, faces=2)).shape == (2, 54)


def test_a_number_of_new_tokens_needs_no_other_option_and_no_warning(model, recwarn, caplog):
    assert model.generate(max_new_tokens=20, do_sample=True, eos_token_id=None, mesh_grammar=False).shape == (1, 29)
    assert model.generate(
        mesh_rows(1, faces=1), max_new_tokens=3, do_sample=False, eos_token_id=None, mesh_grammar=False
    ).shape == (1, 21)
    assert not [str(warning.message) for warning in recwarn]
    assert not [record.getMessage() for record in caplog.records if record.levelname != "INFO"]


def test_generation_settings_are_saved_and_loaded(tmp_path):
    model = small_model()
    model.generation_config.max_length = 40
    model.generation_config.do_sample = True
    model.generation_config.top_k = 5
    model.save_pretrained(tmp_path)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path)
    assert (loaded.generation_config.max_length, loaded.generation_config.top_k) == (40, 5)
    ids = [(torch.manual_seed(0), each.generate(eos_token_id=None, mesh_grammar=False))[1] for each in (model, loaded)]
    assert ids[0].shape == (1, 40) and torch.equal(*ids)
    assert [loaded.generation_config.pad_token_id, loaded.generation_config.bos_token_id] == [PAD, BOS]
    assert loaded.generation_config.eos_token_id == EOS


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}, {"min_p": 0.05}])
def test_sampling_with_a_seed_is_reproducible_and_does_not_depend_on_the_cache(model, options):
    def sample(seed, use_cache=True):
        torch.manual_seed(seed)
        prompt = mesh_rows(2, faces=1)
        return generate(model, prompt, do_sample=True, max_new_tokens=40, use_cache=use_cache, **options)

    first = sample(0)
    assert torch.equal(first, sample(0))
    assert torch.equal(first, sample(0, use_cache=False))
    assert not torch.equal(first, sample(1))


def test_sampled_tokens_are_among_the_likeliest_that_were_asked_for(model):
    torch.manual_seed(0)
    prompt = mesh_rows(4, faces=2)
    ids = generate(model, prompt, do_sample=True, top_k=3, max_new_tokens=30)
    with torch.no_grad():
        best = model(ids).logits.topk(3, dim=-1).indices[:, 26:-1]
    assert (best == ids[:, 27:, None]).any(dim=-1).all()
    assert (best[..., 0] != ids[:, 27:]).any()


@pytest.mark.parametrize("length", [18, 21, 25])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beams_with_the_cache_are_the_beams_without(model, num_beams, length):
    options = {"num_beams": num_beams, "max_new_tokens": 24, "return_dict_in_generate": True, "output_scores": True}
    prompt = mesh_rows(3, faces=2)[:, :length]
    options["num_return_sequences"] = 2
    with_cache, without = (generate(model, prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores, atol=1e-4, rtol=1e-4)
    assert not torch.equal(with_cache.sequences[::2], generate(model, prompt, max_new_tokens=24))
    # the rows of the cache were exchanged on the way
    assert (with_cache.beam_indices[:, 1:] != with_cache.beam_indices[:, :-1]).any()


def test_beams_may_be_sampled_and_padded_on_the_left(model):
    ids = F.pad(mesh_rows(1, faces=1), (9, 0), value=PAD)
    mask = (torch.arange(27) >= 9).long()[None]
    beams = [
        (torch.manual_seed(0), generate(model, ids, attention_mask=mask, num_beams=3, max_new_tokens=20, **options))[1]
        for options in ({}, {"use_cache": False}, {"do_sample": True}, {"do_sample": True, "use_cache": False})
    ]
    assert torch.equal(beams[0], beams[1]) and torch.equal(beams[2], beams[3])
    alone = generate(model, ids[:, 9:], num_beams=3, max_new_tokens=20)
    assert torch.equal(beams[0][:, 9:], alone)


def test_several_sequences_of_one_prompt_go_on_from_it(model):
    torch.manual_seed(0)
    prompt = mesh_rows(2, faces=2)[:, :23]
    ids = generate(model, prompt, do_sample=True, num_return_sequences=3, max_new_tokens=10)
    assert torch.equal(ids[:, :23], prompt.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in ids.tolist()}) == 6
    scores = generate(
        model,
        prompt,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=10,
        top_k=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    with torch.no_grad():
        expected = model(scores.sequences).logits[:, 22:-1]
    assert relative_error(torch.stack(scores.logits, dim=1), expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"use_cache": False}])
def test_a_batch_padded_on_the_left_gives_what_each_row_gives_alone(model, options):
    lengths = [45, 27, 18 + 9 + 9, 9]
    rows = mesh_rows(4, faces=4)
    alone = [generate(model, row[None, :length], max_new_tokens=30) for row, length in zip(rows, lengths, strict=True)]
    for fill in (PAD, 5):
        ids = torch.full((4, 45), fill)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, 45 - length :] = rows[row, :length]
            mask[row, 45 - length :] = 1
        together = generate(model, ids, attention_mask=mask, max_new_tokens=30, **options)
        for row, length in enumerate(lengths):
            assert torch.equal(together[row, 45 - length :], alone[row][0])


def test_a_prompt_inside_a_face_may_stand_after_padding(model):
    for length in (4, 9, 11, 22):
        row = mesh_rows(1, faces=3)[:, :length]
        ids, mask = F.pad(row, (18, 0), value=PAD), F.pad(torch.ones_like(row), (18, 0))
        together = generate(model, ids, attention_mask=mask, max_new_tokens=20)
        assert torch.equal(together[:, 18:], generate(model, row, max_new_tokens=20))
        # without a mask, transformers finds the padding by its id
        assert torch.equal(generate(model, ids, max_new_tokens=20), together)


def test_prompts_that_are_not_padded_by_whole_faces_or_on_the_right_are_refused(model):
    row = mesh_rows(1, faces=2)
    with pytest.raises(ValueError, match="by whole faces"):
        generate(model, F.pad(row, (5, 0), value=PAD), max_new_tokens=2)
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="padding_side='left'"):
            generate(model, F.pad(row, (0, 9), value=PAD), max_new_tokens=1, use_cache=use_cache)


class Only(LogitsProcessor):
    """Allows one token, another at each step."""

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, input_ids.shape[1] % 7] = 0
        return forced


class StopAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("do_sample", [False, True])
def test_processors_and_criteria_of_the_caller_are_honoured(model, do_sample):
    ids = generate(
        model,
        do_sample=do_sample,
        max_new_tokens=50,
        logits_processor=LogitsProcessorList([Only()]),
        stopping_criteria=StoppingCriteriaList([StopAt(31)]),
    )
    assert ids[0].tolist() == [BOS] * 9 + [length % 7 for length in range(9, 31)]


@pytest.mark.parametrize("do_sample", [False, True])
def test_each_row_stops_at_its_end_token_and_is_filled_with_padding(model, do_sample):
    class End(LogitsProcessor):
        """The end token for row i at length 20 + 5 i, and never before."""

        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, PAD:] = float("-inf")
            for row in range(input_ids.shape[0]):
                if input_ids.shape[1] == 20 + 5 * row:
                    scores[row, EOS] = 1e9
            return scores

    ids = generate(
        model,
        mesh_rows(3, faces=1),
        do_sample=do_sample,
        logits_processor=LogitsProcessorList([End()]),
        eos_token_id=EOS,
    )
    assert ids.shape == (3, 31)
    for row in range(3):
        assert (ids[row, 18 : 20 + 5 * row] < PAD).all()
        assert ids[row, 20 + 5 * row :].tolist() == [EOS] + [PAD] * (10 - 5 * row)


def test_scores_logits_states_and_cache_are_returned_when_asked_for(model):
    prompt = mesh_rows(2, faces=2)[:, :20]
    model.set_attn_implementation("eager")
    output = generate(
        model,
        prompt,
        max_new_tokens=9,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    with torch.no_grad():
        expected = model(output.sequences).logits[:, 19:-1]
    assert relative_error(torch.stack(output.logits, dim=1), expected) < 1e-5
    assert relative_error(torch.stack(output.scores, dim=1), expected) < 1e-5
    assert output.past_key_values.get_seq_length() == 28
    assert len(output.hidden_states) == len(output.attentions) == 9
    # tokens 20 (closes a vertex), 21 and 22 after the prompt: blocks of coordinates; of these and of vertices; …
    assert [len(states) for states in output.hidden_states] == [7, 5, 3, 3, 5, 3, 3, 7, 3]
    assert [states[-1].shape[1] for states in output.hidden_states] == [20] + [1] * 8
    model.set_attn_implementation("sdpa")


class Collector:
    """Streams as transformers' TextStreamer does: put() for the prompt and for each step, then end()."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        assert not self.ended
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("prompt", [None, mesh_rows(1, faces=1)[:, :14]], ids=["no prompt", "prompt"])
def test_a_streamer_is_given_the_prompt_and_then_each_token(model, prompt):
    streamer = Collector()
    ids = generate(model, prompt, streamer=streamer, max_new_tokens=12)
    length = 9 if prompt is None else 14
    assert streamer.pieces[0] == ids[0, :length].tolist() and streamer.ended
    assert streamer.pieces[1:] == [[token] for token in ids[0, length:].tolist()]


def test_going_on_from_a_returned_cache_equals_one_longer_run(model):
    prompt = mesh_rows(2, faces=1)
    expected = generate(model, prompt, max_new_tokens=37)
    for first in (1, 8, 9, 13):
        begun = generate(model, prompt, max_new_tokens=first, return_dict_in_generate=True)
        cache = begun.past_key_values
        assert cache.get_seq_length() == 18 + first - 1
        seen = count_tokens(model)
        ended = generate(model, begun.sequences, past_key_values=cache, max_new_tokens=37 - first)
        assert torch.equal(ended, expected)
        assert cache.get_seq_length() == 18 + 36
        assert seen.stop()["coordinates"] == [1] * (37 - first), "the prefix was computed again"


def test_going_on_with_more_tokens_than_one(model):
    prompt = mesh_rows(2, faces=3)
    cache = IFlameCache(model.config)
    with torch.no_grad():
        model(prompt[:, :13], past_key_values=cache)
    assert torch.equal(generate(model, prompt, past_key_values=cache, max_new_tokens=20), greedy(model, prompt, 20))


def test_a_row_that_has_ended_may_go_on_with_its_batch(model):
    prompt = mesh_rows(2, faces=1)
    expected = generate(model, prompt, max_new_tokens=30)
    begun = generate(model, prompt, max_new_tokens=12, return_dict_in_generate=True)
    ids = begun.sequences.clone()
    ids[1, -3:] = PAD
    ended = generate(model, ids, past_key_values=begun.past_key_values, max_new_tokens=18)
    assert torch.equal(ended[0], expected[0])


def test_rows_padded_on_the_left_go_on_from_their_cache_also_without_their_mask(model):
    ids = F.pad(mesh_rows(2, faces=2), (9, 0), value=PAD)
    mask = (torch.arange(36).expand(2, -1) >= 9).long()
    expected = generate(model, ids, attention_mask=mask, max_new_tokens=30)
    begun = generate(model, ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True)
    ended = generate(model, begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=18)
    assert torch.equal(ended, expected)


@pytest.mark.parametrize("chunk", [1, 7, 9, 100])
def test_a_prompt_may_be_prefilled_in_chunks(model, chunk):
    prompt = mesh_rows(2, faces=3)[:, :32]
    assert torch.equal(generate(model, prompt, prefill_chunk_size=chunk, max_new_tokens=12), greedy(model, prompt, 12))


@pytest.mark.parametrize("chunk", [1, 4, 9, 10, 18, 100])
@pytest.mark.parametrize("pads", [(18, 0), (0, 27), (27, 27), (9, 18)])
def test_a_chunk_of_the_prefill_may_end_inside_the_padding(model, chunk, pads):
    rows = [mesh_rows(1, faces=5, seed=seed)[0, : 49 - pad] for seed, pad in enumerate(pads)]
    alone = [greedy(model, row[None], 20)[0, len(row) :] for row in rows]
    ids = torch.stack([F.pad(row, (pad, 0), value=PAD) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([torch.arange(49) >= pad for pad in pads]).long()
    together = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk, max_new_tokens=20)
    for row, expected in zip(together[:, 49:], alone, strict=True):
        assert torch.equal(row, expected)


def test_embeddings_may_be_the_prompt(model):
    prompt = mesh_rows(2, faces=2)[:, :25]
    embeddings = model.get_input_embeddings()(prompt)
    expected = generate(model, prompt, max_new_tokens=20)
    assert torch.equal(generate(model, inputs_embeds=embeddings, max_new_tokens=20), expected[:, 25:])
    assert torch.equal(generate(model, prompt, inputs_embeds=embeddings, max_new_tokens=20), expected)


@pytest.mark.parametrize("speculation", ["assistant", "prompt lookup"])
def test_speculative_decoding_is_refused_because_states_do_not_roll_back(model, speculation):
    options = {
        "assistant": {"assistant_model": copy.deepcopy(model)},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }
    with pytest.raises(ValueError, match="assisted generation .* cannot be rolled back"):
        generate(model, mesh_rows(1, faces=1), max_new_tokens=4, **options[speculation])
    assert model._is_stateful


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static", "quantized", "sliding_window"])
def test_other_kinds_of_cache_are_refused_by_name(model, name):
    with pytest.raises(ValueError, match=f"cache_implementation='{name}' is not available"):
        generate(model, cache_implementation=name, max_new_tokens=3)
    with pytest.raises(ValueError, match=f"cache_implementation='{name}' is not available"):
        generate(
            model, generation_config=GenerationConfig(cache_implementation=name, max_new_tokens=3, bos_token_id=BOS)
        )
    assert torch.equal(
        generate(model, cache_implementation="dynamic", max_new_tokens=3), generate(model, max_new_tokens=3)
    )


def test_a_training_model_generates_as_in_evaluation(model):
    expected = generate(model, max_new_tokens=12)
    model.train()
    assert torch.equal(generate(model, max_new_tokens=12), expected)
    switch_checkpointing(model)
    assert torch.equal(generate(model, max_new_tokens=12), expected)
    switch_checkpointing(model, on=False)
    model.eval()


class count_tokens:
    """Items given to each block, by level and call, until stop()."""

    NAMES = ("coordinates", "vertices", "faces")

    def __init__(self, model):
        self.calls = [[] for _ in model.model.layers]
        self.levels = model.config.layer_levels()
        self.hooks = [
            layer.register_forward_pre_hook(lambda _, inputs, calls=calls: calls.append(inputs[0].shape[1]))
            for layer, calls in zip(model.model.layers, self.calls, strict=True)
        ]

    def stop(self):
        for hook in self.hooks:
            hook.remove()
        by_level = {}
        for level, calls in zip(self.levels, self.calls, strict=True):
            assert by_level.setdefault(self.NAMES[level], calls) == calls, "blocks of a level are called alike"
        return by_level


@pytest.mark.parametrize("length", [9, 36, 31])
def test_a_prefill_is_one_call_of_each_block_and_a_step_one_item_where_one_is_complete(model, length):
    prompt = mesh_rows(2, faces=3)[:, :length]
    seen = count_tokens(model)
    generate(model, prompt, max_new_tokens=28)
    calls = seen.stop()
    end = length + 27
    assert calls["coordinates"] == [length] + [1] * 27
    assert calls["vertices"] == [length // 3] + [1] * (end // 3 - length // 3)
    assert calls["faces"] == [length // 9] + [1] * (end // 9 - length // 9)


def test_generate_compiles_nothing_by_itself(model):
    generate(model, max_new_tokens=12)
    assert not hasattr(model, "_compiled_call")
    assert model._supports_default_dynamic_cache() is False
