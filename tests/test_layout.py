"""Which meshes lie in a batch's rows, and where: said once, at all levels, without a look at the device."""

import pickle

import numpy as np
import pytest
import torch
from small_models import mesh_rows, small_model, switch_checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

from iflame_hf.layout_iflame import RowLayout, fresh_rows

STRIDES = (1, 3, 9)


@pytest.fixture(scope="module")
def model():
    return small_model()


def begins_of(*rows):
    """(B, F) which faces of rows of meshes of so many faces begin one."""
    begins = torch.zeros(len(rows), sum(rows[0]), dtype=torch.bool)
    for row, sizes in enumerate(rows):
        begins[row, np.cumsum([0, *sizes[:-1]])] = True
    return begins


def positions_of(*rows):
    return torch.stack([torch.cat([torch.arange(9 * size) for size in sizes]) for sizes in rows])


PACKED = [(3, 4, 2), (5, 4), (9,), (1, 1, 7)]


@pytest.mark.parametrize("length", [81, 80, 76, 74, 73])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_knows_its_meshes(length, level):
    layout = RowLayout.of_begins(begins_of(*PACKED), length, STRIDES)
    stride, count = STRIDES[level], length // STRIDES[level]
    mesh, meshes, positions, sizes = 0, [], [], []
    for row in PACKED:
        of_row, places = [], []
        for faces in row:
            room = count - len(of_row)
            sizes.append(min(9 * faces // stride, room))
            of_row += [mesh] * sizes[-1]
            places += range(sizes[-1])
            mesh += 1
        meshes.append(of_row)
        positions.append(places)
    bounds = layout.bounds(level)
    assert layout.shape == (4, length) and layout.num_meshes == mesh
    assert bounds.meshes.tolist() == meshes and layout.positions(level).tolist() == positions
    assert bounds.offsets.tolist() == np.cumsum([0, *sizes]).tolist() == bounds.offsets_on_host.tolist()
    assert bounds.longest == max(sizes) and bounds.offsets.dtype == torch.int32
    assert layout.last_starts().tolist() == [63, 45, 0, 18]


def test_attributes_of_meshes_are_had_for_each_item():
    layout = RowLayout.of_begins(begins_of((2, 1), (1, 2)), 27, STRIDES, attributes={"category": torch.arange(4)})
    assert layout.attribute("category", level=2).tolist() == [[0, 0, 1], [2, 3, 3]]
    assert layout.attribute("category").tolist() == [[0] * 18 + [1] * 9, [2] * 9 + [3] * 18]
    with pytest.raises(ValueError, match="category must be one a mesh, of 4"):
        RowLayout.of_begins(begins_of((2, 1), (1, 2)), 27, STRIDES, attributes={"category": torch.arange(3)})
    with pytest.raises(ValueError, match="rows of 28 tokens have 4 faces, got 3"):
        RowLayout.of_begins(begins_of((2, 1)), 28, STRIDES)


def test_a_layout_travels_between_processes_and_devices():
    layout = RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES, attributes={"faces": torch.arange(9)})
    for other in (pickle.loads(pickle.dumps(layout)), layout.to("cpu")):
        assert torch.equal(other.positions(), layout.positions()) and other.shape == layout.shape
        assert torch.equal(other.attribute("faces"), layout.attribute("faces"))
    assert layout.to("meta").positions(1).shape == (4, 27) and layout.to("meta").num_meshes == 9


def test_positions_mean_the_layout_of_the_same_rows():
    positions = positions_of(*PACKED)
    derived = fresh_rows(positions, STRIDES, None, positions, has_cache=False).layout
    made = RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES)
    assert torch.equal(derived.face_positions, made.face_positions)
    assert torch.equal(derived.face_meshes, made.face_meshes) and torch.equal(derived.offsets, made.offsets)
    whole = torch.arange(81).expand(4, -1)
    assert fresh_rows(positions, STRIDES, None, whole, has_cache=False).layout is None


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_computes_the_same_of_a_layout_and_of_positions(model, attention):
    model.set_attn_implementation(attention)
    ids = mesh_rows(4, faces=8)
    layout = RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES)
    expected = model(ids, position_ids=positions_of(*PACKED), labels=ids, use_cache=False)
    output = model(ids, layout=layout, labels=ids, use_cache=False)
    assert torch.equal(output.logits, expected.logits) and torch.equal(output.loss, expected.loss)
    one = RowLayout.of_begins(begins_of((9,), (9,), (9,), (9,)), 81, STRIDES)
    assert torch.equal(model(ids, layout=one).logits, model(ids).logits)
    model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_the_last_meshes_of_rows_with_a_layout_may_go_on(model):
    ids, layout = mesh_rows(4, faces=8), RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES)
    caches = [
        model(ids, layout=layout).past_key_values,
        model(ids, position_ids=positions_of(*PACKED)).past_key_values,
    ]
    steps = [model(ids[:, 9:12], past_key_values=cache).logits for cache in caches]
    assert torch.equal(*steps)
    with pytest.raises(ValueError, match="rows from their start"):
        model(ids, layout=layout, past_key_values=caches[0])


def test_a_layout_of_other_rows_is_refused_or_positions_take_its_place(model):
    ids, layout = mesh_rows(4, faces=8), RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES)
    with pytest.raises(ValueError, match=r"layout is of 4 rows of 81 tokens, got \(2, 81\)"):
        model(ids[:2], layout=layout)
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(ids, layout=layout, attention_mask=torch.ones_like(ids))
    positions = positions_of(*PACKED)[:2]
    with pytest.warns(UserWarning, match="position_ids are read instead"):
        output = model(ids[:2], layout=layout, position_ids=positions)
    assert torch.equal(output.logits, model(ids[:2], position_ids=positions).logits)


def test_a_mesh_that_is_too_long_is_refused_by_its_own_length():
    model = small_model(max_position_embeddings=63)
    ids = mesh_rows(1, faces=8)
    model(ids, layout=RowLayout.of_begins(begins_of((3, 4, 2)), 81, STRIDES))
    with pytest.raises(ValueError, match="a sequence of 72 tokens is longer than max_position_embeddings = 63"):
        model(ids, layout=RowLayout.of_begins(begins_of((1, 8)), 81, STRIDES))


class Looks(TorchDispatchMode):
    """Counts the operations for which a GPU's work would be waited for: values, or sizes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.NAMES
        # a copy from a device to the host waits, too; here all tensors are of one device and only values can tell
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_on_rows_with_a_layout_looks_at_no_value(model, checkpointing):
    if checkpointing:
        model = small_model()
        switch_checkpointing(model)
    model.train()
    ids, layout = mesh_rows(4, faces=8), RowLayout.of_begins(begins_of(*PACKED), 81, STRIDES)
    with Looks() as looks:
        model(ids, layout=layout, labels=ids, use_cache=False).loss.backward()
    assert looks.count == 0
    with Looks() as looks:  # such looks are seen where there are any
        bool((model(ids, position_ids=positions_of(*PACKED), use_cache=False).logits > 0).all())
    assert looks.count > 0
    model.zero_grad()
    model.eval()
