"""The drawing of a run's losses."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from training.drawing.curves import HEIGHT, MARGIN, WIDTH, main

SVG = "{http://www.w3.org/2000/svg}"


def write_log(folder, losses, evaluations=()):
    folder.mkdir(exist_ok=True)
    lines = [{"step": 10 * i, "loss": loss, "minutes": i / 2, "labels": 900 * i} for i, loss in enumerate(losses, 1)]
    lines += [{"step": step, "eval_loss": loss} for step, loss in evaluations]
    lines.sort(key=lambda line: line["step"])
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def drawn(out):
    root = ElementTree.parse(out).getroot()
    lines = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in root.iter(f"{SVG}polyline")
    ]
    points = [(float(point.attrib["cx"]), float(point.attrib["cy"])) for point in root.iter(f"{SVG}circle")]
    return lines, points


def test_losses_fall_from_the_upper_left_to_the_lower_right(tmp_path):
    folder = write_log(tmp_path / "run", [10.0, 1.0, 0.1], [(30, 1.0)])
    assert main([folder, "--out", str(tmp_path / "curves.svg")]) == 0
    lines, points = drawn(tmp_path / "curves.svg")
    inner = WIDTH - 2 * MARGIN
    # The loss on a logarithmic scale, steps on a linear one that begins at 0.
    assert lines == [
        [
            (pytest.approx(MARGIN + inner / 3, abs=0.1), MARGIN),
            (pytest.approx(MARGIN + 2 * inner / 3, abs=0.1), HEIGHT / 2),
            (WIDTH - MARGIN, HEIGHT - MARGIN),
        ]
    ]
    assert points == [(WIDTH - MARGIN, HEIGHT / 2)]


@pytest.mark.parametrize("over", ["minutes", "labels"])
def test_an_evaluation_stands_where_training_was(tmp_path, over):
    folder = write_log(tmp_path / "run", [4.0, 3.0, 2.0, 1.0], [(20, 2.5)])
    assert main([folder, "--out", str(tmp_path / "curves.svg"), "--over", over]) == 0
    lines, points = drawn(tmp_path / "curves.svg")
    assert points[0][0] == lines[0][1][0] and lines[0][1][1] < points[0][1] < lines[0][2][1]


@pytest.mark.parametrize(("last", "labels"), [(150_000_000, ["0", "20,000,000"]), (3, ["0", "0.5"])])
def test_numbers_below_the_axis_are_written_out(tmp_path, last, labels):
    (tmp_path / "log.jsonl").write_text(
        "".join(json.dumps({"step": step, "loss": 2.0 / step, "labels": last * step / 2}) + "\n" for step in (1, 2))
    )
    assert main([str(tmp_path), "--out", str(tmp_path / "curves.svg"), "--over", "labels"]) == 0
    texts = ElementTree.parse(tmp_path / "curves.svg").getroot().iter(f"{SVG}text")
    below = [text.text for text in texts if text.attrib["y"] == str(HEIGHT - MARGIN + 20)]
    assert below[:2] == labels


def test_several_runs_share_the_scales(tmp_path):
    folders = [write_log(tmp_path / "a", [8.0, 4.0]), write_log(tmp_path / "b", [4.0, 2.0, 1.0])]
    assert main([*folders, "--out", str(tmp_path / "curves.svg")]) == 0
    (first, second), _ = drawn(tmp_path / "curves.svg")
    assert first[1][1] == second[0][1] and first[0][0] == second[0][0]


def test_a_folder_without_a_log_is_told(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "curves.svg")]) == 1
    assert "has no log of a run" in capsys.readouterr().err and not (tmp_path / "curves.svg").exists()
