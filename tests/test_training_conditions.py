"""What a model is told of each mesh: its category and its number of faces, by packed rows, streamed or mapped."""

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from small_models import small_config, small_model

from iflame_hf import IFlameConfig, IFlameTokenizer
from training.arguments import parse_arguments
from training.procedural.make import make_dataset
from training.rows.conditions import Conditions, frequent_categories
from training.rows.encode import MeshEncoder
from training.rows.map import MappedRows, MeshRows, RowStream, evaluation_batches, load_data, mesh_sizes
from training.rows.meshes import ParquetMeshes
from training.rows.stream import StreamedRows, open_stream, read_categories
from training.run.create import create_model

ROW = 9 * 120
COUNT = 60
CATEGORIES = [("chair", "table", "lamp", None, "None", "ship")[index % 6] for index in range(COUNT)]
# Of the model: another order than that of the data, one that the data has not, and not all that it has.
KNOWN = ("table", "house", "chair", "None")
BOTH = Conditions(KNOWN, num_faces=True)


@pytest.fixture(scope="module")
def made():
    return make_dataset(COUNT, seed=1, max_faces=60)


@pytest.fixture(scope="module")
def file(made, tmp_path_factory):
    columns = {name: [np.asarray(getattr(mesh, name)).tolist() for mesh in made] for name in ("vertices", "faces")}
    path = tmp_path_factory.mktemp("set") / "train.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns | {"category": CATEGORIES}), path, row_group_size=20)
    return str(path)


@pytest.fixture(scope="module")
def meshes(file, tmp_path_factory):
    datasets.config.HF_DATASETS_CACHE, before = tmp_path_factory.mktemp("cache"), datasets.config.HF_DATASETS_CACHE
    yield ParquetMeshes([file])
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def by_ids(made):
    """(category of the model or -1, faces) by token ids, counted without the code of rows."""
    tokenizer, expected = IFlameTokenizer(), {}
    for mesh, category in zip(made, CATEGORIES, strict=True):
        ids = tokenizer.encode_mesh((mesh.vertices, mesh.faces))
        place = KNOWN.index(category) if category in KNOWN else -1
        expected[tuple(ids)] = (place, len(tokenizer.decode_mesh(ids).faces))
    assert len(expected) == COUNT
    return expected


