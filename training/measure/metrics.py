"""How good a model is on held-out meshes."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch.nn import functional as F

from iflame_hf.format_iflame import known_format
from training.rows.pack import IGNORED

_, TOKENS_PER_VERTEX, TOKENS_PER_FACE = known_format().level_strides
# What is counted for each category, in this order.
COUNTS = ("loss", "tokens", "right_tokens", "vertices", "right_vertices", "faces", "right_faces")


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    category_names: list[str],
    num_coordinate_ids: int,
    check: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """
    Loss, perplexity and accuracies of the next token, given the true ones before it, over all ranks' batches.

    A token counts if it has a label. A vertex or face counts if it is geometry, not an end face, and is right if all
    of its three or nine coordinates are.

    Args:
        batches: this rank's rows, each with `labels` (B, T) and a `layout` that knows the `group` of each mesh, an
            index into category_names.
        num_coordinate_ids: how many token ids, from 0 on, are coordinates.
        check: called before each batch; what it raises ends the evaluation.

    Returns:
        `eval_loss` (nats per token), `eval_perplexity`, `eval_bits_per_face` (those of end faces are spread over the
        faces), `eval_token_accuracy`, `eval_vertex_accuracy`, `eval_face_accuracy`, and the same without the prefix by
        category in `eval_by_category`.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(len(category_names), len(COUNTS), dtype=torch.float64)
    try:
        for batch in batches:
            check()
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            labels, categories = batch.pop("labels"), batch["layout"].attribute("group")
            with torch.no_grad(), accelerator.autocast():
                logits = model(**batch, use_cache=False).logits
            counts += count_right(logits, labels, categories, len(category_names), num_coordinate_ids).cpu()
    finally:
        model.train(was_training)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device), "sum").cpu()
    metrics: dict[str, Any] = {f"eval_{name}": value for name, value in _metrics(counts.sum(dim=0)).items()}
    metrics["eval_by_category"] = {
        name: _metrics(row) for name, row in zip(category_names, counts, strict=True) if row[1] > 0
    }
    return metrics


def count_right(
    logits: torch.Tensor, labels: torch.Tensor, categories: torch.Tensor, num_categories: int, num_coordinate_ids: int
) -> torch.Tensor:
    """
    The COUNTS of each category, (num_categories, 7).

    Args:
        logits: (B, T, vocabulary); those at place t are of the token at t + 1.
        labels: (B, T) token ids, or -100 where nothing counts.
        categories: (B, T) indices; -1 only where nothing counts.
    """
    predicted, target = logits[:, :-1].float(), labels[:, 1:]
    losses = F.cross_entropy(predicted.transpose(1, 2), target, ignore_index=IGNORED, reduction="none")
    losses = F.pad(losses, (1, 0))  # (B, T), each at the place of its token
    right = F.pad(predicted.argmax(dim=-1) == target, (1, 0))
    counted = labels != IGNORED
    geometry = counted & (labels < num_coordinate_ids)
    counts = losses.new_zeros(num_categories, len(COUNTS))

    def add(column: int, values: torch.Tensor, where: torch.Tensor, stride: int = 1) -> None:
        counts[:, column].index_add_(0, categories[:, ::stride][where], values[where].to(counts.dtype))

    add(0, losses, counted)
    add(1, counted, counted)
    add(2, right, counted)
    for column, size in ((3, TOKENS_PER_VERTEX), (5, TOKENS_PER_FACE)):
        whole = geometry.unflatten(1, (-1, size)).all(dim=-1)
        add(column, whole, whole, size)
        add(column + 1, right.unflatten(1, (-1, size)).all(dim=-1), whole, size)
    return counts


def _metrics(counts: torch.Tensor) -> dict[str, float]:
    named = dict(zip(COUNTS, counts.tolist(), strict=True))
    loss = named["loss"] / max(named["tokens"], 1)
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    metrics["bits_per_face"] = named["loss"] / math.log(2) / max(named["faces"], 1)
    for what in ("token", "vertex", "face"):
        plural = {"token": "tokens", "vertex": "vertices", "face": "faces"}[what]
        metrics[f"{what}_accuracy"] = named[f"right_{plural}"] / max(named[plural], 1)
    return metrics
