"""
Runs the original research code of iFlame, from a folder of the reader's own: nothing of it is in this repository.

It imports packages that not every machine has. Where one is missing, or cannot run on the device, a stand-in with the
same call takes its place while the original is imported; which ones were used is reported.
"""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F

from iflame_hf import IFlameConfig
from iflame_hf.implementations_iflame import linear_attention
from iflame_hf.ops_iflame import alibi_slopes

# B batch, T queries, P keys before the first query, H heads, D head size

# Modules of the original that its network consists of.
MODULES = ("transformer", "multihead_flashdiff_2", "rms_norm")
# Its training script, and what else that imports.
SCRIPT_MODULES = ("iFlame", "datasetmy")
# The stages of its network cannot be chosen.
STAGE_LAYERS = [4, 4, 8, 4, 4]


def flash_attn_by_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """flash-attn's `flash_attn_func` by torch's SDPA: q (B, T, H, D), k and v (B, P + T, H, D) -> (B, T, H, D)."""
    query, key, value = (x.to(q.dtype).transpose(1, 2) for x in (q, k, v))
    length, total = query.shape[2], key.shape[2]
    mask = None
    # The last query sees all keys; SDPA's own is_causal lets the first query see the first key only.
    if causal and length == 1:
        causal = False
    elif causal and length < total:
        mask = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal and mask is None)
    return output.transpose(1, 2)


def lightning_attn_by_chunks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """lightning-attn's `lightning_attn_func` in plain torch: q, k, v (B, H, T, D), s (H, 1, 1) -> (B, H, T, D)."""
    heads_last = (x.transpose(1, 2) for x in (q, k, v))
    output, _ = linear_attention(*heads_last, s.flatten(), implementation="chunked")
    return output.transpose(1, 2).to(q.dtype)


def slopes_by_heads(heads: int) -> torch.Tensor:
    """lightning-attn's `_build_slope_tensor`: (H, 1, 1)."""
    return alibi_slopes(heads).view(-1, 1, 1)


def join_heads(tensor: torch.Tensor, pattern: str) -> torch.Tensor:
    """einops' `rearrange`, for the one pattern that the original uses: (B, H, T, D) -> (B, T, H D)."""
    if pattern != "b h n d -> b n (h d)":
        raise NotImplementedError(f"the stand-in for einops.rearrange does not know {pattern!r}")
    return tensor.transpose(1, 2).flatten(2)


def _unused(*arguments: Any, **named: Any) -> None:
    raise NotImplementedError("a stand-in for a function that the original's network does not call was called")


# Package: its modules, with what the original imports from each.
_STAND_INS: dict[str, dict[str, dict[str, Callable]]] = {
    "flash_attn": {
        "flash_attn": {"flash_attn_func": flash_attn_by_sdpa},
        "flash_attn.modules": {},
        "flash_attn.modules.mha": {"MHA": _unused},
    },
    "lightning_attn": {
        "lightning_attn": {},
        "lightning_attn.ops": {"lightning_attn_func": lightning_attn_by_chunks},
        "lightning_attn.utils": {"_build_slope_tensor": slopes_by_heads},
    },
    "einops": {"einops": {"rearrange": join_heads, "repeat": _unused, "pack": _unused}},
    "tqdm": {"tqdm": {"tqdm": _unused}},
    "timm": {"timm": {}},
    "wandb": {"wandb": {}},
}
_COMPUTED_BY = {
    "flash_attn": "flash-attn by torch SDPA",
    "lightning_attn": "lightning-attn by our chunked attention in plain torch",
}


