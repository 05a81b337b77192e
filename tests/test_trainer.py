"""transformers.Trainer trains the model on the project's packed rows, and from prepared meshes by its collator."""

import datasets
import numpy as np
import pytest
import torch
import trimesh
from prepared_fixtures import prepare
from small_models import BOS, EOS, PAD, small_config, small_model
from transformers import Trainer, TrainingArguments, default_data_collator

from iflame_hf import IFlameTokenizer
from training.procedural.make import make_dataset
from training.rows.collate import MeshCollator
from training.rows.map import MeshRows, RowStream, mesh_sizes
from training.rows.meshes import ProceduralMeshes

ROW = 9 * 80
CORNERS = [[0, 0, 0], [2, 0, 0], [0, 0, 2], [0, 4, 0]]
# Of a tetrahedron and of its one side, written down as docs/tokens.md explains them.
TETRAHEDRON = {"vertices": CORNERS, "faces": [[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]}
TETRAHEDRON_IDS = [
    *[32, 32, 0, 32, 96, 0, 96, 32, 0],
    *[32, 32, 0, 96, 32, 0, 32, 32, 128],
    *[32, 32, 0, 32, 32, 128, 32, 96, 0],
    *[96, 32, 0, 32, 96, 0, 32, 32, 128],
]
SIDE = {"vertices": CORNERS, "faces": [[0, 3, 1]]}
SIDE_IDS = [64, 32, 0, 64, 32, 128, 64, 96, 0]
START, END, PADDING, IGNORED = [BOS] * 9, [EOS] * 9, [PAD] * 9, [-100] * 9


@pytest.fixture(scope="module")
def rows():
    meshes = ProceduralMeshes(make_dataset(30, seed=3, max_faces=48))
    stream = RowStream(*mesh_sizes(meshes, ROW, "error"), ROW // 9, seed=0)
    packed = MeshRows(meshes, IFlameTokenizer(), ROW)
    batch = packed.batch([key for (key,), _ in zip(stream.batches(0, 0, 1), range(12), strict=False)])
    columns = {name: batch[name] for name in ("input_ids", "labels")} | {"position_ids": batch["layout"].positions()}
    return [{name: values[row] for name, values in columns.items()} for row in range(12)]


def train(rows, folder, data_collator=default_data_collator, **options):
    model = small_model().train()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=[rows[index] for index in range(4)],
        data_collator=data_collator,
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return model, losses, trainer.evaluate()["eval_loss"]


def test_trainer_learns_the_same_from_accumulated_rows_as_from_whole_batches(rows, tmp_path):
    assert len({int((row["labels"] >= 0).sum()) for row in rows}) > 2, "rows should differ in their number of labels"
    whole, losses, evaluation = train(rows, tmp_path / "whole", per_device_train_batch_size=4)
    parts, others, _ = train(rows, tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert others == pytest.approx(losses, rel=1e-4) and len(losses) == 3
    assert np.isfinite(evaluation) and evaluation < losses[0]
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The training split of a prepared set of furniture, as `datasets` loads it."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "in").mkdir()
    for number, mesh in enumerate(make_dataset(16, seed=3, max_faces=48)):
        trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).export(folder / "in" / f"{number}.ply")
    assert prepare(folder / "in", "--out", folder / "out", "--num_workers", 1) == 0
    files = {"train": str(folder / "out" / "data" / "train-*.parquet")}
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


@pytest.mark.parametrize("row_length", [None, ROW])
def test_trainer_learns_from_a_prepared_set_by_the_collator(row_length, prepared, tmp_path):
    collator = MeshCollator(IFlameTokenizer(), row_length)
    options = {"remove_unused_columns": False, "per_device_train_batch_size": 4}
    _, losses, evaluation = train(prepared, tmp_path, collator, **options)
    assert len(losses) == 3 and np.isfinite(evaluation) and evaluation < losses[0]


def test_the_collator_is_found_at_its_earlier_place_too():
    from training import collator

    assert collator.MeshCollator is MeshCollator


def test_padded_and_packed_meshes_have_the_same_loss(prepared):
    model, examples = small_model(), [prepared[index] for index in range(8)]
    padded = MeshCollator(IFlameTokenizer())(examples)
    packed = MeshCollator(IFlameTokenizer(), ROW)(examples)
    count = int((padded["labels"] >= 0).sum())
    assert count == int((packed["labels"] >= 0).sum()) == 9 * sum(row["num_faces_q"] + 1 for row in examples)
    assert len(padded["input_ids"]) == 8 and 1 < len(packed["input_ids"]) < 8
    assert not padded["attention_mask"].all(), "some mesh should be padded"
    with torch.no_grad():
        whole, rows = (model(**batch, num_items_in_batch=count).loss for batch in (padded, packed))
    torch.testing.assert_close(whole, rows, rtol=1e-5, atol=0)


def test_padded_batches_have_ids_a_mask_and_labels_of_the_meshes_alone():
    batch = MeshCollator(IFlameTokenizer())([SIDE, TETRAHEDRON])
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), torch.int64
    )
    assert batch["input_ids"].tolist() == [
        START + SIDE_IDS + END + 3 * PADDING,
        START + TETRAHEDRON_IDS + END,
    ]
    assert batch["labels"].tolist() == [
        IGNORED + SIDE_IDS + END + 3 * IGNORED,
        IGNORED + TETRAHEDRON_IDS + END,
    ]
    assert batch["attention_mask"].tolist() == [[1] * 27 + [0] * 27, [1] * 54]


