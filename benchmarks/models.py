"""The models that are compared: one configuration, one set of random weights, in our code and in the original's."""

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.reference import load_original
from iflame_hf import IFlameConfig, IFlameForCausalLM
from iflame_hf.format_iflame import known_format
from training.convert_checkpoint import Weights, convert_weights

TOKENS_PER_FACE = known_format().tokens_per_face

# T tokens


class Models(NamedTuple):
    config: IFlameConfig
    weights: Weights  # by our names, on the CPU
    original: Callable[[], nn.Module] | None  # builds the original's network with the same weights, on the CPU
    packages: str  # a sentence on what the original runs on


@torch.no_grad()
def draw_weights(module: nn.Module, seed: int) -> None:
    """Random weights that let every block contribute as much as its input, so that an error in any of them shows."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if "embed" in name and parameter.dim() == 2:
            parameter.copy_(noise)
        elif parameter.dim() == 2:
            parameter.copy_(noise / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.1 * noise)


def draw_models(config: IFlameConfig, seed: int, reference: str | None, device: torch.device) -> Models:
    """
    Draws weights, by the names of the original code where a folder of it is given.

    Raises:
        FileNotFoundError, ValueError: as `load_original`.
    """
    if reference is None:
        model = IFlameForCausalLM(config)
        draw_weights(model, seed)
        return Models(config, model.state_dict(), None, "The original was not measured (--reference DIR).")
    build, packages = load_original(reference, config, device)
    drawn = build()
    draw_weights(drawn, seed)
    converted_config, weights = convert_weights(drawn.state_dict(), config.num_attention_heads)

    def original() -> nn.Module:
        network = build()
        network.load_state_dict(drawn.state_dict())
        return network

    return Models(converted_config, weights, original, packages)


def build_model(
    config: IFlameConfig,
    weights: Mapping[str, torch.Tensor],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "eager",
    linear_attn_implementation: str = "eager",
) -> IFlameForCausalLM:
    """A model of ours in evaluation mode; by default one that spells out attention and the recurrence in float32."""
    model = IFlameForCausalLM(copy.deepcopy(config))
    model.load_state_dict(weights)
    model = model.to(device, dtype).eval()
    model.set_attn_implementation(attn_implementation)
    model.config.linear_attn_implementation = linear_attn_implementation
    return model


def build_twin(
    config: IFlameConfig, length: int, seed: int, device: torch.device, dtype: torch.dtype
) -> LlamaForCausalLM:
    """
    What else would be taken for the same ids: transformers' Llama of the same width, depth and vocabulary, and so of
    about as many parameters, with random weights and room for `length` tokens; in evaluation mode.
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            max_position_embeddings=length,
            bos_token_id=config.bos_token_id,
            eos_token_id=None,
            pad_token_id=config.pad_token_id,
            attn_implementation="sdpa",
        )
    )
    draw_weights(model, seed)
    return model.to(device, dtype).eval()


def mesh_tokens(config: IFlameConfig, rows: int, faces: int, seed: int, end: bool = False) -> torch.Tensor:
    """(rows, 9 (1 + faces + end)) ids: the start face, faces of random coordinates, and the end face if asked for."""
    random = torch.Generator().manual_seed(seed)
    parts = [
        torch.full((rows, TOKENS_PER_FACE), config.bos_token_id),
        torch.randint(config.coordinate_resolution + 1, (rows, faces * TOKENS_PER_FACE), generator=random),
        torch.full((rows, TOKENS_PER_FACE * end), config.eos_token_id),
    ]
    return torch.cat(parts, dim=1)


def mesh_labels(input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) labels of rows that begin with a start face: its tokens are not predicted."""
    labels = input_ids.clone()
    labels[:, :TOKENS_PER_FACE] = -100
    return labels
