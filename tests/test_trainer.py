"""transformers.Trainer trains the model on the project's packed rows."""

import numpy as np
import pytest
import torch
from small_models import small_model
from transformers import Trainer, TrainingArguments, default_data_collator

from iflame_hf import IFlameTokenizer
from training.data import MeshRows, ProceduralMeshes, RowStream, mesh_sizes
from training.procedural import make_dataset

ROW = 9 * 80


@pytest.fixture(scope="module")
def rows():
    meshes = ProceduralMeshes(make_dataset(30, seed=3, max_faces=48))
    stream = RowStream(*mesh_sizes(meshes, ROW, "error"), ROW // 9, seed=0)
    packed = MeshRows(meshes, IFlameTokenizer(), ROW)
    return [packed[batch[0]] for batch, _ in zip(stream.batches(0, 0, 1), range(12), strict=False)]


def train(rows, folder, **options):
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
        eval_dataset=rows[:4],
        data_collator=default_data_collator,
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
