"""
Write the mean of the weights of models that began as one.

    python training/average_models.py outputs/tuned models/iflame-artist --out outputs/mean
    python training/average_models.py outputs/a outputs/b outputs/c --weights 0.5 0.25 0.25 --out outputs/mean

A model and what it became by more training lie in one valley of the loss, and between them is often a model that is
better than both: it has learnt the new without forgetting the old (Wortsman et al., Robust fine-tuning of zero-shot
models, arXiv 2109.01903; of several, Model soups, arXiv 2203.05482). Models that were trained apart have no such mean.
All must have the same sizes, tokens and conditions. Tokenizer, settings of sampling and the dtype that its config.json
names are those of the first.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from transformers.utils.logging import disable_progress_bar

from iflame_cli.models import check_model
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.publish.folder import new_folder
from training.run.ending import ends_in_words

# What weights mean: models that differ here have no mean.
OF_CONFIG = (
    *("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "stage_layers"),
    *("full_attention_interval", "rope_base", "rms_norm_eps", "coordinate_resolution", "mesh_format"),
    *("categories", "num_faces_range"),
)
OF_TOKENIZER = ("up_axis", "reversed_winding")


@torch.no_grad()
def average_models(names: Sequence[str], output_dir: str | Path, weights: Sequence[float] | None = None) -> None:
    """
    Write the folder `output_dir` with the mean of models.

    Args:
        names: folders or Hub names of the models.
        weights: the share of each, together 1; None: the same of all.

    Raises:
        FileExistsError: `output_dir` is there already and holds something.
        ValueError: there are fewer than two models, they differ in what their weights mean, or the shares are no
            shares.
        OSError: a model cannot be loaded.
    """
    if len(names) < 2:
        raise ValueError("a mean takes two models at least")
    shares = [1 / len(names)] * len(names) if weights is None else list(weights)
    if len(shares) != len(names):
        raise ValueError(f"there are {len(names)} models and {len(shares)} weights: give one of each model")
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"weights must be shares of 0 to 1 that make 1 together, got {' '.join(map(str, shares))}")
    for name in names:
        check_model(name)
    with new_folder(output_dir) as folder:
        model, tokenizer = load(names[0])
        means = {name: tensor.float() * shares[0] for name, tensor in model.state_dict().items()}
        for name, share in zip(names[1:], shares[1:], strict=True):
            other, its_tokenizer = load(name)
            require_alike(names[0], model.config, name, other.config, OF_CONFIG)
            require_alike(names[0], tokenizer, name, its_tokenizer, OF_TOKENIZER)
            for key, tensor in other.state_dict().items():
                means[key] += tensor.float() * share
        model.load_state_dict({key: tensor.to(model.dtype) for key, tensor in means.items()})
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def load(name: str) -> tuple[IFlameForCausalLM, IFlameTokenizer]:
    return IFlameForCausalLM.from_pretrained(name, dtype="auto"), IFlameTokenizer.from_pretrained(name)


def require_alike(first: str, of_first: object, name: str, other: object, attributes: Sequence[str]) -> None:
    """Raises ValueError, naming models and values, where they differ in an attribute."""
    for attribute in attributes:
        values = getattr(of_first, attribute), getattr(other, attribute)
        if values[0] != values[1]:
            raise ValueError(f"{first} and {name} have no mean: their {attribute} are {values[0]} and {values[1]}")


@ends_in_words("average_models")
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "training/average_models.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model, or its name on the Hub")
    parser.add_argument("--weights", nargs="+", type=float, metavar="SHARE", help="of each (default: the same of all)")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write, new or empty")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    average_models(options.models, options.out, options.weights)
    print(f"the mean of {len(options.models)} models is in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
