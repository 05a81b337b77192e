"""Rows that hold more than one mesh: padding on either side, and meshes packed one after the other."""

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_model
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening

IMPLEMENTATIONS = [("eager", "eager"), ("eager", "chunked"), ("sdpa", "eager"), ("sdpa", "chunked")]


@pytest.fixture(scope="module", params=[{}, {"heads": 6, "hidden_size": 48}], ids=["4 heads", "6 heads"])
def model(request):
    return small_model(**request.param)


@pytest.fixture(params=IMPLEMENTATIONS, ids="-".join)
def any_implementation(request, model):
    attention, model.config.linear_attn_implementation = request.param
    model.set_attn_implementation(attention)
    yield model
    model.config.linear_attn_implementation = "auto"


def padded_left(rows, lengths, fill):
    """(B, longest) ids and mask: row i keeps its first `lengths[i]` ids, after padding of random ids or of `fill`."""
    longest = max(lengths)
    ids = torch.randint(0, 132, (len(lengths), longest)) if fill is None else torch.full((len(lengths), longest), fill)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = rows[row, :length]
        mask[row, longest - length :] = 1
    return ids, mask


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@torch.no_grad()
def test_padding_of_whole_faces_on_the_left_changes_no_logit_whatever_ids_it_holds(any_implementation, use_cache):
    model, rows, lengths = any_implementation, mesh_rows(4, faces=16), [153, 90, 31 + 5, 9]
    alone = [model(row[None, :length]).logits[0] for row, length in zip(rows, lengths, strict=True)]
    for seed, fill in enumerate([PAD, 7, None, None]):
        torch.manual_seed(seed)
        ids, mask = padded_left(rows, lengths, fill)
        logits = model(ids, attention_mask=mask, use_cache=use_cache).logits
        for row, expected in enumerate(alone):
            assert relative_error(logits[row, -lengths[row] :], expected) < 1e-5
            if seed == 0 and row > 0:
                # without the mask the padding is seen
                unmasked = model(ids, use_cache=use_cache).logits
                assert relative_error(unmasked[row, -lengths[row] :], expected) > 1e-2


@torch.no_grad()
def test_padding_on_the_left_that_is_not_of_whole_faces_is_refused(model):
    row = mesh_rows(1, faces=2)
    expected = model(row).logits
    unchanged = []
    for pads in range(1, 28):
        ids = F.pad(row, (pads, 0), value=PAD)
        mask = (torch.arange(ids.shape[1]) >= pads).long()[None]
        if pads % 9:
            with pytest.raises(
                ValueError, match=rf"by whole faces \(9 tokens\), got one that begins at token {pads} "
            ):
                model(ids, attention_mask=mask)
        else:
            assert relative_error(model(ids, attention_mask=mask).logits[:, pads:], expected) < 1e-5
            unchanged.append(pads)
    assert unchanged == [9, 18, 27]


@torch.no_grad()
def test_a_row_may_be_padded_on_both_sides(model):
    row = mesh_rows(1, faces=3)
    ids = F.pad(row, (18, 22), value=PAD)
    mask = F.pad(torch.ones_like(row), (18, 22))
    logits = model(ids, attention_mask=mask).logits
    assert relative_error(logits[:, 18:-22], model(row).logits) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
@torch.no_grad()
def test_a_mask_may_have_any_dtype_and_a_mask_of_ones_changes_nothing(model, dtype):
    rows = mesh_rows(2, faces=3)
    ids, mask = padded_left(rows, [36, 27], PAD)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits)
    ones = torch.ones_like(rows, dtype=dtype)
    assert torch.equal(model(rows, attention_mask=ones).logits, model(rows).logits)


@pytest.mark.parametrize("zeros", [(0, 20, 21), (0, 9, 18), (1, 30, 34)])
def test_a_mask_with_a_hole_is_refused(model, zeros):
    rows = mesh_rows(2, faces=3)
    mask = torch.ones_like(rows)
    row, first, last = zeros
    mask[row, first:last] = 0
    with pytest.raises(ValueError, match="zeros between ones"):
        model(rows, attention_mask=mask)


