"""Pictures of an evaluation: samples as they come, and each beside its nearest training mesh."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from iflame_cli.render import render_meshes
from training.evaluation.meshes import GridMesh
from training.evaluation.novelty import Nearest, symmetries

MOST_SAMPLES = 64
MOST_PAIRS = 32
COLUMNS = 8  # an even number: pairs stay together


def draw_samples_sheet(samples: Sequence[GridMesh], path: Path) -> None:
    """The first samples, none chosen."""
    shown = samples[:MOST_SAMPLES]
    titles = [f"{len(mesh.faces)} faces" for mesh in shown]
    render_meshes([(mesh.vertices, mesh.faces) for mesh in shown], path, columns=COLUMNS, titles=titles)


def draw_pairs(samples: Sequence[GridMesh], training: Sequence[GridMesh], nearest: Nearest, path: Path) -> None:
    """The samples that are nearest to a training mesh, each turned as it comes nearest, and on its right that mesh."""
    meshes, titles = [], []
    for place in nearest.distance.argsort(kind="stable")[:MOST_PAIRS]:
        sample, other = samples[place], training[nearest.index[place]]
        matrix = symmetries()[nearest.symmetry[place]]
        faces = sample.faces[:, ::-1] if np.linalg.det(matrix) < 0 else sample.faces
        meshes += [(sample.vertices @ matrix, faces), (other.vertices, other.faces)]
        titles += [
            f"sample, {len(sample.faces)} faces",
            f"training, {nearest.distance[place]:.1e}{' (copy)' if nearest.copies[place] else ''}",
        ]
    render_meshes(meshes, path, columns=COLUMNS, titles=titles)
