"""
Everything private of transformers that this project overrides, sets or calls, in one table, and tests that say in
words which of them a version has changed.

A new version of transformers may change any of these without notice. Where a test here fails, read what the hook does
now, mend the module that its row names, and write down the version in which it was seen.
"""

import ast
import inspect
from pathlib import Path
from typing import NamedTuple

import pytest
import transformers
from transformers import Pipeline, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizer
from transformers.generation import GenerationMixin

import iflame_hf
from iflame_hf import generation_iflame

ROOT = Path(__file__).resolve().parents[1]
SEEN = ("5.17.0", "5.20.2", "5.23.0", "5.24.0")
FLAG = "flag"  # an attribute of the class
MEMBER = "member"  # an attribute that the class, or a function of its module, gives its instances


class Hook(NamedTuple):
    """Something private: its class and name, what it is (its parameters, or FLAG or MEMBER), and what it is for."""

    owner: type
    name: str
    shape: str
    used_for: str
    seen: tuple[str, ...] = SEEN

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


HOOKS = [
    # overridden
    Hook(GenerationMixin, "_supports_default_dynamic_cache", "", "generation_iflame: no quantised or offloaded cache"),
    Hook(
        GenerationMixin,
        "_validate_generation_mode",
        "self generation_mode generation_config generation_mode_kwargs",
        "generation_iflame: assisted generation is refused in words",
    ),
    Hook(
        GenerationMixin,
        "_prepare_generated_length",
        "self generation_config has_default_max_length has_default_min_length model_input_name input_ids_length "
        "inputs_tensor",
        "generation_iflame: max_new_tokens takes the place of the default length",
    ),
    Hook(
        GenerationMixin,
        "_maybe_initialize_input_ids_for_generation",
        "self inputs bos_token_id model_kwargs",
        "generation_iflame: without a prompt a row begins with nine bos tokens",
    ),
    Hook(
        GenerationMixin,
        "_prepare_attention_mask_for_generation",
        "self inputs_tensor generation_config model_kwargs",
        "generation_iflame: with a filled cache, pad ids are no padding but what the cache has seen",
    ),
    Hook(
        GenerationMixin,
        "_prepare_cache_for_generation",
        "self generation_config model_kwargs generation_mode batch_size max_cache_length",
        "generation_iflame: the state is an IFlameCache",
    ),
    Hook(
        GenerationMixin,
        "_prepare_generation_config",
        "self generation_config kwargs",
        "generation_iflame: mesh_grammar, min_faces and max_faces",
    ),
    Hook(
        GenerationMixin,
        "_get_logits_processor",
        "self generation_config input_ids_seq_length encoder_input_ids prefix_allowed_tokens_fn logits_processor "
        "device model_kwargs negative_prompt_ids negative_prompt_attention_mask",
        "generation_iflame: the mesh grammar comes after the caller's own processors",
    ),
    Hook(
        GenerationMixin,
        "_get_stopping_criteria",
        "self generation_config stopping_criteria tokenizer",
        "generation_iflame: a row ends with its whole end face",
    ),
    Hook(GenerationMixin, "_validate_model_kwargs", "self model_kwargs", "generation_iflame: generate() takes a seed"),
    Hook(
        GenerationMixin,
        "_sample",
        "self input_ids logits_processor stopping_criteria generation_config synced_gpus streamer model_kwargs",
        "generation_iflame: a seed of its own for each mesh, drawn from after all other processors",
    ),
    Hook(
        GenerationMixin,
        "_beam_search",
        "self input_ids logits_processor stopping_criteria generation_config synced_gpus model_kwargs",
        "generation_iflame: sampled beams take no seed",
    ),
    Hook(GenerationMixin, "_supported_generation_modes", MEMBER, "generation_iflame: the modes that work"),
    Hook(PreTrainedModel, "_init_weights", "self module", "modeling_iflame: fresh weights"),
    Hook(PreTrainedModel, "_no_split_modules", FLAG, "modeling_iflame: what device_map keeps together"),
    Hook(PreTrainedModel, "_skip_keys_device_placement", FLAG, "modeling_iflame: accelerate leaves the cache alone"),
    Hook(PreTrainedModel, "_supports_sdpa", FLAG, "modeling_iflame"),
    Hook(PreTrainedModel, "_supports_flash_attn", FLAG, "modeling_iflame"),
    Hook(PreTrainedModel, "_supports_flex_attn", FLAG, "modeling_iflame"),
    Hook(PreTrainedModel, "_is_stateful", FLAG, "modeling_iflame: assisted generation is refused"),
    Hook(PreTrainedModel, "_auto_class", FLAG, "modeling_iflame: set by register_for_auto_class"),
    Hook(PreTrainedConfig, "_auto_class", FLAG, "configuration_iflame: set by register_for_auto_class"),
    Hook(PreTrainedTokenizer, "_auto_class", FLAG, "tokenization_iflame: set by register_for_auto_class"),
    Hook(PreTrainedTokenizer, "_tokenize", "self text kwargs", "tokenization_iflame"),
    Hook(PreTrainedTokenizer, "_convert_token_to_id", "self token", "tokenization_iflame"),
    Hook(PreTrainedTokenizer, "_convert_id_to_token", "self index", "tokenization_iflame"),
    Hook(Pipeline, "_sanitize_parameters", "self pipeline_parameters", "pipeline_iflame"),
    Hook(Pipeline, "_forward", "self input_tensors forward_parameters", "pipeline_iflame"),
    Hook(Pipeline, "_load_tokenizer", FLAG, "pipeline_iflame: a tokenizer and nothing else is loaded"),
    Hook(Pipeline, "_load_processor", FLAG, "pipeline_iflame"),
    Hook(Pipeline, "_load_image_processor", FLAG, "pipeline_iflame"),
    Hook(Pipeline, "_load_video_processor", FLAG, "pipeline_iflame"),
    Hook(Pipeline, "_load_feature_extractor", FLAG, "pipeline_iflame"),
    # called, or set
    Hook(PreTrainedConfig, "_attn_implementation", FLAG, "modeling_iflame, levels_iflame: how full attention runs"),
    Hook(GenerationMixin, "_pad_token_tensor", MEMBER, "decoding_iflame: the id that ended rows are filled with"),
    Hook(
        GenerationMixin,
        "_from_model_config",
        MEMBER,
        "generation_iflame: own fields of the generation config are loaded",
    ),
    Hook(GenerationMixin, "_is_user_defined", MEMBER, "generation_iflame: marks a state that the caller gave"),
    Hook(PreTrainedTokenizer, "_added_tokens_encoder", MEMBER, "tokenization_iflame: special tokens"),
    Hook(
        PreTrainedTokenizer,
        "_get_padding_truncation_strategies",
        "self padding truncation max_length pad_to_multiple_of verbose kwargs",
        "tokenization_iflame: what padding= and truncation= mean",
    ),
    Hook(Pipeline, "_batch_size", MEMBER, "pipeline_iflame: batch_size given to pipeline()"),
    Hook(Pipeline, "_preprocess_params", MEMBER, "pipeline_iflame: parameters given to pipeline()"),
    Hook(Pipeline, "_forward_params", MEMBER, "pipeline_iflame: parameters given to pipeline()"),
]
# Names of torch and of the operating system that begin with an underscore, too.
NOT_OF_TRANSFORMERS = {"_foreach_lerp", "_foreach_lerp_", "_foreach_mul_", "_foreach_add_", "_init_group", "_dynamo"}
NOT_OF_TRANSFORMERS |= {"_functorch", "_C", "_are_functorch_transforms_active"}
NOT_OF_TRANSFORMERS |= {"_exit", "_abc_impl", "_last_lr", "_assert_async", "_foreach_copy_"}
NOT_OF_TRANSFORMERS |= {"_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_replace"}
NOT_OF_TRANSFORMERS |= {
    "_flash_attention_forward",
    "_flash_attention_backward",
    "_compiled_call_impl",
    "_fields",
    "_asdict",
}


