"""
transformers' own tests of every model, run on this one.

The mixins are part of transformers' source code, not of the installed package, and are skipped without it. With a
checkout of the same version as the installed transformers:

    git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers ../transformers
    pip install parameterized httpx
    TRANSFORMERS_TESTS=../transformers python -m pytest tests/common

A release's source package will do where there is no checkout. It lacks the tests of generate() and of export:

    pip download --no-deps --no-binary transformers transformers==5.24.0 && tar xzf transformers-5.24.0.tar.gz
    TRANSFORMERS_TESTS=transformers-5.24.0 python -m pytest tests/common

RUN_SLOW=1 adds their slow tests. A test is overridden below where its expectation holds for models with one length and
one kind of attention only; the override expects what the architecture promises instead.
"""

import os
import tempfile
import unittest
from unittest import mock

import pytest
import torch

from iflame_hf import IFlameCache, IFlameConfig, IFlameForCausalLM, IFlameModel, generation_iflame
from iflame_hf.format_iflame import known_format

if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS does not name a checkout of transformers", allow_module_level=True)

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor
from transformers.models.auto import modeling_auto

from tests import test_modeling_common

LEVEL_STRIDES, TOKENS_PER_FACE = known_format().level_strides, known_format().tokens_per_face


class IFlameModelTester:
    """The smallest hourglass with both kinds of attention at every level, and rows of two faces."""

    is_training = True
    coordinate_resolution = 64
    # The tests take 15 rows of the embedding away, which must not be those of the special tokens.
    vocab_size = 99
    batch_size = 4
    seq_length = 2 * TOKENS_PER_FACE
    hidden_size = 32
    num_attention_heads = 2
    intermediate_size = 40
    stage_layers = (1, 1, 2, 1, 1)
    num_hidden_layers = sum(stage_layers)

    def get_config(self):
        return IFlameConfig(
            coordinate_resolution=self.coordinate_resolution,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            stage_layers=self.stage_layers,
            full_attention_interval=2,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.coordinate_resolution + 1)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def shapes_of_a_call(config, batch_size, seen, given):
    """Shapes of the hidden states and of the attention weights where `given` tokens follow `seen` in a cache."""
    hidden_states, attentions = [(batch_size, given, config.hidden_size)], []
    for kind, level in zip(config.layer_types, config.layer_levels(), strict=True):
        before, after = seen // LEVEL_STRIDES[level], (seen + given) // LEVEL_STRIDES[level]
        if after > before:
            hidden_states.append((batch_size, after - before, config.hidden_size))
            if kind == "full_attention":
                attentions.append((batch_size, config.num_attention_heads, after - before, after))
    return hidden_states, attentions


def calls_of_generate(prompt_length, step, use_cache):
    """How many tokens lie in the cache, and how many are given to the model, in a step of generate()."""
    return (prompt_length + step - 1, 1) if use_cache and step > 0 else (0, prompt_length + step)


