"""From collections of meshes, bad files among them, to a data set: what is in it, and that nothing can spoil it."""

import hashlib
import json
import os
import time
from pathlib import Path

import bad_files
import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import trimesh
from mesh_fixtures import signed_volume
from prepared_fixtures import content, prepare, rejected, rows, summary, write_boxes

from iflame_hf import IFlameTokenizer
from training.prepare import mesh_worker, prepared_set
from training.prepare.synsets import SYNSETS
from training.rows.meshes import ParquetMeshes


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A data set of the tree of good and bad files, prepared once."""
    folder = tmp_path_factory.mktemp("tree")
    bad_files.write_all(folder / "files")
    assert prepare(folder / "files", "--out", folder / "out", "--min_faces", 4, "--memory_limit", 1) == 0
    return folder


def test_every_file_is_taken_or_rejected_for_its_own_reason(tree):
    kinds = {row["source"]: bad_files.GOOD for row in rows(tree / "out")}
    kinds |= {line["source"]: line["kind"] for line in rejected(tree / "out")}
    assert len(kinds) == len(rows(tree / "out")) + len(rejected(tree / "out")), "a mesh is recorded twice"
    assert {source.removeprefix("files/"): kind for source, kind in kinds.items()} == bad_files.EXPECTED
    bad = [name for name, kind in bad_files.EXPECTED.items() if kind is not bad_files.GOOD]
    assert len(bad) >= 80 and len(bad_files.EXPECTED) - len(bad) >= 15


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_file_that_makes_its_reader_wait_for_ever_is_given_up(tmp_path):
    bad_files.pipe_as_buffer(write_boxes(tmp_path / "in", 20) / "box 005 waits.gltf")
    start = time.monotonic()
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--time_limit", 4) == 0
    assert [(line["name"], line["kind"]) for line in rejected(tmp_path / "out")] == [("box 005 waits", "time limit")]
    assert len(rows(tmp_path / "out")) == 20 and time.monotonic() - start < 60


def test_the_summary_counts_what_the_record_lists(tree):
    counted = summary(tree / "out")["rejected"]
    kinds = [line["kind"] for line in rejected(tree / "out")]
    assert counted == {kind: kinds.count(kind) for kind in kinds}
    assert sum(summary(tree / "out")["meshes"].values()) == len(rows(tree / "out"))


def test_a_record_gives_a_reason_without_folders_of_the_machine(tree):
    for line in rejected(tree / "out"):
        assert len(line["reason"]) > 5
        assert str(tree) not in line["reason"] and ".unpacked" not in line["reason"], line


def test_a_pickle_is_not_read_and_the_recipe_for_meshgpts_is_named(tree, capsys):
    (line,) = [line for line in rejected(tree / "out") if line["source"].endswith("planted.pkl")]
    assert "python -m training.recipes.meshgpt_to_parquet" in line["reason"]
    assert not Path("planted").exists() and not list(tree.rglob("planted"))
    assert prepare(tree / "files" / "table" / "planted.pkl", "--out", tree / "other") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "planted.pkl: a pickle is not read" in line and "training.recipes.meshgpt_to_parquet" in line


def test_nothing_is_left_beside_the_data_set(tree):
    names = {path.name for path in (tree / "out").iterdir()}
    assert names == {"README.md", "data", "rejected.jsonl", "settings.json", "summary.json"}


def test_rows_are_normalised_clean_and_of_the_stated_types(tree):
    table = pyarrow.parquet.read_table(sorted((tree / "out" / "data").glob("train-*.parquet"))[0])
    assert table.schema.remove_metadata() == prepared_set.SCHEMA
    found = rows(tree / "out")
    assert found
    for row in found:
        vertices, faces = np.array(row["vertices"]), np.array(row["faces"])
        assert np.ptp(vertices, axis=0).max() == pytest.approx(1, abs=1e-6)
        assert np.abs(vertices.min(axis=0) + vertices.max(axis=0)).max() < 1e-6
        assert len(np.unique(vertices, axis=0)) == len(vertices) and set(faces.ravel()) == set(range(len(vertices)))
        assert row["num_faces"] == len(faces) >= row["num_faces_q"] >= 4
        assert signed_volume(vertices, faces) > 0.01, row["name"]


def test_a_row_has_the_tokens_of_its_file(tree):
    tokenizer, compared = IFlameTokenizer(), 0
    for row in rows(tree / "out"):
        path = tree / row["source"]
        if path.is_file():
            ids = tokenizer.encode_mesh((np.array(row["vertices"]), np.array(row["faces"])))
            assert ids == tokenizer.encode_mesh(path)
            assert len(ids) == 9 * (row["num_faces_q"] + 2)
            compared += 1
    assert compared >= 10


def test_datasets_and_the_training_data_read_what_was_written(tree, tmp_path):
    loaded = datasets.load_dataset(str(tree / "out"), cache_dir=str(tmp_path))
    assert {split: len(part) for split, part in loaded.items()} == {
        split: count for split, count in summary(tree / "out")["meshes"].items() if count
    }
    assert loaded["train"].features["vertices"] == datasets.List(datasets.List(datasets.Value("float32")))
    streamed = datasets.load_dataset(str(tree / "out"), streaming=True)["train"]
    assert [row["name"] for row in streamed] == loaded["train"]["name"][:]
    meshes = ParquetMeshes([str(path) for path in sorted((tree / "out" / "data").glob("train-*.parquet"))])
    assert meshes.num_faces.tolist() == loaded["train"]["num_faces"][:]
    vertices, faces = meshes.read([0])[0]
    assert vertices.tolist() == loaded["train"]["vertices"][0] and faces.tolist() == loaded["train"]["faces"][0]


def test_the_card_has_the_figures_of_the_set(tree):
    card = (tree / "out" / "README.md").read_text()
    figures = summary(tree / "out")
    assert f"{sum(figures['meshes'].values())} triangle meshes" in card
    assert f"{figures['meshes']['train']} for train" in card and "| encrypted | 1 |" in card
    assert str(tree) not in card


def test_a_mesh_with_z_up_is_written_with_y_up(tmp_path):
    upright = trimesh.creation.box(extents=(1, 2, 10))
    (tmp_path / "in").mkdir()
    upright.export(tmp_path / "in" / "tower.ply")
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--up_axis", "z") == 0
    (row,) = rows(tmp_path / "out")
    vertices = np.array(row["vertices"])
    assert np.ptp(vertices, axis=0) == pytest.approx([0.1, 1, 0.2], abs=1e-6)
    assert signed_volume(vertices, row["faces"]) == pytest.approx(0.02, rel=1e-4)


def test_the_split_of_a_mesh_depends_on_its_name_alone(tmp_path):
    boxes = write_boxes(tmp_path / "in", 40)
    assert prepare(boxes, "--out", tmp_path / "some", "--validation_share", 0.3) == 0
    write_boxes(boxes, 40, first=40)
    assert prepare(boxes, "--out", tmp_path / "all", "--validation_share", 0.3) == 0
    some, every = ({row["name"] for row in rows(tmp_path / name, "validation")} for name in ("some", "all"))
    hashed = {f"box {n:03d}": int(hashlib.sha1(f"box {n:03d}".encode()).hexdigest()[:16], 16) for n in range(80)}
    assert every == {name for name, number in hashed.items() if number < 0.3 * 2**64}
    assert some == {name for name in every if name < "box 040"} and 5 < len(some) < 20


def test_duplicates_are_kept_on_request_and_names_stay_unique(tmp_path):
    for name in ("a/box.obj", "b/box.obj"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(bad_files.box(1.5))
    sources = tmp_path / "a", tmp_path / "b" / "box.obj"
    assert prepare(*sources, "--out", tmp_path / "one") == 0
    assert [row["name"] for row in rows(tmp_path / "one")] == ["box"]
    assert prepare(*sources, "--out", tmp_path / "both", "--no-deduplicate") == 0
    assert sorted(row["name"] for row in rows(tmp_path / "both")) == ["box", "box (2)"]


def test_categories_are_chosen_by_name_or_synset_id_and_written_by_name(tmp_path):
    folders = ["chairs/a", "04379243/b/models", "Lamp/c", ""]
    for number, folder in enumerate(folders):
        write_boxes(tmp_path / "in" / folder, 1, first=number)
    assert prepare(tmp_path / "in", "--out", tmp_path / "all") == 0
    assert [row["category"] for row in rows(tmp_path / "all")] == ["table", "Lamp", None, "chairs"]
    assert prepare(tmp_path / "in", "--out", tmp_path / "some", "--categories", "04379243", "lamp") == 0
    assert [row["category"] for row in rows(tmp_path / "some")] == ["table", "Lamp"]
    assert summary(tmp_path / "some")["rejected"] == {"not chosen": 2} and rejected(tmp_path / "some") == []


def test_shapenet_has_55_categories_with_names_of_their_own():
    assert len(SYNSETS) == len(set(SYNSETS.values())) == 55
    assert all(len(key) == 8 and key.isdigit() for key in SYNSETS)


def test_a_list_chooses_files_wherever_they_lie_and_what_is_not_there_is_recorded(tmp_path):
    for number, folder in enumerate(["000-001", "000-002", "deep/er"]):
        write_boxes(tmp_path / "in" / folder, 2, first=2 * number)
    (tmp_path / "in" / "more.zip").write_bytes(bad_files.zipped(("x/box 100.obj", bad_files.box(5)), ("y.obj", "")))
    (tmp_path / "list.txt").write_text("box 001.obj\nbox 004\nbox 100.obj\nlost.glb\n\n")
    assert prepare(tmp_path / "in", "--ids", tmp_path / "list.txt", "--out", tmp_path / "out") == 0
    assert [row["name"].rpartition("/")[2] for row in rows(tmp_path / "out")] == ["box 001", "box 004", "box 100"]
    assert [(line["name"], line["kind"]) for line in rejected(tmp_path / "out")] == [("lost.glb", "missing file")]


def test_a_data_set_of_the_hub_is_streamed(tmp_path):
    vertices, faces = zip(*(bad_files.row(height) for height in (1.0, 1.2, 1.4)), strict=True)
    features = datasets.Features(
        vertices=datasets.List(datasets.List(datasets.Value("float32"))),
        faces=datasets.List(datasets.List(datasets.Value("int32"))),
        label=datasets.ClassLabel(names=["stool", "bench"]),
        license=datasets.Value("string"),
    )
    table = {"vertices": vertices, "faces": faces, "label": [1, 0, 1], "license": ["MIT", None, "CC0-1.0"]}
    data = datasets.Dataset.from_dict(table, features=features)
    stand_in = tmp_path / "user" / "meshes"
    data.select([0, 1]).to_parquet(stand_in / "data" / "train-0.parquet")
    data.select([2]).to_parquet(stand_in / "data" / "test-0.parquet")
    assert prepare(f"hub:{stand_in}", "--out", tmp_path / "out", "--splits", "source", "--license", "CC-BY-4.0") == 0
    found = [(row["category"], row["license"]) for row in rows(tmp_path / "out", "train")]
    assert found == [("bench", "MIT"), ("stool", "CC-BY-4.0")]
    assert [(row["category"], row["license"]) for row in rows(tmp_path / "out", "validation")] == [
        ("bench", "CC0-1.0")
    ]
    # Of some licences alone: what tells none is left out too.
    assert prepare(f"hub:{stand_in}", "--out", tmp_path / "free", "--only_licenses", "mit", "CC0-1.0") == 0
    free = rows(tmp_path / "free", "train") + rows(tmp_path / "free", "validation")
    assert {row["license"] for row in free} == {"MIT", "CC0-1.0"} and len(free) == 2
    summary = json.loads((tmp_path / "free" / "summary.json").read_text())
    assert summary["rejected"] == {"not chosen": 1}


def test_packs_authors_and_splits_of_a_source_are_kept(tmp_path):
    source = tmp_path / "in"
    write_boxes(source / "boxes", 1)
    for split, heights in {"train": (1.0, 1.2, 1.4), "test": (1.6, 1.8)}.items():
        vertices, faces = zip(*map(bad_files.row, heights), strict=True)
        texts = {"name": [f"{height}" for height in heights], "author": ["Ann", "", None][: len(heights)]}
        packs = [f"Ann/{split} kit"] * len(heights)
        columns = {**texts, "vertices": vertices, "faces": faces, "pack": packs}
        if split == "test":
            columns["nn_iou_train"] = pyarrow.array([0.25, None], pyarrow.float32())
        table = pyarrow.table(columns)
        pyarrow.parquet.write_table(table, source / f"{split}.parquet")
    assert prepare(source, "--out", tmp_path / "out", "--splits", "source", "--validation_share", 0) == 0
    found = [(row["name"], row["pack"], row["author"]) for row in rows(tmp_path / "out", "train")]
    assert found[0] == ("boxes/box 000", None, None)
    assert found[1:] == [
        ("1.0", "Ann/train kit", "Ann"),
        ("1.2", "Ann/train kit", None),
        ("1.4", "Ann/train kit", None),
    ]
    found = [(row["name"], row["pack"], row["author"]) for row in rows(tmp_path / "out", "validation")]
    assert found == [("1.6", "Ann/test kit", "Ann"), ("1.8", "Ann/test kit", None)]
    assert [row["nn_iou_train"] for row in rows(tmp_path / "out")] == [None] * 4 + [0.25, None]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Ann/train kit | 3 |\n" in card and "| not known | 4 |\n| Ann | 2 |\n" in card
    files = [str(path) for path in sorted((tmp_path / "out" / "data").glob("train-*.parquet"))]
    assert ParquetMeshes(files, grouped_by=["pack"]).groups("pack").tolist() == [1, 0, 0, 0]
    assert prepare(source / "boxes", "--out", tmp_path / "plain") == 0
    assert "## Packs" not in (tmp_path / "plain" / "README.md").read_text()


def test_mesh_files_in_a_data_set_of_the_hub_are_read(tmp_path):
    if not hasattr(datasets, "Mesh"):
        pytest.skip("this release of datasets knows no meshes")
    for number, name in enumerate(("stool/a.glb", "stool/b.glb", "bench/a.glb")):
        path = tmp_path / "user" / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bad_files.box_glb(1.5 + number))
    assert prepare(f"hub:{tmp_path / 'user' / 'files'}", "--out", tmp_path / "out") == 0
    assert sorted(row["category"] for row in rows(tmp_path / "out")) == ["bench", "stool", "stool"]


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_files(tmp_path, capsys):
    assert prepare("hub:nobody/nothing", "--out", tmp_path / "out") == 1
    assert "hub:nobody/nothing cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "README.md").exists()


def test_what_a_gltf_file_says_of_its_licence_is_kept(tmp_path):
    text = bad_files.gltf(change=lambda tree: tree["asset"].update(extras={"license": "CC-BY-4.0 \ud800"}))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.gltf").write_text(text)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--license", "CC0-1.0") == 0
    assert [row["license"] for row in rows(tmp_path / "out")] == ["CC-BY-4.0 \\ud800"]


def test_decimation_of_planes_changes_nothing_but_the_count(tmp_path):
    pytest.importorskip("fast_simplification")
    pytest.importorskip("scipy")
    box = trimesh.creation.box(extents=(1, 0.5, 0.25)).subdivide().subdivide().subdivide()
    ball = trimesh.creation.icosphere(subdivisions=4)
    comb = trimesh.util.concatenate(
        [trimesh.creation.cylinder(0.01, 1, sections=40).apply_translation((x, 0, 0)) for x in range(30)]
    )
    (tmp_path / "in").mkdir()
    for name, mesh in {"ball": ball, "box": box, "comb": comb}.items():
        mesh.export(tmp_path / "in" / f"{name}.ply")
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--max_faces", 100, "--decimate") == 0
    found = {row["name"]: row for row in rows(tmp_path / "out")}
    assert {"ball", "box"} == found.keys() and found["box"]["num_faces"] == 12
    volume = signed_volume(found["box"]["vertices"], found["box"]["faces"])
    assert volume == pytest.approx(0.125, rel=1e-4)
    assert 80 <= found["ball"]["num_faces"] <= 100
    volume = signed_volume(found["ball"]["vertices"], found["ball"]["faces"])
    assert volume == pytest.approx(np.pi / 6, rel=0.1)
    assert [(line["name"], line["kind"]) for line in rejected(tmp_path / "out")] == [("comb", "not decimated")]
    strict = ("--max_faces", 100, "--decimate", "--max_deviation", 0.026)
    assert prepare(tmp_path / "in", "--out", tmp_path / "strict", *strict) == 0
    assert [row["name"] for row in rows(tmp_path / "strict")] == ["box"]
    assert "the surface moves by 0.02" in rejected(tmp_path / "strict")[0]["reason"]


def test_the_deviation_of_two_surfaces_is_their_distance():
    pytest.importorskip("scipy")
    big, small = (trimesh.creation.icosphere(subdivisions=4, radius=radius) for radius in (0.5, 0.4))
    measured = mesh_worker.deviation((big.vertices, big.faces), (small.vertices, small.faces))
    assert 0.1 <= measured < 0.125
    assert mesh_worker.deviation((big.vertices, big.faces), (big.vertices, big.faces)) < 0.025
    spike = np.concatenate([small.vertices, [[0, 2, 0]]])
    faces = np.concatenate([small.faces, [[0, 1, len(small.vertices)]]])
    assert mesh_worker.deviation((small.vertices, small.faces), (spike, faces)) > 1


def test_decimation_without_its_packages_is_a_clear_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(mesh_worker, "fast_simplification", None)
    assert prepare(write_boxes(tmp_path / "in", 1), "--out", tmp_path / "out", "--decimate") == 1
    assert "pip install fast-simplification scipy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_number_of_workers_changes_nothing(tmp_path):
    boxes = write_boxes(tmp_path / "in", 50)
    (boxes / "bad.obj").write_text("nothing")
    for workers in (1, 3):
        assert (
            prepare(boxes, "--out", tmp_path / str(workers) / "set", "--num_workers", workers, "--shard_size", 20) == 0
        )
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert [len(pyarrow.parquet.read_table(p)) for p in sorted((tmp_path / "1").rglob("train-*"))][:2] == [20, 20]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no such folder"], "there is no folder or file no such folder"),
        (["user/name"], "write hub:user/name"),
        (["{here}/notes.txt"], "of no format that is read"),
        (["{here}", "--validation_share", "1"], "validation_share"),
        (["{here}", "--min_faces", "9", "--max_faces", "8"], "--max_faces 8 is less"),
        (["{here}", "--num_workers", "0"], "--num_workers must be at least 1"),
        (["{here}", "--ids", "{here}/nothing.txt"], "cannot be read"),
        (["{here}", "--categories", "99999999"], "99999999 is not the synset id"),
    ],
)
def test_an_impossible_request_is_refused_before_anything_is_written(arguments, message, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("nothing")
    arguments = [argument.format(here=tmp_path) for argument in arguments]
    assert prepare(*arguments, "--out", tmp_path / "out") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_folder_written_to_is_never_a_source(tmp_path, capsys):
    boxes = write_boxes(tmp_path / "in", 3)
    assert prepare(boxes, "--out", boxes) == 1
    assert "cannot be a source" in capsys.readouterr().err
    assert prepare(boxes, "--out", boxes / "set") == 0
    assert prepare(boxes, "--out", tmp_path / "again", "--overwrite") == 0
    assert prepare(boxes, "--out", boxes / "set", "--overwrite") == 0
    assert len(rows(boxes / "set")) == 3


def test_links_to_folders_are_recorded_and_not_followed(tmp_path, capsys):
    write_boxes(tmp_path / "elsewhere", 3)
    source = write_boxes(tmp_path / "in", 1, first=3)
    for name, target in {
        "all": "../elsewhere",
        "models.zip": "../elsewhere",
        "up": "..",
        ".hidden": "../elsewhere",
        "loop": "loop",
        "written": "../out",
    }.items():
        (source / name).symlink_to(target)
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert [row["name"] for row in rows(tmp_path / "out")] == ["box 003"]
    assert [(line["source"], line["kind"]) for line in rejected(tmp_path / "out")] == [
        (f"in/{name}", "link to a folder") for name in ("all", "models.zip", "up")
    ]
    assert all("name the folder itself as a source" in line["reason"] for line in rejected(tmp_path / "out"))
    assert summary(tmp_path / "out")["rejected"] == {"link to a folder": 3}
    assert "3 link to a folder" in capsys.readouterr().out
    assert prepare(source / "all", "--out", tmp_path / "followed") == 0
    assert len(rows(tmp_path / "followed")) == 3


def test_an_archive_that_is_a_link_to_itself_is_rejected(tmp_path):
    source = write_boxes(tmp_path / "in", 1)
    (source / "loop.zip").symlink_to("loop.zip")
    assert prepare(source, "--out", tmp_path / "out") == 0
    assert [(line["source"], line["kind"]) for line in rejected(tmp_path / "out")] == [("in/loop.zip", "unreadable")]


@pytest.mark.parametrize(("share", "is_said"), [(0, True), (0.5, False)])
def test_a_set_without_held_out_meshes_says_what_that_means(share, is_said, tmp_path, capsys):
    assert prepare(write_boxes(tmp_path / "in", 12), "--out", tmp_path / "out", "--validation_share", share) == 0
    assert bool(rows(tmp_path / "out", "validation")) is not is_said
    lines = [line for line in capsys.readouterr().out.splitlines() if "--validation_file" in line]
    assert len(lines) == is_said and all("larger --validation_share" in line for line in lines)


def test_a_source_without_meshes_is_an_error_that_names_the_reasons(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.obj").write_text("nothing")
    assert prepare(tmp_path / "in", "--out", tmp_path / "out") == 1
    message = capsys.readouterr().out
    assert "1 empty" in message and "held out" not in message
    assert prepare(tmp_path / "in", "--out", tmp_path / "out") == 1, "as the run that made the set"
    assert "finished already (0 meshes" in capsys.readouterr().out
