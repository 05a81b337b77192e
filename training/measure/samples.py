"""Meshes that a model generates while it is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, StoppingCriteria

from iflame_cli.render import render_meshes
from iflame_hf.export_iflame import export_mesh
from iflame_hf.mesh_iflame import to_y_up
from iflame_hf.tokenization_iflame import IFlameTokenizer
from training.rows.pack import TOKENS_PER_FACE


def draw_samples(
    model: PreTrainedModel,
    tokenizer: IFlameTokenizer,
    accelerator: Accelerator,
    folder: Path,
    count: int,
    max_faces: int,
    seed: int,
    check: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """
    Generate `count` meshes as the model's generation config says, write them to `folder` as sample-00.glb,
    sample-01.glb, ... and a picture of all as samples.png. What of the model is compiled runs uncompiled: no two steps
    of generate have the same shapes.

    Args:
        seed: of the first mesh; the n-th after it is what `generate(do_sample=True, seed=seed + n)` gives. Torch's own
            random numbers are neither used nor changed.
        check: called after each face; what it raises ends the drawing.

    Returns:
        For each sample its number of faces and whether it came to an end by itself. One without a face has no file.
    """
    was_training = model.training
    model.eval()
    try:
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            sequences = model.generate(
                do_sample=True,
                seed=seed,
                num_return_sequences=count,
                max_faces=max_faces,
                max_new_tokens=TOKENS_PER_FACE * (max_faces + 1),
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
        samples.append({"faces": len(mesh.faces), "ended": tokenizer.format.has_ended(ids, max_faces)})
    render_meshes(meshes, folder / "samples.png", titles=[f"{sample['faces']} faces" for sample in samples])
    return samples


class _AfterEachFace(StoppingCriteria):
    """Stops nothing by itself: what it calls may raise."""

    looks_once_a_face = True

    def __init__(self, check: Callable[[], Any]):
        self.check = check

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] % TOKENS_PER_FACE == 0:
            self.check()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
