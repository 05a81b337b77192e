"""torch.compile in training: blocks are compiled once, and learn the same."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_models import relative_error, small_model

from iflame_hf import IFlameTokenizer
from training.measure.samples import draw_samples
from training.rows.pack import pack, row_inputs
from training.run.create import compile_blocks

FACES = 40


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def packed_rows(seed, meshes_in_rows):
    """Rows of 40 faces that hold so many random meshes each."""
    random, rows = np.random.default_rng(seed), []
    for count in meshes_in_rows:
        ends = np.sort(random.choice(np.arange(3, FACES - 2, 3), size=count, replace=False))
        sequences = [
            np.concatenate([np.full(9, 130), random.integers(129, size=9 * (faces - 2)), np.full(9, 131)])
            for faces in np.diff([0, *ends])
        ]
        rows.append(sequences)
    return row_inputs(pack(rows, 9 * FACES, IFlameTokenizer()), IFlameTokenizer())


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def learn(model, batch):
    model.train().zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@torch.no_grad()
def judge(model, batch):
    return model.eval()(**batch, use_cache=False).loss


def test_compiled_blocks_compute_the_loss_and_the_gradients_of_the_others():
    plain, compiled = small_model(seed=3), small_model(seed=3)
    compile_blocks(compiled, backend="aot_eager")
    batch = packed_rows(0, [3, 1])
    (loss, gradient), (expected_loss, expected) = learn(compiled, batch), learn(plain, batch)
    assert graphs() > 0
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    assert relative_error(gradient, expected) < 1e-5
    assert judge(compiled, batch) == pytest.approx(float(judge(plain, batch)), rel=1e-5)


def test_a_run_compiles_every_kind_of_block_once_for_each_level_however_rows_are_filled():
    model = small_model(seed=3)
    compile_blocks(model, backend="eager")
    learn(model, packed_rows(0, [2, 3]))
    kinds = {(kind, level) for kind, level in zip(model.config.layer_types, levels_of(model), strict=True)}
    assert graphs() == len(kinds)
    judge(model, packed_rows(1, [1, 4]))
    after_the_first_evaluation = graphs()
    for seed in range(2, 8):
        learn(model, packed_rows(seed, [1 + seed % 5, 2]))
        judge(model, packed_rows(seed, [seed % 4 + 1, 1]))
    assert graphs() == after_the_first_evaluation <= 2 * len(kinds)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_samples_of_a_model_in_training_compile_nothing(tmp_path):
    plain, compiled = small_model(seed=3), small_model(seed=3)
    compile_blocks(compiled, backend="eager")
    learn(compiled, packed_rows(0, [2, 3]))
    before = graphs()
    meshes = {}
    for name, model in (("plain", plain), ("compiled", compiled)):
        draw_samples(model, IFlameTokenizer(), Accelerator(cpu=True), tmp_path / name, count=2, max_faces=3, seed=1)
        meshes[name] = {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.glb")}
    assert graphs() == before
    assert meshes["compiled"] == meshes["plain"]
    learn(compiled, packed_rows(1, [2, 3]))
    assert graphs() == before


def levels_of(model):
    stages = model.config.stage_layers
    return [level for level, count in zip((0, 1, 2, 1, 0), stages, strict=True) for _ in range(count)]


def test_compiling_leaves_the_names_of_the_weights_alone():
    plain, compiled = small_model(seed=3), small_model(seed=3)
    compile_blocks(compiled, backend="eager")
    assert list(compiled.state_dict()) == list(plain.state_dict())
