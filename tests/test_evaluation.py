"""training/evaluate.py: what its figures say of samples whose answers are known."""

import json
import re

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import trimesh
from accelerate import Accelerator
from mesh_fixtures import solids
from PIL import Image
from small_models import ending_model, small_model

from iflame_hf import IFlameTokenizer
from iflame_hf.mesh_errors_iflame import MeshError
from training import evaluate
from training.evaluation.distribution import Protocol, compare_sets, draw_clouds
from training.evaluation.likelihood import likelihood
from training.evaluation.meshes import GridMesh, clouds, on_grid, split_files
from training.evaluation.novelty import SEEDS, nearest_training, symmetries
from training.evaluation.report import read_for_card
from training.evaluation.samples import read_sets
from training.evaluation.soundness import bin_names, boundary_ratios, soundness
from training.metrics import (
    chamfer_distances,
    coverage,
    jensen_shannon_divergence,
    minimum_matching_distance,
    normalised,
    one_nearest_neighbour_accuracy,
    sample_points,
)
from training.rows.encode import augment
from training.rows.meshes import ParquetMeshes

CHEAP = ("--points", "128", "--search_points", "32", "--repeats", "2", "--use_cpu")


def body(rng):
    """A mesh with no symmetry, unlike any other: two boxes and a cone."""
    parts = [trimesh.creation.box(rng.uniform(0.2, 1, 3)) for _ in range(2)]
    parts.append(trimesh.creation.cone(rng.uniform(0.1, 0.4), rng.uniform(0.3, 1), sections=5))
    for part in parts:
        part.apply_translation(rng.uniform(-0.6, 0.6, 3))
    return trimesh.util.concatenate(parts)


@pytest.fixture(scope="module")
def bodies():
    rng = np.random.default_rng(0)
    return [body(rng) for _ in range(20)]


@pytest.fixture(scope="module")
def training(bodies):
    return [on_grid(f"mesh {i}", mesh.vertices, mesh.faces, 128) for i, mesh in enumerate(bodies[:12])]


@pytest.fixture(scope="module")
def references(bodies):
    return [on_grid(f"mesh {i}", mesh.vertices, mesh.faces, 128) for i, mesh in enumerate(bodies[12:])]


