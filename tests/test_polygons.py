"""Polygons in the `faces` column of parquet files: what is counted is what becomes tokens, however it is read."""

import warnings
from itertools import islice

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from iflame_hf import IFlameTokenizer
from iflame_hf.mesh_errors_iflame import MeshError
from iflame_hf.mesh_files_iflame import load_mesh
from iflame_hf.mesh_iflame import canonicalise, normalise, quantise, triangulate
from training.rows.encode import MeshEncoder, MeshTable, count_triangles
from training.rows.map import MappedRows, MeshRows, RowStream, mesh_sizes
from training.rows.meshes import ParquetMeshes
from training.rows.stream import StreamedRows, open_stream

TOKENIZER = IFlameTokenizer()
PAD = TOKENIZER.pad_token_id


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def grid(seed, sides, rows=5, columns=5):
    """A wavy surface as its polygons of `sides` corners at most: 2 triangles or 1 quad a cell, or strips of cells."""
    height = np.random.default_rng(seed).random((rows + 1, columns + 1))
    y, x = np.mgrid[0 : rows + 1, 0 : columns + 1]
    vertices = np.stack([x, height, y], axis=-1).reshape(-1, 3)
    number = np.arange((rows + 1) * (columns + 1)).reshape(rows + 1, columns + 1)
    faces = []
    for row in range(rows):
        if sides == "strips":
            faces.append([*number[row + 1].tolist(), *number[row, ::-1].tolist()])
            continue
        for column in range(columns):
            a, b = number[row, column : column + 2].tolist()
            d, c = number[row + 1, column : column + 2].tolist()
            kind = sides if sides != "mixed" else (3, 4)[column % 2]
            faces += [[a, d, c, b]] if kind == 4 else [[a, d, c], [a, c, b]]
    return vertices.tolist(), faces


def fans(faces):
    """The triangles of polygons, one after the other."""
    return [[face[0], face[i], face[i + 1]] for face in faces for i in range(1, len(face) - 1)]


def write(path, meshes, **columns):
    vertices, faces = zip(*meshes, strict=True)
    table = pyarrow.table({"vertices": vertices, "faces": faces, **columns})
    pyarrow.parquet.write_table(table, path, row_group_size=4)
    return str(path)


