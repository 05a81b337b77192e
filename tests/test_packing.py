"""Rows of whole meshes: which meshes share a row, and what the model is given."""

import numpy as np
import pytest
import torch
from small_models import mesh_rows, small_model

from iflame_hf import IFlameTokenizer
from training.rows.pack import IGNORED, PackedRows, best_fit, count_faces, pack, plan_rows, row_inputs

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


@pytest.fixture(scope="module")
def tokenizer():
    return IFlameTokenizer()


def inputs_of(rows, length, tokenizer, **options):
    return row_inputs(pack(rows, length, tokenizer, **options), tokenizer)


def test_a_row_restarts_positions_and_labels_neither_start_faces_nor_padding(tokenizer):
    first = [BOS] * 9 + list(range(9)) + [EOS] * 9
    second = [BOS] * 9 + list(range(20, 38)) + [EOS] * 9
    batch = inputs_of([[first, np.array(second)]], 81, tokenizer)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [first + second + [PAD] * 18]
    assert batch["layout"].positions().tolist() == [[*range(27), *range(36), *range(18)]]
    skipped = [IGNORED] * 9
    assert batch["labels"].tolist() == [skipped + first[9:] + skipped + second[9:] + skipped * 2]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_rows_are_what_their_meshes_say(dtype, tokenizer):
    random = np.random.default_rng(0)
    whole = [
        np.array([BOS] * 9 + random.integers(129, size=9 * faces).tolist() + [EOS] * 9) for faces in (1, 2, 30, 4, 5)
    ]
    cropped = whole[2][: 9 * 20]
    rows = [whole, whole[:1], [], [cropped], [cropped, whole[1], cropped, whole[4][: 9 * 3]]]
    categories = np.arange(sum(map(len, rows))) % 4
    packed = pack(rows, 9 * 52, tokenizer, {"category": categories}, dtype)
    assert packed.ids.dtype == dtype and packed.meshes.tolist() == [5, 1, 0, 1, 4]
    faces = [count_faces(sequence, tokenizer) for sequences in rows for sequence in sequences]
    assert faces == [1, 2, 30, 4, 5, 1, 19, 19, 2, 19, 2]
    batch, layout = row_inputs(packed, tokenizer), row_inputs(packed, tokenizer)["layout"]
    assert (batch["input_ids"][0, -9:] == EOS).all(), "the first row should be full"
    mesh = 0
    for row, sequences in enumerate(rows):
        lengths = [len(sequence) for sequence in sequences]
        spare = 9 * 52 - sum(lengths)
        expected = [token for sequence in sequences for token in sequence.tolist()] + [PAD] * spare
        assert batch["input_ids"][row].tolist() == expected
        places = [place for length in [*lengths, spare] for place in range(length)]
        assert layout.positions()[row].tolist() == places
        labels = [
            token if place >= 9 and token != PAD else IGNORED for token, place in zip(expected, places, strict=True)
        ]
        assert batch["labels"][row].tolist() == labels
        own = categories[mesh : mesh + len(sequences)]
        assert layout.attribute("category")[row].tolist() == np.repeat([*own, -1], [*lengths, spare]).tolist()
        mesh += len(sequences)
    assert layout.num_meshes == 11 + 4, "the padding of a row is a mesh"


def test_rows_that_were_parted_or_joined_are_the_same(tokenizer):
    sequences = [[BOS] * 9 + [index] * 9 * index + [EOS] * 9 for index in range(1, 7)]
    rows = [sequences[:3], [], sequences[3:5], sequences[5:]]
    whole = pack(rows, 9 * 20, tokenizer, {"category": range(6)})
    for first in range(5):
        joined = PackedRows.joined([whole[:first], whole[first:]])
        for name in ("ids", "meshes"):
            np.testing.assert_array_equal(getattr(joined, name), getattr(whole, name))
        for name, values in whole.attributes.items():
            np.testing.assert_array_equal(joined.attributes[name], values)
    assert whole[2:3].attributes["category"].tolist() == [3, 4]


def test_no_token_is_predicted_from_another_mesh(tokenizer):
    sequences = [[BOS] * 9 + [index] * 9 * faces + [EOS] * 9 for index, faces in enumerate((1, 4, 2))]
    batch = inputs_of([sequences], 135, tokenizer)
    mesh = batch["layout"].bounds().meshes[0]
    predicted = (batch["labels"][0] != IGNORED).nonzero().flatten()
    assert len(predicted) == sum(len(sequence) - 9 for sequence in sequences)
    assert (mesh[predicted] == mesh[predicted - 1]).all()


@pytest.mark.parametrize(("sequences", "message"), [([[1] * 8], "whole faces"), ([[1] * 18, [1] * 18], "do not fit")])
def test_what_is_no_whole_face_or_does_not_fit_is_refused(sequences, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        pack([sequences], 27, tokenizer)


def test_a_packed_row_has_the_loss_and_gradients_of_its_meshes_one_by_one(tokenizer):
    model = small_model().train()
    sequences = [row.tolist()[: 9 * faces] for row, faces in zip(mesh_rows(3, faces=12), (12, 5, 8), strict=True)]
    labels = sum(len(sequence) - 9 for sequence in sequences)
    losses, gradients = [], []
    one_by_one = [inputs_of([[sequence]], 9 * 12, tokenizer) for sequence in sequences]
    for batches in ([inputs_of([sequences], 9 * 28, tokenizer)], one_by_one):
        model.zero_grad()
        total = 0.0
        for inputs in batches:
            loss = model(**inputs, num_items_in_batch=labels).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()