@contextmanager
def stand_ins(device: torch.device) -> Iterator[list[str]]:
    """
    Puts stand-ins into `sys.modules` for the packages that are missing, for flash-attn always (it takes no float32),
    and for lightning-attn on a CPU; takes them out again. Yields what is computed by something else.
    """
    replaced, computed_by = {}, []
    for package, modules in _STAND_INS.items():
        needed = package == "flash_attn" or (package == "lightning_attn" and device.type == "cpu")
        if not needed and importlib.util.find_spec(package) is not None:
            continue
        for name, contents in modules.items():
            module = types.ModuleType(name)
            vars(module).update(contents)
            replaced[name] = module
        if package in _COMPUTED_BY:
            computed_by.append(_COMPUTED_BY[package])
    before = {name: sys.modules.get(name) for name in replaced}
    sys.modules.update(replaced)
    try:
        yield computed_by
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def load_original(folder: str, config: IFlameConfig, device: torch.device) -> tuple[Callable[[], nn.Module], str]:
    """
    Imports the original code.

    Args:
        device: where it is going to run, which decides what stands in for what.

    Returns:
        What builds its network, on the CPU with weights of its own making, and a sentence on the packages that were
        replaced.

    Raises:
        FileNotFoundError: the folder does not hold the original code.
        ValueError: the sizes are not ones that the original can be built with.
    """
    _require_modules(folder, MODULES)
    if config.stage_layers != STAGE_LAYERS:
        raise ValueError(f"the original code has the stages {STAGE_LAYERS}, got stage_layers {config.stage_layers}")
    transformer, computed_by = _import_from(folder, MODULES, device)

    def build() -> nn.Module:
        return transformer.iFlame(
            embed_dim=config.hidden_size,
            num_heads=config.num_attention_heads,
            depth=2,
            num_categories=config.vocab_size,
            length=1,
        ).eval()

    return build, f"The original runs {', '.join(computed_by) or 'on its own packages'}."


def load_training_script(folder: str, device: torch.device) -> types.ModuleType:
    """
    Imports the original's training script, which trains only where it is run.

    Returns:
        The module, whose `args`, `optname` and `get_optimizer` say what it trains with.

    Raises:
        FileNotFoundError: the folder does not hold it.
        ImportError: it needs a package that is missing and has no stand-in.
    """
    _require_modules(folder, SCRIPT_MODULES + MODULES)
    # It sets these for the whole process when it is imported.
    with torch._dynamo.config.patch(suppress_errors=True, optimize_ddp=False):
        return _import_from(folder, SCRIPT_MODULES + MODULES, device)[0]


def _require_modules(folder: str, names: Sequence[str]) -> None:
    for name in names:
        if not (Path(folder) / f"{name}.py").is_file():
            raise FileNotFoundError(f"--reference {folder}: there is no {name}.py of the original code in it")


def _import_from(folder: str, names: Sequence[str], device: torch.device) -> tuple[types.ModuleType, list[str]]:
    """The first of the modules of the original, which imports the others, and what is computed by something else."""
    # Later calls would otherwise find the modules of another folder, or with other stand-ins.
    for name in names:
        sys.modules.pop(name, None)
    root = str(Path(folder).resolve())
    sys.path.insert(0, root)
    try:
        with stand_ins(device) as computed_by:
            return importlib.import_module(names[0]), computed_by
    finally:
        sys.path.remove(root)


def original_logits(network: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, V); the original pads T to whole faces and returns the padding's logits too."""
    return network(input_ids)[:, : input_ids.shape[1]]


@contextmanager
def quiet() -> Iterator[None]:
    """The original asks for autocast in a deprecated way, and for CUDA wherever it runs: no news in every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*autocast.*")
        yield


def original_generate(
    network: nn.Module, prompt: torch.Tensor, new_tokens: int, device: torch.device, sample: bool = False
) -> torch.Tensor:
    """(B, prompt) -> (B, prompt + new_tokens) on the CPU by the original's own sampling, in its own half precision."""
    choice = {"top_k": 50, "top_p": 0.95} if sample else {"top_k": 1, "top_p": None}
    with quiet():
        tokens = network.generate_sequence(prompt, None, prompt.shape[1] + new_tokens, device, **choice)
    return torch.from_numpy(tokens)


@torch.no_grad()
def original_prefill(network: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """The original's first step over a prompt (B, T), which fills its cache; its logits."""
    with quiet(), torch.amp.autocast("cuda", enabled=prompt.is_cuda, dtype=torch.float16):
        network.init_kv_cache(prompt.shape[0], prompt.shape[1], dtype=torch.float16)
        logits = network.inference_step(prompt)
        network.reset_kv_cache()
    return logits
