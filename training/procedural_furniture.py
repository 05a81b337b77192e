"""Procedural furniture: one function a kind, each draws the parts of one object.

Objects stand on y = 0, are symmetric about x = 0 as a rule, face positive z, and are 128 units long on their longest
side, with corners on whole units. Halves are half widths.
"""

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
    ring,
    spaced,
    widest,
)


def _legs(x: float, z: float, height: float, half: float, foot: float, splay: float = 0) -> list[Solid]:
    """Four legs under (+-x, +-z): `half` is half their thickness at the top, `foot` at the floor."""
    return [
        loft(
            (0, rectangle(around(a + np.sign(a) * splay, foot), around(b + np.sign(b) * splay, foot))),
            (height, rectangle(around(a, half), around(b, half))),
        )
        for a, b in corners(x, z)
    ]


def table(rng: np.random.Generator) -> list[Solid]:
    depth = pick(rng, range(32, 65, 4))
    height = pick(rng, range(52, 97, 4))
    under = height - pick(rng, (4, 6, 8))
    style = pick(rng, ("legs", "legs", "tapered", "panels", "round", "pedestal"))
    if style in ("round", "pedestal"):
        sides = pick(rng, (6, 8))
        radius, foot = pick(rng, (4, 6, 8)), pick(rng, range(24, 41, 4))
        top = ring(sides, widest(sides)) if style == "round" else rectangle((-64, 64), (-depth, depth))
        column = pick(rng, (4, 6))
        foot_height = pick(rng, (4, 6))
        return [
            prism(top, (under, height)),
            prism(ring(column, radius), (foot_height, under)),
            prism(ring(column, foot), (0, foot_height)),
        ]
    parts = [box((-64, 64), (under, height), (-depth, depth))]
    inset = pick(rng, (2, 4, 8, 12))
    half = pick(rng, (3, 4, 5, 6))
    x, z = 64 - inset - half, depth - inset - half
    if style == "panels":
        parts += [box(around(side * x, half), (0, under), (-z - half, z + half)) for side in (-1, 1)]
        if chance(rng, 0.5):
            low = pick(rng, range(8, under - 15, 4))
            parts.append(box((half - x, x - half), (low, low + 6), (-4, 4)))
        return parts
    foot = half if style == "legs" else half - 2
    parts += _legs(x, z, under, half, foot)
    extra = pick(rng, ("none", "none", "shelf", "apron")) if style == "legs" else "none"
    if extra == "shelf":
        low = pick(rng, range(8, 29, 4))
        parts.append(box((half - x, x - half), (low, low + 4), (-z, z)))
    if extra == "apron":
        parts.append(box((half - x, x - half), (under - 10, under), (-z, z)))
    return parts


def _back(rng: np.random.Generator, half: float, y: tuple[float, float], z: tuple[float, float]) -> list[Solid]:
    """The back of a seat, 2 `half` wide: a panel, or two posts with slats or spindles."""
    style = pick(rng, ("panel", "panel", "slats", "spindles"))
    if style == "panel":
        return [box((-half, half), y, z)]
    post, rail = pick(rng, (4, 6)), pick(rng, (8, 10, 12))
    inner = (post - half, half - post)
    posts = [box((-half, -half + post), y, z), box((half - post, half), y, z)]
    thin = (z[0] + 1, z[1] - 1)
    if style == "slats":
        count = pick(rng, (2, 3))
        gap = (y[1] - y[0] - rail * count) // (count + 0.5)
        tops = [y[1] - 2 - place * (rail + gap) for place in range(count)]
        return posts + [box(inner, (top - rail, top), thin) for top in tops]
    rows = [box(inner, (y[1] - 2 - rail, y[1] - 2), thin)]
    places = spaced(-half + post + 6, half - post - 6, pick(rng, (2, 3)))
    return posts + rows + [box(around(x, 2), (y[0], y[1] - 2 - rail), thin) for x in places]


def chair(rng: np.random.Generator) -> list[Solid]:
    half_x, half_z = pick(rng, range(26, 37, 2)), pick(rng, range(26, 37, 2))
    seat = pick(rng, range(48, 65, 4))
    under = seat - pick(rng, (4, 6, 8))
    if chance(rng, 0.2):
        sides, foot = pick(rng, (4, 6)), pick(rng, (18, 22, 26))
        parts = [prism(ring(sides, 4), (4, under)), prism(ring(sides, foot), (0, 4))]
    else:
        half = pick(rng, (3, 4, 5))
        inset, splay = pick(rng, ((0, 0), (2, 0), (4, 4)))
        parts = _legs(half_x - inset - half, half_z - inset - half, under, half, pick(rng, (half, half - 1)), splay)
    parts.append(box((-half_x, half_x), (under, seat), (-half_z, half_z)))
    parts += _back(rng, half_x, (seat, 128), (-half_z, -half_z + pick(rng, (4, 6))))
    if chance(rng, 0.15):
        arm, front = seat + pick(rng, (20, 24)), half_z - pick(rng, (4, 8))
        for side in (-1, 1):
            x = around(side * (half_x - 3), 3)
            parts.append(box(x, (arm, arm + 4), (-half_z + 6, front)))
            parts.append(box(around(side * (half_x - 3), 2), (seat, arm), (front - 6, front - 2)))
    return parts


