"""The parts of procedural meshes: closed solids with outward winding, draws of their sizes, places to put them.

Coordinates are x (right), y (up), z (to the viewer). A solid is a list of points (x, y, z) and a list of triangles,
counter-clockwise seen from outside. Plain lists: at a few dozen points they are built faster than arrays.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

GRID = 4
Choice = TypeVar("Choice")
Point = tuple[float, float, float]
Triangle = tuple[int, int, int]
Solid = tuple[list[Point], list[Triangle]]
Span = tuple[float, float]
Outline = list[tuple[float, float]]


def ring(sides: int, radius: float, x: float = 0, z: float = 0) -> Outline:
    """Corners (x, z) of a regular polygon, moved to the grid; its flat sides are `radius` from the middle."""
    reach = radius / math.cos(math.pi / sides) / GRID
    angles = [math.pi * (2 * side + 1) / sides for side in range(sides)]
    return [(x + GRID * round(reach * math.cos(angle)), z + GRID * round(reach * math.sin(angle))) for angle in angles]


def rectangle(x: Span, z: Span) -> Outline:
    """Corners (x, z) of a rectangle, in the order of `ring`."""
    return [(x[1], z[1]), (x[0], z[1]), (x[0], z[0]), (x[1], z[0])]


def loft(*outlines: tuple[float, Outline]) -> Solid:
    """The solid between convex outlines with equally many corners, given as (y, outline) from bottom to top.

    Outlines may be degenerate: one that is a point makes the tip of a cone, one that is a line the ridge of a roof.
    Corners are merged where they coincide.
    """
    sides = len(outlines[0][1])
    numbers: dict[Point, int] = {}
    rings = [[numbers.setdefault((x, y, z), len(numbers)) for x, z in outline] for y, outline in outlines]
    polygons = [rings[0], rings[-1][::-1]]
    for below, above in zip(rings, rings[1:], strict=False):
        polygons += [(below[side], below[side - 1], above[side - 1], above[side]) for side in range(sides)]
    points = list(numbers)
    return points, [triangle for polygon in polygons for triangle in _fan(points, polygon)]


def box(x: Span, y: Span, z: Span) -> Solid:
    """An axis-aligned box."""
    outline = rectangle(x, z)
    return loft((y[0], outline), (y[1], outline))


def prism(outline: Outline, y: Span) -> Solid:
    """An upright prism."""
    return loft((y[0], outline), (y[1], outline))


def spire(outline: Outline, y: Span) -> Solid:
    """A pyramid or cone whose tip stands above the middle of the outline."""
    middle = tuple(sum(corner[axis] for corner in outline) / len(outline) for axis in (0, 1))
    return loft((y[0], outline), (y[1], [middle] * len(outline)))


def ridge(x: Span, z: Span, along: str, hip: float = 0) -> Outline:
    """The ridge line of a roof on a rectangle, `along` "x" or "z", its ends `hip` inside the eaves (0: a gable)."""
    if along == "x":
        middle = (z[0] + z[1]) / 2
        return rectangle((x[0] + hip, x[1] - hip), (middle, middle))
    middle = (x[0] + x[1]) / 2
    return rectangle((middle, middle), (z[0] + hip, z[1] - hip))


def roof(x: Span, y: Span, z: Span, along: str, hip: float = 0) -> Solid:
    """A gabled or hipped roof between the heights `y`; see `ridge`."""
    return loft((y[0], rectangle(x, z)), (y[1], ridge(x, z, along, hip)))


def merge(solids: Iterable[Solid]) -> Solid:
    """All points and triangles of several solids; points of different solids stay apart."""
    points: list[Point] = []
    triangles: list[Triangle] = []
    for solid_points, solid_triangles in solids:
        first = len(points)
        points += solid_points
        triangles += [(a + first, b + first, c + first) for a, b, c in solid_triangles]
    return points, triangles


def pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    """One of `choices`, all equally likely."""
    return choices[int(rng.integers(len(choices)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    """True with the given probability."""
    return bool(rng.random() < probability)


def around(middle: float, half: float) -> Span:
    """The span from `middle` - `half` to `middle` + `half`."""
    return middle - half, middle + half


def corners(x: float, z: float) -> Outline:
    """The four places (+-x, +-z)."""
    return [(-x, -z), (x, -z), (-x, z), (x, z)]


def spaced(low: float, high: float, count: int) -> list[float]:
    """`count` places from `low` to `high`, evenly spaced as far as the grid allows."""
    return [GRID * round((low + (high - low) * place / (count - 1)) / GRID) for place in range(count)]


def widest(sides: int) -> int:
    """The `ring` radius at which the longest extent is 128: the corners of a hexagon reach further than its sides."""
    return 56 if sides == 6 else 64


def _fan(points: list[Point], polygon: Sequence[int]) -> list[Triangle]:
    """Triangles of a convex polygon around its lowest corner (by y, x, z, the order in which meshes are written), so
    that both halves of a quad follow each other in the sequence."""
    distinct = [corner for place, corner in enumerate(polygon) if corner != polygon[place - 1]]
    if len(distinct) < 3:
        return []
    heights = [(points[corner][1], points[corner][0], points[corner][2]) for corner in distinct]
    lowest = heights.index(min(heights))
    distinct = distinct[lowest:] + distinct[:lowest]
    return [(distinct[0], distinct[place], distinct[place + 1]) for place in range(1, len(distinct) - 1)]