def mapped(meshes, conditions, **options):
    stream = RowStream(*mesh_sizes(meshes, ROW, "error"), ROW // 9, seed=3)
    return MappedRows(MeshRows(meshes, IFlameTokenizer(), ROW, 3, conditions=conditions, **options), stream)


def streamed(file, conditions):
    stream = open_stream([file], with_category=True)
    return StreamedRows(stream, MeshEncoder(IFlameTokenizer(), ROW, seed=3), shards_in_block=2, conditions=conditions)


def epoch_of(rows, epoch=0, workers=0):
    """(ids, category, faces) of every mesh in the rows of an epoch, in their order."""
    found = []
    first = epoch if isinstance(rows, MappedRows) else epoch * rows.blocks_in_epoch
    for batch, _ in rows.batches([[first, 0]], 1, num_workers=workers):
        found += meshes_of(batch)
        if len(found) >= COUNT:
            return found


def meshes_of(batch):
    layout = batch["layout"]
    assert all(values.dtype == torch.int64 for values in layout.attributes.values())
    known = [layout.attribute(name) for name in ("category", "num_faces")]
    found = []
    for row, (ids, positions) in enumerate(zip(batch["input_ids"], layout.positions(), strict=True)):
        starts = (positions == 0).nonzero()[:, 0].tolist()
        for start, end in zip(starts, [*starts[1:], ROW], strict=True):
            told = tuple(set(values[row, start:end].tolist()) for values in known)
            assert all(len(values) == 1 for values in told), "it holds for a whole mesh"
            told = tuple(values.pop() for values in told)
            if ids[start] == 129:
                assert told == (-1, -1), "padding is no mesh"
            else:
                found.append((tuple(ids[start:end].tolist()), *told))
    return found


def test_a_config_says_what_a_model_is_told_and_one_of_before_says_nothing(tmp_path):
    assert Conditions.of(small_config()).names == Conditions.of(None).names == ()
    config = small_config(categories=list(KNOWN), num_faces_range=[1, 9])
    config.save_pretrained(tmp_path)
    for each in (config, IFlameConfig.from_pretrained(tmp_path)):
        told = Conditions.of(each)
        assert told == BOTH and told.names == ("category", "num_faces")
        assert [told.index(name) for name in (*KNOWN, "ship", "", None)] == [0, 1, 2, 3, -1, -1, -1]


@pytest.mark.parametrize("source", ["mapped", "streamed"])
def test_rows_tell_the_category_and_the_faces_of_each_mesh(source, file, meshes, by_ids):
    rows = mapped(meshes, BOTH) if source == "mapped" else streamed(file, BOTH)
    found = epoch_of(rows)
    assert {ids: told for ids, *told in found} == {ids: list(told) for ids, told in by_ids.items()}
    assert rows.knows_categories and {category for _, category, _ in found} == {-1, 0, 2, 3}
    for asked in (Conditions(KNOWN), Conditions(num_faces=True), Conditions()):
        other = mapped(meshes, asked) if source == "mapped" else streamed(file, asked)
        batch, _ = next(other.batches([], 2))
        assert tuple(batch["layout"].attributes) == asked.names


@pytest.mark.parametrize("source", ["mapped", "streamed"])
def test_each_condition_is_left_out_by_itself_as_seed_epoch_and_mesh_say(source, file, meshes, by_ids):
    def rows(**options):
        conditions = Conditions(KNOWN, num_faces=True, **{"dropout": 0.3, "seed": 3} | options)
        return mapped(meshes, conditions) if source == "mapped" else streamed(file, conditions)

    epochs = [epoch_of(rows(), epoch) for epoch in range(8)]
    assert epoch_of(rows(), 1, workers=1) == epochs[1]
    assert epoch_of(rows(seed=4)) != epochs[0]
    counts, left_out = np.zeros((2, 2)), set()
    for epoch in epochs:
        for ids, category, faces in epoch:
            known = by_ids[ids]
            assert category in (-1, known[0]) and faces in (-1, known[1])
            if known[0] >= 0:
                counts[int(category == -1), int(faces == -1)] += 1
        left_out.add(frozenset(ids for ids, _, faces in epoch if faces == -1))
    assert len(left_out) == len(epochs), "each epoch leaves out others"
    total = counts.sum()
    expected = np.outer([0.7, 0.3], [0.7, 0.3])
    assert total == 8 * COUNT / 2
    assert (np.abs(counts / total - expected) < 4 * np.sqrt(expected * (1 - expected) / total)).all()


def test_what_is_left_out_of_one_condition_does_not_hang_on_the_other():
    whole = [Conditions(KNOWN, True, 0.5).of_mesh(1, 20, epoch, 7) for epoch in range(40)]
    alone = [Conditions((), True, 0.5).of_mesh(1, 20, epoch, 7) for epoch in range(40)]
    assert [told["num_faces"] for told in whole] == [told["num_faces"] for told in alone]
    assert {told["num_faces"] for told in whole} == {-1, 20}


def test_held_out_rows_know_both_the_models_category_and_their_own_group(meshes, by_ids):
    sizes, used = mesh_sizes(meshes, ROW, "error")
    rows = MeshRows(meshes, IFlameTokenizer(), ROW, conditions=BOTH, grouped=True)
    names = []
    for keys in evaluation_batches(sizes, used, ROW // 9, 2):
        batch = rows.batch(keys)
        for ids, *told in meshes_of(batch):
            assert tuple(told) == by_ids[ids]
        groups = batch["layout"].attributes["group"]
        names += [meshes.category_names[index] for index in groups[groups >= 0].tolist()]
    assert sorted(names) == sorted(map(str, CATEGORIES))


def test_a_place_in_the_data_is_that_of_a_model_that_is_told_the_same(file, meshes):
    for rows in (lambda told: mapped(meshes, told), lambda told: streamed(file, told)):
        told = [Conditions(), BOTH, Conditions(KNOWN), Conditions(("table",)), Conditions(num_faces=True)]
        assert len({rows(each).digest() for each in told}) == 5
        assert rows(Conditions(KNOWN, True, 0.5)).digest() == rows(BOTH).digest(), "as with the augmentation"


def options_of(file, *more):
    return parse_arguments(["--train_file", file, "--hidden_size", "32", "--row_length", str(ROW), "--use_cpu", *more])


@pytest.mark.parametrize("more", [[], ["--streaming", "--max_steps", "3"]])
def test_a_new_model_knows_the_frequent_categories_and_its_rows_tell_them(file, more, by_ids):
    both = ["--condition_on", "num_faces", "category", "--min_category_meshes", "10"]
    held_out = ["--validation_file", file, "--condition_dropout", "0.5"]
    arguments = options_of(file, *both, *held_out, *more)
    accelerator = Accelerator(cpu=True)
    tokenizer, model = create_model(arguments, accelerator)
    assert model.config.categories == ["None", "chair", "lamp", "ship", "table"]
    assert model.config.num_faces_range == [1, arguments.data.row_length // 9 - 2]
    data = load_data(arguments, tokenizer, accelerator, model.config)
    rows = data.rows if more else data.rows.rows
    assert rows.conditions == Conditions.of(model.config, 0.5, 42)
    assert data.validation_loader.rows.conditions == Conditions.of(model.config, 0.0, 42)
    batch, _ = next(data.rows.batches([], 4))
    assert {-1} < set(batch["layout"].attributes["category"].tolist()) <= {-1, 0, 1, 2, 3, 4}
    for batch in data.validation_loader:
        faces = [faces for _, _, faces in meshes_of(batch)]
        assert faces and min(faces) > 0, "nothing is left out in evaluation"


def test_categories_are_those_of_enough_meshes():
    names = ["b"] * 3 + ["a"] * 2 + ["c"] + [None] * 5 + [""] * 5
    assert frequent_categories(names, 2) == ["a", "b"] and frequent_categories(names, 3) == ["b"]
    with pytest.raises(ValueError, match="no category has 4 training meshes; the largest, b, has 3"):
        frequent_categories(names, 4)
    with pytest.raises(ValueError, match="no training mesh has a category"):
        frequent_categories([None, ""], 1)


def test_a_model_to_start_from_keeps_what_it_is_told(file, tmp_path):
    small_model(categories=["ship", "lamp"]).save_pretrained(tmp_path / "model")
    IFlameTokenizer().save_pretrained(tmp_path / "model")
    start = ["--train_file", file, "--row_length", str(ROW), "--model_name_or_path", str(tmp_path / "model")]
    accelerator = Accelerator(cpu=True)
    for more in ([], ["--condition_on", "category"]):
        tokenizer, model = create_model(parse_arguments([*start, *more]), accelerator)
        assert model.config.categories == ["ship", "lamp"]
    rows = load_data(parse_arguments(start), tokenizer, accelerator, model.config).rows.rows
    assert rows.conditions == Conditions(("ship", "lamp"), dropout=0.2, seed=42)
    with pytest.raises(ValueError, match="--condition_on category num_faces .its own is category"):
        create_model(parse_arguments([*start, "--condition_on", "num_faces", "category"]), accelerator)


def test_a_model_that_is_told_categories_and_finds_none_says_so(made, tmp_path):
    columns = {name: [np.asarray(getattr(made[0], name)).tolist()] for name in ("vertices", "faces")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    arguments, config = options_of(str(tmp_path / "a.parquet")), small_config(categories=["ship"])
    with pytest.warns(UserWarning, match="no training mesh has one that it knows"):
        load_data(arguments, IFlameTokenizer(), Accelerator(cpu=True), config)
    with pytest.raises(ValueError, match="a.parquet has no column category, which --condition_on category needs"):
        read_categories([str(tmp_path / "a.parquet")])


def test_generated_meshes_have_their_kinds_for_categories():
    few = ["--num_procedural_meshes", "40", "--condition_on", "category", "--min_category_meshes", "4"]
    _, model = create_model(parse_arguments(["--hidden_size", "32", *few]), Accelerator(cpu=True))
    kinds = [mesh.kind for mesh in make_dataset(40, seed=42)]
    assert model.config.categories == sorted({kind for kind in kinds if kinds.count(kind) >= 4})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--condition_on", "size"], "invalid choice: 'size'"),
        (["--condition_dropout=1"], "condition_dropout must be at least 0 and less than 1, got 1.0"),
        (["--condition_on=num_faces", "--min_category_meshes=5"], "min_category_meshes needs --condition_on category"),
        (["--condition_on=category", "--min_category_meshes=0"], "min_category_meshes must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(capsys, given, message):
    with pytest.raises(SystemExit) as end:
        parse_arguments(given)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_to_leave_out_what_a_model_is_not_told_is_refused(file):
    with pytest.raises(ValueError, match="condition_dropout is for a model that is told something"):
        load_data(options_of(file, "--condition_dropout", "0.1"), IFlameTokenizer(), Accelerator(cpu=True))
