"""How good a model is on held-out meshes, and meshes that it generates."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F
from transformers import PreTrainedModel, StoppingCriteria

from iflame_cli.render import render_meshes
from iflame_hf.export_iflame import export_mesh
from iflame_hf.mesh_iflame import to_y_up
from iflame_hf.tokenization_iflame import IFlameTokenizer
from training.rows.pack import IGNORED, TOKENS_PER_FACE

TOKENS_PER_VERTEX = 3
# What is counted for each category, in this order.
COUNTS = ("loss", "tokens", "right_tokens", "vertices", "right_vertices", "faces", "right_faces")


def evaluate(
    model: torch.nn.Module,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    category_names: list[str],
    coordinate_levels: int,
    check: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """
    Loss, perplexity and accuracies of the next token, given the true ones before it, over all ranks' batches.

    A token counts if it has a label. A vertex or face counts if it is geometry, not an end face, and is right if all
    of its three or nine coordinates are.

    Args:
        batches: this rank's rows, each with `labels` (B, T) and a `layout` that knows the `category` of each mesh.
        coordinate_levels: number of token ids that are coordinates.
        check: called before each batch; what it raises ends the evaluation.

    Returns:
        `eval_loss` (nats per token), `eval_perplexity`, `eval_token_accuracy`, `eval_vertex_accuracy`,
        `eval_face_accuracy`, and the same without the prefix by category in `eval_by_category`.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(len(category_names), len(COUNTS), dtype=torch.float64)
    try:
        for batch in batches:
            check()
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            labels, categories = batch.pop("labels"), batch["layout"].attribute("category")
            with torch.no_grad(), accelerator.autocast():
                logits = model(**batch, use_cache=False).logits
            counts += count_right(logits, labels, categories, len(category_names), coordinate_levels).cpu()
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
    logits: torch.Tensor, labels: torch.Tensor, categories: torch.Tensor, num_categories: int, coordinate_levels: int
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
    geometry = counted & (labels < coordinate_levels)
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
    for what in ("token", "vertex", "face"):
        plural = {"token": "tokens", "vertex": "vertices", "face": "faces"}[what]
        metrics[f"{what}_accuracy"] = named[f"right_{plural}"] / max(named[plural], 1)
    return metrics


def draw_samples(
    model: PreTrainedModel,
    tokenizer: IFlameTokenizer,
    accelerator: Accelerator,
    folder: Path,
    count: int,
    max_faces: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    check: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """
    Generate `count` meshes, write them to `folder` as sample-00.glb, sample-01.glb, ... and a picture of all as
    samples.png; the state of torch's random numbers is as before. What of the model is compiled runs uncompiled: no
    two steps of generate have the same shapes. `check` is called after each face; what it raises ends the drawing.

    Returns:
        For each sample its number of faces and whether it came to an end by itself. One without a face has no file.
    """
    was_training = model.training
    model.eval()
    device = accelerator.device
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            accelerator.autocast(),
            torch.compiler.set_stance("force_eager"),
        ):
            torch.manual_seed(seed)
            sequences = model.generate(
                do_sample=True,
                num_return_sequences=count,
                max_new_tokens=TOKENS_PER_FACE * max_faces + 1,  # the last may say that the mesh ends
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                stopping_criteria=[_AfterEachFace(check)],
            ).cpu()
    finally:
        model.train(was_training)
    folder.mkdir(parents=True, exist_ok=True)
    meshes, samples = tokenizer.batch_decode_mesh(sequences), []
    for index, (mesh, ids) in enumerate(zip(meshes, sequences, strict=True)):
        mesh.vertices = to_y_up(np.asarray(mesh.vertices), tokenizer.up_axis)
        path = folder / f"sample-{index:02d}.glb"
        path.unlink(missing_ok=True)
        if len(mesh.faces):
            export_mesh(mesh, path, winding="kept")  # a sample shows the model as it is
        samples.append({"faces": len(mesh.faces), "ended": bool((ids == tokenizer.eos_token_id).any())})
    render_meshes(meshes, folder / "samples.png", titles=[f"{sample['faces']} faces" for sample in samples])
    return samples


class _AfterEachFace(StoppingCriteria):
    """Stops nothing by itself: what it calls may raise."""

    def __init__(self, check: Callable[[], Any]):
        self.check = check

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] % TOKENS_PER_FACE == 0:
            self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)
