"""What the page does, without the page: load a model, read a part of a mesh, generate meshes while they are watched.

It needs transformers, torch and trimesh; the model's folder brings the rest of the code, as a pipeline.
"""

import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Pipeline, StoppingCriteria, StoppingCriteriaList, pipeline
from transformers.generation.streamers import BaseStreamer

TASK = "mesh-generation"
FORMATS = ("glb", "obj")


@dataclass(frozen=True)
class Prompt:
    """What meshes begin with: ids (T,) with the start face, how many faces they hold, and the box (2, 3) that places
    them in the units of a given part, or None."""

    ids: list[int]
    faces: int = 0
    bounds: np.ndarray | None = None


@dataclass(frozen=True)
class Growing:
    """A mesh as far as it is made: ids (T,) with those of the prompt, vertices (V, 3) float64 within [-0.5, 0.5], y
    up, and faces (F, 3) int64 in the order in which they came. `ended` says that the model has closed it, `seed` which
    one makes it again."""

    ids: np.ndarray
    vertices: np.ndarray
    faces: np.ndarray
    ended: bool
    seed: int | None = None


def load(name: str) -> Pipeline:
    """The pipeline of a model, a folder or one on the Hub, on the GPU where there is one; its code is run.

    Meshes have y up, as the viewer has. Raises ValueError, in words for the user, where there is no such model.
    """
    is_folder = Path(name).is_dir()
    if is_folder and not (Path(name) / "config.json").is_file():
        raise ValueError(f"the folder {name} holds no model, it has no config.json")
    if not is_folder and (name.count("/") > 1 or name.startswith((".", "/", "~", "outputs/")) or "\\" in name):
        raise ValueError(f"there is no folder {name}")
    try:
        generator = pipeline(TASK, model=name, trust_remote_code=True)
    except KeyError as error:
        raise ValueError(f"{name} does not know the task {TASK}; models saved by this project do") from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{name} cannot be loaded: {reason}") from error
    if not hasattr(generator.tokenizer, "encode_mesh"):
        raise ValueError(f"{name} is no model of meshes but a {type(generator.model).__name__}")
    generator.tokenizer.up_axis = "y"
    generator.model.eval()
    return generator


def read_part(generator: Pipeline, path: str | Path, share: float = 1.0, room_above: float = 0.0) -> Prompt:
    """A prompt of the lowest `share` of the faces of a mesh file, at least one.

    A mesh that lies within half a unit of the origin on every axis keeps its place, as a part of a generated mesh
    must; any other, or any with `room_above`, is scaled so that it fills the box of the whole mesh but for
    `room_above` times its height above it. Raises ValueError, naming the file, for what is no usable mesh.
    """
    path = Path(path)
    try:
        if room_above > 0:
            row = generator.preprocess(path, room_above=room_above)
        else:
            try:
                row = generator.preprocess(path)
            except ValueError:  # it is no mesh, which the next line says too, or lies outside
                row = generator.preprocess(path, room_above=0.0)
    except (OSError, ImportError, ValueError) as error:
        reason = str(error).replace(str(path), path.name)
        raise ValueError(reason if path.name in reason else f"{path.name}: {reason}") from error
    layout = generator.tokenizer.format
    kept = max(1, round(share * layout.prompt_faces(len(row["input_ids"]))))
    return Prompt(row["input_ids"][: layout.num_tokens(kept, start=True)], kept, row["bounds"])


@dataclass(frozen=True)
class Known:
    """What a model can be asked for: its categories, and its fewest and most faces, or None; both empty for a model
    that was trained without."""

    categories: tuple[str, ...] = ()
    faces: tuple[int, int] | None = None


def known(generator: Pipeline) -> Known:
    config = generator.model.config
    faces = getattr(config, "num_faces_range", None)  # a model that was published earlier has none
    return Known(tuple(getattr(config, "categories", None) or ()), tuple(faces) if faces else None)


def asked_for(
    generator: Pipeline, category: str, num_faces: int | None, guidance_scale: float, max_faces: int, given: int = 0
) -> dict[str, Any]:
    """What `grow` is asked for, of what the page has, where an empty category and 0 faces are any; `given` faces are
    those of a part. Raises ValueError, in the page's words, for a number of faces that cannot be."""
    asked: dict[str, Any] = {"category": category} if category else {}
    if num_faces:
        fewest, most = known(generator).faces or (1, max_faces)
        if not fewest <= num_faces <= most:
            raise ValueError(f"this model makes meshes of {fewest:,} to {most:,} faces, not of {num_faces:,.0f}")
        if num_faces > max_faces:
            raise ValueError(f"{num_faces:,.0f} faces are asked for, and a mesh may have {max_faces:,}: allow more")
        if num_faces <= given:
            raise ValueError(f"{num_faces:,.0f} faces are asked for, and the part has {given:,}: keep fewer of it")
        asked["num_faces"] = int(num_faces)
    return asked | {"guidance_scale": guidance_scale} if asked else {}


