"""How well a model with conditions makes what it is asked for: so many faces, of such a category."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from iflame_hf.mesh_errors_iflame import MeshError
from training.evaluation.classifier import agreement, train_classifier
from training.evaluation.meshes import GridMesh
from training.evaluation.samples import Generated, Samples, generate
from training.evaluation.soundness import ALL_BINS, BIN_EDGES, LARGE_BINS, bin_names, soundness
from training.rows.conditions import Conditions

NEAR = 0.1  # of the number asked for
NOT_A_MESH = 10**6  # the rank of its category


class Asked(NamedTuple):
    """What N meshes are asked to be: each the category and the number of faces of a mesh of the data."""

    meshes: list[GridMesh]  # these
    conditions: dict[str, list[Any]]  # options of `generate_meshes`
    most_faces: int | None


class Controlled(NamedTuple):
    """What was made, and how many faces of each sequence (N,), those without an area too."""

    made: Generated
    faces: np.ndarray

    def samples(self) -> Samples:
        return self.made.samples()


def check_control(settings: Mapping[str, Any], option: str) -> None:
    """Raises ValueError, naming the option, for a model, by its config.json, that cannot be asked for anything."""
    if not settings.get("categories") and not settings.get("num_faces_range"):
        raise ValueError(
            f"{option} is of a model with conditions, and this one was trained without: leave it out, or train with "
            "--condition_on"
        )


def asked_of(config: Any, references: Sequence[GridMesh], num: int, seed: int, max_faces: int | None = None) -> Asked:
    """
    What so many meshes are asked to be: what `references` are, of `max_faces` at most, drawn at random, each equally
    often but for one. A category that the model does not know is left open.

    Raises ValueError where none of them is what the model can be asked for.
    """
    conditions = Conditions.of(config)
    fewest, most = config.num_faces_range or (1, np.inf)
    possible = [
        mesh
        for mesh in references
        if fewest <= len(mesh.faces) <= min(most, max_faces or np.inf)
        and (conditions.num_faces or mesh.category in conditions.categories)
    ]
    if not possible:
        raise ValueError("no mesh of the data has a category or a number of faces that the model can be asked for")
    order = np.random.default_rng(seed).permutation(len(possible))
    meshes = [possible[place] for place in np.resize(order, num)]
    asked: dict[str, list[Any]] = {}
    if conditions.categories:
        asked["category"] = [mesh.category if mesh.category in conditions.categories else None for mesh in meshes]
    if conditions.num_faces:
        asked["num_faces"] = [len(mesh.faces) for mesh in meshes]
    return Asked(meshes, asked, max(asked.get("num_faces", [0])) or None)


def set_name(scale: float) -> str:
    """Of the samples that were asked for with so much guidance."""
    return "asked, no guidance" if scale == 1 else f"asked, guidance {scale:g}"


def generate_asked(
    generator: Any,
    asked: Asked,
    scales: Sequence[float],
    seed: int,
    rows: int | None,
    settings: dict[str, Any],
    max_faces: int | None = None,
) -> dict[str, Controlled]:
    """
    By the name of each scale of guidance a mesh for each that is asked for, of the seeds from `seed` on.

    Args:
        settings: options of `generate_meshes`.
        max_faces: most faces of a mesh; None: room for twice what is asked for, where the model has it.
    """
    settings = {**settings, "max_faces": generator.most_faces(max_faces, asked.most_faces)}
    layout = generator.tokenizer.format
    found = {}
    for scale in scales:
        seeds = range(seed, seed + len(asked.meshes))
        made = generate(generator, seeds, rows, {**settings, **asked.conditions, "guidance_scale": scale})
        faces = [int(layout.is_coordinate(ids).sum()) // layout.tokens_per_face for ids in made.ids]
        found[set_name(scale)] = Controlled(made, np.array(faces))
    return found


def control(
    asked: Asked,
    sets: Mapping[str, Controlled],
    free: Samples,
    training: Sequence[GridMesh],
    device: torch.device,
    classifier: Mapping[str, Any],
) -> dict[str, Any]:
    """
    The figures of each set, as JSON values: `faces` (`faces_errors`), `category` (`agreement`, and that of the
    held-out meshes and of `free`) and `soundness`.

    Args:
        free: samples that were asked for nothing: how often a classifier agrees by chance.
        classifier: `points`, `epochs` and `seed` of `train_classifier`.
    """
    found: dict[str, Any] = {"asked": len(asked.meshes), "soundness": {}}
    if "num_faces" in asked.conditions:
        numbers = np.array(asked.conditions["num_faces"])
        found["faces"] = {name: faces_errors(each.faces, numbers) for name, each in sets.items()}
    if "category" in asked.conditions:
        found["category"] = _categories(asked, sets, free, training, device, classifier)
    whole = {"held-out meshes": asked.meshes, **{name: each.samples().meshes for name, each in sets.items()}}
    for name, meshes in whole.items():
        rows = soundness(meshes)
        found["soundness"][name] = {bin_: rows[bin_] for bin_ in (ALL_BINS, LARGE_BINS) if bin_ in rows}
    return found


def faces_errors(made: np.ndarray, asked: np.ndarray) -> dict[str, dict[str, Any]]:
    """
    How far numbers of faces (N,) are from those asked for (N,), of all and by bins of the latter: `meshes`, the median
    and the 90 % quantile of the relative error, and the share whose error is NEAR at most.
    """
    errors = np.abs(made - asked) / asked
    place = np.searchsorted(BIN_EDGES, asked)
    groups = {ALL_BINS: asked > 0, **{name: place == index for index, name in enumerate(bin_names())}}
    return {
        name: {
            "meshes": int(group.sum()),
            "median_error": float(np.median(errors[group])),
            "error_90": float(np.quantile(errors[group], 0.9)),
            "near": float((errors[group] <= NEAR).mean()),
        }
        for name, group in groups.items()
        if group.any()
    }


def _categories(
    asked: Asked,
    sets: Mapping[str, Controlled],
    free: Samples,
    training: Sequence[GridMesh],
    device: torch.device,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    names = {category for category in asked.conditions["category"] if category is not None}
    if not names:
        return {"skipped": "the model knows no category of the held-out meshes"}
    every = sorted({mesh.category for mesh in training if mesh.category is not None})
    if len(every) < 2 or not names <= set(every):
        return {"skipped": "the training meshes looked at do not have all categories that are asked for, two at least"}
    named = [place for place, category in enumerate(asked.conditions["category"]) if category is not None]
    labels = np.array([every.index(asked.conditions["category"][place]) for place in named], dtype=np.int64)
    trained = train_classifier(training, every, device, **options)

    def agrees(meshes: Sequence[GridMesh | MeshError]) -> dict[str, Any]:
        usable = [place for place, mesh in enumerate(meshes) if isinstance(mesh, GridMesh)]
        ranks = np.full(len(meshes), NOT_A_MESH)
        ranks[usable] = trained.ranks([meshes[place] for place in usable], labels[: len(meshes)][usable])
        return agreement(ranks, labels[: len(meshes)], every)

    rows = {"held-out meshes": agrees([asked.meshes[place] for place in named])}
    rows |= {name: agrees([each.made.found[place] for place in named]) for name, each in sets.items()}
    rows["asked for nothing"] = agrees(free.found[: len(named)])
    return {"categories": len(every), "points": trained.points, "sets": rows}
