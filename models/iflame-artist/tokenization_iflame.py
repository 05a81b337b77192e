"""Meshes to token ids and back."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import BatchEncoding, PreTrainedTokenizer

from .format_iflame import DEFAULT_MESH_FORMAT, MeshFormat, known_format
from .mesh_errors_iflame import MeshError, errors_name
from .mesh_files_iflame import declared_up_axis, import_trimesh, is_mesh, load_mesh
from .mesh_iflame import (
    MAX_RESOLUTION,
    canonicalise,
    dequantise,
    from_y_up,
    has_equal_corners,
    quantise,
    to_y_up,
    turn,
    weld,
)
from .mesh_iflame import normalise as normalise_vertices

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}  # in the order of their ids
MOST_FACES = 10_000  # a default of tokenizers, of which a model may hold fewer


class IFlameTokenizer(PreTrainedTokenizer):
    """Turns triangle meshes into token ids and back.

    Ids 0..R (R is the coordinate resolution, 128) are grid coordinates; R + 1 is the padding, R + 2 the start and
    R + 3 the end token. A mesh is a start face of nine start tokens, nine tokens for each face of its canonical form,
    and an end face of nine end tokens; a vertex is three tokens in the order z, x, y.

    Args:
        coordinate_resolution: R, the number of steps along the longest side of a mesh.
        up_axis: the vertical axis of the meshes given and returned, "y" or "z". Sequences run upwards along it. A dae
            file that declares another one is turned; other files are taken to have this one.
        reversed_winding: the second and third vertex of every face stand swapped in the sequences, as in those of
            the original iFlame code. For checkpoints trained on such sequences; meshes are the same either way.
        mesh_format: the layout of sequences, a key of `format_iflame.MESH_FORMATS`.
        kwargs: as of any transformers tokenizer.

    `format`, a `MeshFormat`, holds all of this and does the arithmetic of tokens and faces. Calling the tokenizer
    takes meshes (see `__call__`) or text; `decode` gives text, `decode_mesh` meshes.
    """

    vocab_files_names: dict[str, str] = {}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        coordinate_resolution: int = 128,
        up_axis: str = "y",
        reversed_winding: bool = False,
        mesh_format: str = DEFAULT_MESH_FORMAT,
        **kwargs: Any,
    ):
        if not isinstance(coordinate_resolution, int) or not 1 <= coordinate_resolution <= MAX_RESOLUTION:
            raise ValueError(
                f"coordinate_resolution must be a whole number from 1 to {MAX_RESOLUTION}, "
                f"got {coordinate_resolution!r}"
            )
        self.format: MeshFormat = known_format(
            mesh_format,
            coordinate_resolution=coordinate_resolution,
            up_axis=up_axis,
            reversed_winding=bool(reversed_winding),
        )
        self._tokens = [str(value) for value in range(coordinate_resolution + 1)] + list(SPECIAL_TOKENS.values())
        self._ids = {token: index for index, token in enumerate(self._tokens)}

        for name, token in SPECIAL_TOKENS.items():
            if str(kwargs.setdefault(name, token)) != token:
                raise ValueError(f"{name} of an IFlameTokenizer is always {token}, got {kwargs[name]}")
        kwargs["added_tokens_decoder"] = self._saved_tokens(kwargs.get("added_tokens_decoder", {}))
        kwargs.setdefault("special_tokens_pattern", "none")
        kwargs.setdefault("model_max_length", self.format.num_tokens(MOST_FACES))
        super().__init__(
            coordinate_resolution=coordinate_resolution,
            up_axis=up_axis,
            reversed_winding=reversed_winding,
            mesh_format=mesh_format,
            **kwargs,
        )

    def _saved_tokens(self, saved: dict[int, Any]) -> dict[int, Any]:
        """Added tokens of a saved tokenizer; the special ones only where they were saved at this resolution, since
        their ids follow from it and transformers would keep the saved ids."""
        if all(self._ids.get(str(token), index) == index for index, token in saved.items()):
            return saved
        added = [str(token) for token in saved.values() if str(token) not in self._ids]
        if added:
            raise ValueError(f"coordinate_resolution cannot change: the saved tokenizer has added tokens {added}")
        return {}

    @property
    def coordinate_resolution(self) -> int:
        return self.format.coordinate_resolution

    @property
    def up_axis(self) -> str:
        return self.format.up_axis

    @up_axis.setter
    def up_axis(self, axis: str) -> None:
        self.format = replace(self.format, up_axis=axis)

    @property
    def reversed_winding(self) -> bool:
        return self.format.reversed_winding

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self._added_tokens_encoder

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """No files: the vocabulary follows from `coordinate_resolution`."""
        return ()

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise ValueError(
                    f"{word!r} is no token: text is made of the numbers 0 to {self.coordinate_resolution} and "
                    f"{', '.join(SPECIAL_TOKENS.values())}; the name of a mesh file ends as in chair.obj"
                )
        return words

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < len(self._tokens):
            raise ValueError(f"id {index} is not among the {len(self._tokens)} of the vocabulary")
        return self._tokens[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def encode_mesh(
        self,
        mesh: Any,
        *,
        add_start: bool = True,
        add_end: bool = True,
        max_faces: int | None = None,
        normalise: bool = True,
        bounds: Any = None,
    ) -> list[int]:
        """Token ids of one mesh: start face, faces in canonical order, end face; a multiple of nine.

        Args:
            mesh: anything `load_mesh` takes: the path of a mesh file, a Trimesh, a Scene, a tuple (vertices, faces).
            add_start: begin with the start face.
            add_end: close with the end face; without it the ids are a prompt that a model goes on from.
            max_faces: refuse a mesh with more faces than this after quantisation.
            normalise: centre the mesh and scale its longest side to 1. Otherwise it stays where it is, which must be
                within [-0.5, 0.5] on every axis; for a part of a generated mesh.
            bounds: lowest and highest corner (2, 3) of the box around the whole mesh that this is a part of, in its
                units and axes; takes the place of the mesh's own bounding box. A model goes on upwards from a prompt
                and cannot leave the box: a part normalised by itself leaves no room above it.

        Raises MeshError, a ValueError with a `kind`, naming the file where there is one, for what is no usable mesh:
        unreadable, empty, flat to a point, coordinates not finite, indices out of range, no face left after
        quantisation, too many faces (with their number); ValueError for bounds that are none; FileNotFoundError for a
        missing file.
        """
        vertices, faces = load_mesh(mesh)
        declared = declared_up_axis(mesh) if isinstance(mesh, (str, os.PathLike)) else None
        with errors_name(mesh):
            if bounds is not None and not normalise:
                raise ValueError("bounds are what a mesh is normalised by: leave out normalise=False, or bounds")
            if normalise:
                vertices = normalise_vertices(vertices, bounds)
            elif np.abs(vertices).max() > 0.5 + 0.5 / self.coordinate_resolution:
                raise MeshError("with normalise=False all coordinates must lie in [-0.5, 0.5]", "out_of_bounds")
            vertices = turn(vertices, declared or self.up_axis, self.up_axis)
            ids = self.encode_arrays(vertices, faces, add_start=add_start, add_end=add_end, max_faces=max_faces)
        return ids.tolist()

    def encode_arrays(
        self,
        vertices: np.ndarray,
        faces: np.ndarray,
        *,
        add_start: bool = True,
        add_end: bool = True,
        max_faces: int | None = None,
    ) -> np.ndarray:
        """Token ids (T,) int64 of vertices (V, 3) that are already within [-0.5, 0.5] and faces (F, 3).

        What `encode_mesh` does after loading and normalising, for loaders that augment in between. The arrays are
        taken as valid (`load_mesh` checks them); coordinates outside are clipped. Raises MeshError if no face is
        left after quantisation, or more than `max_faces`.
        """
        grid = quantise(to_y_up(vertices, self.up_axis), self.coordinate_resolution)
        grid, faces = canonicalise(grid, faces)
        if len(faces) == 0:
            message = f"no face is left after quantisation to {self.coordinate_resolution} steps"
            raise MeshError(message, "no_face_left")
        if max_faces is not None and len(faces) > max_faces:
            raise MeshError(
                f"the mesh has {len(faces)} faces after quantisation, more than {max_faces}: "
                "simplify it first or raise max_faces",
                "too_many_faces",
            )
        return self.format.to_ids(grid[faces], start=add_start, end=add_end)

    def decode_arrays(self, ids: Any) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V, 3) float64 in [-0.5, 0.5] and faces (F, 3) int64 of one sequence of ids.

        Takes a list, an array or a tensor of whole numbers, with anything in it that a model can emit: padding and
        start tokens before the first coordinate are skipped, the whole faces before the first id that is no coordinate
        are kept, and of these, degenerate and repeated ones dropped. Equal vertices are merged; faces keep their order
        and winding. What has no face gives empty arrays. Raises ValueError for ids that are not whole numbers or not
        one sequence.
        """
        grid, faces = weld(self._corners(ids))
        return self._coordinates(grid), faces

    def _corners(self, ids: Any) -> np.ndarray:
        """Grid points (F, 3 corners, 3) int64 of the whole faces in a sequence of ids, y up, winding as in meshes."""
        ids = _to_array(ids)
        if ids.ndim != 1 or (ids.size > 0 and ids.dtype.kind not in "iu"):
            raise ValueError(f"ids must be one sequence of whole numbers, got {ids.dtype} of the shape {ids.shape}")
        ids = ids[_first(~self.format.may_precede_mesh(ids)) :]
        return self.format.to_corners(ids[: _first(~self.format.is_coordinate(ids))])

    def _coordinates(self, grid: np.ndarray) -> np.ndarray:
        """Grid points (V, 3), y up, as coordinates (V, 3) in the axes of meshes."""
        return from_y_up(dequantise(grid, self.coordinate_resolution), self.up_axis)

    def decode_mesh(self, ids: Any) -> "trimesh.Trimesh":  # noqa: F821
        """A welded `trimesh.Trimesh` within [-0.5, 0.5] of one sequence of ids: `decode_arrays` as a mesh.

        Its `metadata["dropped_faces"]` counts the faces of the sequence that the mesh lacks, by reason:
        {"degenerate": two equal corners, "repeated": the same three vertices as an earlier face, in any winding}.
        With `len(mesh.faces)` they are all whole faces of the sequence.

        Without a whole face the mesh is empty. Raises ValueError for ids that are not whole numbers or not one
        sequence, ImportError where trimesh is missing.
        """
        corners = self._corners(ids)
        grid, faces = weld(corners)
        degenerate = int(has_equal_corners(corners).sum())
        dropped = {"degenerate": degenerate, "repeated": len(corners) - degenerate - len(faces)}
        return import_trimesh().Trimesh(
            vertices=self._coordinates(grid), faces=faces, process=False, metadata={"dropped_faces": dropped}
        )

    def batch_decode_mesh(self, ids: Any) -> "list[trimesh.Trimesh]":  # noqa: F821
        """`decode_mesh` of each row of ids: a list of sequences, or an array or tensor (B, T)."""
        return [self.decode_mesh(row) for row in (ids if isinstance(ids, (list, tuple)) else _to_array(ids))]

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Ids and attention mask of a mesh or a list of meshes, or of text.

        A mesh is anything `encode_mesh` takes; of strings, those that end in the suffix of a mesh file. Of the
        arguments every tokenizer has, meshes know `add_special_tokens` (start and end face), `padding`, `truncation`,
        `max_length`, `pad_to_multiple_of`, `padding_side`, `return_tensors`, `return_attention_mask` and `verbose`;
        beside these, `add_end=False` leaves out the end face alone, for prompts that a model goes on from, and
        `normalise` and `bounds` are as of `encode_mesh`, the same for all meshes.

        Rows are padded by whole faces. `truncation=True` keeps as many whole faces as `max_length` holds from the
        front; the end face goes first, since a mesh that was cut has not ended. Text, such as "<bos> 5 7", is taken
        word by word; nothing is added to it.

        Raises ValueError for what is neither, for a list of both, for lengths that would pad in mid-face, and as
        `encode_mesh` does.
        """
        is_batch = isinstance(text, (list, tuple)) and not is_mesh(text)
        items = list(text) if is_batch else [text]
        are_meshes = [is_mesh(item) for item in items]
        if not any(are_meshes):
            for item in items:
                if item is not None and not isinstance(item, (str, int, list, tuple)):
                    raise ValueError(
                        f"neither a mesh nor text: {type(item).__name__}; a mesh is a path, a Trimesh, a Scene or a "
                        "tuple (vertices, faces)"
                    )
            return super().__call__(text, *args, **kwargs)
        if not all(are_meshes):
            raise ValueError("a list must hold meshes alone or text alone")
        if args:
            raise ValueError("with meshes every other argument is given by name")
        return self._encode_meshes(items, is_batch, **kwargs)

    def _encode_meshes(
        self,
        meshes: list[Any],
        is_batch: bool,
        *,
        add_special_tokens: bool = True,
        add_end: bool | None = None,
        normalise: bool = True,
        bounds: Any = None,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        padding, truncation, max_length, _ = self._get_padding_truncation_strategies(
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            verbose=verbose,
        )
        if padding != "do_not_pad":
            lengths = {"pad_to_multiple_of": pad_to_multiple_of}
            if padding == "max_length":
                lengths["max_length"] = max_length
            for name, length in lengths.items():
                if length is not None and not self.format.is_whole(length):
                    raise ValueError(
                        f"meshes are padded by whole faces: {name} must be a multiple of "
                        f"{self.format.tokens_per_face}, got {length}"
                    )
        add_end = add_special_tokens if add_end is None else add_end
        rows = []
        for index, mesh in enumerate(meshes):
            with errors_name(f"mesh {index} of the list" if is_batch else None):
                ids = self.encode_mesh(
                    mesh, add_start=add_special_tokens, add_end=add_end, normalise=normalise, bounds=bounds
                )
                rows.append(ids)
        if truncation != "do_not_truncate":
            kept = self.format.num_tokens(self.format.whole_faces(max_length))
            if kept == 0:
                raise ValueError(
                    f"max_length must hold a face, {self.format.tokens_per_face} tokens, got {max_length}"
                )
            rows = [row[:kept] for row in rows]
        batch = self.pad(
            {"input_ids": rows},
            padding=padding,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
            verbose=verbose,
        )
        if is_batch or return_tensors is not None:
            return batch
        return BatchEncoding({name: rows[0] for name, rows in batch.items()})


def _to_array(ids: Any) -> np.ndarray:
    if hasattr(ids, "detach"):
        ids = ids.detach().cpu()
    try:
        return np.asarray(ids)
    except ValueError as error:
        raise ValueError("ids must be one sequence of whole numbers") from error


def _first(is_hit: np.ndarray) -> int:
    """Index of the first True, or the length."""
    return int(is_hit.argmax()) if is_hit.any() else len(is_hit)


IFlameTokenizer.register_for_auto_class("AutoTokenizer")
