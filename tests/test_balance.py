"""Meshes of small groups are drawn more often, as asked for, and a run goes on with the same ones."""

from itertools import islice

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from iflame_hf import IFlameTokenizer
from training.arguments import parse_arguments
from training.procedural.make import make_dataset
from training.rows.balance import Balance, bins_of_faces
from training.rows.map import MappedRows, MeshRows, RowStream, load_data, mesh_sizes
from training.rows.meshes import ParquetMeshes, ProceduralMeshes

ROW = 9 * 202
# Meshes by pack (rows) and category (columns).
COUNTS = np.array([[500, 100, 0], [60, 0, 5], [0, 30, 5]])


class OneProcess:
    is_main_process, process_index, num_processes = True, 0, 1

    def wait_for_everyone(self):
        pass


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def uneven():
    """Pack and category (N,) of each of 700 meshes."""
    cells = [cell for cell in np.ndindex(COUNTS.shape) for _ in range(COUNTS[cell])]
    packs, categories = np.random.default_rng(0).permutation(np.array(cells)).T
    return packs, categories


def drawn(balance, count, epochs=40):
    stream = RowStream(np.full(count, 20), np.arange(count), 200, seed=3, balance=balance)
    return np.concatenate([draws for epoch in range(epochs) for draws in stream.rows_of(epoch)]) % count


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("by", ["pack", "category", "both"])
def test_groups_are_drawn_in_proportion_to_a_power_of_their_size(by, power):
    packs, categories = uneven()
    of_pack, of_category = COUNTS.sum(axis=1), COUNTS.sum(axis=0)
    chance_by_pack = (of_pack**power / of_pack / (of_pack**power).sum())[:, None]  # of one mesh in each cell
    chance_by_category = (of_category**power / of_category / (of_category**power).sum())[None]
    chance = {"pack": chance_by_pack, "category": chance_by_category, "both": chance_by_pack * chance_by_category}[by]
    expected = COUNTS * chance / (COUNTS * chance).sum()
    groups = {"pack": [packs], "category": [categories], "both": [packs, categories]}[by]
    draws = drawn(Balance(groups, power), len(packs))
    assert len(draws) == 28_000
    found = np.zeros(COUNTS.shape)
    np.add.at(found, (packs[draws], categories[draws]), 1)
    bound = 4.5 * np.sqrt(expected * (1 - expected) / len(draws))  # about one in 20,000 such tests fails by chance
    assert (np.abs(found / len(draws) - expected) <= bound).all()
    if by == "pack":
        np.testing.assert_allclose(expected.sum(axis=1), of_pack**power / (of_pack**power).sum())


def test_the_meshes_of_a_group_share_its_draws_equally():
    packs, categories = uneven()
    weights = Balance([packs, categories], 0.5).weights(np.arange(len(packs)))
    assert weights.sum() == pytest.approx(1)
    for cell in np.argwhere(COUNTS):
        own = weights[(packs == cell[0]) & (categories == cell[1])]
        assert own.min() == own.max() > 0