@pytest.mark.parametrize("shape", [(1, 36), (2, 35), (2, 37), (2, 1, 36, 36)])
def test_a_mask_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask must be of the shape .* = \(2, 36\), got \("):
        model(mesh_rows(2, faces=3), attention_mask=torch.ones(shape))


def packed(meshes, length):
    """(1, length) ids, positions and labels of whole meshes one after the other, then padding."""
    ids, positions, labels = [], [], []
    for mesh in meshes:
        ids.append(mesh)
        positions.append(torch.arange(len(mesh)))
        labels.append(mesh.masked_fill(torch.arange(len(mesh)) < 9, -100))
    spare = length - sum(map(len, ids))
    assert spare >= 0
    ids.append(torch.full((spare,), PAD))
    positions.append(torch.arange(spare))
    labels.append(torch.full((spare,), -100))
    return [torch.cat(parts)[None] for parts in (ids, positions, labels)]


def some_meshes(*faces):
    return [mesh_rows(1, count, seed=number, end=True)[0] for number, count in enumerate(faces)]


def gradients(model):
    collected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return collected


@pytest.mark.parametrize("spare", [0, 27], ids=["full", "with padding after"])
def test_logits_and_gradients_of_a_packed_row_are_those_of_its_meshes_one_by_one(any_implementation, spare):
    model = any_implementation.train()
    bins = [some_meshes(3, 12, 1, 5), some_meshes(20, 1)]
    length = max(sum(map(len, meshes)) for meshes in bins) + spare
    ids, positions, labels = (torch.cat(parts) for parts in zip(*(packed(b, length) for b in bins), strict=True))
    count = int((labels != -100).sum())

    output = model(ids, position_ids=positions, labels=labels, num_items_in_batch=count)
    output.loss.backward()
    together = gradients(model)

    losses = []
    for row, meshes in enumerate(bins):
        first = 0
        for mesh in meshes:
            mesh_labels = mesh.masked_fill(torch.arange(len(mesh)) < 9, -100)[None]
            alone = model(mesh[None], labels=mesh_labels, num_items_in_batch=count)
            alone.loss.backward()
            losses.append(float(alone.loss.detach()))
            assert relative_error(output.logits[row, first : first + len(mesh)], alone.logits[0]) < 1e-5
            first += len(mesh)
    one_by_one = gradients(model)
    model.eval()
    assert len(losses) == 6 and float(output.loss.detach()) == pytest.approx(sum(losses), rel=1e-5)
    for name, gradient in one_by_one.items():
        assert gradient.norm() > 0, name
        assert relative_error(together[name], gradient) < 1e-5, name


@torch.no_grad()
def test_a_packed_mesh_sees_nothing_of_its_neighbours(model):
    ids, positions, _ = packed(some_meshes(3, 4, 2), 150)
    begins = [0, 45, 99, 135, 150]
    expected = model(ids, position_ids=positions).logits
    for number, (first, last) in enumerate(zip(begins[:-1], begins[1:], strict=True)):
        changed = ids.clone()
        changed[:, first:last] = (changed[:, first:last] + 17) % 132
        difference = (model(changed, position_ids=positions).logits - expected).abs().amax(dim=-1)[0]
        outside = torch.ones(150, dtype=torch.bool)
        outside[first:last] = False
        assert difference[outside].max() < 1e-5, number
        assert difference[first:last].min() > 1e-4, number


@torch.no_grad()
def test_a_packed_row_may_have_padding_on_the_left_and_a_mask(model):
    first, second = some_meshes(2, 3)
    ids, positions, _ = packed([first, second], len(first) + len(second))
    ids, mask = F.pad(ids, (9, 13), value=PAD), F.pad(torch.ones_like(ids), (9, 13))
    logits = model(ids, attention_mask=mask, position_ids=F.pad(positions, (9, 13))).logits[0, 9:]
    assert relative_error(logits[: len(first)], model(first[None]).logits[0]) < 1e-5
    assert relative_error(logits[len(first) : -13], model(second[None]).logits[0]) < 1e-5


@torch.no_grad()
def test_positions_of_one_row_serve_all(model):
    rows = mesh_rows(3, faces=4)
    positions = (torch.arange(45) % 27)[None]
    logits = model(rows, position_ids=positions).logits
    assert torch.equal(logits, model(rows, position_ids=positions.expand(3, -1)).logits)
    assert relative_error(logits[:, 27:], model(rows[:, 27:]).logits) < 1e-5


@torch.no_grad()
def test_positions_that_only_count_change_nothing(model):
    rows = mesh_rows(2, faces=3)
    assert torch.equal(model(rows, position_ids=torch.arange(36)[None]).logits, model(rows).logits)


@torch.no_grad()
def test_rows_flattened_by_the_collator_of_transformers_are_packed_rows(model):
    meshes = some_meshes(3, 1, 6)
    batch = DataCollatorWithFlattening()([{"input_ids": mesh.tolist()} for mesh in meshes])
    assert batch["input_ids"].shape == (1, sum(map(len, meshes)))
    logits = model(batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
    for part, mesh in zip(logits.split([len(mesh) for mesh in meshes]), meshes, strict=True):
        assert relative_error(part, model(mesh[None]).logits[0]) < 1e-5


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([*range(10), *range(26)], "begins at token 10 of row 0"),
        ([*range(18), *range(5), *range(13)], "begins at token 23 of row 0"),
        ([0] * 36, "begins at token 1 of row 0"),
        ([*range(18), *range(1, 19)], "without a gap"),
        ([*range(1, 37)], "without a gap"),
        ([*range(17), 18, *range(18)], "without a gap"),
    ],
)
def test_positions_that_the_hourglass_cannot_honour_are_refused(model, positions, message):
    with pytest.raises(ValueError, match=message):
        model(mesh_rows(1, faces=3), position_ids=torch.tensor([positions]))


def test_the_row_that_is_wrong_is_named(model):
    positions = torch.arange(36).repeat(3, 1)
    positions[2, 13:] -= 13
    with pytest.raises(ValueError, match="begins at token 13 of row 2"):
        model(mesh_rows(3, faces=3), position_ids=positions)
