"""Procedural buildings: one function a kind; see `procedural_furniture` for their places and sizes."""

import numpy as np

from training.procedural.parts import (
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


def house(rng: np.random.Generator) -> list[Solid]:
    storeys, overhang = pick(rng, (1, 1, 2)), pick(rng, (4, 8))
    storey = pick(rng, (32, 36, 40)) if storeys == 1 else 28
    eaves = storeys * storey
    x, z = 64 - overhang, pick(rng, range(32, 53, 4))
    top = 8 * round((eaves + pick(rng, (24, 32, 40, 48))) / 8)
    along, hip = pick(rng, (("x", 0), ("x", 0), ("x", 24), ("z", 0)))
    parts = [
        box((-x, x), (0, eaves), (-z, z)),
        roof((-64, 64), (eaves, top), (-z - overhang, z + overhang), along, hip),
    ]
    if chance(rng, 0.9):
        parts.append(box((-8, 8), (0, 24), (z, z + 4)))
        half, tall, place = pick(rng, (4, 8)), pick(rng, (8, 12)), pick(rng, (28, 32, 36))
        for sill in range(12, eaves - 8, 28):
            parts += [box(around(side * place, half), (sill, sill + tall), (z, z + 4)) for side in (-1, 1)]
    if top <= 96 and chance(rng, 0.4):
        parts.append(box(around(pick(rng, (-32, 32)), 4), (eaves + 4, top + 8), (-16, -8)))
    return parts


def tower(rng: np.random.Generator) -> list[Solid]:
    style = pick(rng, ("battlements", "spire", "spire", "stepped", "lighthouse"))
    sides, radius = pick(rng, (4, 6, 8)), pick(rng, range(20, 41, 4))
    if style == "stepped":
        count, step = pick(rng, (2, 3, 4)), pick(rng, (4, 8))
        bend, crown = pick(rng, (0.6, 0.8, 1.0)), pick(rng, range(92, 117, 4))
        heights = [4 * round(crown * (place / count) ** bend / 4) for place in range(count + 1)]
        spans = list(zip(heights[:-1], heights[1:], strict=True))
        parts = [prism(ring(4, radius + 16 - step * place), span) for place, span in enumerate(spans)]
        return [*parts, spire(ring(4, 4), (crown, 128))]
    if style == "lighthouse":
        shaft, neck, lantern = pick(rng, range(68, 93, 4)), radius - pick(rng, (4, 8)), pick(rng, (8, 12, 16))
        return [
            loft((0, ring(sides, radius)), (shaft, ring(sides, neck))),
            prism(ring(sides, neck + 4), (shaft, shaft + 4)),
            prism(ring(sides, neck - 4), (shaft + 4, shaft + 4 + lantern)),
            spire(ring(sides, neck), (shaft + 4 + lantern, 128)),
        ]
    if style == "spire":
        wall, wide = pick(rng, range(60, 101, 4)), radius + pick(rng, (4, 8, 12))
        parts = [prism(ring(sides, radius), (0, wall)), spire(ring(sides, wide), (wall, 128))]
    else:
        sides, wall = 4, pick(rng, (96, 100, 104))
        wide = radius + pick(rng, (4, 8))
        parts = [prism(ring(4, radius), (0, wall)), prism(ring(4, wide), (wall, 116))]
        parts += [box(around(x, 4), (116, 128), around(z, 4)) for x, z in corners(wide - 4, wide - 4)]
    if sides == 4:
        parts.append(box((-8, 8), (0, pick(rng, (20, 24, 28))), (radius, radius + 4)))
        if chance(rng, 0.5):
            sill = pick(rng, range(40, 53, 4))
            parts.append(box((-4, 4), (sill, sill + 12), (radius, radius + 4)))
    return parts


def church(rng: np.random.Generator) -> list[Solid]:
    nave, half, wall = pick(rng, (20, 24, 28, 32)), pick(rng, (12, 16)), pick(rng, (28, 32, 36, 40))
    top, tower_top = wall + pick(rng, (16, 20, 24, 28)), pick(rng, range(68, 93, 4))
    length = pick(rng, (64, 72, 80))
    rear = -(length + 2 * half + 8) // 8 * 4
    front = rear + 4 + length
    parts = [
        box((-nave, nave), (0, wall), (rear + 4, front)),
        roof((-nave - 4, nave + 4), (wall, top), (rear, front), "z"),
        box((-half, half), (0, tower_top), (front, front + 2 * half)),
        spire(rectangle(around(0, half + 4), (front - 4, front + 2 * half + 4)), (tower_top, 128)),
    ]
    if chance(rng, 0.7):
        parts.append(box((-4, 4), (0, pick(rng, (16, 20, 24))), (front + 2 * half, front + 2 * half + 4)))
    if chance(rng, 0.4):
        arm, middle = nave + pick(rng, (8, 12, 16)), rear + pick(rng, (24, 28, 32))
        parts.append(box((-arm, arm), (0, wall - 4), around(middle, 8)))
        parts.append(roof((-arm - 4, arm + 4), (wall - 4, top - 4), around(middle, 12), "x"))
    return parts


def castle(rng: np.random.Generator) -> list[Solid]:
    return _gatehouse(rng) if chance(rng, 0.8) else _four_towers(rng)


def _gatehouse(rng: np.random.Generator) -> list[Solid]:
    """Two towers, a wall with a gate and merlons between them."""
    radius, sides = pick(rng, (16, 20, 24)), pick(rng, (4, 4, 6, 8))
    place, thick = 60 - radius, pick(rng, (8, 12))
    wall, tower_top = pick(rng, range(40, 57, 4)), pick(rng, range(64, 85, 4))
    tip = 8 * round((tower_top + pick(rng, (24, 32, 40))) / 8)
    parts: list[Solid] = []
    for x in (-place, place):
        parts.append(prism(ring(sides, radius, x), (0, tower_top)))
        parts.append(spire(ring(sides, radius + 4, x), (tower_top, tip)))
    inner = place - radius
    parts.append(box((-inner, inner), (0, wall), (-thick, thick)))
    parts.append(box((-8, 8), (0, pick(rng, (24, 28, 32))), (thick, thick + 4)))
    if chance(rng, 0.4):
        parts += [box((x, x + 4), (wall, wall + 8), (-thick, thick)) for x in (-inner, inner - 4)]
    return parts


def _four_towers(rng: np.random.Generator) -> list[Solid]:
    """Four towers, walls between them, a gate and perhaps a keep in the middle."""
    radius, sides, thick = pick(rng, (12, 16)), pick(rng, (4, 4, 4, 6)), 4
    x, z = 60 - radius, 60 - radius - pick(rng, (4, 8, 12, 16))
    wall, tower_top = pick(rng, range(28, 45, 4)), pick(rng, range(52, 69, 4))
    tip = 8 * round((tower_top + pick(rng, (20, 28, 36))) / 8)
    parts: list[Solid] = []
    for a, b in corners(x, z):
        parts.append(prism(ring(sides, radius, a, b), (0, tower_top)))
        parts.append(spire(ring(sides, radius + 4, a, b), (tower_top, tip)))
    for side in (-1, 1):
        parts.append(box((radius - x, x - radius), (0, wall), around(side * z, thick)))
        parts.append(box(around(side * x, thick), (0, wall), (radius - z, z - radius)))
    parts.append(box((-8, 8), (0, wall - 8), (z + thick, z + thick + 4)))
    if chance(rng, 0.3):
        parts += [prism(ring(4, 16), (0, tower_top - 8)), spire(ring(4, 20), (tower_top - 8, tip))]
    return parts


def fence(rng: np.random.Generator) -> list[Solid]:
    count, half = pick(rng, (3, 3, 4, 5)), pick(rng, (4, 8))
    height, deep = pick(rng, range(56, 97, 8)), pick(rng, (4, 8))
    pointed = chance(rng, 0.4)
    parts: list[Solid] = []
    for x in spaced(half - 64, 64 - half, count):
        span, depth = around(x, half), (-deep, deep)
        outline = rectangle(span, depth)
        if pointed:
            parts.append(loft((0, outline), (height - 8, outline), (height, ridge(span, depth, "z"))))
        else:
            parts.append(prism(outline, (0, height)))
    rail, low, high = pick(rng, (4, 8)), pick(rng, (8, 12, 16)), pick(rng, (12, 16, 20))
    lows = [low, height - high - rail] if chance(rng, 0.7) else [height - high - rail]
    return parts + [box((-64, 64), (each, each + rail), (deep, deep + 8)) for each in lows]


def bridge(rng: np.random.Generator) -> list[Solid]:
    half, deck, thick = pick(rng, range(16, 33, 4)), pick(rng, range(24, 45, 4)), pick(rng, (4, 8))
    top = deck + thick
    style = pick(rng, ("parapets", "parapets", "parapets", "railings", "towers"))
    parts = [box((-64, 64), (deck, top), (-half, half))]
    pier, batter = pick(rng, (4, 8)), pick(rng, (0, 0, 4))
    reach = pick(rng, (32, 36, 40, 44, 48))
    places = spaced(-reach, reach, 2 if style == "towers" else pick(rng, (2, 2, 3)))
    for x in places:
        foot = rectangle(around(x, pier + batter), around(0, half - 4))
        parts.append(loft((0, foot), (deck, rectangle(around(x, pier), around(0, half - 4)))))
    if style == "towers":
        high = 8 * round((top + pick(rng, (32, 40, 48, 56))) / 8)
        for x in places:
            sides = [around(side * (half - 4), 4) for side in (-1, 1)]
            parts += [box(around(x, 4), (top, high - 8), z) for z in sides]
            parts.append(box(around(x, 4), (high - 8, high), (-half, half)))
        return parts
    rise = 8 * round((top + pick(rng, (12, 16, 20))) / 8)
    for z in ((-half, 4 - half), (half - 4, half)):
        if style == "parapets":
            parts.append(box((-64, 64), (top, rise), z))
        else:
            parts += [box(around(x, 4), (top, rise - 4), z) for x in (-60, 60)]
            parts.append(box((-64, 64), (rise - 4, rise), z))
    return parts
