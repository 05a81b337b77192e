"""What samples are made with: the settings of sampling, and the weights."""

import argparse
import hashlib
from typing import Any

import torch

from iflame_hf.conditions_iflame import asked_conditions

SAMPLING_SETTINGS = (
    "min_faces",
    "max_faces",
    "temperature",
    "top_k",
    "top_p",
    "closing_strength",
    "keep_order",
    "kv_cache_dtype",
)

ASKED_SETTINGS = ("category", "num_faces", "guidance_scale")


def sampling_settings(options: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """The SAMPLING_SETTINGS for `generate_meshes`, with the model's own values where `options` give nothing."""
    own = generator.model.generation_config
    top_k = own.to_diff_dict().get("top_k", 0) if options.top_k is None else options.top_k
    own_strength = getattr(own, "closing_strength", 0.0)
    strength = own_strength if options.closing_strength is None else options.closing_strength
    keep_order = getattr(own, "keep_order", True) if options.keep_order is None else options.keep_order
    return {
        "min_faces": options.min_faces,
        "max_faces": options.max_faces or generator.default_max_faces,
        "temperature": options.temperature or own.temperature or 1.0,
        "top_k": top_k,
        "top_p": options.top_p or own.top_p or 1.0,
        "closing_strength": strength,
        "keep_order": keep_order,
        "kv_cache_dtype": options.kv_cache_dtype or getattr(own, "kv_cache_dtype", None),
    }


def asked_settings(options: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """The ASKED_SETTINGS, what meshes are to be, and the `max_faces` that leaves them room.

    Raises ValueError for what the model cannot be asked for.
    """
    asked = asked_conditions(generator.model.config, 1, options.category, options.num_faces)
    own = generator.model.generation_config.guidance_scale
    scale = own if options.guidance_scale is None else options.guidance_scale
    return {
        "max_faces": generator.most_faces(options.max_faces, options.num_faces),
        "category": options.category,
        "num_faces": options.num_faces,
        "guidance_scale": scale if asked else None,
    }


def digest_of(model: torch.nn.Module) -> str:
    """Of names and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