class _Steps(BaseStreamer):
    """Keeps what generate() hands over after the prompt: a row of ids, one a mesh, for each step."""

    def __init__(self) -> None:
        self.steps: list[np.ndarray] = []
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_came:
            self.steps.append(value.numpy())
        self._prompt_came = True

    def end(self) -> None:
        pass


class _StopWhen(StoppingCriteria):
    """Ends a generation when an event is set, or the program ends: it waits for threads, or torch would abort it."""

    looks_once_a_face = True

    def __init__(self, *events: threading.Event):
        self.events = events

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        is_set = any(event.is_set() for event in self.events) or not threading.main_thread().is_alive()
        return torch.full((input_ids.shape[0],), is_set, device=input_ids.device)


def grow(
    generator: Pipeline,
    *,
    number: int = 1,
    max_faces: int = 200,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    prompt: Prompt | None = None,
    asked: dict[str, Any] | None = None,
    stop: threading.Event | None = None,
    interval: float = 0.1,
) -> Iterator[list[Growing]]:
    """Generates meshes in a thread, all at once, and yields what there is of them: now and then, and at the end.

    Args:
        number: how many meshes.
        max_faces: of a mesh, those of the prompt included.
        temperature, top_p: of the sampling.
        seed: of the first mesh; the others have those that follow it. Alone, each comes again from its own.
        prompt: what every mesh begins with; by default the start face.
        asked: what meshes are to be, as of `asked_for`; by default anything.
        stop: set by another thread, ends the generation at the next token.
        interval: seconds between two yields, at least; more where looking would take above a tenth of the time.

    Raises ValueError for a prompt that leaves no room, and whatever `generate` raises. Where the iteration is left
    early, the generation stops.
    """
    model, tokenizer = generator.model, generator.tokenizer
    prompt = prompt or Prompt(tokenizer.format.start_face)
    room = max_faces - prompt.faces
    if room < 1:
        raise ValueError(
            f"the part has {prompt.faces} faces already, and a mesh may have {max_faces}: "
            "allow more faces, or keep fewer of the part"
        )
    nobody_looks = threading.Event()
    stop = stop or nobody_looks
    streamer, failure = _Steps(), []
    seeds = [seed + row for row in range(number)]

    def work() -> None:
        try:
            model.generate(
                torch.tensor([prompt.ids], device=model.device),
                do_sample=True,
                num_return_sequences=number,
                max_faces=max_faces,
                max_new_tokens=tokenizer.format.num_tokens(room, end=True),
                temperature=temperature,
                top_k=0,
                top_p=top_p,
                seed=seeds,
                **(asked or {}),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhen(stop, nobody_looks)]),
            )
        except BaseException as error:
            failure.append(error)

    def look() -> list[Growing]:
        new = np.array(streamer.steps[:], dtype=np.int64).reshape(-1, number).T
        rows = np.concatenate([np.tile(prompt.ids, (number, 1)), new], axis=1)
        return [
            Growing(row, *tokenizer.decode_arrays(row), tokenizer.format.has_ended(row, max_faces), seed)
            for row, seed in zip(rows, seeds, strict=True)
        ]

    thread = threading.Thread(target=work, name="grow")
    thread.start()
    pause = interval
    try:
        while thread.is_alive():
            thread.join(pause)
            began = time.perf_counter()
            yield look()
            pause = max(interval, 9 * (time.perf_counter() - began))
    finally:
        nobody_looks.set()
        thread.join()
    if failure:
        raise failure[0]
    yield look()


def write(generator: Pipeline, mesh: Growing, prompt: Prompt | None, folder: Path, name: str) -> dict[str, str]:
    """Writes a mesh as glb and as obj, in the units of the part that was given; returns the path of each format,
    none for a mesh without faces."""
    row = {"input_ids": prompt.ids if prompt else [], "bounds": prompt.bounds if prompt else None}
    (shape,) = generator.postprocess({"ids": [mesh.ids], "rows": [row], "max_faces": len(mesh.ids)})
    if not len(shape.faces):
        return {}
    return {suffix: str(generator.export(shape, folder / f"{name}.{suffix}")) for suffix in FORMATS}


def write_all(
    generator: Pipeline, meshes: list[Growing], prompt: Prompt | None, folder: Path, name: str
) -> str | None:
    """Writes a zip file of every mesh that has faces, as glb and as obj; returns its path, None for no such mesh."""
    paths = []
    for number, mesh in enumerate(meshes, 1):
        paths += write(generator, mesh, prompt, folder, f"{name}-{number}").values()
    if not paths:
        return None
    archive = folder / f"{name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in paths:
            file.write(path, Path(path).name)
    return str(archive)
