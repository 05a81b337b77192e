"""The decode engine: what it makes is what transformers' own loop makes, and what it cannot do is left to that."""

import copy
import logging
import threading

import pytest
import torch
from scipy.stats import chisquare
from small_models import BOS, EOS, PAD, ending_model, mesh_rows, small_model
from torch.nn.utils import parametrize
from transformers import (
    AttentionInterface,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from iflame_hf import decoding_iflame, engine_iflame


@pytest.fixture(scope="module")
def model():
    return ending_model(1)


@pytest.fixture
def engines(monkeypatch):
    """How often an engine decoded."""
    calls = []
    real = decoding_iflame.take_engine
    monkeypatch.setattr(decoding_iflame, "take_engine", lambda *a: calls.append(a[1:]) or real(*a))
    return calls


OPTIONS = [
    {"do_sample": False},
    {"do_sample": True, "seed": 4},
    {"do_sample": True, "seed": 4, "top_k": 9, "temperature": 0.7},
    {"do_sample": True, "seed": 4, "top_p": 0.8, "min_p": 0.02},
    {"do_sample": True, "seed": 4, "repetition_penalty": 1.4},
    {"do_sample": False, "repetition_penalty": 1.4},
]


@pytest.mark.parametrize("grammar", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_its_tokens_are_those_of_the_plain_loop(model, engines, rows, options, grammar):
    options = {**options, "mesh_grammar": grammar, "max_new_tokens": 9 * 12 + 5}
    prompt = torch.full((rows, 9), BOS)
    if not grammar:
        prompt = mesh_rows(rows, faces=2)[:, :23]
    found = model.generate(prompt, **options)
    assert len(engines) == 1
    assert torch.equal(found, model.generate(prompt, cache_implementation="dynamic", **options))
    assert len(engines) == 1 and found.shape[1] > prompt.shape[1]


def test_a_repetition_penalty_of_padded_prompts_is_left_to_the_plain_loop(model, engines):
    prompt = torch.tensor([[PAD] * 9 + [BOS] * 9, [BOS] * 9 + list(range(3, 12))])
    options = {"do_sample": False, "repetition_penalty": 1.4, "max_faces": 4}
    found = model.generate(prompt, attention_mask=(prompt != PAD).long(), **options)
    alone = model.generate(prompt[:1, 9:], **options)
    assert torch.equal(found[:1, 9 : 9 + alone.shape[1]], alone)
    assert len(engines) == 1, "the prompt without padding"


def test_greedy_tokens_are_the_plain_loops_for_a_long_time(model):
    options = {"do_sample": False, "min_faces": 150, "max_faces": 150}
    found = model.generate(**options)
    assert found.shape == (1, 9 * 152)
    assert torch.equal(found, model.generate(cache_implementation="dynamic", **options))


def test_tokens_come_as_often_as_the_plain_loop_chooses_them(model):
    """The first token of many meshes, of engine and of torch's own multinomial."""
    options = {"do_sample": True, "top_k": 12, "top_p": 0.95, "temperature": 4.0, "max_new_tokens": 9}
    draws = 3000
    found = model.generate(num_return_sequences=draws, seed=0, **options)[:, 9]
    scores = model.generate(return_dict_in_generate=True, output_scores=True, **options).scores[0]
    expected = scores[0].double().softmax(dim=-1)
    kept = expected > 0
    assert 5 < kept.sum() <= 12
    counts = torch.bincount(found, minlength=132)
    assert counts[~kept].sum() == 0
    assert chisquare(counts[kept].numpy(), (expected[kept] / expected[kept].sum() * draws).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("options", [{}, {"mesh_grammar": False}])
def test_rows_that_end_are_filled_with_padding_and_all_end_together(model, options):
    found = model.generate(do_sample=True, seed=0, num_return_sequences=12, max_new_tokens=9 * 30, **options)
    plain = model.generate(
        do_sample=True,
        seed=0,
        num_return_sequences=12,
        max_new_tokens=9 * 30,
        cache_implementation="dynamic",
        **options,
    )
    assert torch.equal(found, plain)
    assert len({int((row == PAD).sum()) for row in found}) > 3


def test_prompts_may_be_padded_on_the_left_and_end_inside_a_face(model):
    rows = [mesh_rows(1, faces=faces, seed=faces)[0] for faces in (1, 3, 2)]
    ids = torch.stack([torch.nn.functional.pad(row, (36 - len(row), 0), value=PAD) for row in rows])
    for length in (36, 32, 28):
        options = {"attention_mask": (ids != PAD).long()[:, :length], "mesh_grammar": False, "eos_token_id": None}
        found = model.generate(ids[:, :length], max_new_tokens=25, do_sample=True, seed=1, **options)
        plain = model.generate(
            ids[:, :length], max_new_tokens=25, do_sample=True, seed=1, cache_implementation="dynamic", **options
        )
        assert torch.equal(found, plain)


class Collector:
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_is_given_what_the_plain_loop_gives_it(model):
    streamers = Collector(), Collector()
    for streamer, implementation in zip(streamers, (None, "dynamic"), strict=True):
        model.generate(do_sample=True, seed=2, max_faces=9, streamer=streamer, cache_implementation=implementation)
    assert streamers[0].pieces == streamers[1].pieces and all(streamer.ended for streamer in streamers)


def test_time_that_is_up_ends_it_after_a_whole_face(model):
    ids = model.generate(do_sample=True, seed=0, min_faces=700, max_faces=700, max_time=0.3)
    assert 18 <= ids.shape[1] < 9 * 700


def test_a_criterion_that_looks_once_a_face_is_shown_the_ids_so_far(model):
    class UpTo(StoppingCriteria):
        looks_once_a_face = True
        shown = []

        def __call__(self, input_ids, scores, **kwargs):
            self.shown.append(input_ids.clone())
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9 * 5)

    options = {"do_sample": True, "seed": 0, "num_return_sequences": 2, "min_faces": 9, "max_faces": 9}
    ids = model.generate(stopping_criteria=[UpTo()], **options)
    whole = model.generate(**options)
    assert [shown.shape for shown in UpTo.shown] == [(2, 9 * faces) for faces in range(1, 6)]
    assert all(torch.equal(shown, whole[:, : shown.shape[1]]) for shown in UpTo.shown)
    assert torch.equal(ids, whole[:, : ids.shape[1]]) and ids.shape[1] == 9 * 5 + 1


def test_keys_and_values_in_int8_are_of_gpus_and_of_static_caches(model, tmp_path):
    options = {"do_sample": True, "seed": 0, "max_faces": 6, "num_return_sequences": 2}
    expected = model.generate(**options)
    assert torch.equal(model.generate(kv_cache_dtype="int8", **options), expected), "a CPU keeps them in float32"
    found = model.generate(kv_cache_dtype="int8", cache_implementation="static", **options)
    assert found.shape[0] == 2 and torch.equal(found[:, :20], expected[:, :20])
    for wrong in ("fp8", 8, torch.int8):
        with pytest.raises(ValueError, match="kv_cache_dtype must be"):
            model.generate(kv_cache_dtype=wrong, **options)
    copied = copy.deepcopy(model)
    copied.generation_config.kv_cache_dtype = "int8"
    copied.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).generation_config.kv_cache_dtype == "int8"


def test_weights_are_those_of_the_call(engines):
    model = small_model()
    options = {"do_sample": True, "seed": 0, "max_faces": 4, "min_faces": 4}
    before = model.generate(**options)
    model.lm_head.weight.data.mul_(-1)
    after = model.generate(**options)
    assert not torch.equal(before, after)
    assert torch.equal(after, model.generate(cache_implementation="dynamic", **options))
    assert len(engines) == 2 and len(engine_iflame._idle[model]) == 1, "the second call took the first one's engine"


def test_generations_in_threads_do_not_meet(model):
    expected = [model.generate(do_sample=True, seed=seed, max_faces=8) for seed in range(4)]
    found = [None] * 4

    def work(seed):
        found[seed] = model.generate(do_sample=True, seed=seed, max_faces=8)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_a_model_with_an_engine_is_copied_and_saved_without_it(model, tmp_path):
    model.generate(do_sample=True, seed=0, max_faces=2)
    assert torch.equal(
        copy.deepcopy(model).generate(do_sample=True, seed=0, max_faces=3),
        model.generate(do_sample=True, seed=0, max_faces=3),
    )
    model.save_pretrained(tmp_path)


class Same(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class EndsElsewhere(EosTokenCriteria):
    """A user's own, of which nobody knows what it does."""


def with_own_attention(model):
    AttentionInterface.register("of_a_user", ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "of_a_user"
    return model


def with_adapter(model):
    parametrize.register_parametrization(model.lm_head, "weight", torch.nn.Identity())
    return model


@pytest.mark.parametrize(
    ("change", "options", "named"),
    [
        (None, {"logits_processor": LogitsProcessorList([Same()])}, "processor Same"),
        (None, {"use_cache": False}, "use_cache=False"),
        (None, {"return_dict_in_generate": True}, "return_dict_in_generate"),
        (None, {"no_repeat_ngram_size": 4}, "NoRepeatNGramLogitsProcessor"),
        (None, {"prefill_chunk_size": 4}, "prefill_chunk_size"),
        (None, {"stopping_criteria": StoppingCriteriaList([EndsElsewhere(EOS)])}, "criterion EndsElsewhere"),
        (with_own_attention, {}, "attn_implementation='of_a_user'"),
        (with_adapter, {}, "parametrisation of lm_head"),
        (lambda model: model.register_forward_hook(lambda *a: None) and model, {}, "hook of the model"),
    ],
)
def test_what_it_does_not_do_is_done_by_the_plain_loop_and_named(engines, caplog, change, options, named):
    model = small_model()
    if change:
        model = change(model)
    logger = logging.getLogger("transformers")
    with caplog.at_level(logging.INFO, logger="iflame_hf.generation_iflame"):
        logger.addHandler(caplog.handler)
        model.generate(do_sample=True, seed=0, max_new_tokens=18, **options)
    assert not engines
    told = [record.getMessage() for record in caplog.records if "decode engine" in record.getMessage()]
    assert len(told) == 1 and named in told[0]


def test_weights_that_are_no_numbers_are_an_error():
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        model.generate(do_sample=True, max_new_tokens=20)
    model.lm_head.bias.data.zero_()
    assert model.generate(do_sample=True, max_new_tokens=20).shape[1] > 9
