"""Meshes that are read while training: each once an epoch, in the same rows however many processes share the work."""

import os
import subprocess
import sys
import warnings
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub_server import Commit, LoopbackHub, Repository
from training_processes import Trainer, command_line, log_of, losses_of

from iflame_hf import IFlameTokenizer
from training.arguments import parse_arguments
from training.rows.encode import MeshEncoder
from training.rows.map import MappedRows, MeshRows, RowStream, mesh_sizes
from training.rows.meshes import ParquetMeshes
from training.rows.stream import StreamedRows, open_stream
from training.run.checkpoint import Progress

ROW = 9 * 30
BOS, PAD = 130, 129
COUNT = 100


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def meshes():
    """Meshes of four to fifteen triangles, no two alike."""
    random = np.random.default_rng(0)
    faces = random.integers(4, 16, size=COUNT)
    return [(random.random((3 * count, 3), np.float32), np.arange(3 * count).reshape(-1, 3)) for count in faces]


def table_of(meshes, **columns):
    vertices, faces = zip(*((np.asarray(v).tolist(), np.asarray(f).tolist()) for v, f in meshes), strict=True)
    return pyarrow.table({"other": ["x" * 50] * len(meshes), "vertices": vertices, "faces": faces, **columns})


@pytest.fixture(scope="module")
def files(tmp_path_factory, meshes):
    """Three files of 6, 4 and 1 row groups: 11 shards, of 1 to 10 meshes."""
    folder = tmp_path_factory.mktemp("parquet")
    bounds = (0, 57, 94, COUNT)
    for number, (start, end) in enumerate(pairwise(bounds)):
        table = table_of(meshes[start:end], name=[f"mesh {index}" for index in range(start, end)])
        pyarrow.parquet.write_table(table, folder / f"train-{number}.parquet", row_group_size=10)
    return sorted(map(str, folder.glob("*.parquet")))


@pytest.fixture
def encode():
    return MeshEncoder(IFlameTokenizer(), ROW, seed=3)


@pytest.fixture
def rows(files, encode):
    return StreamedRows(open_stream(files), encode, shards_in_block=2)


@pytest.fixture(scope="module")
def names(meshes):
    """The meshes' numbers by their token ids."""
    tokenizer = IFlameTokenizer()
    names = {tuple(tokenizer.encode_mesh(mesh)): index for index, mesh in enumerate(meshes)}
    assert len(names) == COUNT
    return names


def sequences_in(batch):
    """The token ids of every mesh in a batch, row by row."""
    for ids, positions in zip(batch["input_ids"], batch["layout"].positions(), strict=True):
        for part in torch.tensor_split(ids, (positions == 0).nonzero()[1:, 0]):
            if part[0] != PAD:
                yield tuple(part.tolist())


def same(batch, other):
    known = [(each["input_ids"], each["labels"], each["layout"].positions()) for each in (batch, other)]
    return batch.keys() == other.keys() and all(map(torch.equal, *known))


