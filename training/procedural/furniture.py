"""Procedural furniture: one function a kind, each draws the parts of one object.

Objects stand on y = 0, face positive z, are symmetric about x = 0 as a rule, and are 128 units long on their longest
side. Sizes are multiples of 4, heights and widths of 8: so the corners of a centred object have every fourth value of
a coordinate only.
"""

import numpy as np

from training.procedural.parts import (
    Solid,
    Span,
    around,
    box,
    chance,
    corners,
    loft,
    pick,
    prism,
    rectangle,
    ring,
    spaced,
    widest,
)


def legs(x: float, z: float, height: float, splay: float = 0) -> list[Solid]:
    """Four legs, 8 thick, whose outer corners are (+-x, +-z) at the top and `splay` farther out on the floor."""
    parts = []
    for side_x, side_z in corners(1, 1):
        top = rectangle(around(side_x * (x - 4), 4), around(side_z * (z - 4), 4))
        foot = [(a + side_x * splay, b + side_z * splay) for a, b in top]
        parts.append(loft((0, foot), (height, top)))
    return parts


def supports(rng: np.random.Generator, x: float, z: float, height: float) -> list[Solid]:
    """What a top reaching to (+-x, +-z) at `height` stands on: four legs, two panels, or a column on a foot."""
    style = pick(rng, ("legs", "legs", "splayed", "panels", "panels", "column"))
    if style == "legs":
        inset = pick(rng, (0, 4, 8))
        return legs(x - inset, z - inset, height)
    if style == "splayed":
        return legs(x - 8, z - 8, height, splay=4)
    if style == "panels":
        inset, thick = pick(rng, (0, 4, 8)), pick(rng, (4, 8))
        middle = x - inset - thick / 2
        return [box(around(side * middle, thick / 2), (0, height), (4 - z, z - 4)) for side in (-1, 1)]
    foot = pick(rng, (12, 16, 20))
    return [box((-4, 4), (4, height), (-4, 4)), prism(ring(pick(rng, (4, 8)), foot), (0, 4))]


def back(rng: np.random.Generator, half: float, y: Span, z: Span) -> list[Solid]:
    """The back of a seat, 2 `half` wide: a panel, or two posts and two slats."""
    if chance(rng, 0.7):
        return [box((-half, half), y, z)]
    slat, gap = pick(rng, (8, 12)), pick(rng, (4, 8))
    inner = (8 - half, half - 8)
    tops = [y[1] - 4, y[1] - 4 - slat - gap]
    posts = [box((-half, -half + 8), y, z), box((half - 8, half), y, z)]
    return posts + [box(inner, (top - slat, top), z) for top in tops]


def table(rng: np.random.Generator) -> list[Solid]:
    height = pick(rng, range(48, 97, 8))
    under = height - pick(rng, (4, 8))
    if chance(rng, 0.25):
        sides, foot = pick(rng, (6, 8)), pick(rng, (16, 20, 24, 28, 32))
        column = pick(rng, (4, 8))
        return [
            prism(ring(sides, widest(sides)), (under, height)),
            box(around(0, column), (4, under), around(0, column)),
            prism(ring(pick(rng, (4, sides)), foot), (0, 4)),
        ]
    depth = pick(rng, range(28, 65, 4))
    parts = [box((-64, 64), (under, height), (-depth, depth)), *supports(rng, 64, depth, under)]
    if len(parts) == 5 and chance(rng, 0.2):
        low = pick(rng, (12, 16, 20, 24))
        parts.append(box((-52, 52), (low, low + 4), (12 - depth, depth - 12)))
    return parts


