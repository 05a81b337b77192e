"""`pipeline("mesh-generation")`: from a model's name to meshes."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Pipeline

from .conditions_iflame import UNKNOWN, asked_conditions, check_guidance
from .export_iflame import export_mesh
from .faces_iflame import stream_faces
from .format_iflame import UP_AXES
from .many_iflame import default_rows
from .mesh_errors_iflame import MeshError, OptionError, errors_name
from .mesh_files_iflame import import_trimesh, is_mesh, load_mesh, up_axis_of
from .mesh_iflame import bounding_box, denormalise, turn
from .ranking_iflame import generate_best
from .sampling_iflame import row_seeds


class MeshGenerationPipeline(Pipeline):
    """Generates triangle meshes, from nothing or from a part of a mesh.

    ```python
    generator = pipeline("mesh-generation", model="user/name", trust_remote_code=True)
    meshes = generator(num_meshes=4, max_faces=200, seed=0)  # list of trimesh.Trimesh
    generator.export(meshes[0], "chair.glb")
    completed = generator("part.obj", num_meshes=2, room_above=1.0)
    chairs = generator(category="chair", num_faces=200, num_meshes=4)  # of a model that was trained with them
    for face in generator.stream(max_faces=200):  # (3, 3) each
        ...
    ```

    Every parameter of a call may also be given to `pipeline()`, as the default of all calls.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False

    def __call__(self, prompt: Any = None, *, batch_size: int | None = None, **kwargs: Any) -> list:
        """Generated meshes, `trimesh.Trimesh` in the axes of the tokenizer.

        Args:
            prompt: a part of a mesh to complete: a path, a Trimesh, a Scene or a tuple (vertices, faces); or a list of
                such; by default nothing. What is added lies above the part, or beside it: a mesh is generated from
                its lowest vertex upwards.
            batch_size: how many meshes are in work at once, by default 64 on a CUDA device and 8 elsewhere.
            num_meshes: how many, or how many for each prompt, 1 by default.
            max_faces: most faces of a mesh, those of the prompt included; by default as many as `generate()` makes, or
                twice `num_faces` where that is more.
            category: what meshes are asked to be, one of the model's `config.categories`: one for all, or a list of
                one for each mesh of all prompts, in which None leaves it open. Open by default.
            num_faces: how many faces meshes are asked to have, about, those of the prompt included, within the model's
                `config.num_faces_range`; one for all or a list, as `category`.
            guidance_scale: above 1 it gives `category` and `num_faces` more weight, at twice the work. By default that
                of the model's generation_config.json, or none.
            seed: a whole number, the seed of the first mesh; the others, of all prompts, have those that follow it. Or
                a list of one for each mesh. A seed gives the same mesh again for the same prompt and parameters,
                alone or in a batch; torch's own random numbers stay as they are. By default one is drawn of them.
            best_of: draw so many meshes for each one and keep the best (`iflame_hf.ranking_iflame.best`): an ended one
                before one that was cut off, then likely under the model and with few boundary edges. The candidates
                of the seed s have the seeds s * best_of + 0, 1, ...; the mesh has the one of its own. 1 by default.
            do_sample, temperature, top_p, top_k, closing_strength, keep_order: as of `generate()`. By default it
                samples, from all tokens unless the model's generation_config.json says otherwise.
            room_above: how much higher than the part the whole mesh may become, in heights of the part (1.0: twice as
                high). By default the part keeps its place, which must be within [-0.5, 0.5] on every axis: right for
                parts of generated meshes, and for no others.
            bounds: instead of `room_above`, the box that the whole mesh fills, as of the tokenizer's `encode_mesh`.
            keep: of the prompt only its lowest faces: a share (float between 0 and 1) or a number (int) of them. The
                box that it has to lie within, or that `room_above` adds to, is that of all faces; a prompt that is
                not within [-0.5, 0.5] then needs neither `room_above` nor `bounds`: it fills its own box.
            prompt_up_axis: the vertical axis of the prompt and of `bounds`, "y" or "z". By default that of the
                tokenizer, and for a file the one that it declares (dae), or that of its format: z in ply and stl, else
                y.
            kwargs: any other parameter of `generate()`.

        Returns:
            A list of `num_meshes` meshes, in the prompt's units; for a list of prompts a list of such lists. Their
            `metadata["ended"]` says whether the mesh came to its end before `max_faces`, `metadata["seed"]` is the
            seed that makes it again (None for greedy search and beams), and `metadata["asked_for"]`, if anything was,
            has its category, num_faces and guidance_scale. One may be without a face.

        Raises ValueError for parameters and prompts that cannot be, ImportError where trimesh is missing.
        """
        num_meshes = kwargs.get("num_meshes") or self._forward_params.get("num_meshes") or 1
        numbered = dict(self.as_finished(prompt, batch_size=batch_size, **kwargs))
        meshes = [numbered[number] for number in range(len(numbered))]
        if not isinstance(prompt, list):
            return meshes
        return [meshes[start : start + num_meshes] for start in range(0, len(meshes), num_meshes)]

    def as_finished(
        self, prompt: Any = None, *, batch_size: int | None = None, **kwargs: Any
    ) -> Iterator[tuple[int, Any]]:
        """The meshes of a call, each as soon as it is finished: pairs (number, mesh), in any order.

        Mesh `number` is `num_meshes * i + j` for the j-th mesh of the i-th prompt, and has the seed `seed + number`.
        With `best_of` a mesh is finished when all are that it was chosen from.

        ```python
        for number, mesh in generator.as_finished(num_meshes=1000, seed=0):
            if len(mesh.faces):
                generator.export(mesh, f"mesh-{number:03d}.glb")
        ```

        Args: as of a call. Raises at once for parameters and prompts that cannot be.
        """
        import_trimesh()
        preprocess, forward, _ = self._parameters(kwargs)
        batch_size = _whole("batch_size", batch_size or self._batch_size or default_rows(self.model))
        prompts = prompt if isinstance(prompt, list) else [prompt]
        rows = [self.preprocess(each, **preprocess) for each in prompts]
        num_meshes, best_of = forward.pop("num_meshes", 1), forward.pop("best_of", 1)
        each_row = [row for row in rows for _ in range(num_meshes)]
        each_asked = self._asked(len(each_row), forward)
        for number, (row, asked) in enumerate(zip(each_row, each_asked, strict=True)):
            with errors_name(prompts[number // num_meshes]):
                self._check_room(row, forward["max_faces"], asked.get("num_faces"))
        one_by_one = self._samples_one_by_one(**forward)
        if self._num_beams(**forward) > 1 and forward.get("guidance_scale", 1) != 1:
            raise OptionError(
                "%s is for sampling and greedy search: leave out %s or %s",
                *("guidance_scale", "num_beams", "guidance_scale"),
            )
        if best_of > 1 and not one_by_one:
            raise ValueError(
                f"best_of={best_of} draws meshes at random and keeps the best: leave out do_sample=False and "
                "num_beams, or best_of"
            )
        seeds = self._seeds(len(each_row), **forward)
        forward.pop("seed", None)
        jobs = [
            {**row, "seed": seed, "asked": asked, "asked_for": self._asked_for(asked, **forward)}
            for row, seed, asked in zip(each_row, seeds, each_asked, strict=True)
        ]
        if one_by_one:
            return self._sampled(jobs, batch_size, best_of, **forward)
        return self._in_batches(jobs, batch_size, **forward)

    def _sampled(self, jobs: list[dict], rows: int, best_of: int, max_faces: int, **options: Any) -> Iterator:
        made = generate_best(
            self.model,
            [job["seed"] for job in jobs],
            best_of,
            rows=rows,
            max_faces=max_faces,
            prompt=[job["input_ids"] for job in jobs],
            **_conditions(jobs),
            **self._sampling_options(**options),
        )
        return (
            (mesh.number, self._decoded(mesh.ids, jobs[mesh.number] | {"seed": mesh.seed}, max_faces)) for mesh in made
        )

    def _in_batches(self, jobs: list[dict], batch_size: int, **options: Any) -> Iterator[tuple[int, Any]]:
        """Meshes that are not sampled with a seed each: the likeliest, or beams."""
        for start in range(0, len(jobs), batch_size):
            batch = {"rows": jobs[start : start + batch_size]}
            yield from enumerate(self.postprocess(self.forward(batch, **options)), start)

    def stream(
        self, prompt: Any = None, *, skip_prompt: bool = False, timeout: float | None = None, **kwargs: Any
    ) -> Iterator[np.ndarray]:
        """The faces of one mesh as they are generated, arrays (3, 3) float64, in the prompt's units.

        Args:
            prompt, kwargs: as of a call; with a seed, the faces are those of the mesh that a call gives.
            skip_prompt: leave out the faces of the prompt.
            timeout: seconds to wait for a face at most; by default for ever.

        Raises as `stream_faces` does.
        """
        preprocess, forward, _ = self._parameters(kwargs)
        if forward.pop("num_meshes", 1) != 1 or isinstance(prompt, list):
            raise ValueError("faces come of one mesh at a time: leave out num_meshes and give one prompt")
        if forward.pop("best_of", 1) != 1:
            raise ValueError(
                "faces come before it is known which mesh will be the best: leave out best_of, or give the seed of a "
                "mesh that best_of has chosen"
            )
        row = self.preprocess(prompt, **preprocess)
        (asked,) = self._asked(1, forward)
        with errors_name(prompt):
            self._check_room(row, forward["max_faces"], asked.get("num_faces"))
        (forward["seed"],) = self._seeds(1, **forward)
        options = self._generate_options([row], **forward) | asked
        faces = stream_faces(
            self.model, self.tokenizer, row["input_ids"], skip_prompt=skip_prompt, timeout=timeout, **options
        )
        return faces if row["bounds"] is None else _placed(faces, row["bounds"])

    def export(self, mesh: Any, path: str | os.PathLike, **options: Any) -> Path:
        """Writes a generated mesh as glb, obj, ply or stl, upright; `options` are those of `export_mesh`."""
        return export_mesh(mesh, path, **{"up_axis": self.tokenizer.up_axis, **options})

    def _parameters(self, given: dict[str, Any]) -> tuple[dict, dict, dict]:
        preprocess, forward, postprocess = self._sanitize_parameters(**given)
        return {**self._preprocess_params, **preprocess}, {**self._forward_params, **forward}, postprocess

    def _sanitize_parameters(self, **given: Any) -> tuple[dict, dict, dict]:
        given = {name: value for name, value in given.items() if value is not None}
        preprocess = {
            name: given.pop(name) for name in ("room_above", "bounds", "keep", "prompt_up_axis") if name in given
        }
        for name in ("num_meshes", "max_faces", "best_of"):
            if name in given:
                _whole(name, given[name])
        if given.get("temperature", 1) <= 0:
            raise ValueError(f"temperature must be above 0, got {given['temperature']}; do_sample=False is greedy")
        if not 0 < given.get("top_p", 1) <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {given['top_p']}")
        if given.get("top_k", 0) < 0:
            raise ValueError(f"top_k must not be negative, got {given['top_k']}; 0 takes all tokens")
        for name in ("num_return_sequences", "max_length", "max_new_tokens"):
            if name in given:
                raise ValueError(f"{name} is for generate(): meshes are counted by num_meshes, faces by max_faces")
        return preprocess, given, {}

    def preprocess(
        self,
        prompt: Any,
        room_above: float | None = None,
        bounds: Any = None,
        keep: float | int | None = None,
        prompt_up_axis: str | None = None,
    ) -> dict[str, Any]:
        """Ids of what a mesh begins with, and the box that places it, or None."""
        if prompt is None:
            if not (room_above is bounds is keep is prompt_up_axis is None):
                raise OptionError(
                    "%s, %s, %s and %s are of a prompt, and there is none",
                    *("room_above", "bounds", "keep", "prompt_up_axis"),
                )
            return {"input_ids": self.tokenizer.format.start_face, "bounds": None}
        if not is_mesh(prompt):
            raise ValueError(
                f"a prompt is the path of a mesh file, a Trimesh, a Scene or a tuple (vertices, faces), got {prompt!r}"
            )
        if room_above is not None and bounds is not None:
            raise OptionError("give either %s or %s, and not both", "room_above", "bounds")
        if room_above is not None and room_above < 0:
            raise OptionError(f"%s must not be negative, got {room_above}", "room_above")
        if keep is not None and not (0 < keep < 1 if isinstance(keep, float) else _is_whole(keep)):
            raise OptionError(
                f"%s must be a share between 0.0 and 1.0, or a whole number of faces from 1 on, got {keep!r}", "keep"
            )
        if prompt_up_axis not in (None, *UP_AXES):
            raise ValueError(f"prompt_up_axis must be one of {', '.join(UP_AXES)}, got {prompt_up_axis!r}")
        vertices, faces = load_mesh(prompt)
        up_axis, is_file = self.tokenizer.up_axis, isinstance(prompt, (str, os.PathLike))
        given_up = prompt_up_axis or (up_axis_of(prompt) if is_file else up_axis)
        vertices = turn(vertices, given_up, up_axis)
        with errors_name(prompt):
            if room_above is not None:
                bounds = bounding_box(vertices, room_above, up_axis)
            elif bounds is not None:
                bounds = np.sort(turn(np.asarray(bounds, dtype=np.float64), given_up, up_axis), axis=0)
            elif np.abs(vertices).max() > 0.5 + 0.5 / self.tokenizer.coordinate_resolution:
                if keep is None:
                    raise MeshError(
                        "the part does not lie within [-0.5, 0.5] as parts of generated meshes do: say with %s or %s "
                        "how large the whole mesh may become",
                        "out_of_bounds",
                        options=("room_above", "bounds"),
                    )
                bounds = bounding_box(vertices)
            ids = self.tokenizer.encode_mesh(
                (vertices, faces), add_end=False, normalise=bounds is not None, bounds=bounds
            )
        if keep is not None:
            layout = self.tokenizer.format
            kept = max(1, round(keep * layout.prompt_faces(len(ids)))) if isinstance(keep, float) else keep
            ids = ids[: layout.num_tokens(kept, start=True)]
        return {"input_ids": ids, "bounds": bounds}

    @property
    def default_max_faces(self) -> int:
        """Most faces of a mesh where a call does not give `max_faces`."""
        return max(self.tokenizer.format.most_faces(self.model.generation_config.max_length), 1)

    def most_faces(self, max_faces: int | None = None, num_faces: int | None = None) -> int:
        """Most faces of a mesh, of which so many are asked for at most: `max_faces`, or by default
        `default_max_faces`, or twice `num_faces` where that is more and the model's longest sequence holds them.

        Raises OptionError where it is less than `num_faces`.
        """
        if num_faces is None:
            return max_faces or self.default_max_faces
        longest = self.tokenizer.format.most_faces(self.model.config.max_position_embeddings)
        most = max_faces or max(self.default_max_faces, min(2 * num_faces, longest))
        if num_faces <= most:
            return most
        if max_faces is None:
            raise OptionError(
                f"%s={num_faces} is more than the {most} faces that this model's longest sequence holds", "num_faces"
            )
        raise OptionError(
            f"%s={num_faces} is more than %s={max_faces}: raise %s, or leave it out",
            *("num_faces", "max_faces", "max_faces"),
        )

    def _asked(self, meshes: int, forward: dict[str, Any]) -> list[dict[str, Any]]:
        """What each mesh is asked to be, None where that is open; takes it out of the parameters, and gives them
        their `max_faces`."""
        numbers = asked_conditions(
            self.model.config, meshes, forward.pop("category", None), forward.pop("num_faces", None)
        )
        check_guidance(forward.get("guidance_scale"), bool(numbers))
        values = {name: [None if each == UNKNOWN else each for each in row.tolist()] for name, row in numbers.items()}
        if "category" in values:
            names = self.model.config.categories
            values["category"] = [None if each is None else names[each] for each in values["category"]]
        most = max((each for each in values.get("num_faces", []) if each is not None), default=None)
        forward["max_faces"] = self.most_faces(forward.get("max_faces"), most)
        return [{name: row[place] for name, row in values.items()} for place in range(meshes)]

    def _asked_for(self, asked: dict[str, Any], guidance_scale: float | None = None, **options: Any) -> dict[str, Any]:
        """What is told of a mesh: what it was asked to be, and how closely it had to follow."""
        asked = {name: value for name, value in asked.items() if value is not None}
        config = options.get("generation_config") or self.model.generation_config
        scale = config.guidance_scale if guidance_scale is None else guidance_scale
        return asked | {"guidance_scale": scale} if asked and scale not in (None, 1) else asked

    def _num_faces(self, row: dict) -> int:
        return self.tokenizer.format.prompt_faces(len(row["input_ids"]))

    def _check_room(self, row: dict, max_faces: int, num_faces: int | None) -> None:
        """Raises MeshError for a prompt that leaves no room for another face."""
        faces = self._num_faces(row)
        for name, most in (("max_faces", max_faces), ("num_faces", num_faces)):
            if most is not None and faces >= most:
                message = f"the prompt has {faces} faces already: %s must be more, not {most}"
                raise MeshError(message, "too_many_faces", options=(name,))

    def _generate_options(self, rows: list[dict], max_faces: int | None = None, **options: Any) -> dict[str, Any]:
        most = max_faces or self.default_max_faces
        new_tokens = self.tokenizer.format.num_tokens(most - min(map(self._num_faces, rows)), end=True)
        return {**self._sampling_options(**options), "max_faces": most, "max_new_tokens": new_tokens}

    def _sampling_options(self, **options: Any) -> dict[str, Any]:
        own = self.model.generation_config.to_diff_dict()
        defaults = {name: own.get(name, value) for name, value in (("do_sample", True), ("top_k", 0))}
        if not {**defaults, **options}["do_sample"]:
            defaults.pop("top_k")
        return {**defaults, **options}

    def _seeds(self, number: int, seed: Any = None, **options: Any) -> list[int | None]:
        """A seed for each mesh: as given, or drawn where meshes are sampled one by one, or None."""
        if seed is not None:
            return row_seeds(seed, number)
        if not self._samples_one_by_one(**options):
            return [None] * number
        return row_seeds(int(torch.randint(2**31, ())), number)

    def _samples_one_by_one(self, **options: Any) -> bool:
        return self._num_beams(**options) == 1 and self._sampling_options(**options)["do_sample"]

    def _num_beams(self, **options: Any) -> int:
        config = options.get("generation_config") or self.model.generation_config
        return options.get("num_beams", config.num_beams) or 1

    def _forward(self, inputs: dict[str, Any], max_faces: int | None = None, **options: Any) -> dict[str, Any]:
        rows = inputs["rows"]
        options = self._generate_options(rows, max_faces, **options)
        batch = self.tokenizer.pad(
            {"input_ids": [row["input_ids"] for row in rows]}, padding_side="left", return_tensors="pt"
        ).to(self.device)
        seeds = [row.get("seed") for row in rows]
        seed = None if None in seeds else seeds
        sequences = self.model.generate(**batch, seed=seed, **_conditions(rows), **options)
        most = options["max_faces"]
        longest = self.tokenizer.format.num_tokens(most, start=True, end=True)
        padding = [batch["input_ids"].shape[1] - len(row["input_ids"]) for row in rows]
        ids = [row[start : start + longest] for row, start in zip(sequences, padding, strict=True)]
        return {"ids": ids, "rows": rows, "max_faces": most}

    def postprocess(self, outputs: dict[str, Any]) -> list:
        return [
            self._decoded(ids, row, outputs["max_faces"])
            for ids, row in zip(outputs["ids"], outputs["rows"], strict=True)
        ]

    def _decoded(self, ids: Any, row: dict, most: int) -> Any:
        layout = self.tokenizer.format
        # Without the mesh grammar the tokens of an end face may be of another face.
        ids = np.asarray(torch.as_tensor(ids).cpu())[: layout.num_tokens(most, start=True) + 1]
        mesh = self.tokenizer.decode_mesh(ids)
        if row["bounds"] is not None and len(mesh.faces):
            mesh.vertices = denormalise(np.asarray(mesh.vertices), row["bounds"])
        mesh.metadata |= {"seed": row.get("seed"), "ended": layout.has_ended(ids, most)}
        if row.get("asked_for"):
            mesh.metadata["asked_for"] = row["asked_for"]
        return mesh


def _conditions(rows: list[dict]) -> dict[str, list]:
    """What the meshes of rows are asked to be, as `generate()` takes it."""
    return {name: [row["asked"][name] for row in rows] for name in (rows[0]["asked"] if rows else ())}


def _placed(faces: Iterator[np.ndarray], bounds: Any) -> Iterator[np.ndarray]:
    with closing(faces):
        for face in faces:
            yield denormalise(face, bounds)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _whole(name: str, value: Any) -> int:
    if not _is_whole(value):
        raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")
    return value