def until_block(rows, last, *arguments, **options):
    """The batches of one process that begin before a block."""
    taken = []
    for batch, place in rows.batches(*arguments, **options):
        if place[0] >= last:
            return taken
        taken.append((batch, place))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_mesh_is_in_an_epoch_once_over_all_ranks_and_workers(rows, names, world_size, workers):
    assert rows.stream.num_shards == 11 and rows.blocks_in_epoch == 6
    seen, readers = [Counter(), Counter()], {}
    for rank in range(world_size):
        for batch, (block, _) in until_block(rows, 12, [], 1, rank, world_size, workers):
            seen[block // 6].update(names[sequence] for sequence in sequences_in(batch))
            assert readers.setdefault(block, rank) == rank, "a block is read by one rank only"
    assert seen == [Counter(range(COUNT))] * 2
    assert len(readers) == 12


def test_the_rows_of_a_process_are_the_same_for_any_number_of_workers(files):
    rows = StreamedRows(
        open_stream(files), MeshEncoder(IFlameTokenizer(), ROW, 3, scale=0.25, shift=True), shards_in_block=2
    )
    alone = list(islice(rows.batches([], 4, 1, 2), 15))
    assert alone[-1][1][0] > 6, "the rows should reach into the second epoch"
    for workers in (1, 2):
        others = islice(rows.batches([], 4, 1, 2, workers), 15)
        for (batch, place), (other, other_place) in zip(alone, others, strict=True):
            assert same(batch, other) and place == other_place


@pytest.mark.parametrize("world_size", [1, 3])
def test_rows_from_a_place_on_are_those_that_come_after_it(rows, world_size):
    everything = [list(islice(rows.batches([], 3, rank, world_size), 25)) for rank in range(world_size)]
    for step in (0, 7, 20):
        places = [batches[step][1] for batches in everything]
        for rank, batches in enumerate(everything):
            after = islice(rows.batches(places, 3, rank, world_size, num_workers=1), 24 - step)
            assert all(same(batch, other) for (batch, _), (other, _) in zip(batches[step + 1 :], after, strict=True))


def test_epochs_differ_in_order_and_company(rows, names):
    epochs = [[], []]
    for batch, (block, _) in until_block(rows, 12, [], 1):
        epochs[block // 6].append(frozenset(names[sequence] for sequence in sequences_in(batch)))
    assert sorted(epochs[0], key=sorted) != sorted(epochs[1], key=sorted)
    order = [index for row in epochs[0] for index in row]
    assert np.abs(np.corrcoef(order, range(COUNT))[0, 1]) < 0.5, "the order should not be that of the files"


def test_without_augmentation_meshes_are_as_memory_mapped_ones_and_with_it_they_vary_by_epoch(files, names):
    augmented = StreamedRows(open_stream(files), MeshEncoder(IFlameTokenizer(), ROW, 3, scale=0.25), shards_in_block=2)
    epochs = [set(), set()]
    for batch, (block, _) in until_block(augmented, 12, [], 1):
        epochs[block // 6].update(sequences_in(batch))
    assert len(epochs[0]) == len(epochs[1]) == COUNT
    assert not epochs[0] & epochs[1] and not epochs[0] & names.keys()
    mapped = ParquetMeshes(files)
    stream = RowStream(*mesh_sizes(mapped, ROW, "error"), ROW // 9, seed=3)
    batches = MappedRows(MeshRows(mapped, IFlameTokenizer(), ROW), stream).batches([], len(stream.rows_of(0)))
    assert set(sequences_in(next(batches)[0])) == names.keys()


def test_another_number_of_processes_goes_on_after_what_was_begun(rows, names):
    places = [[7, 3], [4, 1]]
    with pytest.warns(UserWarning, match="2 processes were reading the data and 3 go on.*up to block 8"):
        _, place = next(rows.batches(places, 1, 0, 3))
    assert place == [8, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [next(rows.batches(places, 1, rank, 3))[1] for rank in (1, 2)] == [[9, 1], [10, 1]]


@pytest.mark.parametrize("choice", ["crop", "drop"])
def test_meshes_longer_than_a_row_are_cropped_or_dropped(files, meshes, names, choice):
    length = 9 * 11
    long = {index for index, (_, faces) in enumerate(meshes) if len(faces) + 2 > 11}
    assert 10 < len(long) < 90
    rows = StreamedRows(open_stream(files), MeshEncoder(IFlameTokenizer(), length), choice, shards_in_block=3)
    seen = Counter(
        sequence for batch, _ in until_block(rows, rows.blocks_in_epoch, [], 1) for sequence in sequences_in(batch)
    )
    expected = {ids[:length]: index for ids, index in names.items() if choice == "crop" or index not in long}
    assert seen == Counter(expected.keys())


@pytest.mark.parametrize("workers", [0, 1])
def test_meshes_longer_than_a_row_are_an_error_that_names_one(files, workers):
    rows = StreamedRows(open_stream(files), MeshEncoder(IFlameTokenizer(), 9 * 11))
    with pytest.raises(
        ValueError, match=r"mesh \d+, mesh \d of row group \d+, has 1\d faces.* give --row_length 1\d\d"
    ):
        next(rows.batches([], 1, num_workers=workers))


def test_an_epoch_in_which_nothing_fits_is_an_error_and_no_endless_search(files):
    rows = StreamedRows(open_stream(files), MeshEncoder(IFlameTokenizer(), 27), "drop", shards_in_block=2)
    with pytest.raises(ValueError, match="no mesh in the stream"):
        next(rows.batches([], 1))


def test_row_groups_without_rows_do_no_harm(files, tmp_path, names, encode):
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(files[0]).slice(0, 0), empty)
    rows = StreamedRows(open_stream([str(empty), *files]), encode, shards_in_block=1)
    assert rows.blocks_in_epoch == 12
    seen = Counter(names[sequence] for batch, _ in until_block(rows, 12, [], 1) for sequence in sequences_in(batch))
    assert seen == Counter(range(COUNT))
    with pytest.raises(ValueError, match="no mesh in the stream"):
        next(StreamedRows(open_stream([str(empty)]), encode).batches([], 1))


def test_unusable_meshes_are_left_out_and_named(tmp_path, meshes):
    bad = [(np.zeros((3, 3)), [[0, 1, 2]]), ([], []), (meshes[0][0], [[0, 1, 1000]])]
    file = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(table_of([*bad, meshes[5]], name=["flat", "empty", "index", "good"]), file)
    rows = StreamedRows(open_stream([str(file)]), MeshEncoder(IFlameTokenizer(), ROW))
    with pytest.warns(UserWarning) as caught:
        batch, _ = next(rows.batches([], 1))
    messages = [str(warning.message) for warning in caught]
    assert [
        name in message
        for name, message in zip(("flat, mesh 0", "empty, mesh 1", "index, mesh 2"), messages, strict=True)
    ] == [True] * 3
    assert list(sequences_in(batch)) == [tuple(IFlameTokenizer().encode_mesh(meshes[5]))]


def test_a_row_group_too_large_for_memory_is_refused_with_advice(files, encode, monkeypatch):
    monkeypatch.setattr("training.rows.stream.MOST_MESHES", 9)
    with pytest.raises(ValueError, match="more than 9 meshes.*smaller row groups"):
        next(StreamedRows(open_stream(files), encode).batches([], 1))


def test_what_cannot_be_streamed_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("not parquet")
    pyarrow.parquet.write_table(pyarrow.table({"points": [[0.0]]}), tmp_path / "points.parquet")
    for name, reason in (
        ("text.parquet", "cannot be streamed as parquet"),
        ("no.parquet", "cannot be streamed as parquet"),
        ("no*.parquet", "cannot be streamed as parquet"),
        ("points.parquet", "no column faces and no column vertices"),
    ):
        with pytest.raises(ValueError, match=rf"{name.replace('*', '.')}.*{reason}"):
            open_stream([str(tmp_path / name)])


def test_patterns_folders_and_files_name_the_same_stream(files, tmp_path):
    pattern = files[0].replace("-0", "-*")
    folder = files[0].rpartition("/")[0]
    streams = [open_stream(sources) for sources in (files, [pattern], [folder])]
    assert [stream.num_shards for stream in streams] == [11] * 3
    for shard in (0, 6, 10):
        tables = [next(iter(stream.shard(11, shard).with_format("arrow").iter(100))) for stream in streams]
        assert tables[0].column_names == ["vertices", "faces", "name"]
        assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


def test_the_digest_changes_with_all_that_a_place_depends_on(files, encode):
    stream = open_stream(files)
    digest = StreamedRows(stream, encode, label="a").digest()
    assert digest == StreamedRows(open_stream(files), encode, label="a").digest()
    others = [
        StreamedRows(stream, encode, label="b"),
        StreamedRows(stream, encode, "crop", label="a"),
        StreamedRows(stream, encode, shards_in_block=3, label="a"),
        StreamedRows(stream, MeshEncoder(encode.tokenizer, ROW + 9, seed=3), label="a"),
        StreamedRows(stream, MeshEncoder(encode.tokenizer, ROW, seed=4), label="a"),
        StreamedRows(open_stream(files[:2]), encode, label="a"),
    ]
    assert len({digest, *(other.digest() for other in others)}) == 7


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture
def options(files):
    """A run that is two steps into its second epoch when it is half done, on one process."""
    return {
        "streaming": True,
        "train_file": files,
        "streaming_row_groups": 2,
        "validation_file": files[2:],
        "row_length": ROW,
        "max_steps": 14,
        "save_steps": 7,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "dataloader_num_workers": 1,
    }


def states_of(output_dir, step):
    """Of every process: model, optimiser."""
    folder = output_dir / f"checkpoint-{step}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "optimizer.bin")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(trainer, options, tmp_path, world_size):
    trainer.finish(*trainer.start_ranks(tmp_path / "whole", world_size, **options))
    checkpoint = tmp_path / "whole" / "checkpoint-7"
    places = Progress.read(checkpoint).places
    assert len(places) == world_size and min(block for block, _ in places) >= 6, "half is the second epoch"
    trainer.finish(
        *trainer.start_ranks(tmp_path / "resumed", world_size, **options, resume_from_checkpoint=checkpoint)
    )
    before, after = losses_of(tmp_path / "whole"), losses_of(tmp_path / "resumed")
    assert sorted(after) == list(range(8, 15))
    assert after == {step: before[step] for step in after}
    assert states_of(tmp_path / "resumed", 14) == states_of(tmp_path / "whole", 14)
    lines = [line for line in log_of(tmp_path / "resumed") if "eval_loss" in line]
    assert [line["step"] for line in lines] == [14]
    assert max(line["epoch"] for line in log_of(tmp_path / "resumed") if "epoch" in line) > 2


def test_two_processes_that_become_one_lose_the_rest_of_their_blocks_only(trainer, options, tmp_path):
    trainer.finish(*trainer.start_ranks(tmp_path, 2, **{**options, "max_steps": 7}))
    begun = Progress.read(tmp_path / "checkpoint-7").places
    trainer.finish(trainer.start(tmp_path, **{**options, "max_steps": 8}, resume_from_checkpoint="latest"))
    assert "2 processes were reading the data and 1 go on" in trainer.messages.read_text()
    assert sorted(losses_of(tmp_path)) == list(range(1, 9))
    (place,) = Progress.read(tmp_path / "checkpoint-8").places
    assert place[0] > max(block for block, _ in begun)


def test_a_data_set_on_the_hub_is_trained_on_without_being_downloaded(files, tmp_path):
    held_out = Path(files[2]).read_bytes()
    content = {f"data/{Path(file).name}": Path(file).read_bytes() for file in files[:2]}
    with LoopbackHub() as hub:
        commit = Commit({**content, "data/validation-0.parquet": held_out})
        hub.repositories["datasets/someone/meshes"] = Repository(branches={"main": [commit]})
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        command = command_line(
            tmp_path / "run",
            streaming=True,
            train_file="someone/meshes",
            validation_file="hf://datasets/someone/meshes/data/validation-*.parquet",
            row_length=ROW,
            max_steps=10,
            save_steps=0,
            per_device_train_batch_size=8,
            dataloader_num_workers=2,
        )
        done = subprocess.run(
            [sys.executable, Path(__file__).parents[1] / "training" / "train.py", *command],
            env={**os.environ, **settings, "HF_HOME": str(tmp_path / "home"), "ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        for name in content:
            assert hub.sent("GET", f"/datasets/someone/meshes/resolve/[^/]+/{name}") > 1
    assert "10 row groups in 2 blocks, streamed in rows of 270 tokens" in done.stderr
    assert sorted(losses_of(tmp_path / "run")) == list(range(1, 11))
    assert [line["step"] for line in log_of(tmp_path / "run") if "eval_loss" in line] == [10]
    kept = [path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert held_out in kept and not set(content.values()) & set(kept)


def test_other_data_is_not_gone_on_with(trainer, options, files, tmp_path):
    trainer.finish(trainer.start(tmp_path, **{**options, "max_steps": 1}))
    changed = {**options, "train_file": files[:2], "resume_from_checkpoint": "latest"}
    process = trainer.start(tmp_path, **changed)
    process.join(60)
    assert process.exitcode == 1 and "belongs to other training data" in trainer.messages.read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--max_steps=5"], "streaming needs a train_file"),
        (["--train_file=a.parquet"], "streaming needs max_steps"),
        (["--train_file=a.parquet", "--max_steps=5", "--balance=category"], "balance category does not go with"),
        (["--train_file=a.parquet", "--max_steps=5", "--max_train_samples=9"], "max_train_samples does not go with"),
        (["--train_file=a.parquet", "--max_steps=5", "--streaming_row_groups=0"], "streaming_row_groups must be at"),
    ],
)
def test_what_streaming_cannot_do_is_refused_in_plain_words(capsys, given, message):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--streaming=true", *given])
    assert end.value.code == 2 and message in capsys.readouterr().err
