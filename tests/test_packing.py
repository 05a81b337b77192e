"""Rows of whole meshes: which meshes share a row, and what the model is given."""

import numpy as np
import pytest
import torch
from small_models import mesh_rows, small_model

from training.rows.pack import IGNORED, best_fit, pack_ids, pack_row, plan_rows, row_inputs

PAD, BOS, EOS = 129, 130, 131


def artist_like_sizes(count, seed=0):
    """Faces of meshes with about the quartiles of real low-poly collections: 67, 142, 302, and at most 800."""
    quantiles = [0, 0.25, 0.5, 0.75, 0.9, 1]
    faces = np.interp(np.random.default_rng(seed).random(count), quantiles, [12, 67, 142, 302, 498, 800])
    return faces.astype(np.int64) + 2


def tightest_rows(sizes, capacity):
    """Best fit as one would write it without thinking of speed."""
    rooms, rows = [], []
    for index, size in enumerate(sizes):
        fitting = [row for row, room in enumerate(rooms) if room >= size]
        if fitting:
            row = min(fitting, key=lambda row: rooms[row])
        else:
            row = len(rows)
            rows.append([])
            rooms.append(capacity)
        rows[row].append(index)
        rooms[row] -= size
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_every_mesh_is_in_exactly_one_row_and_no_row_is_too_full(seed):
    sizes = artist_like_sizes(1000, seed)
    rows = plan_rows(sizes, 802, np.random.default_rng(seed))
    assert sorted(np.concatenate(rows)) == list(range(1000))
    assert max(sizes[row].sum() for row in rows) <= 802


@pytest.mark.parametrize("seed", range(5))
def test_every_mesh_goes_into_the_fullest_row_that_has_room(seed):
    sizes = np.random.default_rng(seed).integers(1, 60, size=300).tolist()
    filled = [
        sorted(sum(sizes[index] for index in row) for row in rows(sizes, 64)) for rows in (best_fit, tightest_rows)
    ]
    assert filled[0] == filled[1]


@pytest.mark.parametrize("capacity", [802, 2000])
def test_rows_of_realistic_meshes_waste_less_than_one_percent(capacity):
    sizes = artist_like_sizes(5000)
    rows = plan_rows(sizes, capacity, np.random.default_rng(1))
    assert 1 - sizes.sum() / (len(rows) * capacity) < 0.01


def test_rows_depend_on_the_random_generator_alone():
    sizes = artist_like_sizes(500)
    first, again, other = (plan_rows(sizes, 802, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert {frozenset(row.tolist()) for row in first} != {frozenset(row.tolist()) for row in other}


@pytest.mark.parametrize("size", [0, 10])
def test_an_item_that_fits_no_row_is_refused(size):
    with pytest.raises(ValueError, match=f"size {size}"):
        best_fit([3, size], 9)


def test_a_row_restarts_positions_and_labels_neither_start_faces_nor_padding():
    first = [BOS] * 9 + list(range(9)) + [EOS] * 9
    second = [BOS] * 9 + list(range(20, 38)) + [EOS] * 9
    row = pack_row([first, np.array(second)], 81, PAD)
    assert {name: values.dtype for name, values in row.items()} == dict.fromkeys(row, np.dtype(np.int64))
    assert row["input_ids"].tolist() == first + second + [PAD] * 18
    assert row["position_ids"].tolist() == [*range(27), *range(36), *range(18)]
    skipped = [IGNORED] * 9
    assert row["labels"].tolist() == skipped + first[9:] + skipped + second[9:] + skipped * 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_what_follows_from_the_ids_of_rows_is_what_their_meshes_say(dtype):
    random = np.random.default_rng(0)
    whole = [
        np.array([BOS] * 9 + random.integers(129, size=9 * faces).tolist() + [EOS] * 9) for faces in (1, 2, 30, 4, 5)
    ]
    cropped = whole[2][: 9 * 20]
    rows = [whole, whole[:1], [], [cropped], [cropped, whole[1], cropped, whole[4][: 9 * 3]]]
    expected = [pack_row(sequences, 9 * 52, PAD) for sequences in rows]
    assert (expected[0]["input_ids"][-9:] == EOS).all(), "the first row should be full"
    found = row_inputs(np.stack([pack_ids(sequences, 9 * 52, PAD, dtype) for sequences in rows]), BOS, PAD)
    assert found.keys() == expected[0].keys()
    for name, values in found.items():
        assert values.dtype == np.int64
        np.testing.assert_array_equal(values, np.stack([row[name] for row in expected]))


def test_no_token_is_predicted_from_another_mesh():
    sequences = [[BOS] * 9 + [index] * 9 * faces + [EOS] * 9 for index, faces in enumerate((1, 4, 2))]
    row = pack_row(sequences, 135, PAD)
    mesh = np.cumsum(row["position_ids"] == 0)
    predicted = np.flatnonzero(row["labels"] != IGNORED)
    assert len(predicted) == sum(len(sequence) - 9 for sequence in sequences)
    assert (mesh[predicted] == mesh[predicted - 1]).all()


@pytest.mark.parametrize(("sequences", "message"), [([[1] * 8], "whole faces"), ([[1] * 18, [1] * 18], "do not fit")])
def test_what_is_no_whole_face_or_does_not_fit_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        pack_row(sequences, 27, PAD)


def test_a_packed_row_has_the_loss_and_gradients_of_its_meshes_one_by_one():
    model = small_model().train()
    sequences = [row.tolist()[: 9 * faces] for row, faces in zip(mesh_rows(3, faces=12), (12, 5, 8), strict=True)]
    labels = sum(len(sequence) - 9 for sequence in sequences)
    losses, gradients = [], []
    for rows in ([pack_row(sequences, 9 * 28, PAD)], [pack_row([sequence], 9 * 12, PAD) for sequence in sequences]):
        model.zero_grad()
        total = 0.0
        for row in rows:
            inputs = {name: torch.from_numpy(values)[None] for name, values in row.items()}
            loss = model(**inputs, num_items_in_batch=labels).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