@pytest.fixture(scope="module")
def data(bodies, tmp_path_factory):
    """A data set of 12 training meshes, and 8 to test with, of which every other one is like one of the former."""
    folder = tmp_path_factory.mktemp("data")
    for split, part in (("train", bodies[:12]), ("test", bodies[12:])):
        rows = [
            {"vertices": mesh.vertices.tolist(), "faces": mesh.faces.tolist(), "category": "ab"[i % 2]}
            for i, mesh in enumerate(part)
        ]
        if split == "test":
            rows = [{**row, "nn_iou_train": (0.2, 0.9, None)[i % 3]} for i, row in enumerate(rows)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = ending_model(4).float()
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def results_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def copied(bodies, data, tmp_path_factory):
    """The results for samples that are training meshes, turned, mirrored, moved and scaled, in files of all kinds,
    and one that is no mesh."""
    folder = tmp_path_factory.mktemp("copied")
    (folder / "samples").mkdir()
    for number, mesh in enumerate(bodies[:6]):
        rng = np.random.default_rng(number)
        normal = (mesh.vertices - mesh.bounds.mean(axis=0)) / mesh.extents.max()
        vertices, faces = augment(normal, mesh.faces, rng, scale=False, shift=True, turn="quarter", mirror=True)
        suffix = ("glb", "obj", "off")[number % 3]
        trimesh.Trimesh(3 * vertices, faces, process=False).export(folder / "samples" / f"{number}.{suffix}")
    (folder / "samples" / "broken.obj").write_text("v 0 0 0\n")
    arguments = ["--samples", folder / "samples", "--data", data, "--output", folder / "out", *CHEAP]
    assert evaluate.main([*map(str, arguments), "--num_samples", "8"]) == 0
    return folder / "out"


def test_training_meshes_given_as_samples_are_copies(copied):
    novelty = results_of(copied)["novelty"]
    assert novelty["copies"] == 1 and novelty["held_out_copies"] == 0 and novelty["nearer_than_held_out"] == 1
    for found in novelty["nearest"]:
        assert found["nearest"] == f"mesh {found['sample'].partition('.')[0]}" and found["copy"]


def test_what_is_no_mesh_is_counted_and_takes_part_in_nothing(copied):
    results = results_of(copied)
    assert results["samples"] == {"samples": {"count": 7, "usable": 6, "unusable": {"empty": 1}}}
    assert results["distribution"]["protocol"]["size"] == 6, "as many of each set"
    assert results["soundness"]["samples"]["all"]["meshes"] == 6
    assert results["likelihood"] is None
    assert "samples: 7, of which 6 are a mesh (empty: 1)" in (copied / "evaluation.md").read_text()


def test_tables_are_whole_and_pictures_are_pictures(copied):
    lines = (copied / "evaluation.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    assert sum(line.startswith("|---") for line in tables) == 3
    for before, line in zip(lines, lines[1:], strict=False):
        if before.startswith("|") and line.startswith("|"):
            assert line.count("|") == before.count("|")
    for name in ("samples.png", "pairs.png"):
        with Image.open(copied / name) as picture:
            assert min(picture.size) > 256
    assert sorted(path.name for path in copied.iterdir()) == [
        "evaluation.json", "evaluation.md", "pairs.png", "samples.png"
    ]  # fmt: skip


def test_the_oracle_row_is_what_the_functions_give_directly(training, references):
    protocol = Protocol(size=6, points=64, normalisation="longest side", repeats=2, seed=5)
    found = compare_sets({"samples": references, "oracle": training}, references, protocol)["oracle"]
    for repeat in range(2):
        a, b = (draw_clouds(each, protocol, repeat, place) for each, place in ((training, 2), (references, 0)))
        a, b = normalised(a, "longest side"), normalised(b, "longest side")
        between = chamfer_distances(a, b)
        nearest = one_nearest_neighbour_accuracy(chamfer_distances(a), chamfer_distances(b), between)
        assert found["coverage"][repeat] == coverage(between)
        assert found["mmd"][repeat] == pytest.approx(minimum_matching_distance(between))
        assert found["one_nna"][repeat] == nearest
        assert found["jsd"][repeat] == jensen_shannon_divergence(a, b)
    assert found["mmd"][0] != found["mmd"][1], "repeats differ in points and meshes"


def test_references_as_samples_are_all_covered_and_not_told_apart(references):
    protocol = Protocol(size=len(references), points=256, repeats=1, emd_meshes=len(references), emd_points=64)
    found = compare_sets({"samples": references}, references, protocol)["samples"]
    assert found["coverage"] == [1] and found["one_nna"] == [0] and found["emd_one_nna"] == [0]


def test_points_are_spread_as_trimesh_spreads_them_the_first_of_them_too(training):
    cloud = clouds(training[:2], 40_000, 7)
    assert not np.array_equal(cloud, clouds(training[:2], 40_000, 8))
    for mesh, own in zip(training, cloud, strict=False):
        wanted = sample_points(mesh.vertices, mesh.faces, 40_000, 0)
        for part in (own, own[:10_000]):
            np.testing.assert_allclose(part.mean(axis=0), wanted.mean(axis=0), atol=0.02)
            np.testing.assert_allclose(np.cov(part.T), np.cov(wanted.T), atol=0.005)
        _, distances, _ = trimesh.proximity.closest_point_naive(trimesh.Trimesh(mesh.vertices, mesh.faces), own[:500])
        assert distances.max() < 1e-6, "they lie on the surface"


def test_sets_too_small_to_compare_are_refused(training):
    with pytest.raises(ValueError, match="2 at least; samples has 1"):
        compare_sets({"samples": training[:1]}, training, Protocol(size=1))


def test_the_symmetries_are_the_eight_that_augmentation_makes():
    points = np.random.default_rng(0).normal(size=(5, 3))
    made = {(points @ matrix).round(5).tobytes() for matrix in symmetries().astype(float)}
    box = np.array([[-0.5] * 3, [0.5] * 3, *points / 20])  # whose box and longest side stay as they are
    for seed in range(40):
        turned, _ = augment(box, np.zeros((1, 3), int), np.random.default_rng(seed), False, False, "quarter", True)
        made.discard((20 * turned[2:]).round(5).tobytes())
    assert not made


def test_the_search_finds_what_a_search_by_all_points_finds(training, references):
    nearest = nearest_training(references, training, points=128, search_points=64, candidates=12)
    every = nearest_training(references, training, points=128, search_points=128, candidates=12)
    assert nearest.index.tolist() == every.index.tolist()
    np.testing.assert_allclose(nearest.distance, every.distance, rtol=1e-5)
    assert not nearest.copies.any()
    a, b = clouds(references, 128, 0, SEEDS["queries"]), clouds(training, 128, 0, SEEDS["training"])
    distances = np.stack([chamfer_distances(a @ matrix, b) for matrix in symmetries()])  # (8, N, M)
    np.testing.assert_allclose(nearest.distance, distances.min(axis=(0, 2)), rtol=1e-4)
    place = np.arange(len(a))
    np.testing.assert_allclose(distances[nearest.symmetry, place, nearest.index], nearest.distance, rtol=1e-4)


def closed_and_open(count):
    mesh = trimesh.creation.icosphere(subdivisions=2)  # of 320 faces
    return on_grid("sphere", mesh.vertices, mesh.faces[count:], 1024)


def test_closed_meshes_have_no_boundary_and_ratios_are_of_means():
    found = soundness([on_grid(name, mesh.vertices, mesh.faces, 1024) for name, mesh in solids().items()])
    assert found["all"]["boundary_edges"] == 0 and found["all"]["closed"] == 1 and found["all"]["pieces"] == 1
    one, two = soundness([closed_and_open(1), closed_and_open(0)]), soundness([closed_and_open(1)])
    assert one["all"]["boundary_edges"] == pytest.approx(3 / 480 / 2)
    assert boundary_ratios(one, two) == {"all": pytest.approx(0.5), "above 200": pytest.approx(0.5)}
    assert boundary_ratios(two, found) == {"all": None, "above 200": None}


def test_meshes_are_in_the_bin_of_their_faces_and_what_was_left_out_is_counted():
    box = trimesh.creation.box()
    faces = [*box.faces, box.faces[0], [0, 0, 1]]
    mesh = on_grid("box", box.vertices, faces, 128)
    assert (len(mesh.faces), mesh.repeated, mesh.degenerate) == (12, 1, 1)
    found = soundness([mesh._replace(ended=True), mesh._replace(ended=False), closed_and_open(0)])
    assert list(found) == ["all", "above 200", "1 to 100", "201 to 400"] and set(bin_names()) >= {"201 to 400"}
    assert found["1 to 100"]["repeated_faces"] == found["1 to 100"]["degenerate_faces"] == pytest.approx(1 / 14)
    assert found["1 to 100"]["ended"] == 0.5 and found["above 200"]["ended"] is None


def test_what_the_grid_flattens_to_nothing_is_no_mesh():
    with pytest.raises(MeshError):
        on_grid("line", np.array([[0, 0, 0], [1, 1, 1], [2, 2, 2.0]]), np.array([[0, 1, 2]]), 128)


def test_files_of_formats_whose_z_is_up_are_turned(tmp_path):
    mesh = trimesh.creation.box((1, 2, 3))
    mesh.export(tmp_path / "box.stl")
    (sample,) = read_sets(tmp_path, 5, 1, 0, 128)[0].meshes
    assert isinstance(sample, GridMesh) and np.ptp(sample.vertices, axis=0) == pytest.approx(
        [1 / 3, 1, 2 / 3], abs=0.01
    )


# With a model


@pytest.fixture(scope="module")
def of_model(model, data):
    arguments = ["--model", model, "--data", data, "--num_samples", "4", "--max_faces", "12", "--save_samples", *CHEAP]
    assert (
        evaluate.main(list(map(str, [*arguments, "--temperature", "0.9", "--min_p", "0.001", "--no-keep_order"]))) == 0
    )
    return model / "evaluation"


def test_a_models_samples_are_two_sets_beside_the_oracle(of_model):
    results = results_of(of_model)
    rows = results["distribution"]["sets"]
    assert list(rows) == ["samples", "samples, set 2", "training set (oracle)"]
    for row in rows.values():
        assert all(len(figure["values"]) == 2 and figure["deviation"] >= 0 for figure in row.values())
    assert results["settings"]["temperature"] == 0.9 and results["settings"]["max_faces"] == 12
    assert 0 < results["samples"]["samples"]["usable"] <= 4 == results["samples"]["samples, set 2"]["count"]


def test_a_card_has_the_figures_that_matter_and_no_folder_of_this_machine(of_model, copied):
    for folder in (of_model, copied):
        results = results_of(folder)
        text, figures = read_for_card(folder / "evaluation.json")
        lines = [line for line in (folder / "evaluation.md").read_text().splitlines() if line.startswith("|")]
        for beginning in ("| training set (oracle)", "| all | 8", "| unlike any", "| samples |"):
            for line in lines:
                assert not line.startswith(beginning) or line in text
        assert "/" not in text.replace("training/evaluate.py", "") and "| a | 4 |" not in text
        edges = [results["soundness"][each]["all"]["boundary_edges"] for each in ("samples", "references", "training")]
        shown = " | ".join(f"{100 * share:.2f}" for share in edges)
        assert f"| all | {results['soundness']['samples']['all']['meshes']} | {shown} |" in text
        assert "### Likelihood" in text if figures else results["likelihood"] is None
    assert "drawn with temperature 0.9" in read_for_card(of_model / "evaluation.json")[0]
    assert "keep order off in float32" in read_for_card(of_model / "evaluation.json")[0]
    assert "at most 12 faces" in read_for_card(of_model / "evaluation.json")[0]
    assert read_for_card(of_model / "evaluation.json")[1]["loss"] == results_of(of_model)["likelihood"]["all"]["loss"]


def test_another_file_is_no_evaluation_for_a_card(tmp_path):
    (tmp_path / "other.json").write_text('{"settings": {}, "samples": {}}')
    with pytest.raises(ValueError, match=r"other\.json is no evaluation\.json of training/evaluate\.py"):
        read_for_card(tmp_path / "other.json")


def test_saved_samples_are_evaluated_as_the_model_s_own_are(of_model, data, tmp_path):
    saved = read_sets(of_model / "samples", 8, 1, 0, 128)[0]
    own = results_of(of_model)["samples"].values()
    assert saved.count == sum(each["count"] for each in own) == 8
    assert len(saved.meshes) == sum(each["usable"] for each in own)
    assert {mesh.ended for mesh in saved.meshes} <= {True, False}


def test_likelihood_is_that_of_the_model_for_all_and_for_meshes_unlike_training(of_model, model, data):
    figures = results_of(of_model)["likelihood"]
    network = small_model().from_pretrained(model).eval()
    rows = pyarrow.parquet.read_table(data / "test.parquet").to_pylist()
    tokenizer, nats = IFlameTokenizer(), []
    for row in rows:
        ids = torch.tensor([tokenizer.encode_mesh((row["vertices"], row["faces"]))])
        with torch.no_grad():
            scores = network(ids).logits[0, 8:-1].double().log_softmax(-1)
        nats.append(-scores.gather(1, ids[0, 9:, None])[:, 0].numpy())
    faces = sum(len(each) // 9 - 1 for each in nats)
    assert figures["all"]["loss"] == pytest.approx(np.concatenate(nats).mean(), rel=1e-5)
    assert figures["all"]["bits_per_face"] == pytest.approx(np.concatenate(nats).sum() / np.log(2) / faces, rel=1e-5)
    far = [each for each, row in zip(nats, rows, strict=True) if (row["nn_iou_train"] or 1) < 0.5]
    assert figures["far_meshes"] == len(far) == 3
    assert figures["far"]["loss"] == pytest.approx(np.concatenate(far).mean(), rel=1e-5)
    assert {name: each["meshes"] for name, each in figures["by_category"].items()} == {"a": 4, "b": 4}


def test_meshes_that_the_model_has_no_room_for_are_counted(data):
    files = split_files(data, "test")
    generator = type("", (), {"model": small_model(max_position_embeddings=9 * 36), "tokenizer": IFlameTokenizer()})
    meshes = ParquetMeshes(files)
    meshes.num_faces[:2] = 40
    figures = likelihood(generator, meshes, files, Accelerator(cpu=True), 2)
    assert figures["too_long"] == 2 and figures["meshes"] == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere", "--samples", "."], "--data nowhere is no folder"),
        (["--data", "DATA", "--samples", "EMPTY"], "there are no meshes"),
        (["--data", "EMPTY", "--samples", "FILES"], "no parquet files of a split test or validation"),
        (["--data", "DATA", "--samples", "FILES", "--references", "validation"], "of a split validation"),
        (["--data", "DATA", "--samples", "FILES"], "give --output"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(arguments, message, data, tmp_path, capsys):
    for name in ("EMPTY", "FILES"):
        (tmp_path / name).mkdir()
    trimesh.creation.box().export(tmp_path / "FILES" / "box.obj")
    places = {"DATA": data, "EMPTY": tmp_path / "EMPTY", "FILES": tmp_path / "FILES"}
    assert evaluate.main([str(places.get(word, word)) for word in arguments]) == 1
    assert re.fullmatch(rf"evaluate: .*{re.escape(message)}.*\n", capsys.readouterr().err)


def test_several_processes_are_refused(data, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert evaluate.main(["--data", str(data), "--samples", str(data)]) == 1
    assert "the work of one process: give accelerate launch --num_processes 1" in capsys.readouterr().err


def test_neither_a_model_nor_samples_is_a_fault_of_the_command(data, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--data", str(data)])
    assert "give --model, or --samples" in capsys.readouterr().err
