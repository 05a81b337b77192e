"""Procedural buildings: one function a kind; see `procedural_furniture` for their places and sizes."""

import numpy as np

from training.procedural_parts import (
    Solid,
    around,
    box,
    chance,
    corners,
    loft,
    pick,
    prism,
    rectangle,
    ridge,
    ring,
    roof,
    spaced,
    spire,
)


def _openings(rng: np.random.Generator, half: float, storeys: int, storey: float, front: float) -> list[Solid]:
    """A door and windows, 2 units thick, on the wall x = -half..half at z = front."""
    face = (front, front + 2)
    door = pick(rng, (6, 7, 8))
    parts = [box((-door, door), (0, storey - 8), face)]
    columns = 4 if storeys == 1 and chance(rng, 0.3) else 2
    wide = pick(rng, (5, 6, 7))
    places = spaced(-half, half, columns + 3)[1:-1]
    places = [place for place in places if abs(place) > door + wide] if columns == 4 else [-half / 2 - 4, half / 2 + 4]
    tall = pick(rng, (10, 12))
    for level in range(storeys):
        sill = level * storey + storey - 8 - tall
        parts += [box(around(round(x), wide), (sill, sill + tall), face) for x in places]
    return parts


def house(rng: np.random.Generator) -> list[Solid]:
    storeys = pick(rng, (1, 1, 2))
    storey = pick(rng, range(32, 45, 4)) if storeys == 1 else pick(rng, (28, 32))
    eaves, overhang = storeys * storey, pick(rng, (4, 6, 8))
    half_x, half_z = 64 - overhang, pick(rng, range(32, 53, 4))
    top = eaves + pick(rng, range(24, 49, 4))
    along, hip = pick(rng, (("x", 0), ("x", 0), ("x", 24), ("z", 0)))
    outer = ((-64, 64), (-half_z - overhang, half_z + overhang))
    parts = [
        box((-half_x, half_x), (0, eaves), (-half_z, half_z)),
        roof(outer[0], (eaves, top), outer[1], along, hip),
    ]
    if not chance(rng, 0.1):
        parts += _openings(rng, half_x, storeys, storey, half_z)
    if chance(rng, 0.5):
        x, z = pick(rng, (-32, 32)), -12
        parts.append(box(around(x, 5), (eaves + 8, top + pick(rng, (4, 8))), around(z, 5)))
    return parts


def tower(rng: np.random.Generator) -> list[Solid]:
    style = pick(rng, ("castle", "spire", "skyscraper", "lighthouse"))
    radius = pick(rng, range(20, 33, 2))
    if style == "skyscraper":
        count, step = pick(rng, (2, 3, 4)), pick(rng, (3, 4, 5))
        bend, crown = pick(rng, (0.6, 0.8, 1.0)), pick(rng, range(92, 113, 4))
        heights = [2 * round(crown * (place / count) ** bend / 2) for place in range(count + 1)]
        parts = [
            prism(ring(4, radius - step * place), (low, high))
            for place, (low, high) in enumerate(zip(heights[:-1], heights[1:], strict=True))
        ]
        return parts + [spire(ring(4, pick(rng, (2, 3, 4))), (heights[-1], 128))]
    sides = pick(rng, (4, 6, 8))
    if style == "lighthouse":
        shaft, gallery = pick(rng, range(76, 93, 4)), pick(rng, (4, 6))
        neck, lantern = radius - pick(rng, (6, 8, 10)), pick(rng, (12, 16))
        return [
            loft((0, ring(sides, radius)), (shaft, ring(sides, neck))),
            prism(ring(sides, neck + 4), (shaft, shaft + gallery)),
            prism(ring(sides, neck - 4), (shaft + gallery, shaft + gallery + lantern)),
            spire(ring(sides, neck), (shaft + gallery + lantern, 128)),
        ]
    wide = radius + pick(rng, (4, 6))
    wall = pick(rng, range(72, 101, 4))
    parts = [prism(ring(sides, radius), (0, wall))]
    if style == "spire":
        parts.append(spire(ring(sides, wide), (wall, 128)))
    else:
        sides = 4
        parts = [prism(ring(sides, radius), (0, 100)), prism(ring(sides, wide), (100, 116))]
        merlon = pick(rng, (5, 6, 7))
        parts += [
            box(around(x, merlon), (116, 128), around(z, merlon)) for x, z in corners(wide - merlon, wide - merlon)
        ]
        if chance(rng, 0.5):
            parts += [box(around(x, 4), (116, 128), around(z, 4)) for x, z in ((0, wide - 4), (0, 4 - wide))]
    if sides == 4:
        parts.append(box((-6, 6), (0, pick(rng, range(20, 33, 4))), (radius, radius + 2)))
        for sill in range(44, wall - 16, 24):
            parts.append(box((-4, 4), (sill, sill + 12), (radius, radius + 2)))
    return parts


def church(rng: np.random.Generator) -> list[Solid]:
    nave, half, wall = pick(rng, range(20, 33, 4)), pick(rng, (14, 16, 18)), pick(rng, range(32, 45, 4))
    top, tower = wall + pick(rng, range(20, 33, 4)), pick(rng, range(72, 97, 4))
    front = pick(rng, (40, 44, 48))
    back = front - pick(rng, range(64, 89, 4))
    parts = [
        box((-nave, nave), (0, wall), (back + 2, front)),
        roof((-nave - 4, nave + 4), (wall, top), (back, front), "z"),
        box((-half, half), (0, tower), (front, front + 2 * half)),
        spire(rectangle(around(0, half + 2), (front - 2, front + 2 * half + 2)), (tower, 128)),
        box((-6, 6), (0, 24), (front + 2 * half, front + 2 * half + 2)),
    ]
    extra = pick(rng, ("none", "transept", "windows"))
    if extra == "transept":
        arm, middle, wide = nave + pick(rng, (10, 14, 18)), back + pick(rng, (28, 32, 36)), pick(rng, (10, 12))
        parts.append(box((-arm, arm), (0, wall - 4), around(middle, wide)))
        parts.append(roof((-arm - 2, arm + 2), (wall - 4, top - 6), around(middle, wide + 2), "x"))
    if extra == "windows":
        places = spaced(back + 20, front - 12, 2)
        for x in ((-nave - 2, -nave), (nave, nave + 2)):
            parts += [box(x, (12, wall - 8), around(z, 4)) for z in places]
    return parts


