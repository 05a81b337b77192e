"""What peers have in common: a network learns rows of meshes and is judged by held-out ones; samples are written."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from iflame_hf import IFlameTokenizer
from iflame_hf.many_iflame import GeneratedMesh
from training.arguments import Arguments
from training.measure.metrics import evaluate
from training.rows.load import Batch
from training.rows.map import Data
from training.rows.pack import IGNORED, TOKENS_PER_FACE
from training.run.checkpoint import Progress
from training.run.learner import AcceleratedLearner
from training.run.log import RunLog, Window
from training.run.steps import Steps
from training.sampling.folder import MeshFolder
from training.sampling.write import MeshWriter

# B batch, T tokens, V vocabulary

# Steps before the clock of a speed starts: they compile and allocate.
FIRST_STEPS = 2


class Output(NamedTuple):
    """As of a model of transformers."""

    loss: torch.Tensor | None
    logits: torch.Tensor  # (B, T, V)


def output_of(logits: torch.Tensor, labels: torch.Tensor | None, num_items: torch.Tensor | None) -> Output:
    """The logits, and the sum of the losses of all labels (B, T) but -100, each predicted from the place before it,
    divided by `num_items`."""
    if labels is None:
        return Output(None, logits)
    predicted, target = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return Output(F.cross_entropy(predicted, target, ignore_index=IGNORED, reduction="sum") / num_items, logits)


def labels_in_epoch(data: Data) -> int:
    """Tokens with a label of all training meshes that are used, each once: nine of each of its faces and of the end
    face. Faces that quantisation merges are counted too."""
    stream = data.rows.stream
    faces = data.rows.rows.meshes.num_faces[stream.used]
    return int(np.minimum(faces + 1, stream.capacity - 1).sum()) * TOKENS_PER_FACE


def learn(
    model: nn.Module, optimizer: torch.optim.Optimizer, arguments: Arguments, data: Data, accelerator: Accelerator
) -> tuple[nn.Module, dict[str, Any]]:
    """
    Train as long as the options say, by their schedule, on one device.

    Args:
        model: takes `input_ids` and `labels` (B, T), `layout` and `num_items_in_batch`, and returns an Output.

    Returns:
        The model as Accelerate has prepared it, and the figures of the run; `log.jsonl` in the output folder has those
        on the way.
    """
    options, device = arguments.train, accelerator.device
    rows, length = options.per_device_train_batch_size, arguments.data.row_length
    progress, log = Progress(), RunLog(Path(options.output_dir), accelerator)
    log.cut(0)
    steps = Steps(arguments, progress, optimizer, data.rows.rows_in_epoch, 1)
    model, stepped = accelerator.prepare(model, optimizer)
    learner = AcceleratedLearner(accelerator, model, stepped, options.max_grad_norm or float("inf"))
    pinned = device.type == "cuda"
    if pinned:
        torch.cuda.reset_peak_memory_stats(device)
    batches = data.rows.batches([], rows, num_workers=arguments.data.dataloader_num_workers, pin_memory=pinned)
    model.train()
    whole, pace, window = Window(), Window(), Window()
    before: tuple[torch.Tensor, int] | None = None  # of the step that the device may be at work on

    def read() -> float:
        """The loss of that step. Raises CommandError where too many in a row were not finite."""
        found, labels = before
        norm, loss = found.tolist()
        steps.require_finite(norm == norm and abs(norm) != float("inf"), labels)
        return loss

    while progress.step < steps.last:
        began = time.monotonic()
        batch, place = next(batches)
        labels = count_labels(batch)
        steps.end_after(steps.fitting(pace))
        found = learner.update(learner.backward([batch], labels))
        steps.schedule.step()
        if before is not None:
            read()
        before, progress.step = (found, labels), progress.step + 1
        progress.labels += labels
        loss = read() if steps.due(options.logging_steps, at_end=True) else None  # waits for the device
        seconds = time.monotonic() - began
        progress.seconds += seconds
        for each in (whole, window):
            each.add(seconds, rows, labels)
        if progress.step > FIRST_STEPS:
            pace.add(seconds, rows, labels)
        if loss is not None:
            figures = {"loss": loss, "learning_rate": steps.schedule.get_last_lr()[0], **speed(window, length)}
            figures |= {"epoch": data.rows.epochs(place), "labels": progress.labels, "minutes": progress.seconds / 60}
            log.write(progress.step, figures)
            log.report(f"step {progress.step} of {steps.last}: loss {loss:.4f}, {progress.seconds / 60:.1f} minutes")
            window, before = Window(), None
    return model, {
        "steps": progress.step,
        "rows": rows,
        "row_tokens": length,
        "tokens": progress.step * rows * length,
        "labels": progress.labels,
        "epochs": data.rows.epochs(place),
        "train_seconds": progress.seconds,
        **speed(pace if pace.steps else whole, length),
        "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }


def speed(window: Window, row_length: int) -> dict[str, float]:
    """Tokens a second, those of padding and start faces included, and useful ones: those that have a label."""
    seconds = max(window.seconds, 1e-9)
    return {
        "tokens_per_second": window.rows * row_length / seconds,
        "useful_tokens_per_second": window.labels / seconds,
    }


def count_labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def judge(model: nn.Module, data: Data, tokenizer: IFlameTokenizer, accelerator: Accelerator) -> dict[str, Any]:
    """
    The figures of `training.measure.metrics.evaluate` on the held-out meshes, without the prefix and of all categories
    together, beside the number of meshes and of labels that they are of: the coordinates of all faces and the nine
    tokens of the end face.
    """
    labels = 0

    def counted() -> Iterator[Batch]:
        nonlocal labels
        for batch in data.validation_loader:
            labels += count_labels(batch)
            yield batch

    found = evaluate(
        model, counted(), accelerator, data.validation.category_names, tokenizer.coordinate_resolution + 1
    )
    meshes = sum(len(key.draws) for keys in data.validation_loader.keys for key in keys)
    figures = {name.removeprefix("eval_"): value for name, value in found.items() if name != "eval_by_category"}
    return {"meshes": meshes, "labels": labels, **figures}


def start_faces(rows: int, tokenizer: IFlameTokenizer, device: torch.device) -> torch.Tensor:
    """(rows, 9) ids: what sampling begins with."""
    return torch.full((rows, TOKENS_PER_FACE), tokenizer.bos_token_id, device=device)


def cut_at_end(tokens: torch.Tensor, first: int, seed: int, tokenizer: IFlameTokenizer) -> Iterator[GeneratedMesh]:
    """The rows (B, T) of a sample as meshes numbered from `first` on, each up to its first end token."""
    for number, ids in enumerate(tokens.cpu(), first):
        ends = (ids == tokenizer.eos_token_id).nonzero()
        ended = len(ends) > 0
        yield GeneratedMesh(number, seed, ids[: int(ends[0]) + 1] if ended else ids, ended)


def write_samples(
    meshes: Iterable[GeneratedMesh], folder: Path, tokenizer: IFlameTokenizer, settings: dict[str, Any]
) -> dict[str, Any]:
    """
    Write meshes as training/generate.py does, in place of those of an earlier run, for training/evaluate.py --samples.

    Returns:
        How many there are, how many have come to their end and how many have a face, the mean number of faces, and the
        seconds until all were written.
    """
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    there = MeshFolder(folder)
    there.begin(settings, overwrite=True)
    with MeshWriter(folder, "glb", tokenizer, 0) as writer:
        for mesh in meshes:
            writer.put(mesh.number, mesh)
    records = list(there.records().values())
    there.finish(records)
    return {
        "meshes": len(records),
        "ended": sum(record.ended for record in records),
        "with_faces": sum(record.file is not None for record in records),
        "mean_faces": sum(record.faces for record in records) / len(records),
        "seconds": time.monotonic() - began,
        **settings,
    }
