"""What is counted as right, and samples."""

import math

import pytest
import torch
import trimesh
from accelerate import Accelerator
from small_models import EOS, mesh_rows, small_model
from torch.nn import functional as F

from iflame_hf import IFlameTokenizer
from training.measure.metrics import COUNTS, count_right, evaluate
from training.measure.samples import draw_samples
from training.rows.pack import IGNORED, pack, row_inputs

CATEGORIES = ["chair", "lamp", "table"]


@pytest.fixture(scope="module")
def batch():
    """Two rows of four meshes, of the categories chair, table, table, chair."""
    meshes, tokenizer = list(mesh_rows(4, faces=4, end=True).numpy()), IFlameTokenizer()
    return row_inputs(pack([meshes[:2], meshes[2:]], 9 * 14, tokenizer, {"group": [0, 2, 2, 0]}), tokenizer)


@pytest.fixture(scope="module")
def logits(batch):
    """Random, but the true token is the likeliest at about nine places in ten."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 126, 132, generator=random)
    known = torch.rand(2, 125, generator=random) < 0.9
    true = F.one_hot(batch["input_ids"][:, 1:], 132) * known[..., None]
    logits[:, :-1] += 8 * true
    return logits


def counted_one_by_one(logits, labels, categories):
    """The same by going from token to token."""
    counts = torch.zeros(len(CATEGORIES), len(COUNTS), dtype=torch.float64)
    for row in range(labels.shape[0]):
        for start in range(0, labels.shape[1], 9):
            hits = []
            for place in range(start, start + 9):
                label = int(labels[row, place])
                if label == IGNORED:
                    continue
                before = logits[row, place - 1].double()
                hits.append(int(before.argmax()) == label)
                counts[categories[row, place], 0] += before.logsumexp(0) - before[label]
                counts[categories[row, place], 1] += 1
                counts[categories[row, place], 2] += hits[-1]
            if hits and label != EOS:
                category = categories[row, start]
                counts[category, 3] += 3
                counts[category, 4] += sum(all(hits[first : first + 3]) for first in (0, 3, 6))
                counts[category, 5] += 1
                counts[category, 6] += all(hits)
    return counts


def test_tokens_vertices_and_faces_are_counted_by_category(batch, logits):
    categories = batch["layout"].attribute("group")
    expected = counted_one_by_one(logits, batch["labels"], categories)
    counts = count_right(logits, batch["labels"], categories, len(CATEGORIES), 129)
    torch.testing.assert_close(counts.double(), expected, rtol=1e-5, atol=1e-5)
    assert expected[:, 1].tolist() == [90, 0, 90] and expected[:, 5].tolist() == [8, 0, 8]
    assert 0 < expected[0, 6] < 8, "some faces right and some wrong"


def test_metrics_are_those_of_the_model(batch):
    model = small_model().train()
    metrics = evaluate(model, [batch, batch], Accelerator(cpu=True), CATEGORIES, 129)
    assert model.training
    assert metrics["eval_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert set(metrics["eval_by_category"]) == {"chair", "table"}
    losses = [part["loss"] for part in metrics["eval_by_category"].values()]
    assert sum(losses) / 2 == pytest.approx(metrics["eval_loss"])


def meshes_of(folder):
    return [trimesh.load(path, force="mesh", process=False) for path in sorted(folder.glob("sample-*.glb"))]


def test_samples_are_files_and_a_picture_with_a_seed_each_and_leave_the_random_numbers_alone(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[129:] = -1e9  # coordinates only
    torch.manual_seed(3)
    before = torch.get_rng_state()
    samples = draw_samples(model, IFlameTokenizer(), Accelerator(cpu=True), tmp_path, count=3, max_faces=4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [sample["ended"] for sample in samples] == [False] * 3
    meshes = meshes_of(tmp_path)
    for mesh, sample in zip(meshes, samples, strict=True):
        assert 0 < len(mesh.faces) == sample["faces"] <= 4
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    draw_samples(model, IFlameTokenizer(), Accelerator(cpu=True), tmp_path / "again", count=2, max_faces=4, seed=2)
    again = meshes_of(tmp_path / "again")
    assert [mesh.vertices.tolist() for mesh in again] == [mesh.vertices.tolist() for mesh in meshes[1:]]
    assert meshes[0].vertices.tolist() != meshes[1].vertices.tolist()


def test_a_sample_without_a_face_leaves_no_file(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[EOS] = 1e9
    (tmp_path / "sample-00.glb").write_bytes(b"of an earlier run")
    samples = draw_samples(model, IFlameTokenizer(), Accelerator(cpu=True), tmp_path, count=2, max_faces=4, seed=1)
    assert samples == [{"faces": 0, "ended": True}] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["samples.png"]
