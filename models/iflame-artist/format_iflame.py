"""How a mesh becomes a sequence: what each token of a face stands for, and which ids are no coordinates."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

UP_AXES = ("y", "z")
COORDINATES_PER_VERTEX = 3


@dataclass(frozen=True)
class MeshFormat:
    """The layout of sequences of meshes, and the ids in them.

    A sequence is a start face of start tokens alone, the faces of the mesh, and an end face of end tokens alone, each
    of `tokens_per_face` tokens: the vertices of a face one after the other, the coordinates of each in
    `coordinate_order`. Ids 0..R are the grid coordinates, R being `coordinate_resolution`; the special ids lie above.

    Args:
        name: under which the layout is known, a key of `MESH_FORMATS`.
        coordinate_order: the axes of a vertex's tokens, of a mesh whose y is up.
        vertices_per_face: C, the corners of every face.
        coordinate_resolution: R, the steps of the grid along the longest side of a mesh.
        reversed_winding: whether the vertices of every face after its first stand in reverse: in a triangle the
            second and the third are swapped.
        up_axis: the vertical axis, "y" or "z", of the meshes that sequences are made of and become.
        special_ids: of padding, start and end; by default the three ids after the coordinates.
    """

    name: str
    coordinate_order: str
    vertices_per_face: int
    coordinate_resolution: int = 128
    reversed_winding: bool = False
    up_axis: str = "y"
    special_ids: tuple[int, int, int] | None = None

    def __post_init__(self):
        if self.up_axis not in UP_AXES:
            raise ValueError(f"up_axis must be one of {', '.join(UP_AXES)}, got {self.up_axis!r}")

    @property
    def tokens_per_face(self) -> int:
        return self.vertices_per_face * COORDINATES_PER_VERTEX

    @property
    def level_strides(self) -> tuple[int, int, int]:
        """Tokens that one item of a level of the hourglass spans: a coordinate, a vertex, a face."""
        return (1, COORDINATES_PER_VERTEX, self.tokens_per_face)

    @property
    def pad_token_id(self) -> int:
        return self.special_ids[0] if self.special_ids else self.coordinate_resolution + 1

    @property
    def bos_token_id(self) -> int:
        return self.special_ids[1] if self.special_ids else self.coordinate_resolution + 2

    @property
    def eos_token_id(self) -> int:
        return self.special_ids[2] if self.special_ids else self.coordinate_resolution + 3

    @property
    def start_face(self) -> list[int]:
        return [self.bos_token_id] * self.tokens_per_face

    @property
    def end_face(self) -> list[int]:
        return [self.eos_token_id] * self.tokens_per_face

    def is_coordinate(self, ids: Any) -> Any:
        """Whether ids, a number or an array of them, are grid coordinates."""
        return (ids >= 0) & (ids <= self.coordinate_resolution)

    def may_precede_mesh(self, ids: Any) -> Any:
        """Whether ids, a number or an array of them, may stand before the first coordinate: padding and start."""
        return (ids == self.pad_token_id) | (ids == self.bos_token_id)

    # Of a number of tokens, or an array or tensor of such numbers.

    def is_whole(self, tokens: Any) -> Any:
        """Whether so many tokens, from the beginning of a sequence, end with a face."""
        return tokens % self.tokens_per_face == 0

    def whole_faces(self, tokens: Any) -> Any:
        """How many faces so many tokens hold from their first to their last token; start and end face count too."""
        return tokens // self.tokens_per_face

    def prompt_faces(self, tokens: Any) -> Any:
        """How many faces a mesh has whose sequence is so far so long, start face included."""
        return self.whole_faces(tokens) - 1

    def most_faces(self, tokens: Any) -> Any:
        """How many faces a mesh may have so that its sequence, with start and end face, is no longer than that."""
        return self.whole_faces(tokens) - 2

    def num_tokens(self, faces: Any, *, start: bool = False, end: bool = False) -> Any:
        """The length of so many faces, with or without start and end face."""
        return (faces + start + end) * self.tokens_per_face

    def has_ended(self, ids: Any, most: int) -> bool:
        """Whether ids (T,), from the start face on, come to an end before they have as many faces as they may have:
        after so many the end was the only way to go on."""
        ends = np.flatnonzero(np.asarray(ids) == self.eos_token_id)
        return len(ends) > 0 and self.prompt_faces(int(ends[0])) < most

    # Between corners and ids.

    def to_ids(self, corners: np.ndarray, *, start: bool = False, end: bool = False) -> np.ndarray:
        """Ids (T,) int64 of faces of grid coordinates (F, C corners, 3), y up, in the winding of meshes; with or
        without start and end face."""
        corners = self._reversed(corners) if self.reversed_winding else corners
        first, last = self.num_tokens(0, start=start), self.num_tokens(len(corners), start=start)
        ids = np.empty(self.num_tokens(len(corners), start=start, end=end), dtype=np.int64)
        ids[:first] = self.bos_token_id
        ids[first:last] = corners[..., ["xyz".index(axis) for axis in self.coordinate_order]].ravel()
        ids[last:] = self.eos_token_id
        return ids

    def to_corners(self, ids: np.ndarray) -> np.ndarray:
        """Grid coordinates (F, C corners, 3) int64, y up, in the winding of meshes, of the whole faces of coordinate
        ids (T,): the inverse of `to_ids`. A face that is not whole at the end is left out."""
        whole = ids[: self.num_tokens(self.whole_faces(len(ids)))].astype(np.int64)
        corners = whole.reshape(-1, self.vertices_per_face, COORDINATES_PER_VERTEX)
        corners = corners[..., [self.coordinate_order.index(axis) for axis in "xyz"]]
        return self._reversed(corners) if self.reversed_winding else corners

    def _reversed(self, corners: np.ndarray) -> np.ndarray:
        return corners[:, [0, *range(self.vertices_per_face - 1, 0, -1)]]


# The layouts that models are trained on, by the names that their config.json gives.
MESH_FORMATS = {each.name: each for each in (MeshFormat("zxy-faces", "zxy", vertices_per_face=3),)}
DEFAULT_MESH_FORMAT = "zxy-faces"


def known_format(name: str = DEFAULT_MESH_FORMAT, **settings: Any) -> MeshFormat:
    """The layout of that name, with the other arguments of a `MeshFormat`; raises ValueError for an unknown name."""
    if not isinstance(name, str) or name not in MESH_FORMATS:
        raise ValueError(f"mesh_format must be one of {', '.join(MESH_FORMATS)}, got {name!r}")
    return replace(MESH_FORMATS[name], **settings)