def chair(rng: np.random.Generator) -> list[Solid]:
    x, z = pick(rng, range(24, 41, 4)), pick(rng, range(24, 37, 4))
    seat, thick = pick(rng, range(44, 65, 4)), pick(rng, (4, 8))
    parts = [*supports(rng, x, z, seat - thick), box((-x, x), (seat - thick, seat), (-z, z))]
    parts += back(rng, x, (seat, 128), (-z, -z + pick(rng, (4, 8))))
    if chance(rng, 0.2):
        arm, front = seat + pick(rng, (12, 16, 20)), z - pick(rng, (4, 8))
        parts += [box(around(side * (x - 4), 4), (seat, arm), (8 - z, front)) for side in (-1, 1)]
    return parts


def stool(rng: np.random.Generator) -> list[Solid]:
    sides = pick(rng, (4, 4, 6, 8))
    low = chance(rng, 0.3)
    height = pick(rng, range(56, 97, 8)) if low else 128
    radius = widest(sides) if low else pick(rng, range(24, 49, 4))
    under = height - (pick(rng, range(12, 37, 4)) if low else pick(rng, (4, 8, 12, 16)))
    parts = [prism(ring(sides, radius), (under, height))]
    place = pick(rng, (36, 40, 44)) if low else 4 * round(radius * 0.7 / 4) - pick(rng, (0, 4))
    if chance(rng, 0.3):
        column = pick(rng, (4, 8))
        foot = prism(ring(4, place), (0, 4))
        return [*parts, box(around(0, column), (4, under), around(0, column)), foot]
    splay = pick(rng, (0, 4, 8))
    parts += legs(place, place, under, splay)
    if splay == 0 and not low and chance(rng, 0.3):
        rung = pick(rng, range(16, 49, 4))
        parts += [box((8 - place, place - 8), (rung, rung + 4), around(side * (place - 4), 4)) for side in (-1, 1)]
    return parts


def bench(rng: np.random.Generator) -> list[Solid]:
    z, thick = pick(rng, range(16, 33, 4)), pick(rng, (4, 8))
    seat = pick(rng, (32, 40, 48, 56))
    parts = [box((-64, 64), (seat - thick, seat), (-z, z))]
    inset = pick(rng, range(0, 25, 4))
    if chance(rng, 0.5):
        parts += legs(64 - inset, z, seat - thick)
    else:
        places = spaced(inset - 60, 60 - inset, pick(rng, (2, 3)))
        parts += [box(around(x, 4), (0, seat - thick), (4 - z, z - 4)) for x in places]
    if chance(rng, 0.5):
        parts += back(rng, 64, (seat, seat + pick(rng, (32, 40, 48))), (-z, -z + pick(rng, (4, 8))))
    return parts


def bed(rng: np.random.Generator) -> list[Solid]:
    x = pick(rng, range(32, 61, 4))
    frame, mattress, thick = pick(rng, (12, 16, 20, 24)), pick(rng, (8, 12, 16)), pick(rng, (4, 8))
    top = frame + mattress
    head, foot = -64 + thick, 64
    parts: list[Solid] = []
    if chance(rng, 0.15):
        head, foot, high = -56, 56, pick(rng, (88, 96, 104))
        parts += [box(around(a, 4), (0, high - 4), around(b, 4)) for a, b in corners(x - 4, 60)]
        parts.append(box((-x, x), (high - 4, high), (-64, 64)))
    else:
        high = pick(rng, (56, 64, 72, 80))
        parts.append(box((-x, x), (0, high), (-64, head)))
        if chance(rng, 0.5):
            foot = 64 - thick
            parts.append(box((-x, x), (0, top + pick(rng, (4, 8, 12))), (foot, 64)))
    parts.append(box((4 - x, x - 4), (4, frame), (head, foot)))
    parts.append(box((4 - x, x - 4), (frame, top), (head, foot - 4)))
    half = pick(rng, (8, 12)) if x >= 44 else pick(rng, (12, 16))
    for side in (-1, 1) if x >= 44 else (0,):
        parts.append(box(around(side * (x - 8 - half), half), (top, top + 4), (head + 4, head + 20)))
    return parts