def test_groups_are_counted_among_the_meshes_that_are_used():
    groups = np.array([0, 0, 0, 1, 1, 2])
    used = np.array([0, 3, 4])
    np.testing.assert_allclose(Balance([groups], 0).weights(used), [1 / 2, 1 / 4, 1 / 4])
    np.testing.assert_allclose(Balance([groups], 1).weights(used), [1 / 3, 1 / 3, 1 / 3])


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_takes_the_same_rows():
    meshes = ProceduralMeshes(make_dataset(60, seed=1))
    packs = np.minimum(np.arange(60) // 10, 2)

    def rows():
        balance = Balance([packs, meshes.categories], 0.5)
        stream = RowStream(*mesh_sizes(meshes, ROW, "error"), ROW // 9, 5, balance)
        return MappedRows(MeshRows(meshes, IFlameTokenizer(), ROW, 5, 0.25, True, "any", True), stream)

    whole = list(islice(rows().batches([], 2), 30))
    assert whole[-1][1][0] >= 1 and rows().digest() == rows().digest()
    for done in (4, 17):
        place = whole[done][1]
        assert place[1] > 0, "the place lies within an epoch"
        for (batch, after), (other, other_after) in zip(whole[done + 1 :], rows().batches([place], 2), strict=False):
            assert after == other_after and torch.equal(batch["input_ids"], other["input_ids"])
    ranks = [rows().batches([whole[4][1]] * 2, 1, rank, 2) for rank in range(2)]
    for batch, _ in whole[5:10]:
        parts = [next(rank)[0]["input_ids"] for rank in ranks]
        assert torch.equal(batch["input_ids"], torch.cat(parts))


def files(folder, **columns):
    count = len(next(iter(columns.values())))
    meshes = make_dataset(count, seed=1)
    table = {name: [np.asarray(getattr(mesh, name)).tolist() for mesh in meshes] for name in ("vertices", "faces")}
    pyarrow.parquet.write_table(pyarrow.table(table | columns), folder / "a.parquet")
    return [str(folder / "a.parquet")]


def test_any_column_of_text_or_whole_numbers_is_a_grouping(tmp_path):
    texts = pyarrow.array(["kits", None, "props", "kits"])
    columns = {"pack": texts, "label": [3, 1, 3, 3], "category": texts.dictionary_encode()}
    meshes = ParquetMeshes(files(tmp_path, **columns), grouped_by=list(columns))
    for name, expected in {"pack": [1, 0, 2, 1], "label": [1, 0, 1, 1], "category": [1, 0, 2, 1]}.items():
        groups = meshes.groups(name)
        assert (groups[:, None] == groups).tolist() == np.equal.outer(expected, expected).tolist()


@pytest.mark.parametrize(
    ("columns", "asked", "message"),
    [
        ({"category": ["a", "b"]}, "pack", "--balance pack: in .*a.parquet that column is not there.*by category"),
        ({"overlap": [0.5, 1.0]}, "overlap", "that column is neither text nor whole numbers"),
        ({"overlap": [0.5, 1.0]}, "vertices", "neither text nor whole numbers; no other column"),
        ({"pack": pyarrow.array([None, None], pyarrow.string())}, "pack", "no mesh has a value in the column pack"),
    ],
)
def test_what_cannot_be_balanced_by_is_an_error_that_names_the_column(tmp_path, columns, asked, message):
    arguments = parse_arguments(["--train_file", *files(tmp_path, **columns), "--balance", asked])
    with pytest.raises(ValueError, match=message):
        load_data(arguments, IFlameTokenizer(), OneProcess())


def test_meshes_are_balanced_by_bins_of_faces_that_double(tmp_path):
    edges = [1, 50, 51, 100, 101, 200, 400, 401, 6400, 6401, 90_000]
    assert bins_of_faces(np.array(edges)).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 7, 8, 8]
    table = files(tmp_path, num_faces=[7] * 60)  # a column of that name is not asked
    data = load_data(
        parse_arguments(["--train_file", *table, "--balance", "num_faces"]), IFlameTokenizer(), OneProcess()
    )
    stream, counts = data.rows.stream, data.rows.rows.meshes.num_faces
    bins = [np.flatnonzero((low < counts) & (counts <= high)) for low, high in ((0, 50), (50, 100), (100, 200))]
    assert all(len(own) > 2 for own in bins) and sum(map(len, bins)) == 60
    roots = np.sqrt([len(own) for own in bins])
    for own, root in zip(bins, roots, strict=True):
        np.testing.assert_allclose(stream.weights[own], root / roots.sum() / len(own))


def test_generated_meshes_are_balanced_by_kind_and_faces_and_by_nothing_else():
    few = ["--num_procedural_meshes", "20", "--num_procedural_validation_meshes", "0"]
    data = load_data(parse_arguments([*few, "--balance", "category"]), IFlameTokenizer(), OneProcess())
    assert data.rows.stream.weights.sum() == pytest.approx(1) and data.rows.stream.balance.power == 0.5
    by_faces = load_data(parse_arguments([*few, "--balance", "num_faces"]), IFlameTokenizer(), OneProcess())
    assert len(np.unique(by_faces.rows.stream.weights)) == len(np.unique(by_faces.rows.stream.balance.groups[0])) > 1
    with pytest.raises(ValueError, match="generated meshes have no pack"):
        load_data(parse_arguments([*few, "--balance", "pack"]), IFlameTokenizer(), OneProcess())


def test_the_options_reach_training_rows_and_no_held_out_ones(tmp_path):
    table = files(tmp_path, pack=list("aaab"), category=list("cccd"))
    given = ["--train_file", *table, "--validation_file", *table, "--balance", "pack", "category"]
    given += ["--balance_power", "0.25", "--turn_augmentation", "any", "--mirror_augmentation"]
    data = load_data(parse_arguments(given), IFlameTokenizer(), OneProcess())
    encode, fixed = data.rows.rows.encode, data.validation_loader.rows.encode
    assert (encode.scale, encode.shift, encode.turn, encode.mirror) == (0.25, True, "any", True)
    assert (fixed.scale, fixed.shift, fixed.turn, fixed.mirror) == (0, False, "none", False)
    balance = data.rows.stream.balance
    assert balance.power == 0.25 and [groups.tolist() for groups in balance.groups] == [[0, 0, 0, 1]] * 2
    streamed = [*given[:4], *given[9:], "--streaming", "--max_steps", "5"]
    encode = load_data(parse_arguments(streamed), IFlameTokenizer(), OneProcess()).rows.encode
    assert (encode.scale, encode.shift, encode.turn, encode.mirror) == (0.25, True, "any", True)
    plain = load_data(parse_arguments(given[:4]), IFlameTokenizer(), OneProcess())
    encode = plain.rows.rows.encode
    assert (encode.turn, encode.mirror, plain.rows.stream.balance) == ("none", False, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--balance=category", "--balance_power=2"], "balance_power must be from 0 to 1, got 2.0"),
        (["--balance", "pack", "pack"], "balance names a column twice: pack pack"),
        (["--balance_power=0.5"], "balance_power needs balance"),
        (["--scale_augmentation=-0.1"], "scale_augmentation must be at least 0 and finite, got -0.1"),
        (["--scale_augmentation=nan"], "must be at least 0 and finite, got nan"),
        (["--turn_augmentation=half"], "invalid choice: 'half'"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, given, message):
    with pytest.raises(SystemExit) as end:
        parse_arguments(given)
    assert end.value.code == 2 and message in capsys.readouterr().err
