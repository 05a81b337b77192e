"""MeshGPT's pickle becomes parquet, and then a data set; other pickles are refused, and run nothing."""

import pickle
import re

import bad_files
import datasets
import numpy as np
import pyarrow.parquet
import pytest
import trimesh
from mesh_fixtures import signed_volume
from prepared_fixtures import prepare, rejected, rows

from training.recipes import meshgpt_to_parquet
from training.rows.meshes import ParquetMeshes

NAMES = {"train": ["03001627_a", "04379243_b", "03001627_c"], "val": ["02828884_d"]}


def convert(path, out, *options):
    return meshgpt_to_parquet.main([str(argument) for argument in (path, "--out", out, *options)])


def write_pickle(path, **changes):
    """Boxes of different widths: faces as lists, and of val as arrays."""
    tables, width = {}, 1.0
    for split, names in NAMES.items():
        boxes = [trimesh.creation.box(extents=(width + 0.1 * number, 1, 1)) for number in range(len(names))]
        width += 1
        faces = [box.faces.tolist() if split == "train" else np.array(box.faces) for box in boxes]
        vertices = [np.array(box.vertices, dtype=np.float32) for box in boxes]
        tables |= {f"name_{split}": names, f"vertices_{split}": vertices, f"faces_{split}": faces}
    path.write_bytes(pickle.dumps(tables | changes))
    return path


def test_the_files_keep_splits_and_categories_and_become_a_data_set(tmp_path, capsys):
    assert convert(write_pickle(tmp_path / "shapenet.pkl"), tmp_path / "parquet") == 0
    printed = capsys.readouterr().out
    assert "train-00000.parquet: 3 meshes" in printed and "validation-00000.parquet: 1 mesh\n" in printed
    assert prepare(tmp_path / "parquet", "--out", tmp_path / "out", "--splits", "source") == 0
    found = {row["name"]: row["category"] for row in rows(tmp_path / "out", "train")}
    assert found == {"03001627_a": "chair", "04379243_b": "table", "03001627_c": "chair"}
    assert [(row["name"], row["category"]) for row in rows(tmp_path / "out", "validation")] == [
        ("02828884_d", "bench")
    ]
    for row in rows(tmp_path / "out"):
        assert signed_volume(row["vertices"], row["faces"]) > 0


def test_training_reads_the_files_as_they_are_polygons_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    square = [[0, 1, 2, 3]]
    path = write_pickle(
        tmp_path / "shapenet.pkl",
        name_val=["02828884_d"],
        vertices_val=[[[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]],
        faces_val=[square],
    )
    assert convert(path, tmp_path / "out") == 0
    for split, num_faces in (("train", [12, 12, 12]), ("validation", [2])):
        assert ParquetMeshes([str(tmp_path / "out" / f"{split}-00000.parquet")]).num_faces.tolist() == num_faces
    (row,) = pyarrow.parquet.read_table(tmp_path / "out" / "validation-00000.parquet").to_pylist()
    assert row["faces"] == square and row["source"] == "shapenet.pkl#val/0"


def test_a_mesh_that_is_none_is_left_out_and_named_and_an_empty_one_is_rejected_later(tmp_path, capsys):
    boxes = pickle.loads(write_pickle(tmp_path / "shapenet.pkl").read_bytes())
    faces = [boxes["faces_train"][0], "no faces", []]
    path = write_pickle(tmp_path / "shapenet.pkl", faces_train=faces)
    assert convert(path, tmp_path / "parquet") == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meshgpt_to_parquet: left out: shapenet.pkl#train/1 (04379243_b): ")
    assert prepare(tmp_path / "parquet", "--out", tmp_path / "out") == 0
    assert [(line["name"], line["kind"]) for line in rejected(tmp_path / "out")] == [("03001627_c", "empty")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: pickle.dumps({"name_train": bad_files.Planted()}), r"the pickle asks for \w+\.system"),
        (lambda: b"nothing", "not a readable pickle"),
        (lambda: pickle.dumps(list(range(1000)))[:-20], "not a readable pickle"),
        (lambda: pickle.dumps([1, 2, 3]), "not MeshGPT's data"),
        (lambda: pickle.dumps({"vertices_train": [1], "name_train": [], "faces_train": []}), "do not match"),
        (lambda: pickle.dumps({f"{part}_train": [] for part in ("name", "vertices", "faces")}), "holds no meshes"),
    ],
    ids=["planted", "no pickle", "cut", "other", "uneven", "empty"],
)
def test_another_pickle_is_refused_in_a_line_and_nothing_of_it_runs(content, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(content())
    assert convert("bad.pkl", "out") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("meshgpt_to_parquet: bad.pkl ") and re.search(reason, line)
    assert {path.name for path in tmp_path.iterdir()} == {"bad.pkl", "out"} and not list((tmp_path / "out").iterdir())


def test_a_pickle_that_takes_too_much_memory_is_given_up(tmp_path, capsys):
    (tmp_path / "large.pkl").write_bytes(pickle.dumps([bytearray(2**20) for _ in range(64)]))
    assert convert(tmp_path / "large.pkl", tmp_path / "out", "--memory_limit", 0.02) == 1
    assert "memory" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    path = write_pickle(tmp_path / "shapenet.pkl")
    assert convert(path, tmp_path) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert convert(tmp_path / "lost.pkl", tmp_path / "out") == 1
    assert "there is no file" in capsys.readouterr().err and not (tmp_path / "out").exists()