def stool(rng: np.random.Generator) -> list[Solid]:
    sides = pick(rng, (4, 6, 8))
    if chance(rng, 0.3):
        height, radius = pick(rng, range(64, 97, 4)), widest(sides)
        under = height - pick(rng, (20, 24, 28))
        half = pick(rng, (6, 8, 10))
        place = pick(rng, (36, 40))
        return [prism(ring(sides, radius), (under, height)), *_legs(place, place, under, half, half - 2)]
    radius = pick(rng, range(26, 43, 2))
    under = 128 - pick(rng, (6, 8, 12))
    parts = [prism(ring(sides, radius), (under, 128))]
    if chance(rng, 0.25):
        column, foot = pick(rng, (4, 6)), radius - pick(rng, (4, 8))
        return parts + [prism(ring(column, 6), (6, under)), prism(ring(column, foot), (0, 6))]
    half = pick(rng, (4, 5, 6))
    place = round(radius * 0.7) - half
    splay = pick(rng, (0, 4, 8))
    parts += _legs(place, place, under, half, half - pick(rng, (0, 1)), splay)
    if splay == 0 and chance(rng, 0.6):
        rung = pick(rng, range(20, 49, 4))
        parts += [box((half - place, place - half), (rung, rung + 6), around(side * place, 2)) for side in (-1, 1)]
    return parts


def bench(rng: np.random.Generator) -> list[Solid]:
    half_z = pick(rng, range(16, 29, 2))
    seat = pick(rng, range(36, 57, 4))
    under = seat - pick(rng, (4, 6, 8))
    parts = [box((-64, 64), (under, seat), (-half_z, half_z))]
    inset, half = pick(rng, (4, 8, 16)), pick(rng, (3, 4, 5))
    if chance(rng, 0.5):
        parts += _legs(64 - inset - half, half_z - 2 - half, under, half, half)
    else:
        places = spaced(-64 + inset + half, 64 - inset - half, pick(rng, (2, 3)))
        parts += [box(around(x, half), (0, under), (2 - half_z, half_z - 2)) for x in places]
    if chance(rng, 0.6):
        parts += _back(rng, 64, (seat, seat + pick(rng, range(36, 53, 4))), (-half_z, -half_z + 6))
    return parts


def bed(rng: np.random.Generator) -> list[Solid]:
    half_x = pick(rng, range(34, 59, 4))
    legs, frame, mattress = pick(rng, (8, 12, 16)), pick(rng, (8, 12)), pick(rng, (8, 12, 16))
    board = pick(rng, (4, 6, 8))
    back, front = -64 + board, 64
    top = legs + frame
    parts: list[Solid] = []
    if chance(rng, 0.25):
        high = pick(rng, range(88, 121, 8))
        x, z = half_x - 3, 61
        parts += [box(around(a, 3), (0, high), around(b, 3)) for a, b in corners(x, z)]
        parts.append(box((-half_x - 2, half_x + 2), (high, high + 4), (-64, 64)))
        back, front = -58, 58
        parts.append(box((3 - x, x - 3), (legs, top + mattress + 16), (-64, -60)))
    else:
        parts.append(box((-half_x, half_x), (0, pick(rng, range(48, 77, 4))), (-64, back)))
        if chance(rng, 0.5):
            front = 64 - board
            parts.append(box((-half_x, half_x), (0, top + mattress + pick(rng, (-4, 4, 8))), (front, 64)))
        else:
            parts += [box(around(side * (half_x - 6), 4), (0, legs), (front - 10, front - 2)) for side in (-1, 1)]
    parts.append(box((2 - half_x, half_x - 2), (legs, top), (back, front)))
    parts.append(box((4 - half_x, half_x - 4), (top, top + mattress), (back, front - 2)))
    pillows = (-1, 1) if half_x > 44 else (0,)
    half = half_x // 2 - 6 if half_x > 44 else half_x // 2
    for side in pillows:
        x, z = side * (half_x - 4) // 2, (back + 4, back + 24)
        base, soft = rectangle(around(x, half), z), rectangle(around(x, half - 4), (z[0] + 4, z[1] - 4))
        parts.append(loft((top + mattress, base), (top + mattress + 8, soft)))
    return parts


