"""The samples that are evaluated: those of a model, or the files of any generator."""

from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from iflame_hf.many_iflame import GeneratedMesh
from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_files_iflame import MESH_SUFFIXES, load_mesh, up_axis_of
from iflame_hf.mesh_iflame import to_y_up
from iflame_hf.ranking_iflame import generate_best
from training.evaluation.meshes import GridMesh, checked, on_grid
from training.sampling.folder import INDEX, MeshFolder
from training.sampling.pace import Pace
from training.sampling.write import MeshWriter


class Samples(NamedTuple):
    """A set of samples; those that are no mesh are counted, and take part in nothing else."""

    found: Sequence[GridMesh | MeshError]

    @property
    def meshes(self) -> list[GridMesh]:
        return [each for each in self.found if isinstance(each, GridMesh)]

    @property
    def count(self) -> int:
        return len(self.found)

    @property
    def unusable(self) -> Counter:
        """By the kind of error."""
        return Counter(each.kind for each in self.found if isinstance(each, MeshError))


class Generated(NamedTuple):
    """What a model has made of each of N seeds."""

    found: list[GridMesh | MeshError]
    ids: list[torch.Tensor]  # (T,) of each, from the start face on

    def samples(self, part: slice = slice(None)) -> Samples:
        return Samples(self.found[part])


def generate(
    generator: Any,
    seeds: Sequence[int],
    rows: int | None,
    settings: dict[str, Any],
    best_of: int = 1,
    put: Callable[[int, GeneratedMesh], None] = lambda *_: None,
) -> Generated:
    """
    A mesh for each seed, with the pace on stderr.

    Args:
        generator: the pipeline of the model.
        rows: meshes in work at a time, as of `generate_meshes`.
        settings: options of `generate_meshes`.
        best_of: as of `generate_best`.
        put: gets the place of each mesh, and the mesh, when it is made.
    """
    made = generate_best(generator.model, seeds, best_of, rows=rows, **settings)
    found: list[Any] = [None] * len(seeds)
    ids: list[Any] = [None] * len(seeds)
    arrived = _Arrived()
    pace = Pace(arrived, 0, len(seeds))
    with ExitStack() as stack:
        stack.callback(pace.end)
        for mesh in made:
            found[mesh.number], ids[mesh.number] = decoded(mesh, generator.tokenizer), mesh.ids
            arrived.add(found[mesh.number])
            put(mesh.number, mesh)
            pace.show_if_due()
        pace.show()
    return Generated(found, ids)


def generated_sets(
    generator: Any, num: int, sets: int, seed: int, rows: int | None, settings: dict[str, Any], folder: Path | None
) -> list[Samples]:
    """
    Sets of `num` samples of a model, the mesh i of the set j with the seed `seed + j * num + i`, by `generate`.

    Args:
        folder: where they are written as training/generate.py writes them; None: nowhere.
    """
    seeds = range(seed, seed + num * sets)
    if folder is None:
        made = generate(generator, seeds, rows, settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        MeshFolder(folder).begin({"seed": seed, **settings}, overwrite=True)
        with MeshWriter(folder, "glb", generator.tokenizer, 0) as writer:
            made = generate(generator, seeds, rows, settings, put=writer.put)
        MeshFolder(folder).finish(MeshFolder(folder).records().values())
    return [made.samples(slice(first, first + num)) for first in range(0, len(seeds), num)]


def decoded(mesh: GeneratedMesh, tokenizer: Any) -> GridMesh | MeshError:
    """A generated mesh, or why it is none."""
    result = tokenizer.decode_mesh(mesh.ids)
    dropped = result.metadata["dropped_faces"]
    vertices = to_y_up(np.asarray(result.vertices), tokenizer.up_axis)
    whole = GridMesh(f"seed {mesh.seed}", vertices, np.asarray(result.faces), **dropped, ended=mesh.ended)
    try:
        return checked(whole)
    except MeshError as error:
        return error


def sample_files(folder: Path) -> list[Path]:
    """The mesh files in a folder and below. Raises ValueError if there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    if not found:
        raise ValueError(f"there are no meshes ({', '.join(MESH_SUFFIXES)}) in {folder}")
    return found


def read_sets(folder: Path, num: int, sets: int, seed: int, resolution: int) -> list[Samples]:
    """
    Sets of samples from files: `num` in each, drawn at random; fewer, and fewer sets, where there are not enough.
    Where training/generate.py made the folder, its samples without a face are samples too.
    """
    endings: dict[str, bool] = {}
    items: list[Path | None] = list(sample_files(folder))
    if (folder / INDEX).is_file():
        records = MeshFolder(folder).records().values()
        endings = {record.file: record.ended for record in records if record.file is not None}
        items += [None for record in records if record.file is None]
    order = np.random.default_rng(seed).permutation(len(items))[: num * sets]
    parts = [order[first : first + num] for first in range(0, len(order), num)]
    whole = [part for part in parts if len(part) == num] or parts[:1]
    return [Samples([_read(items[place], endings, resolution) for place in part]) for part in whole]


def _read(path: Path | None, endings: dict[str, bool], resolution: int) -> GridMesh | MeshError:
    if path is None:
        return MeshError("it has no face", "empty")
    try:
        vertices, faces = load_mesh(path)
        mesh = on_grid(path.name, to_y_up(vertices, up_axis_of(path)), faces, resolution)
    except MeshError as error:
        return error
    return mesh._replace(ended=endings.get(path.name))


class _Arrived:
    """What has come since it was last read."""

    def __init__(self) -> None:
        self.waiting: deque[Any] = deque()

    def add(self, mesh: GridMesh | MeshError) -> None:
        self.waiting.append(_Faces(len(mesh.faces) if isinstance(mesh, GridMesh) else 0))

    def read(self) -> list[Any]:
        return [self.waiting.popleft() for _ in range(len(self.waiting))]


class _Faces(NamedTuple):
    faces: int