def mapped(file, row_length, long_meshes="error"):
    meshes = ParquetMeshes([file])
    stream = RowStream(*mesh_sizes(meshes, row_length, long_meshes), row_length // 9, seed=0)
    return MappedRows(MeshRows(meshes, TOKENIZER, row_length), stream)


def streamed(file, row_length, long_meshes="error"):
    return StreamedRows(open_stream([file]), MeshEncoder(TOKENIZER, row_length), long_meshes)


WAYS = {"mapped": mapped, "streamed": streamed}


def sequences(rows):
    """The meshes of an epoch: the token ids of each, in order."""
    if isinstance(rows, MappedRows):
        batches = islice(rows.stream.batches(0, 0, 1), rows.rows_in_epoch)
        ids = rows.rows.pack([key for batch in batches for key in batch]).ids
    else:
        ids = np.concatenate([rows.read_block(block).ids for block in range(rows.blocks_in_epoch)])
    found = []
    for row in ids:
        faces = row[row != PAD].reshape(-1, 9)
        starts = np.flatnonzero((faces == TOKENIZER.bos_token_id).all(axis=1))
        found += [tuple(part.ravel().tolist()) for part in np.split(faces, starts[1:])]
    return sorted(found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sides", [3, 4, "mixed", "strips"])
def test_polygons_are_trained_on_as_their_fans_whole_and_with_their_winding(way, sides, tmp_path):
    meshes = [grid(seed, sides) for seed in range(10)]
    expected = sorted(tuple(TOKENIZER.encode_mesh((vertices, fans(faces)))) for vertices, faces in meshes)
    assert {len(ids) for ids in expected} == {9 * (50 + 2)}
    found = sequences(WAYS[way](write(tmp_path / "a.parquet", meshes), 9 * 110))
    assert found == expected


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_whose_polygons_are_too_many_triangles_for_a_row_is_long(way, tmp_path):
    meshes = [grid(0, 4), grid(1, 4, rows=2)]  # 25 quads, and 10
    file = write(tmp_path / "a.parquet", meshes, name=["large", "small"])
    with pytest.raises(ValueError, match=r"large.* has 50 faces as triangles.*--row_length 468"):
        sequences(WAYS[way](file, 9 * 40))
    (small,) = sequences(WAYS[way](file, 9 * 40, "drop"))
    assert len(small) == 9 * 22
    assert sorted(len(ids) for ids in sequences(WAYS[way](file, 9 * 40, "crop"))) == [9 * 22, 9 * 40]


BAD_FACES = {
    "two corners": ([[0, 1, 2], [1, 2]], "fewer than three corners"),
    "two corners beside four": ([[0, 1, 2, 3], [1, 2]], "fewer than three corners"),
    "no corners": ([[0, 1, 2], []], "fewer than three corners"),
    "a missing face": ([[0, 1, 2], None], "fewer than three corners"),
    "an index out of range": ([[0, 1, 2], [1, 2, 3, 99]], "from 0 to 99"),
    "a negative index": ([[0, 1, -2]], "from -2 to 1"),
    "a missing index": ([[0, 1, None], [0, 1, 2]], "a value is missing"),
    "no faces": ([], "no faces"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", BAD_FACES)
def test_a_mesh_with_a_bad_face_is_left_out_with_the_reason_and_the_others_stay(way, name, tmp_path):
    faces, reason = BAD_FACES[name]
    good = [grid(seed, 4) for seed in range(3)]
    file = write(tmp_path / "a.parquet", [*good[:1], (good[0][0], faces), *good[1:]], name=["a", "bad", "c", "d"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = sequences(WAYS[way](file, 9 * 60))
    assert found == sorted(tuple(TOKENIZER.encode_mesh((vertices, fans(faces)))) for vertices, faces in good)
    (message,) = [str(warning.message) for warning in caught if "is left out" in str(warning.message)]
    assert "bad" in message and reason in message


BAD_VERTICES = {
    "ragged": ([[0, 0, 0], [1, 0, 0], [0, 1]], "different numbers of coordinates"),
    "ragged in all": ([[0, 0, 0], [1, 0], [0, 1, 0, 0]], "different numbers of coordinates"),
    "flat": ([[0, 0], [1, 0], [0, 1]], r"shape (V, 3)"),
    "none": ([], "no vertices"),
    "missing": ([[0, 0, 0], [1, 0, None], [0, 1, 0]], "a value is missing"),
}


@pytest.mark.parametrize("name", BAD_VERTICES)
def test_bad_vertices_are_refused_with_the_reason_and_the_other_meshes_stay(name):
    vertices, reason = BAD_VERTICES[name]
    good = grid(0, 4)
    table = MeshTable(pyarrow.table({"vertices": [vertices, good[0]], "faces": [[[0, 1, 2]], good[1]]}))
    with pytest.raises(MeshError) as caught:
        load_mesh(table[0])
    assert reason in str(caught.value)
    assert len(load_mesh(table[1])[1]) == 50


def test_counting_needs_no_mesh_and_gives_what_fans_have_for_every_type_of_list():
    meshes = [grid(0, 3), grid(1, 4), grid(2, "mixed"), grid(3, "strips")]
    faces = [faces for _, faces in meshes]
    expected = [len(fans(each)) for each in faces]
    ragged = pyarrow.array(faces)
    assert count_triangles(pyarrow.chunked_array([ragged])).tolist() == expected
    assert (
        count_triangles(pyarrow.chunked_array([ragged[:1], ragged[1:3], ragged[:0], ragged[3:]])).tolist() == expected
    )
    large = ragged.cast(pyarrow.large_list(pyarrow.large_list(pyarrow.int64())))
    assert count_triangles(pyarrow.chunked_array([large[1:]])).tolist() == expected[1:]
    fixed = pyarrow.array(faces[1:2] * 3, pyarrow.list_(pyarrow.list_(pyarrow.int32(), 4)))
    assert count_triangles(pyarrow.chunked_array([fixed[1:]])).tolist() == expected[1:2] * 2
    holes = pyarrow.array([faces[0], None, [], faces[1], [[0, 1]], [[0]]])
    assert count_triangles(pyarrow.chunked_array([holes])).tolist() == [expected[0], 0, 0, expected[1], 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_triangulating_gives_the_fans_of_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    faces = [rng.integers(0, 100, rng.integers(3, 3 + seed + 1)).tolist() for _ in range(50)]
    sides = np.array([len(face) for face in faces])
    np.testing.assert_array_equal(triangulate(np.concatenate(faces), sides), fans(faces))


def test_a_quad_keeps_its_area_and_the_side_it_is_seen_from():
    square = [[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    table = MeshTable(pyarrow.table({"vertices": [square], "faces": [[[0, 1, 2, 3]]]}))
    vertices, faces = load_mesh(table[0])
    sides = vertices[faces[:, 1:]] - vertices[faces[:, :1]]
    np.testing.assert_array_equal(np.cross(sides[:, 0], sides[:, 1]), [[0, 0, 1]] * 2)
    points, faces = canonicalise(quantise(normalise(vertices)), faces)
    assert len(faces) == 2


@pytest.mark.parametrize("way", WAYS)
def test_columns_of_flat_lists_are_refused_with_what_they_should_be(way, tmp_path):
    vertices, faces = grid(0, 3)
    file = write(tmp_path / "a.parquet", [(vertices, sum(faces, []))])
    with pytest.raises(ValueError, match="must be lists of lists of numbers, not list<"):
        sequences(WAYS[way](file, 9 * 110))


@pytest.mark.parametrize("way", WAYS)
def test_arrays_that_datasets_itself_wrote_are_read(way, tmp_path):
    vertices, faces = grid(0, 4)
    features = {"vertices": datasets.Array2D((36, 3), "float32"), "faces": datasets.Array2D((25, 4), "int32")}
    data = datasets.Dataset.from_dict({"vertices": [vertices], "faces": [faces]}, features=datasets.Features(features))
    data.to_parquet(tmp_path / "a.parquet")
    (found,) = sequences(WAYS[way](str(tmp_path / "a.parquet"), 9 * 60))
    assert found == tuple(TOKENIZER.encode_mesh((np.float32(vertices), fans(faces))))
