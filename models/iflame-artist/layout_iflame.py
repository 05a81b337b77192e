"""
Rows: where the meshes of a batch begin and end.

A mesh begins at a whole face, so that what is known of the faces of a row says everything about its coordinates and
vertices. Padding on the left is one more mesh of its row, and so is the padding after the last mesh of a packed one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

# B batch, T tokens of a row, F faces of a row (the last one may be open), M meshes of all rows


class MeshBounds(NamedTuple):
    """Where meshes begin and end among the items (B, T) of one level."""

    meshes: torch.Tensor  # (B, T) number of the mesh of each item, never falling along a row
    # Of the meshes of all rows laid end to end; None where a compiled graph derives them, which knows no values.
    offsets: torch.Tensor | None = None  # (M + 1,) int32: where each begins, and the end
    offsets_on_host: torch.Tensor | None = None  # the same on the CPU
    longest: int | None = None  # items of the longest mesh


@dataclass(frozen=True, eq=False)
class RowLayout:
    """
    Which meshes lie in the rows of a batch, and where.

    It is made once: on the CPU by who packs the rows (`of_begins`), or by the model from `position_ids` or an
    `attention_mask`. The former costs no look at values on a device.

    Args:
        face_positions: (B, F) int64, the place of each face in its mesh.
        face_meshes: (B, F) int64, the number of its mesh in the batch, from 0 on.
        length: tokens of a row, T.
        strides: tokens that one item of each level spans, ending with those of a face.
        offsets: (levels, M + 1) int32, where at each level the meshes of all rows laid end to end begin, and the end;
            None where no value can be read.
        offsets_on_host: the same on the CPU, whatever the device of the others.
        longest: at each level the items of the longest mesh.
        attributes: tensors (M,) by name: what is known of each mesh, such as its category; -1 for padding.
    """

    face_positions: torch.Tensor
    face_meshes: torch.Tensor
    length: int
    strides: tuple[int, ...]
    offsets: torch.Tensor | None = None
    offsets_on_host: torch.Tensor | None = None
    longest: tuple[int, ...] | None = None
    attributes: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of_begins(
        cls,
        begins: torch.Tensor,
        length: int,
        strides: Sequence[int],
        on_host: np.ndarray | None = None,
        attributes: Mapping[str, torch.Tensor] | None = None,
    ) -> "RowLayout":
        """
        The layout of rows of `length` tokens of which `begins` (B, F) says at which faces a mesh begins; at the first
        one always does.

        Args:
            on_host: the same on the CPU; by default `begins` itself where it is there.

        Raises:
            ValueError: the number of faces is not that of `length` tokens, or attributes are not one a mesh.
        """
        faces = begins.shape[1]
        if faces != -(-length // strides[-1]):
            raise ValueError(f"rows of {length} tokens have {-(-length // strides[-1])} faces, got {faces}")
        index = torch.arange(faces, device=begins.device)
        begins = begins | (index == 0)
        positions = index - torch.where(begins, index, 0).cummax(dim=1).values
        meshes = begins.flatten().cumsum(dim=0).view(begins.shape) - 1
        if on_host is None and begins.device.type == "cpu" and not torch.compiler.is_compiling():
            on_host = begins.numpy()
        offsets = longest = None
        if on_host is not None:
            offsets = _offsets(on_host, length, strides)
            longest = tuple(np.diff(offsets).max(axis=1).tolist())
            offsets = torch.from_numpy(offsets)
            for name, values in (attributes or {}).items():
                if values.shape[:1] != (offsets.shape[1] - 1,):
                    raise ValueError(
                        f"{name} must be one a mesh, of {offsets.shape[1] - 1}, got the shape {tuple(values.shape)}"
                    )
        on_device = None if offsets is None else offsets.to(begins.device, non_blocking=True)
        return cls(positions, meshes, length, tuple(strides), on_device, offsets, longest, dict(attributes or {}))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of a row, (B, T)."""
        return self.face_positions.shape[0], self.length

    @property
    def num_meshes(self) -> int | None:
        """Meshes M of all rows, padding after or before others being one; None if no value can be read."""
        return None if self.offsets_on_host is None else self.offsets_on_host.shape[1] - 1

    def to(self, device: Any, non_blocking: bool = False) -> "RowLayout":
        """The same layout on another device; `offsets_on_host` stays."""

        def move(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        return self._map(move)

    def with_room(self, meshes: int) -> "RowLayout":
        """
        The same layout, filled up with empty meshes to so many, of which any may be as long as a row: what is told of
        it on the host holds for every layout of the same rows with at most as many meshes. Attributes of empty meshes
        are -1.

        Raises:
            ValueError: there are more already, or it is not known how many.
        """
        if self.num_meshes is None or meshes < self.num_meshes:
            raise ValueError(f"a layout of {self.num_meshes} meshes has no room among {meshes}")
        missing = meshes - self.num_meshes

        def filled(offsets: torch.Tensor) -> torch.Tensor:
            return torch.cat([offsets, offsets[:, -1:].expand(-1, missing)], dim=1)

        return replace(
            self,
            offsets=filled(self.offsets),
            offsets_on_host=filled(self.offsets_on_host),
            longest=tuple(self.length // stride for stride in self.strides),
            attributes={
                name: torch.cat([values, values.new_full((missing, *values.shape[1:]), -1)])
                for name, values in self.attributes.items()
            },
        )

    def pin_memory(self) -> "RowLayout":
        """The same layout in page-locked memory, from which a copy to a GPU waits for nothing."""
        return self._map(lambda tensor: None if tensor is None else tensor.pin_memory())

    def _map(self, function):
        return replace(
            self,
            face_positions=function(self.face_positions),
            face_meshes=function(self.face_meshes),
            offsets=function(self.offsets),
            attributes={name: function(values) for name, values in self.attributes.items()},
        )

    def positions(self, level: int = 0) -> torch.Tensor:
        """Places (B, items) of the items of a level in their meshes: of coordinates (0), vertices (1), faces (2)."""
        within = torch.arange(self.strides[-1] // self.strides[level], device=self.face_positions.device)
        places = self.face_positions[..., None] * len(within) + within
        return places.flatten(1)[:, : self.length // self.strides[level]]

    def last_starts(self) -> torch.Tensor:
        """(B,) token at which the mesh that ends each row begins."""
        tokens_per_face = self.strides[-1]
        open_tokens = (self.length - 1) % tokens_per_face
        return self.length - 1 - (self.face_positions[:, -1] * tokens_per_face + open_tokens)

    def bounds(self, level: int = 0) -> MeshBounds:
        """Where meshes begin and end among the items of a level."""
        meshes = self._of_items(self.face_meshes, level)
        if self.offsets_on_host is None:
            return MeshBounds(meshes)
        return MeshBounds(meshes, self.offsets[level], self.offsets_on_host[level], self.longest[level])

    def attribute(self, name: str, level: int = 0) -> torch.Tensor:
        """The attribute `name` of the mesh of each item of a level, (B, items, ...)."""
        return self.attributes[name][self._of_items(self.face_meshes, level)]

    def _of_items(self, of_faces, level):
        each = self.strides[-1] // self.strides[level]
        return of_faces.repeat_interleave(each, dim=1)[:, : self.length // self.strides[level]].contiguous()


def _offsets(begins: np.ndarray, length: int, strides: Sequence[int]) -> np.ndarray:
    """(levels, M + 1) int32: where meshes that begin at the faces `begins` (B, F) begin at each level, and the end."""
    rows, faces = begins.nonzero()
    levels = []
    for stride in strides:
        count = length // stride
        starts = rows * count + np.minimum(faces * (strides[-1] // stride), count)
        levels.append(np.append(starts, len(begins) * count))
    return np.stack(levels).astype(np.int32)


class FreshRows(NamedTuple):
    """Rows from their start on, as a mask and positions describe them."""

    layout: RowLayout | None  # None: every row is one mesh
    padding: torch.Tensor | None = None  # (B,) masked tokens that each row begins with; None: none
    has_begun: torch.Tensor | None = None  # (B,) False where a row is padding so far; None: nowhere
    ends_in_padding: bool = False  # some row does


def fresh_rows(
    tokens: torch.Tensor,
    strides: Sequence[int],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    has_cache: bool,
) -> FreshRows:
    """
    The layout that `attention_mask` (B, T) bool and `position_ids` (B, T) of rows from their start on mean.

    Args:
        tokens: (B, T, …) whatever is given for the tokens; only its shape and device are read.
        has_cache: padding on the left is a mesh of its own even where it is all that there is of the row.

    Raises:
        ValueError: for masks and positions that the model cannot honour.
    """
    batch, length = tokens.shape[:2]
    index = torch.arange(length, device=tokens.device)
    real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    begins = torch.zeros_like(real)
    if attention_mask is not None:
        real = attention_mask
        begins = real & ~F.pad(real[:, :-1], (1, 0))
    runs = begins.sum(dim=1)
    if position_ids is not None:
        begins = begins | (real & (position_ids == 0))
    begins = begins | (index == 0)
    has_begun, padding = real.any(dim=1), leading_zeros(real)
    faces = begins[:, :: strides[-1]]
    # A compiled graph cannot look at values, and takes every row for a packed one.
    if torch.compiler.is_compiling():
        return FreshRows(RowLayout.of_begins(faces, length, strides), padding)
    starts = torch.where(begins, index, 0).cummax(dim=1).values
    broken = (starts % strides[-1] != 0).any()
    uneven = real.new_zeros(()) if position_ids is None else (real & (position_ids != index - starts)).any()
    facts = [
        runs.max() > 1,
        (has_begun & ~real[:, -1]).any(),
        broken,
        uneven,
        ~has_begun.all(),
        (padding > 0).any(),
    ]
    # Reading a value waits for the device: once for all.
    seen = torch.cat([torch.stack(facts), faces.flatten()]).cpu().numpy()
    (has_gap, ends_in_padding, broken, uneven, is_padding, is_padded), on_host = seen[: len(facts)], seen[len(facts) :]
    if has_gap:
        raise ValueError("attention_mask has zeros between ones: only padding at the ends of a row can be masked")
    if broken:
        row, column = (starts % strides[-1] != 0).nonzero()[0].tolist()
        raise ValueError(not_whole_faces(int(starts[row, column]), row, strides[-1]))
    if uneven:
        raise ValueError("position_ids must count tokens from 0 in every mesh, without a gap")
    on_host = on_host.reshape(faces.shape)
    layout = None
    if on_host[:, 1:].any() or (is_padding and has_cache):
        layout = RowLayout.of_begins(faces, length, strides, on_host)
    return FreshRows(layout, padding if is_padded else None, has_begun if is_padding else None, bool(ends_in_padding))


def leading_zeros(real: torch.Tensor) -> torch.Tensor:
    """(B, T) booleans -> (B,) how many of each row are False before the first that is True."""
    return (real.cumsum(dim=1) == 0).sum(dim=1)


def not_whole_faces(token: int, row: int, tokens_per_face: int) -> str:
    return (
        f"a mesh must be padded, and packed after others, by whole faces ({tokens_per_face} tokens), got one that "
        f"begins at token {token} of row {row}"
    )