def shelf(rng: np.random.Generator) -> list[Solid]:
    x, z = pick(rng, range(24, 57, 4)), pick(rng, (12, 16, 20, 24))
    side, count = pick(rng, (4, 8)), pick(rng, (3, 3, 3, 4, 5))
    inner = (side - x, x - side)
    parts = [box((-x, -x + side), (0, 128), (-z, z)), box((x - side, x), (0, 128), (-z, z))]
    rear = -z
    if chance(rng, 0.3):
        rear += 4
        parts.append(box(inner, (0, 128), (-z, rear)))
    floors = spaced(pick(rng, (0, 4, 8)), 124, count)
    parts += [box(inner, (floor, floor + 4), (rear, z)) for floor in floors]
    fill = pick(rng, ("none", "none", "none", "divider", "doors"))
    if fill == "divider" and count < 5:
        spans = zip(floors[:-1], floors[1:], strict=True)
        parts += [box((-4, 4), (low + 4, high), (rear, z - 4)) for low, high in spans]
    if fill == "doors":
        parts += [box(span, (floors[0] + 4, floors[1]), (z - 8, z - 4)) for span in ((inner[0], -4), (4, inner[1]))]
    return parts


def sofa(rng: np.random.Generator) -> list[Solid]:
    z = pick(rng, range(24, 37, 4))
    seat, high, arm_high = pick(rng, range(20, 33, 4)), pick(rng, (48, 56, 64, 72)), pick(rng, range(36, 45, 4))
    arm, thick, soft = pick(rng, (8, 12, 16)), pick(rng, (8, 12, 16)), pick(rng, (4, 8))
    inner, front = 64 - arm, thick - z
    parts = [
        box((-inner, inner), (0, seat), (front, z)),
        box((-inner, inner), (0, high), (-z, front)),
        box((-64, -inner), (0, arm_high), (-z, z)),
        box((inner, 64), (0, arm_high), (-z, z)),
    ]
    count = pick(rng, (0, 1, 1, 2, 3))
    if count:
        edges = spaced(-inner, inner, count + 1)
        gap = 0 if count == 1 else 4
        for low, end in zip(edges[:-1], edges[1:], strict=True):
            parts.append(box((low, end - gap if end < inner else end), (seat, seat + soft), (front, z - 4)))
    return parts


def lamp(rng: np.random.Generator) -> list[Solid]:
    sides = pick(rng, (4, 6, 8))
    style = pick(rng, ("floor", "floor", "table", "street"))
    if style == "street":
        reach, foot, wide, drop = (
            pick(rng, each) for each in (range(24, 57, 4), (8, 12, 16), (8, 12), (8, 12, 16, 20, 24))
        )
        parts = [box((-4, 4), (4, 120), (-4, 4)), box((-foot, foot), (0, 4), (-foot, foot))]
        parts.append(box((-reach, reach), (120, 128), (-4, 4)))
        for x in (-reach + 4, reach - 4):
            parts.append(loft((120 - drop, ring(4, wide, x)), (120, ring(4, 4, x))))
        return parts
    shade, low, high = pick(rng, range(28, 53, 4)), pick(rng, range(20, 41, 4)), pick(rng, (8, 12, 16, 20))
    top = loft((128 - shade, ring(sides, low)), (128, ring(sides, high)))
    if style == "floor":
        foot = pick(rng, (12, 16, 20, 24))
        return [top, box((-4, 4), (4, 128 - shade), (-4, 4)), prism(ring(pick(rng, (4, sides)), foot), (0, 4))]
    foot, belly, bulge = pick(rng, (8, 12, 16)), pick(rng, (16, 20, 24)), pick(rng, (16, 20, 24))
    neck = bulge + pick(rng, (16, 20, 24))
    vase = loft((0, ring(sides, foot)), (bulge, ring(sides, belly)), (neck, ring(sides, 8)))
    return [top, vase, box((-4, 4), (neck, 128 - shade), (-4, 4))]
