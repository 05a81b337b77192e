"""
Speed of a training step, of this model and, given a folder of its code, of the original.

    python benchmarks/bench_train.py [--preset published] [--compile] [--reference DIR]

Every variant's gradients are tested against the recurrence and spelled-out attention in float32 first, and it
has no figures if they fail.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, this module must find its siblings

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.common import Row, gibibytes, measure
from benchmarks.models import build_model, draw_models, mesh_labels, mesh_tokens
from benchmarks.oracle import Oracle, WrongResult, computes_in, flat_gradients, gradients_of, require_close
from iflame_hf.format_iflame import known_format
from training.convert_checkpoint import convert_weights
from training.run.ending import ends_in_words

TOKENS_PER_FACE = known_format().tokens_per_face

# B batch, T tokens

PRESETS = {
    "published": {"batch_size": [8], "faces": 767, "repeats": 5},
    "demo": {"batch_size": [2], "faces": 60, "repeats": 2},
}
COLUMNS = {
    "model": "model",
    "step": "step",
    "dtype": "dtype",
    "batch_size": "rows",
    "row_tokens": "tokens a row",
    "tokens_per_second": "tokens/s",
    "milliseconds_per_step": "ms/step",
    "memory_gib": "GiB",
}
NOTES = """\
A step: forward, loss, backward, clipping, AdamW; weights in float32, autocast to the dtype; one mesh fills a row.
Two figures are two measurements. Memory is the GPU's peak.
"""
MAX_GRAD_NORM = 1.0

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Gradients = dict[str, torch.Tensor]


class FirstStep:
    """One batch and its gradients: those of the first variant, which was tested on shorter rows, are those of all."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows
        self.gradients: torch.Tensor | None = None

    def require(self, gradients: torch.Tensor, allowed: float) -> None:
        if self.gradients is None:
            self.gradients = gradients
        require_close("gradients of the first step", gradients, self.gradients, allowed)


def our_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids, labels=mesh_labels(input_ids), use_cache=False).loss


def original_loss(network: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """The same loss: every token after the start face, from the one before it."""
    logits = network(input_ids)[:, TOKENS_PER_FACE - 1 : -1]
    return F.cross_entropy(logits.flatten(0, 1).float(), input_ids[:, TOKENS_PER_FACE:].flatten())


def add_figures(
    row: Row,
    options: argparse.Namespace,
    network: nn.Module,
    loss_of: Loss,
    rows: torch.Tensor,
    require_first: Callable[[Gradients], None],
) -> None:
    """
    Measures, and writes the figures into the row.

    Args:
        rows: (B, T) tokens of every step.
        require_first: raises WrongResult unless the gradients of the first step, by the network's names, are right.
    """
    device, dtype = options.device, common.DTYPES[options.dtype]
    run = torch.compile(network) if row["step"] == "compiled" else network
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")

    def backward() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(run, rows)
        loss.backward()
        return loss.detach()

    last_loss = backward()
    require_first({name: parameter.grad for name, parameter in network.named_parameters()})

    def step() -> None:
        nonlocal last_loss
        last_loss = backward()
        nn.utils.clip_grad_norm_(network.parameters(), MAX_GRAD_NORM)
        optimizer.step()

    for _ in range(options.warmup):
        step()
    seconds, memory = measure(step, device, options.repeats)
    if not last_loss.isfinite():
        raise WrongResult(f"the loss became {float(last_loss)}")
    row["tokens_per_second"] = [rows.numel() / each for each in seconds]
    row["milliseconds_per_step"] = [1000 * each for each in seconds]
    row["memory_gib"] = gibibytes(memory)


def ours(
    row: Row, options: argparse.Namespace, oracle: Oracle, first: FirstStep, attention: str, linear_attention: str
) -> None:
    device, dtype = options.device, common.DTYPES[options.dtype]
    allowed = oracle.gradients_error(computes_in(dtype, device, linear_attention))
    model = build_model(oracle.config, oracle.weights, device, torch.float32, attention, linear_attention).train()
    tested = flat_gradients(gradients_of(model, oracle.input_ids.to(device), dtype))
    require_close("gradients", tested, oracle.gradients, allowed)
    add_figures(row, options, model, our_loss, first.rows, lambda found: first.require(flat_gradients(found), allowed))


def theirs(row: Row, options: argparse.Namespace, oracle: Oracle, first: FirstStep, network: nn.Module) -> None:
    device, dtype = options.device, common.DTYPES[options.dtype]
    network.to(device).train()

    def by_our_names(gradients: Gradients) -> torch.Tensor:
        return flat_gradients(convert_weights(gradients, oracle.config.num_attention_heads)[1])

    network.zero_grad()
    original_loss(network, oracle.input_ids.to(device)).backward()
    tested = by_our_names({name: parameter.grad for name, parameter in network.named_parameters()})
    require_close("gradients", tested, oracle.gradients, oracle.gradients_error(computes_in(torch.float32, device)))
    allowed = oracle.gradients_error(computes_in(dtype, device))
    # As its training script does; what dynamo cannot trace then runs as it is.
    with torch._dynamo.config.patch(suppress_errors=True):
        add_figures(
            row, options, network, original_loss, first.rows, lambda found: first.require(by_our_names(found), allowed)
        )


@ends_in_words("bench_train")
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_model_options(parser)
    parser.add_argument("--compile", action="store_true", help="also measure every variant under torch.compile")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    options = common.parse_options(parser, PRESETS, arguments)
    device = options.device
    try:
        models = draw_models(common.build_config(options), options.seed, options.reference, device)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    oracle = Oracle(models.config, models.weights, options.seed)

    rows: list[Row] = []
    for batch in options.batch_size:
        first = FirstStep(mesh_tokens(models.config, batch, options.faces, options.seed, end=True).to(device))
        sizes = {"dtype": options.dtype, "batch_size": batch, "row_tokens": first.rows.shape[1]}
        for step in ["eager", "compiled"] if options.compile else ["eager"]:
            for attention in options.attn_implementation:
                for linear_attention in options.linear_attn_implementation:
                    row = {"model": f"iflame_hf, {attention}, {linear_attention}", "step": step, **sizes}
                    with common.reported(row, rows, device):
                        ours(row, options, oracle, first, attention, linear_attention)
            if models.original is not None:
                row = {"model": "original", "step": step, **sizes}
                with common.reported(row, rows, device):
                    theirs(row, options, oracle, first, models.original())
    return common.report("train", options, rows, COLUMNS, NOTES + models.packages)


if __name__ == "__main__":
    sys.exit(main())