def shelf(rng: np.random.Generator) -> list[Solid]:
    half_x, half_z = pick(rng, range(24, 53, 4)), pick(rng, (12, 16, 20))
    side, board = pick(rng, (4, 6)), pick(rng, (4, 6))
    count = pick(rng, (3, 4, 4, 5))
    x = (side - half_x, half_x - side)
    back = -half_z
    parts = [box(around(sign * (half_x - side / 2), side / 2), (0, 128), (-half_z, half_z)) for sign in (-1, 1)]
    if chance(rng, 0.4):
        back += 2
        parts.append(box(x, (0, 128), (-half_z, back)))
    lift = pick(rng, (0, 4, 8))
    floors = [floor - board / 2 for floor in spaced(lift + board / 2, 128 - board / 2, count)]
    parts += [box(x, (floor, floor + board), (back, half_z)) for floor in floors]
    fill = pick(rng, ("none", "none", "divider" if count < 5 else "none", "doors", "books" if count < 5 else "none"))
    low, high = floors[0] + board, floors[1]
    if fill == "divider":
        parts += [
            box((-2, 2), (a + board, b), (back, half_z - 2)) for a, b in zip(floors[:-1], floors[1:], strict=True)
        ]
    if fill == "doors":
        parts += [box(span, (low, high), (half_z - 6, half_z - 2)) for span in ((x[0], -1), (1, x[1]))]
    if fill == "books":
        for floor in floors[:-1]:
            start = pick(rng, range(int(x[0]), 1, 4))
            parts.append(box((start, start + pick(rng, (12, 16, 20))), (floor + board, floor + board + 12), (back, 4)))
    return parts


def sofa(rng: np.random.Generator) -> list[Solid]:
    half_z = pick(rng, range(24, 35, 2))
    feet, seat, back = pick(rng, (0, 0, 6, 8)), pick(rng, range(20, 29, 4)), pick(rng, range(48, 69, 4))
    arm, arm_high, thick = pick(rng, (10, 12, 16)), pick(rng, range(32, 45, 4)), pick(rng, (12, 16))
    inner = 64 - arm
    behind = thick - half_z
    parts = [
        box((-inner, inner), (feet, seat), (behind, half_z)),
        box((-inner, inner), (feet, back), (-half_z, behind)),
        box((-64, -inner), (feet, arm_high), (-half_z, half_z)),
        box((inner, 64), (feet, arm_high), (-half_z, half_z)),
    ]
    if feet:
        parts += [box(around(a, 3), (0, feet), around(b, 3)) for a, b in corners(58, half_z - 6)]
    count, soft = pick(rng, (1, 2, 2, 3)), pick(rng, (6, 8))
    edges = spaced(1 - inner, inner - 1, count + 1)
    spans = [(a + 1, b - 1) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    parts += [box(span, (seat, seat + soft), (behind, half_z - 2)) for span in spans]
    if not feet and chance(rng, 0.4):
        for low, high in spans:
            base, top = (
                rectangle((low, high), (behind, behind + 10)),
                rectangle((low + 2, high - 2), (behind, behind + 6)),
            )
            parts.append(loft((seat + soft, base), (back - 4, top)))
    return parts


def lamp(rng: np.random.Generator) -> list[Solid]:
    sides, thin = pick(rng, (4, 6, 8)), pick(rng, (4, 6))
    style = pick(rng, ("floor", "floor", "table", "street"))
    if style == "street":
        reach, foot = pick(rng, range(28, 49, 4)), pick(rng, (8, 10, 12))
        parts = [
            prism(ring(sides, foot), (0, 6)),
            prism(ring(thin, 3), (6, 122)),
            box((-reach, reach), (122, 128), (-3, 3)),
        ]
        drop, wide = pick(rng, (12, 16, 20)), pick(rng, (8, 10, 12))
        arms = (-1, 1) if chance(rng, 0.6) else (1,)
        for side in arms:
            x = side * (reach - 6)
            parts.append(loft((122 - drop, ring(sides, wide, x)), (122, ring(sides, wide - 5, x))))
        return parts
    shade_low, shade_high = pick(rng, range(20, 41, 4)), pick(rng, range(8, 21, 4))
    if style == "floor":
        foot, shade = pick(rng, range(14, 25, 2)), pick(rng, range(28, 45, 4))
        parts = [prism(ring(sides, foot), (0, 4)), prism(ring(thin, 2), (4, 128 - shade))]
    else:
        shade = pick(rng, range(48, 65, 4))
        foot, belly, neck = pick(rng, range(10, 21, 2)), pick(rng, range(14, 25, 2)), pick(rng, (4, 6))
        bulge = pick(rng, (16, 20, 24, 28))
        vase = ((0, ring(sides, foot)), (bulge, ring(sides, belly)), (bulge + 24, ring(sides, neck)))
        parts = [loft(*vase), prism(ring(thin, 2), (bulge + 24, 128 - shade))]
        shade_low, shade_high = shade_low + 8, shade_high + 8
    parts.append(loft((128 - shade, ring(sides, shade_low)), (128, ring(sides, shade_high))))
    return parts