def padded_by_whole_faces(mask):
    """(B, T) mask with its zeros on the left rounded up to whole faces."""
    padding = -(-mask.argmax(dim=1, keepdim=True) // TOKENS_PER_FACE) * TOKENS_PER_FACE
    return mask * (torch.arange(mask.shape[1]) >= padding)


@pytest.fixture(autouse=True)
def any_ids_are_a_prompt(monkeypatch):
    """transformers draws prompts at random, which no mesh begins with."""
    monkeypatch.setitem(generation_iflame.OWN_SETTINGS, "mesh_grammar", False)


of_generation = unittest.skipUnless(
    hasattr(GenerationTesterMixin, "test_greedy_generate"), "TRANSFORMERS_TESTS has no tests of generate()"
)


class IFlameModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (IFlameModel, IFlameForCausalLM)

    def setUp(self):
        self.model_tester = IFlameModelTester()
        self.config_tester = ConfigTester(
            self, config_class=IFlameConfig, hidden_size=32, num_attention_heads=2, stage_layers=[1, 1, 2, 1, 1]
        )
        # The models of transformers stand in these tables, by which the tests tell heads from base models.
        for table, name in (
            (modeling_auto.MODEL_MAPPING_NAMES, "IFlameModel"),
            (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "IFlameForCausalLM"),
        ):
            patch = mock.patch.dict(table, {"iflame": name})
            patch.start()
            self.addCleanup(patch.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        # Padding on the left must be of whole faces; the tests pad by two tokens.
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if inputs.get("attention_mask") is not None:
            inputs["attention_mask"] = padded_by_whole_faces(inputs["attention_mask"])
        return inputs

    def test_num_layers_is_small(self):
        # Not two, but the least with both kinds of attention at each of three levels.
        self.assertEqual(self.model_tester.num_hidden_layers, 6)

    def test_attention_outputs(self):
        # Linear attention has no weights, and the first block with full attention sees vertices.
        self.model_tester.num_hidden_layers = 3
        self.model_tester.encoder_seq_length = self.model_tester.seq_length // 3
        super().test_attention_outputs()

    def test_can_init_all_missing_weights(self):
        # Run for models whose files have a recent copyright line; ours have none.
        with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
            file.write("# Copyright 2025\n")
            file.flush()
            with mock.patch.object(test_modeling_common.inspect, "getfile", return_value=file.name):
                super().test_can_init_all_missing_weights()

    @of_generation
    def test_left_padding_compatibility(self):
        # By three faces instead of 32 tokens.
        config, inputs = self.prepare_config_and_inputs_for_generate()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        padding = torch.full((ids.shape[0], 3 * TOKENS_PER_FACE), config.pad_token_id)
        padded = {
            "input_ids": torch.cat([padding, ids], dim=1),
            "attention_mask": torch.cat([torch.zeros_like(padding), mask], dim=1),
        }
        super().test_left_padding_compatibility(unpadded_custom_inputs=inputs, padded_custom_inputs=padded)

    @of_generation
    def test_recurrent_layers_mask_padding_on_continued_forward(self):
        # Padding between tokens would move the bounds of faces and is refused; padding before them must not return
        # with the tokens after a cache.
        with self.assertRaisesRegex(ValueError, "zeros between ones"):
            super().test_recurrent_layers_mask_padding_on_continued_forward()
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        mask[1:, :TOKENS_PER_FACE] = 0
        model = IFlameForCausalLM(config).eval()
        for first in range(TOKENS_PER_FACE + 1, ids.shape[1]):
            cache = IFlameCache(config)
            with torch.no_grad():
                single = model(ids, attention_mask=mask).logits
                model(ids[:, :first], attention_mask=mask[:, :first], past_key_values=cache)
                continued = model(ids[:, first:], attention_mask=mask, past_key_values=cache).logits
            torch.testing.assert_close(continued, single[:, first:], rtol=1e-4, atol=1e-5)

    def attention_mask_padding_matches_padding_free_with_position_ids(self, attn_implementation, fa_kwargs=False):
        # The test is for models that say that they work with every attention backend, keep no state, and are given
        # padded rows by their tester.
        def padded_inputs():
            config, inputs = IFlameModelTester.prepare_config_and_inputs_for_common(self.model_tester)
            inputs["attention_mask"][1:, :TOKENS_PER_FACE] = 0
            return config, inputs

        flags = {"_supports_attention_backend": True, "_is_stateful": False}
        with (
            mock.patch.object(self.model_tester, "prepare_config_and_inputs_for_common", padded_inputs),
            mock.patch.multiple(IFlameForCausalLM, **flags),
        ):
            super().attention_mask_padding_matches_padding_free_with_position_ids(attn_implementation, fa_kwargs)

    def _check_outputs_close(self, actual, expected, *args, **kwargs):
        # An exported graph always says where padding ends and meshes begin, and may keep other spare room.
        outputs = []
        for each in (actual, expected):
            places = {k: v for k, v in each.items() if k.endswith(".padding")}
            self.assertFalse(any(place.any() for place in places.values() if place is not None))
            outputs.append({k: v for k, v in each.items() if k not in places and "_buffers" not in k})
        super()._check_outputs_close(*outputs, *args, **kwargs)

    def _check_hidden_states_for_generate(
        self, batch_size, hidden_states, prompt_length, output_length, config, use_cache=False
    ):
        # Each block has the length of its level, and runs where a step completes an item of it.
        self.assertEqual(len(hidden_states), output_length - prompt_length)
        for step, of_step in enumerate(hidden_states):
            seen, given = calls_of_generate(prompt_length, step, use_cache)
            expected, _ = shapes_of_a_call(config, batch_size, seen, given)
            self.assertEqual([tuple(each.shape) for each in of_step], expected)

    def _check_attentions_for_generate(
        self, batch_size, attentions, prompt_length, output_length, config, decoder_past_key_values
    ):
        self.assertEqual(len(attentions), output_length - prompt_length)
        for step, of_step in enumerate(attentions):
            seen, given = calls_of_generate(prompt_length, step, decoder_past_key_values is not None)
            _, expected = shapes_of_a_call(config, batch_size, seen, given)
            self.assertEqual([tuple(each.shape) for each in of_step], expected)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        # Keys and values have the length of their level, and the hourglass has open ends.
        self.assertIsInstance(past_key_values, IFlameCache)
        self.assertEqual(past_key_values.get_seq_length(), seq_length)
        heads, size = config.num_attention_heads, config.head_dim
        kinds = zip(past_key_values.layers, config.layer_types, config.layer_levels(), strict=True)
        for layer, kind, level in kinds:
            if kind == "full_attention":
                shape = (batch_size, heads, seq_length // LEVEL_STRIDES[level], size)
                self.assertEqual((layer.keys.shape, layer.values.shape), (shape, shape))
            else:
                self.assertEqual(layer.state.shape, (batch_size, heads, size, size))
        for stride, group in zip(LEVEL_STRIDES, past_key_values.open_groups, strict=False):
            self.assertEqual(group.waiting.shape, (batch_size, seq_length // stride % 3, config.hidden_size))

    def _check_caches_are_equal(self, cache1, cache2):
        self.assertEqual(cache1.get_seq_length(), cache2.get_seq_length())
        for one, other in zip(cache1.layers, cache2.layers, strict=True):
            self.assertIs(type(one), type(other))
            for name in ("keys", "values") if hasattr(one, "keys") else ("state",):
                torch.testing.assert_close(getattr(one, name), getattr(other, name))
        for one, other in zip(cache1.open_groups, cache2.open_groups, strict=True):
            torch.testing.assert_close((one.waiting, one.handed_up), (other.waiting, other.handed_up))