def test_packed_rows_restart_positions_at_every_mesh_and_at_the_padding():
    batch = MeshCollator(IFlameTokenizer(), 9 * 10)([SIDE, TETRAHEDRON, SIDE])
    assert batch.keys() == {"input_ids", "position_ids", "labels", "layout"}
    assert {batch[name].dtype for name in ("input_ids", "position_ids", "labels")} == {torch.int64}
    mesh, labels = START + SIDE_IDS + END, IGNORED + SIDE_IDS + END
    assert batch["input_ids"].tolist() == [START + TETRAHEDRON_IDS + END + mesh + PADDING, mesh + 7 * PADDING]
    assert batch["labels"].tolist() == [IGNORED + TETRAHEDRON_IDS + END + labels + IGNORED, labels + 7 * IGNORED]
    places = [54, 27, 9], [27, 63]
    assert batch["position_ids"].tolist() == [[n for length in row for n in range(length)] for row in places]
    assert batch["layout"].positions().tolist() == batch["position_ids"].tolist()
    assert batch["layout"].attributes == {}


def test_batches_tell_the_model_what_its_config_asks_for():
    config = small_config()
    config.categories, config.num_faces_range = ["side", "solid"], [1, 9]
    examples = [SIDE | {"category": "side"}, TETRAHEDRON | {"category": "solid"}, SIDE | {"category": "door"}, SIDE]
    packed = MeshCollator(IFlameTokenizer(), 9 * 10, config)(examples)
    layout = packed["layout"]  # a solid and a side; two sides; paddings
    assert {name: values.tolist() for name, values in layout.attributes.items()} == {
        "category": [1, 0, -1, -1, -1, -1],
        "num_faces": [4, 1, -1, 1, 1, -1],
    }
    assert layout.attribute("num_faces")[0].tolist() == [4] * 54 + [1] * 27 + [-1] * 9
    padded = MeshCollator(IFlameTokenizer(), config=config)(examples)
    assert padded["category"].tolist() == [0, 1, -1, -1] and padded["num_faces"].tolist() == [1, 4, 1, 1]
    assert {padded[name].dtype for name in ("category", "num_faces")} == {torch.int64}
    config.categories = None
    assert "category" not in MeshCollator(IFlameTokenizer(), config=config)(examples)


@pytest.mark.parametrize("row_length", [None, 9 * 10])
def test_ids_arrays_and_tensors_make_the_same_batch_as_lists(row_length):
    tokenizer = IFlameTokenizer()
    collator, examples = MeshCollator(tokenizer, row_length), [TETRAHEDRON, SIDE]
    expected = collator(examples)
    others = [
        [{"input_ids": tokenizer.encode_mesh((mesh["vertices"], mesh["faces"]))} for mesh in examples],
        [{name: np.array(values) for name, values in mesh.items()} for mesh in examples],
        [{name: torch.tensor(values) for name, values in mesh.items()} for mesh in examples],
    ]
    for batch in map(collator, others):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in expected.keys() - {"layout"})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (TETRAHEDRON, "takes 54 tokens.* does not fit into a row of 45: give a row_length of at least 54"),
        ({"vertices": CORNERS, "faces": [[0, 1, 4]]}, "face indices run from 0 to 4"),
        ({"vertices": CORNERS, "faces": []}, "the mesh has no faces"),
        ({"vertices": None, "faces": [[0, 1, 2]]}, "vertices must"),
        ({"name": "chair"}, "it has no faces and no vertices; .*remove_unused_columns=False"),
        ({"input_ids": [*START, *SIDE_IDS, EOS]}, r"whole faces of nine ids, got int64 of the shape \(19,\)"),
        ({"input_ids": SIDE_IDS + END}, "must begin with nine start tokens"),
        ({"input_ids": 2 * (START + SIDE_IDS + END)}, "have no others: one mesh an example"),
        ({"input_ids": START + SIDE_IDS + END + PADDING}, "encode with padding=False"),
    ],
)
def test_what_cannot_be_collated_is_named_by_its_place(bad, message):
    with pytest.raises(ValueError, match=f"^mesh 1 of the batch:? .*{message}"):
        MeshCollator(IFlameTokenizer(), 45)([SIDE, bad])


@pytest.mark.parametrize("row_length", [0, 18, 28, -27])
def test_a_row_that_holds_no_whole_mesh_is_refused(row_length):
    with pytest.raises(ValueError, match="row_length must be a multiple of 9, at least 27"):
        MeshCollator(IFlameTokenizer(), row_length)
