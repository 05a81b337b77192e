"""Whether a model makes what it is asked for, and which settings to sample it with: training.evaluation.control,
training.evaluation.classifier and training/choose_sampling.py."""

import json
import re
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import trimesh
from small_models import ending_model, small_model
from transformers import GenerationConfig

from iflame_hf import IFlameTokenizer
from training import choose_sampling, evaluate
from training.evaluation.choice import best_setting, described, settings_to_try
from training.evaluation.classifier import agreement, train_classifier
from training.evaluation.control import asked_of, faces_errors
from training.evaluation.meshes import on_grid, places_of
from training.evaluation.report import read_for_card
from training.evaluation.samples import generated_sets
from training.rows.meshes import ParquetMeshes

SHAPES = {
    "box": trimesh.creation.box,
    "cone": lambda: trimesh.creation.cone(0.5, 1.0, sections=8),
    "ball": lambda: trimesh.creation.icosphere(subdivisions=1),
}
CHEAP = ("--points", "64", "--repeats", "1", "--use_cpu", "--rows", "16")


def shapes(count, seed):
    """Meshes of the three categories, none like another."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        category = sorted(SHAPES)[number % 3]
        mesh = SHAPES[category]()
        mesh.apply_transform(trimesh.transformations.rotation_matrix(rng.uniform(0, 6), (0, 1, 0)))
        vertices = mesh.vertices * rng.uniform(0.7, 1.3, 3)
        grid = on_grid(f"{category} {number}", vertices, mesh.faces, 128)
        found.append(grid._replace(category=category))
    return found


def table_of(meshes):
    rows = [
        {
            "name": mesh.name,
            "category": mesh.category,
            "vertices": mesh.vertices.tolist(),
            "faces": mesh.faces.tolist(),
        }
        for mesh in meshes
    ]
    return pyarrow.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pyarrow.parquet.write_table(table_of(shapes(30, 0)), folder / "train.parquet")
    pyarrow.parquet.write_table(table_of(shapes(24, 1)), folder / "test.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = ending_model(4, categories=["ball", "box"], num_faces_range=[12, 80]).float()
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def test_a_mesh_stays_in_its_half_whatever_the_order_and_the_others(data, tmp_path):
    table = pyarrow.parquet.read_table(data / "test.parquet")
    backwards = table.take(list(range(len(table)))[:4:-1])
    pyarrow.parquet.write_table(backwards, tmp_path / "test.parquet")
    halves = []
    for folder in (data, tmp_path):
        meshes = ParquetMeshes([str(folder / "test.parquet")])
        first, second = (places_of(meshes, half) for half in ("first", "second"))
        assert sorted([*first, *second]) == list(range(len(meshes.num_faces))) and min(len(first), len(second)) > 4
        halves.append({meshes.names()[place] for place in first})
    assert halves[1] == halves[0] & set(backwards["name"].to_pylist())
    some = places_of(meshes, "first", most=3, seed=1)
    assert len(some) == 3 and set(some) <= set(first) and list(some) == sorted(some)


def test_errors_of_numbers_of_faces_are_relative_and_by_bins_of_what_was_asked_for():
    found = faces_errors(np.array([100, 55, 300, 0]), np.array([100, 50, 200, 200]))
    assert list(found) == ["all", "1 to 100", "101 to 200"]
    assert found["1 to 100"] == {
        "meshes": 2, "median_error": pytest.approx(0.05), "error_90": pytest.approx(0.09), "near": 1
    }  # fmt: skip
    assert found["101 to 200"]["median_error"] == 0.75 and found["101 to 200"]["near"] == 0
    assert found["all"]["near"] == 0.5


def test_agreement_counts_and_rare_categories_weigh_as_much_as_others():
    found = agreement(np.array([0, 0, 0, 2, 9]), np.array([1, 1, 1, 1, 2]), ["no one", "many", "one"])
    assert (found["meshes"], found["top_1"], found["top_3"]) == (5, 0.6, 0.8) and found["macro"] == 0.375
    assert found["by_category"] == {"many": {"meshes": 4, "top_1": 0.75}, "one": {"meshes": 1, "top_1": 0.0}}


def test_the_classifier_tells_shapes_apart_however_they_are_turned_and_leaves_random_numbers_alone():
    names, held_out = sorted(SHAPES), shapes(30, 1)
    before = torch.get_rng_state()
    classifier = train_classifier(shapes(90, 0), names, points=32, epochs=40)
    assert torch.equal(torch.get_rng_state(), before)
    labels = np.array([names.index(mesh.category) for mesh in held_out])
    turned = [mesh._replace(vertices=mesh.vertices[:, [2, 1, 0]] * (1, 1, -1)) for mesh in held_out]
    for meshes in (held_out, turned):
        assert agreement(classifier.ranks(meshes, labels), labels, names)["macro"] > 0.85
    wrong = classifier.ranks(held_out, (labels + 1) % 3)
    assert (wrong > 0).mean() > 0.85 and wrong.max() == 2


def test_meshes_are_asked_to_be_what_held_out_ones_are():
    config = small_model(categories=["ball", "box"], num_faces_range=[12, 70]).config
    references = shapes(12, 2)
    asked = asked_of(config, references, 30, seed=0)
    assert {mesh.category for mesh in asked.meshes} == {"box", "cone"}, "balls have 80 faces"
    for mesh, category, faces in zip(asked.meshes, *asked.conditions.values(), strict=True):
        assert faces == len(mesh.faces) and category == (None if mesh.category == "cone" else mesh.category)
    counts = np.unique([mesh.name for mesh in asked.meshes], return_counts=True)[1]
    assert len(counts) == 8 and set(counts) == {3, 4}
    with pytest.raises(ValueError, match="no mesh of the data has a category or a number of faces"):
        asked_of(config, references, 30, seed=0, max_faces=11)


def test_control_is_measured_without_guidance_and_with_it(model, data, tmp_path, capsys):
    arguments = ["--model", model, "--data", data, "--output", tmp_path, "--num_samples", "5", "--num_sets", "1"]
    arguments += ["--max_faces", "20", "--search_points", "16", "--half", "second", *CHEAP]
    arguments += [
        "--control",
        "--guidance_scales",
        "1",
        "2.5",
        "--classifier_points",
        "16",
        "--classifier_epochs",
        "1",
    ]
    assert evaluate.main(list(map(str, arguments))) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "evaluation.json").read_text())
    sets, found = ["asked, no guidance", "asked, guidance 2.5"], results["control"]
    assert list(results["distribution"]["sets"]) == ["samples", *sets, "training set (oracle)"]
    assert list(found["faces"]) == sets and found["faces"][sets[0]]["all"]["meshes"] == 5
    rows = found["category"]["sets"]
    assert list(rows) == ["held-out meshes", *sets, "asked for nothing"]
    assert all(0 <= row["top_1"] <= row["top_3"] == 1 or row["top_3"] < 1 for row in rows.values())
    assert results["likelihood"]["meshes"] == len(places_of(ParquetMeshes([str(data / "test.parquet")]), "second"))
    lines = (tmp_path / "evaluation.md").read_text().splitlines()
    control = lines[lines.index("## Control") : lines.index("## Likelihood")]
    for name in sets:
        assert sum(f"| {name} |" in line for line in control) >= 3
    for before, line in zip(lines, lines[1:], strict=False):
        if before.startswith("|") and line.startswith("|"):
            assert line.count("|") == before.count("|")


def test_a_model_without_conditions_cannot_be_asked(data, tmp_path, capsys):
    small_model().config.save_pretrained(tmp_path)
    for option in ("--control", "--ask"):
        assert evaluate.main(["--model", str(tmp_path), "--data", str(data), option]) == 1
        said = f"{option} is of a model with conditions, and this one was trained without"
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--samples", "there"], "--ask asks a model for meshes, and --samples are made"),
        (["--control"], "--control compares with samples that are asked for nothing: leave out --ask"),
    ],
)
def test_what_asks_for_two_things_is_refused_in_words(more, words, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", "here", "--data", "data", "--ask", *more])
    assert words in capsys.readouterr().err


def test_samples_can_be_asked_to_be_what_training_meshes_are(model, data, tmp_path, monkeypatch):
    asked = []

    def made(generator, num, sets, seed, rows, settings, folder):
        asked.append(settings)
        return generated_sets(generator, num, sets, seed, rows, settings, folder)

    monkeypatch.setattr(evaluate, "generated_sets", made)
    arguments = ["--model", model, "--data", data, "--output", tmp_path, "--num_samples", "7", "--num_sets", "2"]
    assert evaluate.main(list(map(str, [*arguments, "--ask", "--max_faces", "20", *CHEAP]))) == 0
    (settings,) = asked
    training = [mesh for mesh in shapes(30, 0) if len(mesh.faces) <= 20]
    kinds = {(mesh.category if mesh.category in ("ball", "box") else None, len(mesh.faces)) for mesh in training}
    assert set(zip(settings["category"], settings["num_faces"], strict=True)) == kinds and len(kinds) == 2
    assert len(settings["num_faces"]) == 14
    text, _ = read_for_card(tmp_path / "evaluation.json")
    assert "none chosen and each asked to be what a training mesh drawn at random is" in text
    assert "Samples were asked to be what training meshes" in (tmp_path / "evaluation.md").read_text()
    found = json.loads((tmp_path / "evaluation.json").read_text())["settings"]
    assert found["ask"] is True and found["max_faces"] == settings["max_faces"] == 20


BASE = {"temperature": 1.0, "top_p": 0.9, "best_of": 1}


def test_settings_are_changed_one_at_a_time_or_all_together():
    values = {"temperature": [0.8, 1.0], "top_p": [0.9, 0.5]}
    one = settings_to_try(BASE, values, product=False)
    assert one == [BASE, {**BASE, "temperature": 0.8}, {**BASE, "top_p": 0.5}]
    every = settings_to_try(BASE, values, product=True)
    assert len(every) == 4 and every[0] == BASE and {**BASE, "temperature": 0.8, "top_p": 0.5} in every
    assert [described(each, BASE) for each in one] == ["base", "temperature 0.8", "top_p 0.5"]


def row(one_nna=0.6, coverage=0.5, mmd=0.01, boundary=0.1, large=0.1, ended=1.0):
    return {
        "one_nna": one_nna, "coverage": coverage, "mmd": mmd, "boundary_edges": boundary,
        "large_boundary_edges": large, "ended": ended,
    }  # fmt: skip


@pytest.mark.parametrize(
    "better",
    [{"one_nna": 0.55}, {"one_nna": 0.45}, {"coverage": 0.6}, {"mmd": 0.009}, {"boundary": 0.07}, {"large": 0.04}],
)
def test_the_better_figure_wins_wherever_it_stands(better):
    data = {"boundary_edges": 0.06, "large_boundary_edges": 0.05}
    assert best_setting([row(), row(**better), row(large=None)], data) == 1
    assert best_setting([row(**better), row()], data) == 0
    assert best_setting([row(), row(**better, ended=0.9)], data) == 0, "what does not end is out"
    unmeasured = dict.fromkeys(("one_nna", "coverage", "mmd"))
    assert best_setting([row(), {**row(**better), **unmeasured}], data) == 0
    with pytest.raises(ValueError, match="no setting gives enough meshes"):
        best_setting([{**row(), **unmeasured}], data)


def test_the_best_setting_is_written_where_generate_reads_it(model, data, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text('{"max_length": 900, "top_p": 0.95, "min_p": 0.2}')
    arguments = ["--model", folder, "--data", data, "--output", tmp_path / "out", "--num_samples", "4"]
    arguments += ["--max_faces", "16", "--temperature", "0.7", "--min_p", "0", "--best_of", "2", "--write", *CHEAP]
    assert choose_sampling.main(list(map(str, arguments))) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert [each["name"] for each in results["settings"]] == ["base", "temperature 0.7", "min_p 0.0", "best_of 2"]
    assert results["base"]["top_p"] == 0.95 and results["base"]["min_p"] == 0.2
    chosen = next(each["setting"] for each in results["settings"] if each["is_best"])
    written = GenerationConfig.from_pretrained(folder)
    assert (written.temperature, written.top_p) == (chosen["temperature"], chosen["top_p"]) and written.do_sample
    assert (written.min_p or 0, written.max_length) == (chosen["min_p"], 900)
    assert len({each["log_probability"] for each in [*results["settings"], results["again"]]}) == 5, "all differ"
    lines = (tmp_path / "out" / "sampling.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 8 and len({line.count("|") for line in rows}) == 1
    assert sum("**" in line for line in rows) == 1 and capsys.readouterr().out.count("| data |") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "MODEL", "--top_p", "1", "--write"], "no parquet files of a split validation"),
        (["--model", "someone/model", "--top_p", "1", "--references", "test", "--write"], "is one on the Hub"),
    ],
)
def test_what_cannot_be_chosen_is_said_at_once(arguments, message, model, data, tmp_path, capsys):
    arguments = [str(model) if word == "MODEL" else word for word in arguments]
    arguments += ["--data", str(data), "--output", str(tmp_path)]
    if "--references" not in arguments:
        arguments += ["--references", "validation"]
    assert choose_sampling.main(arguments) == 1
    assert re.fullmatch(rf"choose_sampling: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_nothing_to_choose_from_is_a_fault_of_the_command(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        choose_sampling.main(["--model", "x", "--data", str(data), "--output", str(tmp_path)])
    assert "give values of some of --temperature, --top_k" in capsys.readouterr().err
