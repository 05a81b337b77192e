"""The configuration: the published sizes, what follows from sizes, refusals, and files."""

import copy
import json
import pickle

import pytest
import torch
from small_models import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from iflame_hf import IFlameConfig, IFlameForCausalLM


def test_the_default_is_the_published_model_of_75_732_598_parameters():
    with torch.device("meta"):
        model = IFlameForCausalLM(IFlameConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 75_732_598
    assert len(list(model.buffers())) == 0


def test_the_default_sizes_are_those_of_the_published_model():
    config = IFlameConfig()
    assert (config.vocab_size, config.hidden_size, config.num_attention_heads) == (132, 512, 16)
    assert (config.head_dim, config.intermediate_size, config.num_hidden_layers) == (32, 1365, 24)
    assert config.stage_layers == [4, 4, 8, 4, 4]
    assert (config.coordinate_resolution, config.rope_base, config.rms_norm_eps) == (128, 1024.0, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (129, 130, 131)
    assert config.max_position_embeddings >= 9 * 4002
    assert config.tie_word_embeddings is False


def test_every_fourth_layer_of_the_whole_stack_has_full_attention():
    three_and_one = ["linear_attention"] * 3 + ["full_attention"]
    assert IFlameConfig().layer_types == three_and_one * 6
    # layers are counted through the stack, not anew in every stage
    odd = IFlameConfig(stage_layers=[1, 2, 3, 0, 1], full_attention_interval=3)
    assert [kind[0] for kind in odd.layer_types] == list("llfllfl")
    assert odd.num_hidden_layers == 7
    everywhere = IFlameConfig(full_attention_interval=1)
    assert set(everywhere.layer_types) == {"full_attention"}


def test_stages_cover_the_stack_and_know_their_level():
    config = IFlameConfig(stage_layers=[1, 2, 3, 0, 4])
    assert config.layer_levels() == [0] + [1, 1] + [2, 2, 2] + [0, 0, 0, 0]
    layers = list(range(config.num_hidden_layers))
    assert [layers[stage] for stage in config.stage_slices()] == [[0], [1, 2], [3, 4, 5], [], [6, 7, 8, 9]]


def test_special_ids_follow_the_grid_coordinates():
    config = IFlameConfig(coordinate_resolution=64, vocab_size=68)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (65, 66, 67)


def test_the_hidden_units_follow_the_width_unless_they_are_given():
    assert IFlameConfig(hidden_size=64).intermediate_size == 170
    assert IFlameConfig(hidden_size=64, intermediate_size=300).intermediate_size == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive whole number, got 0"),
        ({"hidden_size": 64.0}, "hidden_size must be a positive whole number, got 64.0"),
        ({"vocab_size": -1}, "vocab_size must be a positive whole number"),
        ({"num_attention_heads": True}, "num_attention_heads must be a positive whole number"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive whole number"),
        ({"full_attention_interval": 0}, "full_attention_interval must be a positive whole number"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings must be a positive whole number, got 'long'"),
        ({"coordinate_resolution": 0}, "coordinate_resolution must be a positive whole number"),
        ({"rope_base": 0.0}, "rope_base must be a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number"),
        ({"initializer_range": "small"}, "initializer_range must be a positive number, got 'small'"),
        ({"stage_layers": [4, 4, 8, 4]}, "stage_layers must be five whole numbers"),
        ({"stage_layers": [4, 4, -8, 4, 4]}, "stage_layers must be five whole numbers"),
        ({"stage_layers": [4, 4, 8.0, 4, 4]}, "stage_layers must be five whole numbers"),
        ({"stage_layers": [0] * 5}, "at least one block"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "multiple of num_attention_heads, got 100 and 3"),
        ({"hidden_size": 60, "num_attention_heads": 10}, "must be a multiple of 4 .* got 6"),
        ({"vocab_size": 131}, "eos_token_id must lie above .* below vocab_size 131, got 131"),
        ({"pad_token_id": 128}, "pad_token_id must lie above the grid coordinates 0 to 128"),
        ({"eos_token_id": [131]}, "eos_token_id must be one whole number"),
        ({"pad_token_id": 131}, "pad, bos and eos must be three different ids"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"num_hidden_layers": 12}, "num_hidden_layers follows from stage_layers .* would be 24, got 12"),
        ({"layer_types": ["full_attention"] * 24}, "layer_types follows from stage_layers"),
        ({"linear_attn_implementation": "quick"}, "linear_attn_implementation must be one of auto, .*, got 'quick'"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        IFlameConfig(**options)


def test_sizes_that_follow_may_be_repeated():
    given = IFlameConfig().to_dict()
    again = IFlameConfig(num_hidden_layers=given["num_hidden_layers"], layer_types=given["layer_types"])
    assert again.to_dict() == given


def test_a_saved_configuration_is_read_back_as_it_was(tmp_path):
    config = small_config(heads=6, hidden_size=48, rope_base=500.0, max_position_embeddings=900)
    config.save_pretrained(tmp_path)
    read = IFlameConfig.from_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is IFlameConfig
    assert read.to_dict() == config.to_dict()
    assert (read.rope_base, read.num_attention_heads, read.stage_layers) == (500.0, 6, [1, 1, 2, 1, 1])
    assert read.to_json_string() == config.to_json_string()


def test_the_file_names_the_classes_for_remote_code_and_every_published_size(tmp_path):
    IFlameConfig().save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["model_type"] == "iflame"
    assert stored["auto_map"] == {
        "AutoConfig": "configuration_iflame.IFlameConfig",
        "AutoModel": "modeling_iflame.IFlameForCausalLM",
        "AutoModelForCausalLM": "modeling_iflame.IFlameForCausalLM",
    }
    sizes = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "stage_layers", "layer_types")
    assert all(stored[name] == getattr(IFlameConfig(), name) for name in sizes)


def test_options_that_the_model_does_not_know_are_kept(tmp_path):
    config = small_config(data_set="chairs", id2label={0: "a", 1: "b"})
    config.save_pretrained(tmp_path)
    read = IFlameConfig.from_pretrained(tmp_path)
    assert (read.data_set, read.id2label) == ("chairs", {0: "a", 1: "b"})


def test_the_linear_implementation_is_not_saved_but_taken_when_loading(tmp_path):
    config = small_config(linear_attn_implementation="eager")
    config.save_pretrained(tmp_path)
    assert "linear_attn_implementation" not in (tmp_path / "config.json").read_text()
    assert "linear_attn_implementation" not in str(config)
    assert IFlameConfig.from_pretrained(tmp_path).linear_attn_implementation == "auto"
    read = IFlameConfig.from_pretrained(tmp_path, linear_attn_implementation="chunked")
    assert read.linear_attn_implementation == "chunked"
    with pytest.raises(ValueError, match="got 'quick'"):
        IFlameConfig.from_pretrained(tmp_path, linear_attn_implementation="quick")


def test_a_model_is_loaded_with_the_linear_implementation_asked_for(tmp_path):
    IFlameForCausalLM(small_config()).save_pretrained(tmp_path)
    assert IFlameForCausalLM.from_pretrained(tmp_path).config.linear_attn_implementation == "auto"
    for loader in (IFlameForCausalLM, AutoModelForCausalLM):
        model = loader.from_pretrained(tmp_path, linear_attn_implementation="eager")
        assert model.model.layers[0].self_attn.config.linear_attn_implementation == "eager"
    from_config = AutoModelForCausalLM.from_config(small_config(linear_attn_implementation="chunked"))
    assert from_config.config.linear_attn_implementation == "chunked"


def test_the_linear_implementation_can_be_changed_and_is_checked_then_too():
    config = small_config()
    config.linear_attn_implementation = "eager"
    assert config.linear_attn_implementation == "eager"
    with pytest.raises(ValueError, match="linear_attn_implementation must be one of"):
        config.linear_attn_implementation = "quick"
    assert config.linear_attn_implementation == "eager"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copy_keeps_everything(copied):
    config = small_config(linear_attn_implementation="eager", data_set="chairs")
    again = copied(config)
    assert again.to_dict() == config.to_dict()
    assert again.linear_attn_implementation == "eager"
    again.stage_layers[0] = 7
    assert config.stage_layers[0] == 1


def test_a_configuration_does_not_share_its_lists_with_the_caller_or_with_others():
    layers = [1, 1, 2, 1, 1]
    config = IFlameConfig(stage_layers=layers)
    layers[0] = 9
    assert config.stage_layers == [1, 1, 2, 1, 1]
    IFlameConfig().stage_layers[0] = 9
    assert IFlameConfig().stage_layers == [4, 4, 8, 4, 4]


class ConfigWithArguments(IFlameConfig):
    model_type = "iflame_with_arguments"

    def __init__(self, extra=3, **kwargs):
        self.extra = extra
        super().__init__(**kwargs)


class ConfigWithoutArguments(IFlameConfig):
    model_type = "iflame_without_arguments"


@pytest.mark.parametrize("subclass", [ConfigWithArguments, ConfigWithoutArguments])
def test_a_subclass_has_all_that_the_configuration_has(tmp_path, subclass):
    config = subclass(hidden_size=64, num_attention_heads=4, extra=5)
    assert (config.extra, config.intermediate_size, config.pad_token_id) == (5, 170, 129)
    config.save_pretrained(tmp_path)
    read = subclass.from_pretrained(tmp_path)
    assert read.to_dict() == config.to_dict() and read.model_type == subclass.model_type
    assert subclass(linear_attn_implementation="eager").linear_attn_implementation == "eager"
    with pytest.raises(ValueError, match="stage_layers"):
        subclass(stage_layers=[1])
