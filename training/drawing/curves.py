"""
Draw the loss curves of a run, or of several on top of each other.

    python -m training.drawing.curves outputs/mine [outputs/other ...] --out curves.svg

The lines are the training loss, the points the loss on held-out meshes; --over minutes or --over labels (tokens learnt
from) puts them over what they took instead of over steps.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from training.run.ending import ends_in_words

WIDTH, HEIGHT, MARGIN = 860, 460, 60
COLOURS = ("#1f6fb2", "#c8553d", "#3d8a5f", "#8457a0", "#a07b1f")
# What stands at the lower edge, by the name in the log.
AXES = {"step": "steps of the optimiser", "minutes": "minutes of training", "labels": "tokens learnt from"}

Point = tuple[float, float]


def read_curves(folder: Path, over: str) -> tuple[list[Point], list[Point]]:
    """
    Training and evaluation losses of the log in a run's folder, as (place, loss); `over` is a key of AXES.

    Raises:
        ValueError: there is no log, it cannot be read, or it has no training loss.
    """
    path = folder / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(f"{folder} has no log of a run: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    training = [(line[over], line["loss"], line["step"]) for line in lines if "loss" in line]
    if not training:
        raise ValueError(f"{path} has no training loss yet")
    # An evaluation is told after a line on training, whose minutes and tokens are its own.
    evaluation = []
    for line in lines:
        if "eval_loss" in line:
            before = [place for place, _, step in training if step <= line["step"]]
            evaluation.append((line["step"] if over == "step" else (before or [0])[-1], line["eval_loss"]))
    return [(place, loss) for place, loss, _ in training if math.isfinite(loss)], evaluation


def draw_curves(runs: dict[str, tuple[list[Point], list[Point]]], over: str) -> str:
    """The text of an svg file; the loss stands on a logarithmic scale."""
    points = [point for curves in runs.values() for curve in curves for point in curve]
    right = max(place for place, _ in points) or 1
    low, high = (math.log10(limit) for limit in (min(y for _, y in points), max(y for _, y in points)))
    high = max(high, low + 0.1)

    def at(point: Point) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * point[0] / right
        y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (math.log10(point[1]) - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    lines = []
    for exponent in range(math.floor(low), math.ceil(high) + 1):
        for factor in (1, 1.5, 2, 3, 5, 7):
            value = factor * 10.0**exponent
            if low <= math.log10(value) <= high:
                y = at((0, value)).split(",")[1]
                lines.append(f'<path d="M{MARGIN} {y}H{WIDTH - MARGIN}" stroke="#ddd"/>')
                lines.append(f'<text x="{MARGIN - 8}" y="{y}" text-anchor="end" dy="4">{value:g}</text>')
    power = 10 ** math.floor(math.log10(right / 4))
    apart = max(factor * power for factor in (1, 2, 5) if factor * power <= right / 4)
    for part in range(math.floor(right / apart) + 1):
        x = at((part * apart, 10**low)).split(",")[0]
        value = part * apart
        label = f"{value:,.0f}" if apart >= 1 else f"{value:.6g}"
        lines.append(f'<text x="{x}" y="{HEIGHT - MARGIN + 20}" text-anchor="middle">{label}</text>')
    lines.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{AXES[over]}</text>')
    lines.append(f'<text x="{MARGIN}" y="{MARGIN - 30}">loss, nats a token: lines training, points held out</text>')
    for index, (name, (training, evaluation)) in enumerate(runs.items()):
        colour = COLOURS[index % len(COLOURS)]
        way = " ".join(at(point) for point in training)
        lines.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for point in evaluation:
            x, y = at(point).split(",")
            lines.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
        y = MARGIN + 18 * index
        lines.append(f'<text x="{WIDTH - MARGIN}" y="{y}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif"'
    return "\n".join(
        [f'{head} font-size="13">', '<rect width="100%" height="100%" fill="white"/>', *lines, "</svg>\n"]
    )


@ends_in_words("curves")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m training.drawing.curves",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--out", type=Path, required=True, help="the drawing, an svg")
    parser.add_argument("--over", choices=list(AXES), default="step")
    options = parser.parse_args(argv)
    runs = {str(folder): read_curves(folder, options.over) for folder in options.folders}
    options.out.write_text(draw_curves(runs, options.over), encoding="utf-8")
    print(options.out)


if __name__ == "__main__":
    sys.exit(main())
