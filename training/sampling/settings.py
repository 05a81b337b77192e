"""What samples are made with: the settings of sampling, and the weights."""

import argparse
import hashlib
from typing import Any

import torch

SAMPLING_SETTINGS = ("min_faces", "max_faces", "temperature", "top_k", "top_p", "kv_cache_dtype")


def sampling_settings(options: argparse.Namespace, generator: Any) -> dict[str, Any]:
    """The SAMPLING_SETTINGS for `generate_meshes`, with the model's own values where `options` give nothing."""
    own = generator.model.generation_config
    top_k = own.to_diff_dict().get("top_k", 0) if options.top_k is None else options.top_k
    return {
        "min_faces": options.min_faces,
        "max_faces": options.max_faces or generator.default_max_faces,
        "temperature": options.temperature or own.temperature or 1.0,
        "top_k": top_k,
        "top_p": options.top_p or own.top_p or 1.0,
        "kv_cache_dtype": options.kv_cache_dtype or getattr(own, "kv_cache_dtype", None),
    }


def digest_of(model: torch.nn.Module) -> str:
    """Of names and values of all weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
