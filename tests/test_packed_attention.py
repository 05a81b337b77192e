"""Softmax attention of packed rows, mesh by mesh, against all pairs of items in float64."""

import pytest
import torch
import torch._dynamo.testing
from small_models import mesh_rows, relative_error, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from iflame_hf.layout_iflame import RowLayout
from iflame_hf.packed_attention_iflame import (
    Packing,
    _attention,
    _flash,
    _flash_backward,
    _mesh_after_mesh,
    _mesh_after_mesh_backward,
    packed_attention,
)

STRIDES = (1, 3, 9)
FACES = 8
PACKED = [(3, 4, 1), (8,), (1, 1, 6)]


def layout_of(rows, length=9 * FACES):
    begins = torch.zeros(len(rows), FACES, dtype=torch.bool)
    for row, sizes in zip(begins, rows, strict=True):
        row[torch.tensor([0, *sizes[:-1]]).cumsum(dim=0)] = True
    return RowLayout.of_begins(begins, length, STRIDES)


def all_pairs(query, key, value, bounds, scale):
    """The formula, in float64: an item looks at those of its mesh up to itself."""
    query, key, value = (x.double().transpose(1, 2) for x in (query, key, value))
    meshes, index = bounds.meshes, torch.arange(query.shape[2], device=query.device)
    seen = (meshes[:, :, None] == meshes[:, None]) & (index <= index[:, None])
    scores = (query @ key.mT * scale).masked_fill(~seen[:, None], float("-inf"))
    return (scores.softmax(dim=-1) @ value).transpose(1, 2)


def results(function, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 2, output.numel(), device=output.device).to(output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), leaves)]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.untyped_storage().nbytes() // each.element_size())
        return made


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("length", [72, 65])  # the last mesh of a row may have nothing at a level
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_softmax_over_the_items_of_a_mesh(level, length, compiled):
    bounds = layout_of([*PACKED[:2], (7, 1)], length).bounds(level)
    random = torch.Generator().manual_seed(level)
    # As they come from one product: views of it.
    inputs = torch.randn(*bounds.meshes.shape, 9, 4, generator=random, dtype=torch.float64).chunk(3, dim=2)
    packing = Packing.of(bounds, 3 * FACES)

    def attend(query, key, value):
        return packed_attention(query, key, value, packing, 0.3)

    torch._dynamo.reset()
    used = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    found = results(used, inputs)
    expected = results(lambda *qkv: all_pairs(*qkv, bounds, 0.3), inputs)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_own_gradient_is_as_near_to_the_softmax_as_torchs_without_the_square_of_a_mesh(dtype):
    items = 1300  # blocks of 512 queries, and a part of one
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, items, 2, 20, generator=random).to(dtype) for _ in range(3)]
    begins = torch.zeros(1, items, dtype=torch.bool)
    begins[0, 20] = True
    bounds, lengths = RowLayout.of_begins(begins, items, (1,)).bounds(), [20, items - 20]
    exact = results(lambda *qkv: all_pairs(*qkv, bounds, 0.3), inputs)
    output, *plain = results(lambda *qkv: _mesh_after_mesh(*qkv, lengths, 0.3), inputs)
    grad = torch.linspace(-1, 2, output.numel(), dtype=dtype).view_as(output)
    with Largest() as largest:
        found = _mesh_after_mesh_backward(grad, *inputs, output.detach(), lengths, 0.3)
    assert largest.numel <= 2 * 512 * items < 2 * (items - 20) ** 2
    for value, torchs, expected in zip(found, plain, exact[1:], strict=True):
        assert value.dtype == dtype
        assert relative_error(value, expected) < 1.5 * relative_error(torchs, expected) + 1e-6 < 0.1