@pytest.mark.parametrize("hook", HOOKS, ids=str)
def test_a_hook_is_what_it_was(hook):
    now = f"in transformers {transformers.__version__}; it is used for {hook.used_for}, seen in {', '.join(hook.seen)}"
    if hook.shape == MEMBER:
        sources = [inspect.getsource(inspect.getmodule(base)) for base in hook.owner.__mro__ if base is not object]
        assert any(hook.name in source for source in sources), f"{hook} is not spoken of any more {now}"
        return
    missing = object()
    value = inspect.getattr_static(hook.owner, hook.name, missing)
    assert value is not missing, f"{hook} is gone {now}"
    if hook.shape == FLAG:
        assert not inspect.isroutine(value), f"{hook} is no attribute any more but a function {now}"
        return
    parameters = " ".join(inspect.signature(getattr(hook.owner, hook.name)).parameters)
    assert parameters == hook.shape, f"{hook} takes ({parameters}) instead of ({hook.shape}) {now}"


def own_classes():
    modules = {inspect.getmodule(getattr(iflame_hf, name)) for name in iflame_hf.__all__} | {generation_iflame}
    return [
        each
        for module in modules
        for each in vars(module).values()
        if inspect.isclass(each) and each.__module__ == module.__name__
    ]


def test_every_private_attribute_that_is_overridden_stands_in_the_table():
    known, found = {hook.name for hook in HOOKS} | NOT_OF_TRANSFORMERS, set()
    for own in own_classes():
        library = [base for base in own.__mro__ if base.__module__.startswith("transformers.")]
        private = {name for name in vars(own) if name.startswith("_") and not name.startswith("__")}
        found |= {name for name in private if any(name in vars(base) for base in library)}
    assert {"_init_weights", "_prepare_cache_for_generation", "_sanitize_parameters"} <= found
    assert found <= known, f"overridden, but not in the table: {', '.join(sorted(found - known))}"


def test_every_private_attribute_of_another_project_that_is_called_stands_in_the_table():
    paths = [
        path for folder in ("iflame_hf", "iflame_cli", "training", "app") for path in (ROOT / folder).rglob("*.py")
    ]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in [*paths, ROOT / "hub_upload.py"]]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    of_self = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own |= {node.attr for node in of_self if isinstance(node.value, ast.Name) and node.value.id == "self"}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    private = {name for name in used - own if name.startswith("_") and not name.startswith("__")}
    known = {hook.name for hook in HOOKS} | NOT_OF_TRANSFORMERS
    assert {"_attn_implementation", "_forward_params"} <= private
    assert private <= known, f"called, but not in the table: {', '.join(sorted(private - known))}"
