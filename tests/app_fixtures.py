"""A model for the page, a part of a mesh to complete, and the way to the page's modules."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import trimesh
from small_models import small_model

from iflame_hf import IFlameTokenizer

APP = Path(__file__).resolve().parents[1] / "app"
sys.path.insert(0, str(APP))  # as it is where app.py runs as a script

import sampling  # noqa: E402, F401


def save_endless_model(folder: Path, **options) -> Path:
    """A model whose meshes have random faces and no end; `options` are of its config."""
    model = small_model(**options)
    with torch.no_grad():
        model.lm_head.bias[129:] = -1e4
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


CONDITIONED = {"categories": ["chair", "lamp", "table"], "num_faces_range": [4, 64]}


@contextmanager
def closes_meshes(generator, state: dict) -> Iterator[dict]:
    """Meanwhile the model closes every mesh that has `state["faces"]` faces."""
    generate, eos = generator.model.generate, generator.tokenizer.eos_token_id

    def close(ids, scores):
        if ids.shape[1] < 9 * (1 + state["faces"]):
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(-1, torch.tensor([eos]), 0.0)

    generator.model.generate = lambda *args, **options: generate(*args, logits_processor=[close], **options)
    yield state
    del generator.model.generate


def box(tmp_path, suffix, scale=1.0, shift=(0.0, 0.0, 0.0)):
    """A file with the lower half of a box that is as wide as it is deep, half a unit, in the middle of its space."""
    mesh = trimesh.creation.box((0.5, 0.5, 0.5))
    mesh.apply_translation((0, -0.25, 0))
    mesh.apply_scale(scale)
    mesh.apply_translation(shift)
    path = tmp_path / f"lower half{suffix}"
    mesh.export(path)
    return path
