"""How likely held-out meshes are to a model, and how often it is right, each token given the true ones before it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator

from training.evaluation.meshes import FAR_COLUMN, column_of
from training.measure.metrics import evaluate
from training.rows.conditions import Conditions
from training.rows.map import HeldOutRows, MeshRows, evaluation_batches, mesh_sizes, require_usable
from training.rows.meshes import ParquetMeshes
from training.rows.pack import EXTRA_FACES, TOKENS_PER_FACE

FAR_BELOW = 0.5


def likelihood(
    generator: Any,
    meshes: ParquetMeshes,
    files: Sequence[str],
    accelerator: Accelerator,
    batch_size: int,
    places: np.ndarray | None = None,
) -> dict[str, Any]:
    """
    What `training.measure.metrics.evaluate` gives, without the prefix: of all meshes (`all`), by their categories
    (`by_category`) and, where the files have the column FAR_COLUMN, of those below FAR_BELOW there (`far`, and their
    number `far_meshes`); of a model with conditions also of all when it is told these (`told`). `meshes` are counted;
    `too_long` are those that the model has no room for. With `places` (N,) of those meshes alone.
    """
    model, tokenizer = generator.model, generator.tokenizer
    most = model.config.max_position_embeddings // TOKENS_PER_FACE
    capacity = min(int(meshes.num_faces.max()) + EXTRA_FACES, most)
    row_length = capacity * TOKENS_PER_FACE
    sizes, used = mesh_sizes(meshes, row_length, "drop")
    places = np.arange(len(sizes)) if places is None else places
    used = np.intersect1d(used, places)
    conditions = Conditions.of(model.config)
    rows = MeshRows(meshes, tokenizer, row_length, grouped=True)
    require_usable(rows, used, "--data", files)

    def figures(chosen: np.ndarray, rows: MeshRows = rows) -> dict[str, Any]:
        batches = HeldOutRows(rows, evaluation_batches(sizes, chosen, capacity, batch_size))
        found = evaluate(model, batches, accelerator, meshes.category_names, tokenizer.coordinate_resolution + 1)
        return {name.removeprefix("eval_"): value for name, value in found.items()}

    result = figures(used)
    by_category = result.pop("by_category")
    counts = np.bincount(meshes.categories[used], minlength=len(meshes.category_names))
    for name, count in zip(meshes.category_names, counts.tolist(), strict=True):
        if name in by_category:
            by_category[name] = {"meshes": count, **by_category[name]}
    found = {
        "meshes": len(used),
        "too_long": len(places) - len(used),
        "all": result,
        "by_category": by_category,
    }
    if conditions.names:
        told = MeshRows(meshes, tokenizer, row_length, conditions=conditions, grouped=True)
        found["told"] = {name: value for name, value in figures(used, told).items() if name != "by_category"}
    overlaps = column_of(files, FAR_COLUMN)
    if overlaps is not None and (far := used[overlaps[used] < FAR_BELOW]).size:
        found["far_meshes"] = len(far)
        found["far"] = {name: value for name, value in figures(far).items() if name != "by_category"}
    return found