def test_one_compiled_graph_serves_every_packing():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed_attention, backend=counter, fullgraph=True, dynamic=False)
    for rows in ([(8,), (8,)], [(1, 7), (2, 2, 4)], [(1,) * 8, (3, 5)]):
        bounds = layout_of(rows).bounds()
        inputs = torch.randn(3, *bounds.meshes.shape, 2, 4, dtype=torch.float64)
        found = compiled(*inputs, Packing.of(bounds, 2 * FACES), 0.3)
        assert torch.allclose(found, all_pairs(*inputs, bounds, 0.3), atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_graph_of_one_packing_is_not_another_ones(dtype):
    torch._dynamo.reset()
    compiled = torch.compile(packed_attention, mode="reduce-overhead")
    for rows in [[(8,), (8,)]] * 3 + [[(1, 7), (2, 2, 4)], [(1,) * 8, (3, 5)]]:
        bounds = layout_of(rows).to("cuda").bounds()
        inputs = torch.randn(3, *bounds.meshes.shape, 2, 32, device="cuda").to(dtype)
        found = compiled(*inputs, Packing.of(bounds, 2 * FACES), 0.3)
        assert relative_error(found, all_pairs(*inputs, bounds, 0.3)) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [20, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_is_as_near_to_the_softmax_as_torchs_attention_of_single_meshes(size, dtype, compiled):
    random = torch.Generator().manual_seed(size)
    begins = torch.rand(2, 60, generator=random) < 0.1
    bounds = RowLayout.of_begins(begins, 540, STRIDES).to("cuda").bounds()
    packing = Packing.of(bounds, 120)
    inputs = torch.randn(2, 540, 9, size, generator=random).to("cuda", dtype).chunk(3, dim=2)

    def attend(query, key, value):
        return packed_attention(query, key, value, packing, 0.3)

    def of_single_meshes(query, key, value):
        return _mesh_after_mesh(query, key, value, bounds.offsets.diff().tolist(), 0.3)

    torch._dynamo.reset()
    used = torch.compile(attend, backend="aot_eager", fullgraph=True) if compiled else attend
    found, plain = results(used, inputs), results(of_single_meshes, inputs)
    expected = results(lambda *qkv: all_pairs(*qkv, bounds, 0.3), inputs)
    assert all(x.dtype == dtype for x in found)
    for value, torchs, exact in zip(found, plain, expected, strict=True):
        assert relative_error(value, exact) < 2 * relative_error(torchs, exact) + 1e-6 < 0.1


def test_torchs_flash_attention_takes_and_gives_what_is_thought():
    """Its shapes alone: it runs on GPUs."""
    bounds = layout_of(PACKED).bounds()
    packing = Packing.of(bounds, 3 * FACES)
    inputs = torch.empty(3, *bounds.meshes.shape, 2, 32, device="meta", dtype=torch.bfloat16)
    offsets = packing.offsets.to("meta")
    output, sums = _flash(*inputs, offsets, packing.limits, 0.4)
    assert output.shape == inputs[0].shape and sums.shape == (2, 3 * 9 * FACES) and sums.dtype == torch.float32
    grads = _flash_backward(output, *inputs, output, sums, offsets, packing.limits, 0.4)
    assert [each.shape for each in grads] == [output.shape] * 3


def test_the_operator_is_what_torch_wants_of_one():
    bounds = layout_of(PACKED).bounds(1)
    random = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(*bounds.meshes.shape, 2, 8, generator=random, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    ]
    torch.library.opcheck(_attention, (*inputs, *Packing.of(bounds, 3 * FACES), 0.4))


def test_torch_counts_its_operations():
    bounds = layout_of(PACKED).bounds()
    inputs = torch.randn(3, *bounds.meshes.shape, 2, 8, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output, _ = _attention(*inputs, *Packing.of(bounds, 3 * FACES), 0.4)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    pairs = 3 * 2 * 72 * 72  # of all rows and heads
    assert forward.get_total_flops() == 2 * 2 * pairs * 8 / 2 and backward.get_total_flops() == 5 * 2 * pairs * 8 / 2


def test_a_packing_has_one_shape_however_many_meshes_there_are():
    few, many = (Packing.of(layout_of(rows).bounds(), 3 * FACES) for rows in ([(8,)] * 3, [(1,) * 8] * 3))
    assert few.offsets.shape == many.offsets.shape == (3 * FACES + 1,)
    assert few.offsets.tolist() == [0, 72, 144] + [216] * 22
    assert many.offsets.tolist() == list(range(0, 217, 9)) == many.offsets_on_host.tolist()


def test_under_autocast_it_has_autocasts_type():
    bounds = layout_of(PACKED).bounds()
    inputs = torch.randn(3, *bounds.meshes.shape, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = packed_attention(*inputs, Packing.of(bounds, 3 * FACES), 0.4)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, all_pairs(*inputs, bounds, 0.4)) < 2e-2


@pytest.mark.parametrize("described", ["layout", "positions"])
def test_a_packed_row_never_makes_a_tensor_of_its_square(described):
    model, faces = small_model(hidden_size=16, heads=2), 80
    ids, begins = mesh_rows(1, faces - 1), torch.zeros(1, faces, dtype=torch.bool)
    begins[0, ::16] = True
    layout = RowLayout.of_begins(begins, 9 * faces, STRIDES)
    inputs = {"layout": layout} if described == "layout" else {"position_ids": layout.positions()}
    with Largest() as largest:
        loss = model(ids, labels=ids, use_cache=False, **inputs).loss
        loss.backward()
    assert 9 * faces * 132 <= largest.numel < (9 * faces) ** 2 / 2
    model.set_attn_implementation("eager")
    assert float(loss) == pytest.approx(float(model(ids, labels=ids, use_cache=False, **inputs).loss), rel=1e-6)
