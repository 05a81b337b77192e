"""Meshes from files or made up, their variation, and their order."""

import warnings
from itertools import islice

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from iflame_hf import IFlameTokenizer
from training.procedural.make import make_dataset
from training.rows.balance import Balance
from training.rows.encode import augment
from training.rows.map import MappedRows, MeshRows, RowKey, RowStream, evaluation_batches, mesh_sizes
from training.rows.meshes import ParquetMeshes, ProceduralMeshes
from training.rows.pack import IGNORED

ROW = 9 * 202


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def meshes():
    return ProceduralMeshes(make_dataset(40, seed=1))


@pytest.fixture(scope="module")
def tokenizer():
    return IFlameTokenizer()


@pytest.fixture
def rows(meshes, tokenizer):
    return MeshRows(meshes, tokenizer, ROW, seed=5, scale=0.25, shift=True)


@pytest.fixture
def stream(meshes):
    return RowStream(*mesh_sizes(meshes, ROW, "error"), ROW // 9, seed=5)


def write_parquet(path, meshes, **columns):
    table = {
        "vertices": [np.asarray(vertices, np.float32).tolist() for vertices, _ in meshes],
        "faces": [np.asarray(faces, np.int32).tolist() for _, faces in meshes],
        **columns,
    }
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    return str(path)


def parts(batch):
    """All that a batch says of its tokens, (B, T) each."""
    layout = batch["layout"]
    known = {name: layout.attribute(name) for name in layout.attributes}
    positions = layout.positions()
    return {"input_ids": batch["input_ids"], "labels": batch["labels"], "positions": positions, **known}


def same(batch, other):
    batch, other = parts(batch), parts(other)
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def first_batches(rows, stream, count, place=(0, 0), size=2, **options):
    taken = list(islice(MappedRows(rows, stream).batches([list(place)], size, **options), count))
    return [batch for batch, _ in taken]


def sequence(rows, epoch, draw):
    return rows.pack([RowKey(epoch, np.array([draw]))]).ids[0]


def test_any_number_of_workers_prepares_the_same_rows(rows, stream):
    alone = first_batches(rows, stream, 12)
    for workers in (1, 2):
        assert all(map(same, alone, first_batches(rows, stream, 12, num_workers=workers)))
    assert len(stream.rows_of(0)) < 24, "the rows should reach into the second epoch"


def test_the_ranks_together_take_every_row_in_order(rows, stream):
    alone = first_batches(rows, stream, 8, size=6)
    ranks = [first_batches(rows, stream, 8, size=2, rank=rank, world_size=3) for rank in range(3)]
    for whole, *shares in zip(alone, *ranks, strict=True):
        shares = list(map(parts, shares))
        for name, values in parts(whole).items():
            assert torch.equal(values, torch.cat([share[name] for share in shares]))


def test_rows_from_a_place_on_are_those_that_come_after_it(rows, stream):
    everything = list(islice(MappedRows(rows, stream).batches([], 1), 30))
    place = everything[18][1]
    assert place[0] == 1 and place == list(stream.advance(0, 0, 19))
    after = first_batches(rows, stream, 11, place, size=1)
    assert all(same(batch, other) for (batch, _), other in zip(everything[19:], after, strict=True))


@pytest.mark.parametrize("size", [1, 3, 40])
def test_a_place_is_the_same_for_all_ranks_and_where_all_of_them_go_on(rows, stream, size):
    def start(rank, places=()):
        return MappedRows(rows, stream).batches(list(places), size, rank, 2)

    ranks = [list(islice(start(rank), 4)) for rank in range(2)]
    assert [place for _, place in ranks[0]] == [place for _, place in ranks[1]]
    for rank in range(2):
        batch, _ = next(start(rank, [ranks[0][1][1]] * 2))
        assert same(batch, ranks[rank][2][0])


def test_rows_that_came_from_a_worker_are_those_of_their_keys(rows, stream):
    (batch,) = first_batches(rows, stream, 1, size=5, num_workers=1)
    assert same(batch, rows.batch([RowKey(0, draws) for draws in stream.rows_of(0)[:5]]))


def test_an_epoch_holds_every_mesh_once_and_epochs_differ(stream):
    epochs = [stream.rows_of(epoch) for epoch in range(2)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(40))
    assert np.concatenate(epochs[0]).tolist() != np.concatenate(epochs[1]).tolist()


def test_a_mesh_varies_from_epoch_to_epoch_and_is_the_same_within_one(rows):
    first, again, later = (sequence(rows, epoch, 3) for epoch in (0, 0, 1))
    assert first.tolist() == again.tolist() != later.tolist()


def test_without_augmentation_rows_hold_what_the_tokenizer_makes(meshes, tokenizer):
    ids = MeshRows(meshes, tokenizer, 2 * ROW).pack([RowKey(7, np.array([4, 11]))]).ids[0]
    expected = [token for mesh in meshes.read([4, 11]) for token in tokenizer.encode_mesh(mesh)]
    assert ids[: len(expected)].tolist() == expected
    assert set(ids[len(expected) :].tolist()) == {tokenizer.pad_token_id}


def test_loading_takes_nothing_from_torchs_random_numbers(rows, stream):
    before = torch.get_rng_state()
    first_batches(rows, stream, 3, num_workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_stretches_within_its_range_and_stays_in_the_cube():
    corners = np.array([[-0.5, -0.4, -0.3], [0.5, 0.4, 0.3], [0.0, 0.1, 0.2]])
    spans, middles = [], []
    for seed in range(300):
        vertices, _ = augment(corners, np.array([[0, 1, 2]]), np.random.default_rng(seed))
        assert np.abs(vertices).max() <= 0.5 + 1e-12
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        spans.append(high - low)
        middles.append((low + high) / 2)
        inside = (vertices[2] - low) / (high - low)
        np.testing.assert_allclose(inside, [0.5, 0.5 / 0.8, 0.5 / 0.6], atol=1e-12)
    spans, middles = np.array(spans), np.array(middles)
    np.testing.assert_allclose(spans.max(axis=1), 1)
    ratios = spans[:, 1] / spans[:, 0] / 0.8
    assert 1.25**-2 < ratios.min() < 0.7 and 1.45 < ratios.max() < 1.25**2
    assert np.abs(middles[:, :2]).max() == pytest.approx(0.1, abs=0.005)
    assert np.abs(middles[:, 2]).max() == pytest.approx(0.075, abs=0.005)


def test_parquet_files_are_read_with_their_categories(tmp_path, meshes):
    pairs = meshes.read(range(6))
    files = [
        write_parquet(
            tmp_path / "a.parquet", pairs[:4], category=["chair", "table", "chair", "lamp"], name=list("abcd")
        ),
        write_parquet(tmp_path / "b.parquet", pairs[4:], category=["lamp", "lamp"], name=list("ef")),
    ]
    read = ParquetMeshes(files)
    assert read.category_names == ["chair", "lamp", "table"]
    assert read.categories.tolist() == [0, 2, 0, 1, 1, 1]
    assert read.num_faces.tolist() == [len(faces) for _, faces in pairs]
    order = [4, 0, 5, 3, 3, 1, 2]
    found = read.read(order)
    assert len(found) == len(order)
    for index, (vertices, faces) in zip(order, found, strict=True):
        np.testing.assert_array_equal(vertices, pairs[index][0])
        np.testing.assert_array_equal(faces, pairs[index][1])
    assert read.describe(5) == "mesh 5 (f)"
    assert ParquetMeshes(files, max_samples=5).num_faces.tolist() == read.num_faces[:5].tolist()


def test_parquet_files_need_neither_names_nor_categories(tmp_path, meshes):
    read = ParquetMeshes([write_parquet(tmp_path / "plain.parquet", meshes.read([0, 1]))])
    assert read.category_names == ["all"] and read.categories.tolist() == [0, 0]
    assert read.describe(1) == "mesh 1"


def test_files_that_cannot_be_trained_on_are_named(tmp_path):
    table = pyarrow.table({"points": [[0.0]]})
    pyarrow.parquet.write_table(table, tmp_path / "points.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    for name, reason in (
        ("points", "no column faces and no column vertices"),
        ("text", "cannot be read"),
        ("no", "read"),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.parquet.*{reason}"):
            ParquetMeshes([str(tmp_path / f"{name}.parquet")])
    with pytest.raises(ValueError, match="no mesh"):
        ParquetMeshes([write_parquet(tmp_path / "empty.parquet", [], category=pyarrow.array([], pyarrow.string()))])


@pytest.mark.parametrize("name", ["train", "validation"])
def test_a_pattern_without_files_is_named_and_one_of_held_out_meshes_advised_on(name, tmp_path):
    pattern = f"{tmp_path}/{name}-*.parquet"
    with pytest.raises(ValueError) as caught:
        ParquetMeshes([pattern])
    advice = "; a set without held-out meshes has none: leave out --validation_file"
    assert str(caught.value) == f"no file matches {pattern}" + advice * (name == "validation")


def test_an_unusable_mesh_is_left_out_of_its_row_and_named(tmp_path, meshes, tokenizer):
    flat = (np.zeros((3, 3)), [[0, 1, 2]])
    holes = (np.array([[0, 0, 0], [1, 0, 0], [0, np.nan, 0]]), [[0, 1, 2]])
    (good,) = meshes.read([0])
    bad = {"flat": flat, "holes": holes, "empty": ([], []), "ragged": None}
    file = tmp_path / "some.parquet"
    write_parquet(file, [flat, holes, ([], []), good, good], name=["flat", "holes", "empty", "ragged", "good"])
    table = pyarrow.parquet.read_table(file).to_pydict()
    table["vertices"][3][1] = [0.5]
    pyarrow.parquet.write_table(pyarrow.table(table), file)
    rows = MeshRows(ParquetMeshes([str(file)]), tokenizer, ROW, grouped=True)
    with pytest.warns(UserWarning) as caught:
        batch = rows.batch([RowKey(0, np.arange(5))])
    messages = [str(warning.message) for warning in caught]
    assert [f"({name}) is left out" in message for name, message in zip(bad, messages, strict=True)] == [True] * 4
    length = len(tokenizer.encode_mesh(good))
    assert (batch["labels"] != IGNORED).sum() == length - 9
    assert batch["layout"].attribute("group").tolist() == [[0] * length + [-1] * (ROW - length)]


def test_meshes_longer_than_a_row_are_an_error_cropped_or_dropped(meshes, tokenizer):
    limit = int(np.median(meshes.num_faces)) + 2
    length, long = 9 * limit, np.flatnonzero(meshes.num_faces + 2 > limit)
    assert len(long) > 5
    with pytest.raises(ValueError, match=f"--row_length {9 * (meshes.num_faces.max() + 2)}"):
        mesh_sizes(meshes, length, "error")
    sizes, used = mesh_sizes(meshes, length, "drop")
    assert sorted([*used, *long]) == list(range(40))
    sizes, used = mesh_sizes(meshes, length, "crop")
    assert len(used) == 40 and sizes.max() == limit
    rows = MeshRows(meshes, tokenizer, length)
    assert sequence(rows, 0, long[0]).tolist() == tokenizer.encode_mesh(meshes.read(long[:1])[0])[:length]
    with pytest.raises(ValueError, match="every mesh is longer"):
        mesh_sizes(meshes, 27, "drop")


def test_balanced_epochs_draw_all_categories_equally_often_and_vary_repeated_meshes():
    meshes = ProceduralMeshes(make_dataset(400, seed=2))
    meshes.categories = (np.arange(400) < 20).astype(np.int64)
    sizes, used = mesh_sizes(meshes, ROW, "error")
    stream = RowStream(sizes, used, ROW // 9, seed=0, balance=Balance([meshes.categories], 0))
    draws = np.concatenate([draw for epoch in range(4) for draw in stream.rows_of(epoch)])
    share = meshes.categories[draws % 400].mean()
    assert share == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(len(draws)))
    epoch = np.concatenate(stream.rows_of(0))
    assert len(epoch) == 400 == len(np.unique(epoch)), "a mesh that is drawn again is another draw"
    mesh = int(epoch[epoch >= 400][0] % 400)
    rows = MeshRows(meshes, IFlameTokenizer(), ROW, scale=0.25)
    assert sequence(rows, 0, mesh).tolist() != sequence(rows, 0, mesh + 400).tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_mesh_once_in_equally_many_batches_a_rank(meshes, tokenizer, world_size):
    sizes, used = mesh_sizes(meshes, ROW, "error")
    ranks = [evaluation_batches(sizes, used, ROW // 9, 4, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    keys = [key for batches in ranks for batch in batches for key in batch]
    assert sorted(np.concatenate([key.draws for key in keys])) == list(range(40))
    empty = MeshRows(meshes, tokenizer, ROW, grouped=True).batch([RowKey(0, np.array([], dtype=np.int64))])
    assert (empty["labels"] == IGNORED).all() and (empty["layout"].attribute("group") == -1).all()


def test_the_digest_changes_with_the_data_and_not_with_the_run(meshes):
    sizes, used = mesh_sizes(meshes, ROW, "error")
    digest = RowStream(sizes, used, ROW // 9, seed=5).digest()
    assert digest == RowStream(sizes.copy(), used.copy(), ROW // 9, seed=5).digest()
    others = [
        RowStream(sizes, used, ROW // 9, seed=6),
        RowStream(sizes, used, ROW // 9 + 1, seed=5),
        RowStream(sizes[::-1], used, ROW // 9, seed=5),
        RowStream(sizes, used[1:], ROW // 9, seed=5),
        RowStream(sizes, used, ROW // 9, seed=5, balance=Balance([meshes.categories], 0)),
        RowStream(sizes, used, ROW // 9, seed=5, balance=Balance([meshes.categories], 0.5)),
        RowStream(sizes, used, ROW // 9, seed=5, balance=Balance([meshes.categories[::-1]], 0.5)),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 8


def test_no_row_of_good_meshes_warns(rows, stream):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_batches(rows, stream, 10)
