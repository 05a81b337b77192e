"""What a mesh is asked to be: its category and its number of faces, as they enter the network and generate()."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LogitsProcessor

from .layout_iflame import RowLayout
from .mesh_errors_iflame import OptionError

# B batch, T tokens of a row, M meshes of all rows, C channels

# Per-mesh attributes of rows, and arguments of the model and of generate().
CONDITIONS = ("category", "num_faces")
UNKNOWN = -1  # of a mesh of which it is not known, or not asked for
POINTS_PER_OCTAVE = 4  # of the table of numbers of faces


def known_conditions(config: Any) -> tuple[str, ...]:
    """Of CONDITIONS those that a model of this config was made for."""
    has = {"category": bool(config.categories), "num_faces": config.num_faces_range is not None}
    return tuple(name for name in CONDITIONS if has[name])


class IFlameConditions(nn.Module):
    """
    What is added to the embeddings of the nine tokens of a start face: a row of a table for the category, and one that
    lies between the two rows of a table of numbers of faces, which are evenly spaced in their logarithm.

    Nothing is added for what is unknown, so that a model that now and then was trained without conditions (as in
    classifier-free guidance, arXiv 2207.12598) also generates without.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.category = self.num_faces = None
        if config.categories:
            self.category = nn.Embedding(len(config.categories), config.hidden_size)
        if config.num_faces_range is not None:
            fewest, most = config.num_faces_range
            self.fewest, self.octaves = fewest, max(math.log2(most / fewest), 1e-6)
            self.num_faces = nn.Embedding(math.ceil(self.octaves * POINTS_PER_OCTAVE) + 1, config.hidden_size)

    def forward(self, conditions: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """(M,) category, a number in `config.categories`, and (M,) number of faces, each -1 where unknown; either or
        both may be missing -> (M, C), or None without any."""
        added = None
        for name, values in conditions.items():
            known = (values != UNKNOWN)[:, None]
            each = self.category(values.clamp(min=0)) if name == "category" else self._between(values)
            each = torch.where(known, each, torch.zeros_like(each))
            added = each if added is None else added + each
        return added

    def _between(self, num_faces: torch.Tensor) -> torch.Tensor:
        last = self.num_faces.num_embeddings - 1
        place = (num_faces.clamp(min=1).float() / self.fewest).log2() * (last / self.octaves)
        place = place.clamp(0, last)
        lower = place.long().clamp(max=last - 1)
        share = (place - lower)[:, None]
        return torch.lerp(self.num_faces(lower), self.num_faces(lower + 1), share.to(self.num_faces.weight.dtype))


def add_conditions(
    embeds: torch.Tensor, starts: torch.Tensor, of_meshes: torch.Tensor, layout: RowLayout | None
) -> torch.Tensor:
    """
    Embeddings (B, T, C) with what is known of each mesh, (M, C), added where `starts` (B, T) is True; without a
    layout each row is a mesh.
    """
    if layout is None:
        of_tokens = of_meshes[:, None]
    else:
        of_faces = F.embedding(layout.face_meshes, of_meshes)
        of_tokens = of_faces.repeat_interleave(layout.strides[-1], dim=1)[:, : layout.length]
    return torch.addcmul(embeds, starts[..., None].to(embeds.dtype), of_tokens.to(embeds.dtype))


def conditions_of_rows(
    config: Any, category: torch.Tensor | None, num_faces: torch.Tensor | None, layout: RowLayout | None, rows: int
) -> dict[str, torch.Tensor]:
    """
    What the model is told of the meshes of its rows: the attributes of a layout, or tensors (B,) beside rows of one
    mesh each.

    Raises:
        ValueError: both are given, one that the model does not know, or one of another shape.
    """
    given = {"category": category, "num_faces": num_faces}
    given = {name: values for name, values in given.items() if values is not None}
    known = known_conditions(config)
    for name, values in given.items():
        if name not in known:
            raise _not_known(name, known)
        if not isinstance(values, torch.Tensor) or values.is_floating_point() or values.shape != (rows,):
            raise ValueError(
                f"{name} must be a tensor of {rows} whole numbers, one a row ({UNKNOWN}: unknown); names and plain "
                "numbers are for generate()"
            )
    if layout is not None:
        if given:
            raise ValueError(f"{', '.join(given)} of packed rows belong to the layout's attributes, one for each mesh")
        given = {name: layout.attributes[name] for name in known if name in layout.attributes}
    return given


def asked_conditions(config: Any, rows: int | None, category: Any = None, num_faces: Any = None) -> dict[str, Any]:
    """
    Tensors (B,) for what generate() is asked for: one value for all meshes, or a list of one for each, in which None
    leaves it open.

    Args:
        rows: B; None: as many as the lists have.
        category: names out of `config.categories`.
        num_faces: whole numbers within `config.num_faces_range`.

    Raises:
        ValueError: for what the model was not trained with, in words that say with what it was.
    """
    known = known_conditions(config)
    lists = {}
    for name, values in (("category", category), ("num_faces", num_faces)):
        if isinstance(values, torch.Tensor):
            values = [None if each == UNKNOWN else each for each in values.flatten().tolist()]
            if name == "category" and config.categories:
                values = [None if each is None else _at(config.categories, each) for each in values]
        if values is None:
            continue
        if name not in known:
            raise _not_known(name, known)
        lists[name] = list(values) if isinstance(values, (list, tuple, range, np.ndarray)) else values
    lengths = {name: len(values) for name, values in lists.items() if isinstance(values, list)}
    if rows is None:
        rows = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if length != rows:
            raise ValueError(f"{rows} meshes need as many values of {name}, got {length}: give one for each, or one")
    to_number = {"category": _category_number, "num_faces": _faces_number}
    asked = {}
    for name, values in lists.items():
        values = values if isinstance(values, list) else [values] * rows
        numbers = [UNKNOWN if each is None else to_number[name](config, each) for each in values]
        asked[name] = torch.tensor(numbers, dtype=torch.long)
    return asked


def _at(categories: list[str], number: int) -> Any:
    return categories[number] if 0 <= number < len(categories) else number


def _category_number(config: Any, category: Any) -> int:
    if category not in config.categories:
        raise ValueError(
            f"this model does not know the category {category!r}: it was trained with {', '.join(config.categories)}"
        )
    return config.categories.index(category)


def _faces_number(config: Any, number: Any) -> int:
    fewest, most = config.num_faces_range
    is_whole = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    if not is_whole or not fewest <= number <= most:
        got = repr(number).replace("%", "%%")
        raise OptionError(f"%s must be a whole number from {fewest} to {most}, as of training; got {got}", "num_faces")
    return int(number)


def _not_known(name: str, known: tuple[str, ...]) -> OptionError:
    if not known:
        return OptionError("this model takes no %s: it was trained without any", name)
    names = ", ".join("%s" for _ in known)
    return OptionError(f"this model takes no %s: the conditions that it was trained with are {names}", name, *known)


def check_guidance(scale: Any, is_asked: bool) -> None:
    """Raises OptionError for a `guidance_scale` that cannot be, or with which nothing is asked for."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale < math.inf:
        got = repr(scale).replace("%", "%%")
        raise OptionError(f"%s must be a number from 0 on, got {got}; 1 is without guidance", "guidance_scale")
    if scale != 1 and not is_asked:
        raise OptionError(
            "%s is of a condition: give %s or %s too, or leave it out", "guidance_scale", "category", "num_faces"
        )


def guided_pairs(generation_config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether generate() makes two rows for each mesh, one without conditions; `inputs` are the model's arguments."""
    scale = generation_config.guidance_scale
    return scale is not None and scale != 1 and any(inputs.get(name) is not None for name in CONDITIONS)


def in_pairs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The model's arguments for rows each of which is followed by itself without conditions."""
    paired = dict(inputs)
    for name in ("attention_mask", "position_ids", *CONDITIONS):
        if inputs.get(name) is not None:
            paired[name] = inputs[name].repeat_interleave(2, dim=0)
    for name in CONDITIONS:
        if paired.get(name) is not None:
            paired[name][1::2] = UNKNOWN
    return paired


class GuidanceLogitsProcessor(LogitsProcessor):
    """
    Classifier-free guidance (arXiv 2207.12598, in the form of arXiv 2306.17806) of pairs of rows: log-probabilities u
    of the row without conditions and c of the row with them become u + scale (c - u), for both.
    """

    def __init__(self, scale: float):
        self.scale = scale

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (2B, V) -> (2B, V), in which each two rows are the same."""
        with_them, without = scores.float().log_softmax(dim=-1).unflatten(0, (-1, 2)).unbind(1)
        return (without + self.scale * (with_them - without)).repeat_interleave(2, dim=0)


class PairsStreamer:
    """Hands on the ids of the rows with conditions alone."""

    def __init__(self, streamer: Any):
        self.streamer = streamer

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value[::2])

    def end(self) -> None:
        self.streamer.end()