def _gatehouse(rng: np.random.Generator) -> list[Solid]:
    radius, sides = pick(rng, (16, 18, 20, 22)), pick(rng, (4, 6, 8))
    place, thick = 62 - radius, pick(rng, (8, 10, 12))
    wall, tower = pick(rng, range(44, 61, 4)), pick(rng, range(64, 85, 4))
    tip = tower + pick(rng, range(24, 41, 4))
    parts: list[Solid] = []
    for x in (-place, place):
        parts.append(prism(ring(sides, radius, x), (0, tower)))
        parts.append(spire(ring(sides, radius + 2, x), (tower, tip)))
    inner = place - radius
    parts.append(box((-inner, inner), (0, wall), (-thick, thick)))
    parts.append(box((-10, 10), (0, wall - 16), (thick, thick + 2)))
    half = pick(rng, (3, 4))
    places = spaced(half - inner, inner - half, pick(rng, (2, 3)))
    return parts + [box(around(x, half), (wall, wall + 8), (-thick, thick)) for x in places]


def castle(rng: np.random.Generator) -> list[Solid]:
    if chance(rng, 0.4):
        return _gatehouse(rng)
    radius, sides = pick(rng, (12, 14, 16)), pick(rng, (4, 4, 4, 6))
    place = 64 - radius - 2
    place_z = place - pick(rng, (4, 8, 16))
    wall, tower = pick(rng, range(28, 45, 4)), pick(rng, range(52, 69, 4))
    tip = tower + pick(rng, range(20, 41, 4))
    thick = pick(rng, (4, 6))
    parts: list[Solid] = []
    for x, z in corners(place, place_z):
        parts.append(prism(ring(sides, radius, x, z), (0, tower)))
        parts.append(spire(ring(sides, radius + 2, x, z), (tower, tip)))
    for side in (-1, 1):
        parts.append(box((radius - place, place - radius), (0, wall), around(side * place_z, thick)))
        parts.append(box(around(side * place, thick), (0, wall), (radius - place_z, place_z - radius)))
    parts.append(box((-12, 12), (0, wall + pick(rng, (8, 12))), (place_z + thick, place_z + thick + 8)))
    if chance(rng, 0.4):
        keep, high = pick(rng, (14, 16, 18)), pick(rng, range(72, 89, 4))
        parts.append(prism(ring(4, keep), (0, high)))
        parts.append(spire(ring(4, keep + 2), (high, high + 24)))
    return parts


def fence(rng: np.random.Generator) -> list[Solid]:
    count, half = pick(rng, (3, 4, 5, 6)), pick(rng, (3, 4, 5))
    height, deep = pick(rng, range(48, 81, 2)), pick(rng, (3, 4))
    pointed = chance(rng, 0.5)
    parts: list[Solid] = []
    for x in spaced(half - 64, 64 - half, count):
        span, depth = around(x, half), (-deep, deep)
        if pointed:
            outline = rectangle(span, depth)
            parts.append(loft((0, outline), (height - 8, outline), (height, ridge(span, depth, "z"))))
        else:
            parts.append(box(span, (0, height), depth))
    rails, rail, low = pick(rng, (1, 2, 2)), pick(rng, (6, 8)), pick(rng, (6, 10, 14))
    lows = [low, height - 14 - rail] if rails > 1 else [height // 4 * 2]
    parts += [box((-64, 64), (low, low + rail), (deep, deep + 4)) for low in lows]
    return parts


def bridge(rng: np.random.Generator) -> list[Solid]:
    half, deck, thick = pick(rng, range(14, 25, 2)), pick(rng, range(24, 45, 4)), pick(rng, (6, 8))
    top = deck + thick
    parts = [box((-64, 64), (deck, top), (-half, half))]
    pier, batter = pick(rng, (4, 5, 6)), pick(rng, (0, 2, 4))
    style = pick(rng, ("parapet", "parapet", "railing", "towers"))
    count = 2 if style == "towers" else pick(rng, (2, 2, 3))
    places = spaced(-44, 44, count)
    inner = 2 if style == "towers" else 4
    for x in places:
        foot = rectangle(around(x, pier + batter), around(0, half - inner + batter))
        parts.append(loft((0, foot), (deck, rectangle(around(x, pier), around(0, half - inner)))))
    if style == "parapet":
        high = pick(rng, (10, 12, 16))
        parts += [box((-64, 64), (top, top + high), around(side * (half - 2), 2)) for side in (-1, 1)]
    elif style == "railing":
        high = pick(rng, (12, 16, 20))
        posts = spaced(-60, 60, pick(rng, (2, 3)))
        for side in (-1, 1):
            z = around(side * (half - 2), 2)
            parts += [box(around(x, 2), (top, top + high), z) for x in posts]
            parts.append(box((-64, 64), (top + high, top + high + 4), z))
    else:
        high = top + pick(rng, range(36, 57, 4))
        for x in places:
            parts += [box(around(x, 4), (top, high), around(side * (half - 3), 3)) for side in (-1, 1)]
            parts.append(box(around(x, 5), (high, high + 6), (-half, half)))
    return parts
