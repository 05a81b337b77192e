"""
Turns a checkpoint of the original iFlame code into a folder for the Hugging Face Hub.

    python -m training.convert_checkpoint ORIGINAL.pth OUT --num_attention_heads 16
"""

import argparse
import os
import pickle
import re
import sys
from collections.abc import Sequence

import torch

from iflame_hf import IFlameConfig, IFlameForCausalLM, IFlameTokenizer
from training.publish.folder import new_folder
from training.run.ending import ends_in_words

# The original's six lists of blocks in the order in which they run, and the stage of the hourglass each belongs to.
STAGES = {
    "encoder_blocks.0": 0,
    "encoder_blocks.1": 1,
    "bottlenecke": 2,
    "bottleneckd": 2,
    "decoder_blocks.0": 3,
    "decoder_blocks.1": 4,
}
BLOCK_NAMES = {
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.out_proj.weight": "self_attn.o_proj.weight",
    "attn.rms_norm.weight": "self_attn.norm.weight",
    "feed_forward.proj1.weight": "mlp.gate_proj.weight",
    "feed_forward.proj1.bias": "mlp.gate_proj.bias",
    "feed_forward.proj2.weight": "mlp.up_proj.weight",
    "feed_forward.proj2.bias": "mlp.up_proj.bias",
    "feed_forward.proj3.weight": "mlp.down_proj.weight",
    "feed_forward.proj3.bias": "mlp.down_proj.bias",
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
}
OTHER_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.embed_norm.weight",
    "output_proj.weight": "lm_head.weight",
    "output_proj.bias": "lm_head.bias",
}
# One weight for the step to the vertices, then one for the step to the coordinates.
SKIP_WEIGHTS = "skip_weights2"
BLOCK_KEY = re.compile(rf"({'|'.join(map(re.escape, STAGES))})\.(\d+)\.(.+)")
# torch.compile and DistributedDataParallel put these before every name.
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")

Weights = dict[str, torch.Tensor]


def load_original(path: str | os.PathLike) -> Weights:
    """
    The weights of a checkpoint of the original code by their original names, without the prefixes of wrappers.

    The file is read with `weights_only=True`: no code in it runs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint of the original code, with the reason.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a torch checkpoint of plain tensors: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise ValueError(f"{path} is not a checkpoint of the original iFlame code: it has no 'model_state_dict'")
    weights = checkpoint["model_state_dict"]
    if not all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in weights.items()):
        raise ValueError(
            f"{path} is not a checkpoint of the original iFlame code: its model_state_dict holds other than tensors"
        )
    return {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}


def convert_weights(weights: Weights, num_attention_heads: int) -> tuple[IFlameConfig, Weights]:
    """
    Configuration and state dict of an [`IFlameForCausalLM`] from weights of the original code.

    Sizes are read off the weights; the number of heads leaves no trace in them and must be given.

    Raises:
        ValueError: a weight is missing, left over or of the wrong shape.
    """
    missing = [name for name in (*OTHER_NAMES, SKIP_WEIGHTS) if name not in weights]
    blocks = [match for match in map(BLOCK_KEY.fullmatch, weights) if match]
    if missing or not blocks:
        raise ValueError(
            f"these are not weights of the original iFlame code: {missing[0] if missing else 'its blocks'} is missing"
        )
    counts = {stage: 0 for stage in STAGES}
    for match in blocks:
        counts[match[1]] = max(counts[match[1]], int(match[2]) + 1)
    first, total = {}, 0
    for stage, count in counts.items():
        first[stage] = total
        total += count
    stage_layers = [sum(counts[name] for name in STAGES if STAGES[name] == stage) for stage in range(5)]

    # Only linear attention has a norm of its own, so its absence marks full attention.
    normed = {first[match[1]] + int(match[2]) for match in blocks if match[3] == "attn.rms_norm.weight"}
    full = [index + 1 for index in range(total) if index not in normed]
    interval = full[0] if full else total + 1
    if full != list(range(interval, total + 1, interval)):
        raise ValueError(f"full attention stands at the layers {full}, which is not every {interval}-th")

    vocab_size, hidden_size = weights["embedding.weight"].shape
    config = IFlameConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        intermediate_size=weights[f"{blocks[0][1]}.{blocks[0][2]}.feed_forward.proj1.weight"].shape[0],
        stage_layers=stage_layers,
        full_attention_interval=interval,
        coordinate_resolution=vocab_size - 4,
    )

    converted, unknown = {}, []
    for name, tensor in weights.items():
        if name == SKIP_WEIGHTS:
            converted["model.upsamplers.1.scale"], converted["model.upsamplers.0.scale"] = tensor.clone().split(1)
        elif name in OTHER_NAMES:
            converted[OTHER_NAMES[name]] = tensor
        elif (match := BLOCK_KEY.fullmatch(name)) and match[3] in BLOCK_NAMES:
            converted[f"model.layers.{first[match[1]] + int(match[2])}.{BLOCK_NAMES[match[3]]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"these weights have no place in iFlame: {', '.join(unknown[:5])}")
    with torch.device("meta"):
        expected = IFlameForCausalLM(config).state_dict()
    lost = sorted(set(expected) ^ set(converted))
    if lost:
        raise ValueError(f"the weights do not fill the model: {', '.join(lost[:5])} missing or left over")
    for name, tensor in converted.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"{name} should be of shape {tuple(expected[name].shape)}, got {tuple(tensor.shape)}")
    return config, converted


def convert_checkpoint(
    path: str | os.PathLike, output_dir: str | os.PathLike, num_attention_heads: int, reversed_winding: bool = True
) -> IFlameForCausalLM:
    """
    Writes the Hub folder `output_dir` (weights, configuration, tokenizer, remote code) and returns the model.

    Args:
        reversed_winding: what the tokenizer is told of the winding in the sequences the checkpoint was trained on. The
            original code reverses every face where networkx is 3.2 or newer.

    Raises:
        FileExistsError: `output_dir` is there already and holds something.
        FileNotFoundError, ValueError: as `load_original` and `convert_weights`.
    """
    with new_folder(output_dir) as folder:
        config, weights = convert_weights(load_original(path), num_attention_heads)
        model = IFlameForCausalLM(config)
        model.load_state_dict(weights)
        # What the original's own sampling uses.
        model.generation_config.update(do_sample=True, top_k=50, top_p=0.95)
        resolution = config.coordinate_resolution
        tokenizer = IFlameTokenizer(coordinate_resolution=resolution, reversed_winding=reversed_winding)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


@ends_in_words("convert_checkpoint")
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m training.convert_checkpoint", description=__doc__.strip().splitlines()[0]
    )
    parser.add_argument("checkpoint", help="a .pth file that the original training script wrote")
    parser.add_argument("output_dir", help="the folder to write; it must not exist yet, or be empty")
    parser.add_argument("--num_attention_heads", type=int, required=True, help="16 for the published model")
    parser.add_argument(
        "--reversed_winding",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the checkpoint was trained on faces with reversed winding (networkx 3.2 or newer)",
    )
    options = parser.parse_args(arguments)
    model = convert_checkpoint(
        options.checkpoint, options.output_dir, options.num_attention_heads, options.reversed_winding
    )
    print(f"{options.output_dir}: {model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    sys.exit(main())
