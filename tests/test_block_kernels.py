"""What stands between the products of a block, by Triton's interpreter, against formulas in float64."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from interpreted_module import interpreted
from small_models import mesh_rows, relative_error, small_model, switch_checkpointing
from torch.nn import functional as F

from iflame_hf import (
    block_kernels_iflame,
    blocks_iflame,
    fused_products_iflame,
    products_iflame,
    rotary_kernels_iflame,
)
from iflame_hf.fused_products_iflame import Norm, Weights
from iflame_hf.ops_iflame import apply_rotary, rotary_tables
from training.run.create import keep_less

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
MODULES = rotary_kernels_iflame, block_kernels_iflame, fused_products_iflame


def together(modules):
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


ON_A_GPU = together(MODULES)


@pytest.fixture(scope="module")
def copy():
    with ExitStack() as stack:
        rotary, kernels, fused = (stack.enter_context(interpreted(module)) for module in MODULES)
        kernels.STRIPES = 2  # of few items, too, a program takes several blocks
        for name in vars(fused).keys() & vars(kernels).keys():
            if not name.startswith("__"):
                setattr(fused, name, getattr(kernels, name))
        yield together([rotary, kernels, fused])


def gated_down(kernels):
    return lambda x, bias, weight, down_bias: kernels.silu_product_down(x, bias, None, Weights(weight, down_bias))


def product_of_normed(kernels):
    return lambda x, norm, weight: kernels.normed_linear(x, Norm(norm, 1e-5), Weights(weight))[0]


def fused_half(kernels, keeps):
    def half(x, other, norm, inward, bias, outward, down_bias):
        weights = Weights(inward, bias), Weights(outward, down_bias)
        return kernels.add_normed_silu_product_down(x, other, Norm(norm, 1e-5), *weights, keeps)

    return half


@pytest.fixture(params=["cpu", CUDA])
def place(request, copy):
    """The kernels, and the device that they run on."""
    return (copy if request.param == "cpu" else ON_A_GPU), request.param


def run(function, inputs, dtype, device):
    """Outputs and gradients, of inputs in a type on a device."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 2, x.numel(), dtype=torch.float64).view(x.shape).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def agreement(found, expected, dtype):
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype and relative_error(value.cpu(), exact) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "heads", "size"), [(2, 7, 2, 8), (1, 9, 3, 12), (3, 5, 1, 32)])
@pytest.mark.parametrize("tables", ["one", "each"])
def test_heads_are_turned_as_the_tables_say(place, dtype, batch, length, heads, size, tables):
    kernels, device = place
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, 3 * heads * size, generator=random).to(dtype)
    positions = torch.randint(0, 50, (1 if tables == "one" else batch, length), generator=random)
    cos, sin = (each.to(device) for each in rotary_tables(positions, size, 100.0))

    def formula(x):
        query, key, value = x.unflatten(-1, (-1, size)).chunk(3, dim=-2)
        turned = []
        for part in (query, key):
            first, second = part.chunk(2, dim=-1)
            c, s = cos.cpu().double(), sin.cpu().double()
            turned.append(torch.cat([first * c + second * s, second * c - first * s], dim=-1))
        return *turned, value

    found = run(lambda x: kernels.turned_heads(x, cos, sin), [x], dtype, device)
    agreement(found, run(formula, [x], torch.float64, "cpu"), dtype)
    torch.testing.assert_close(
        found[0], apply_rotary(x.to(device)[..., : heads * size].unflatten(-1, (heads, size)), cos, sin)
    )


def test_gradients_of_heads_may_have_any_strides(place):
    kernels, device = place
    x = torch.randn(2, 7, 3 * 2 * 8, device=device, requires_grad=True)
    cos, sin = rotary_tables(torch.arange(7, device=device)[None], 8, 100.0)
    grads = torch.randn(3, 2, 2, 7, 8, device=device)  # heads first, as torch's attention gives them
    strided = [each.transpose(1, 2) for each in grads]
    strided[1] = strided[1].mT.contiguous().mT  # not even the last dimension is dense
    found = torch.autograd.grad(kernels.turned_heads(x, cos, sin), x, strided)
    expected = torch.autograd.grad(kernels.turned_heads(x, cos, sin), x, [each.contiguous() for each in strided])
    assert torch.equal(*found, *expected)


def gated(x, bias, weight, down_bias):
    gate, up = (x + bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weight, down_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "units"), [((2, 40), 48), ((1, 5), 16), ((3, 37), 144)])
def test_a_gated_product_is_that_of_float64(place, dtype, shape, units):
    kernels, device = place
    random = torch.Generator().manual_seed(1)
    sizes = (*shape, 2 * units), (2 * units,), (24, units), (24,)
    inputs = [torch.randn(size, generator=random).to(dtype) for size in sizes]
    found = run(gated_down(kernels), inputs, dtype, device)
    agreement(found, run(gated, inputs, torch.float64, "cpu"), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channels"), [((2, 40), 48), ((1, 1), 16), ((3, 37), 130)])
def test_a_product_of_what_is_normalised_is_that_of_float64(place, dtype, shape, channels):
    kernels, device = place
    random = torch.Generator().manual_seed(2)
    inputs = [
        torch.randn(size, generator=random).to(dtype) for size in ((*shape, channels), (channels,), (24, channels))
    ]

    def formula(x, norm, weight):
        return F.linear(F.rms_norm(x, (channels,), norm, 1e-5), weight)

    found = run(product_of_normed(kernels), inputs, dtype, device)
    agreement(found, run(formula, inputs, torch.float64, "cpu"), dtype)


def half_a_block(shape, channels, units, dtype):
    random = torch.Generator().manual_seed(4)
    sizes = [(*shape, channels)] * 2
    sizes += [(channels,), (2 * units, channels), (2 * units,), (channels, units), (channels,)]
    scales = [1, 1, 1, channels**-0.5, 1, units**-0.5, 1]
    return [(scale * torch.randn(size, generator=random)).to(dtype) for size, scale in zip(sizes, scales, strict=True)]


def half_by_formula(x, other, norm, inward, bias, outward, down_bias):
    total = x + other
    return gated(F.linear(F.rms_norm(total, norm.shape, norm, 1e-5), inward), bias, outward, down_bias), total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize(("shape", "channels", "units"), [((2, 40), 24, 48), ((1, 3), 16, 16)])
def test_half_a_block_is_that_of_float64(place, dtype, keeps, shape, channels, units):
    kernels, device = place
    inputs = half_a_block(shape, channels, units, dtype)
    found = run(fused_half(kernels, keeps), inputs, dtype, device)
    expected = run(half_by_formula, inputs, torch.float64, "cpu")
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype and relative_error(value.cpu(), exact) < 3 * ALLOWED[dtype]


def test_what_is_made_again_is_what_was_kept(place):
    kernels, device = place
    inputs = half_a_block((2, 40), 24, 48, torch.float32)

    def results(keeps):
        return run(fused_half(kernels, keeps), inputs, torch.float32, device)

    assert all(torch.equal(x, y) for x, y in zip(results(True), results(False), strict=True))


def test_a_sum_whose_product_nobody_asks_for_has_its_gradient(place):
    kernels, device = place
    x, other, norm, *rest = (each.to(device).requires_grad_() for each in half_a_block((1, 3), 16, 16, torch.float32))
    _, total = fused_half(kernels, True)(x, other, norm, *rest)
    grad = torch.randn_like(total)
    found = torch.autograd.grad(total, [x, other, norm], grad, allow_unused=True)
    assert torch.equal(found[0], grad) and torch.equal(found[1], grad) and found[2] is None


@pytest.mark.gpu
def test_there_may_be_very_many_items():
    """A GPU runs at most 65,535 programs along all dimensions but the first."""
    rows = 16 * 65_535 + 5
    x = torch.randn(1, rows, 32, device="cuda")
    bias, weight, down_bias = (torch.randn(size, device="cuda") for size in ((32,), (8, 16), (8,)))
    found = gated_down(ON_A_GPU)(x, bias, weight, down_bias)
    assert relative_error(found, gated(x, bias, weight, down_bias)) < 1e-5
    weight = torch.eye(32, device="cuda")
    found = product_of_normed(ON_A_GPU)(x, bias, weight)
    assert relative_error(found, F.linear(F.rms_norm(x, (32,), bias, 1e-5), weight)) < 1e-5
    x = x[..., :24].contiguous().requires_grad_()
    cos, sin = rotary_tables(torch.arange(rows, device="cuda")[None], 8, 100.0)
    query, key, value = ON_A_GPU.turned_heads(x, cos, sin)
    assert relative_error(query, apply_rotary(x[..., :8].unflatten(-1, (1, 8)), cos, sin)) < 1e-5
    (back,) = torch.autograd.grad([query, key, value], x, [query, key, value])
    assert relative_error(back, x) < 1e-5  # a rotation's gradient turns back


@pytest.mark.parametrize(
    "name", ["_turn", "_turn_back", "gated", "gated_backward", "normed", "normed_backward", "sum_of_rows"]
)
def test_the_operators_are_what_torch_wants_of_one(copy, name):
    cos = torch.rand(1, 5, 4)
    arguments = {
        "_turn": (torch.randn(2, 5, 48), cos, cos),
        "_turn_back": (*torch.randn(3, 2, 5, 2, 8), cos, cos),
        "gated": (torch.randn(2, 5, 32), torch.randn(32)),
        "gated_backward": (torch.randn(10, 16), torch.randn(2, 5, 32), torch.randn(32)),
        "sum_of_rows": (torch.randn(10, 16),),
        "normed": (torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(8), 1e-5),
        "normed_backward": (torch.randn(10, 8), None, torch.randn(2, 5, 8), torch.randn(8), torch.rand(10)),
    }
    torch.library.opcheck(getattr(copy, name), arguments[name])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (130, 70), (1030, 20)])
def test_rows_are_added_up_in_float32(place, dtype, shape):
    kernels, device = place
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(device, dtype)
    found = kernels.sum_of_rows(x)
    assert found.dtype == torch.float32 and relative_error(found, x.double().sum(dim=0)) < 1e-5
    total = found.clone()
    kernels.add_rows_to(total, x)
    assert torch.equal(total, 2 * found)


def test_the_same_numbers_come_of_every_run(place):
    kernels, device = place
    inputs = [torch.randn(size, device=device) for size in ((2, 40, 96), (96,), (24, 48), (24,))]
    first, second = (run(gated_down(kernels), inputs, torch.float32, device) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.fixture
def in_the_network(copy, monkeypatch):
    """The network takes the kernels, however few the items; says which."""
    calls = []
    monkeypatch.setattr(products_iflame, "LEAST_ITEMS", 1)
    monkeypatch.setattr(blocks_iflame, "has_block_kernels", lambda x: True)
    monkeypatch.setattr(products_iflame, "has_block_kernels", lambda x: True)
    names = {
        blocks_iflame: ["turned_heads", "normed_linear"],
        products_iflame: ["silu_product_down", "add_normed_silu_product_down"],
    }
    for module in names:
        for name in names[module]:
            function = getattr(copy, name)
            monkeypatch.setattr(module, name, lambda *a, _of=function, _as=name: calls.append(_as) or _of(*a))
    return calls


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointing", "keeping less"])
def test_a_network_whose_blocks_take_them_is_the_same_network(how, in_the_network, monkeypatch):
    ids = mesh_rows(2, faces=5)

    def logits_and_gradients(model):
        output = model(ids, labels=ids, use_cache=False)
        return [output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))]

    # a block with linear and one with full attention are what there is to compile
    stages = (1, 1, 0, 0, 0) if how == "compiled" else (1, 1, 2, 1, 1)
    model = small_model(stage_layers=stages).train()
    if how == "compiled":
        torch._dynamo.reset()
        for block in model.model.layers:
            block.compile(backend="aot_eager", dynamic=False)
    elif how == "checkpointing":
        switch_checkpointing(model)
    elif how == "keeping less":
        keep_less(model, 0.5)
    found = logits_and_gradients(model)
    fused = {"normed_linear", "add_normed_silu_product_down"}
    assert {*in_the_network} == {"turned_heads", *({"silu_product_down"} if how == "compiled" else fused)}
    monkeypatch.setattr(blocks_iflame, "has_block_kernels", lambda x: False)
    monkeypatch.setattr(products_iflame, "has_block_kernels", lambda x: False)
    for value, expected in zip(found, logits_and_gradients(small_model(stage_layers=stages).train()), strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize(
    ("budget", "dropped"), [(1, [0, 0, 0]), (0.95, [1, 0, 1]), (0.75, [6, 0, 0]), (0.55, [8, 7, 1]), (0.2, [8, 8, 8])]
)
def test_blocks_keep_what_the_budget_allows_of_the_finest_level_last(budget, dropped):
    model = small_model(stage_layers=[4, 4, 8, 4, 4])
    keep_less(model, 0.5)
    keep_less(model, budget)
    levels = model.config.layer_levels()
    lost = [level for level, block in zip(levels, model.model.layers, strict=True) if not block.mlp.keeps_units]
    assert [lost.count(level) for level in range(3)] == dropped


@pytest.mark.parametrize(
    "hooked", ["post_attention_layernorm", "input_layernorm", "mlp", "self_attn", "self_attn.norm"]
)
def test_a_module_that_somebody_looks_at_is_called(hooked, in_the_network):
    model, seen = small_model(), []
    module = model.model.layers[0].get_submodule(hooked)
    expected = model(mesh_rows(2, faces=5)).logits
    module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs)))
    found = model(mesh_rows(2, faces=5)).logits
    assert seen == [3 if hooked == "self_attn" else 1] and relative_error(found, expected) < 1e-5


def test_a_module_that_is_wrapped_is_called(in_the_network):
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return self.module(*inputs)

    model = small_model()
    expected = model(mesh_rows(2, faces=5)).logits
    for block in model.model.layers:
        block.mlp, block.self_attn = Wrapper(block.mlp), Wrapper(block.self_attn)
    in_the_network.clear()
    assert relative_error(model(mesh_rows(2, faces=5)).logits, expected) < 1e-5
    assert "add_normed_silu_product_down" not in in_the_network


def test_frozen_weights_have_no_gradient_and_the_others_theirs(place):
    kernels, device = place
    sizes = (1, 40, 32), (32,), (8, 16), (8,)
    inputs = [torch.randn(size, device=device) for size in sizes]
    for function in (
        gated_down(kernels),
        lambda x, bias, weight, _: product_of_normed(kernels)(x, bias, weight.repeat(1, 2)),
    ):
        expected = run(lambda *leaves, of=function: of(*leaves[:2], *inputs[2:]), inputs[:2], torch.float32, device)
        found = run(lambda *leaves, of=function: of(*leaves, inputs[3]), inputs[:3], torch.float32, device)
        assert all(torch.equal(x, y) for x, y in zip(expected, found[:3], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [48, 45])
def test_gradients_are_added_to_totals_that_are_given(place, dtype, columns):
    """Those of the columns that were filled up with zeros are left out."""
    kernels, device = place
    x, other, *vectors = (each.to(device) for each in half_a_block((2, 40), 24, 48, dtype))
    norm, inward, bias, outward, down_bias = vectors
    with torch.no_grad():
        outward[:, columns:] = 0
    totals = [torch.ones(each.shape, device=device) for each in vectors]
    totals[3] = totals[3][:, :columns].contiguous()

    def half(*leaves):
        weights = Weights(inward, bias, *totals[1:3]), Weights(outward, down_bias, *totals[3:])
        return kernels.add_normed_silu_product_down(*leaves, Norm(norm, 1e-5, totals[0]), *weights, True)

    found = run(half, [x, other], dtype, device)
    expected = run(fused_half(kernels, True), [x, other, *vectors], dtype, device)
    assert all(torch.equal(value, exact) for value, exact in zip(found, expected, strict=False))
    for total, exact in zip(totals, expected[4:], strict=True):
        assert relative_error(total - 1, exact[..., : total.shape[-1]]) < ALLOWED[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_products_add_theirs_too(place, dtype):
    kernels, device = place
    x, _, norm, inward, bias, outward, down_bias = (each.to(device) for each in half_a_block((2, 40), 24, 48, dtype))
    of_linear, of_norm, of_gated = (
        [torch.ones(each.shape, device=device) for each in group]
        for group in ((inward, bias), (norm, inward), (bias, outward, down_bias))
    )
    pairs = [
        (of_linear, lambda x: kernels.linear(x, Weights(inward, bias, *of_linear)), F.linear, (inward, bias)),
        (
            of_norm,
            lambda x: kernels.normed_linear(x, Norm(norm, 1e-5, of_norm[0]), Weights(inward, None, of_norm[1]))[0],
            product_of_normed(kernels),
            (norm, inward),
        ),
        (
            of_gated,
            lambda x: kernels.silu_product_down(x, bias, of_gated[0], Weights(outward, down_bias, *of_gated[1:])),
            gated_down(kernels),
            (bias, outward, down_bias),
        ),
    ]
    for totals, adding, plain, weights in pairs:
        items = x if plain is not pairs[2][2] else torch.cat([x, x, x, x], dim=-1)
        found = run(adding, [items], dtype, device)
        expected = run(plain, [items, *weights], dtype, device)
        for value, exact in zip(found, expected, strict=False):
            assert relative_error(value, exact) < ALLOWED[dtype]
        for total, exact in zip(totals, expected[2:], strict=True):
            assert relative_error(total - 1, exact) < ALLOWED[dtype]


def test_what_comes_back_for_items_is_added_in_the_same_pass(place):
    kernels, device = place
    x, _, norm, inward, *_ = (each.to(device) for each in half_a_block((2, 40), 24, 48, torch.float32))

    def both(x, norm, inward):
        return kernels.normed_linear(x, Norm(norm, 1e-5), Weights(inward))

    def formula(x, norm, inward):
        return F.linear(F.rms_norm(x, norm.shape, norm, 1e-5), inward), x

    inputs = [x, norm, inward]
    agreement(run(both, inputs, torch.float32, device), run(formula, inputs, torch.float64, "cpu"), torch.float32)
    x = x.requires_grad_()
    _, again = both(x, norm, inward)
    (alone,) = torch.autograd.grad(again.sum(), x)  # nobody asks for the product
    assert torch.equal(alone, torch.ones_like(x))


def test_under_autocast_they_are_as_near_to_float32_as_the_plain_blocks(in_the_network, monkeypatch):
    ids = mesh_rows(3, faces=11)

    def gradients(autocast=True):
        model = small_model().train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids, use_cache=False).loss
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])

    found = gradients()
    assert "add_normed_silu_product_down" in in_the_network
    monkeypatch.setattr(blocks_iflame, "has_block_kernels", lambda x: False)
    monkeypatch.setattr(products_iflame, "has_block_kernels", lambda x: False)
    exact = gradients(autocast=False)
    # The interpreter cuts off what does not fit into bfloat16, where a GPU rounds.
    assert relative_error(found, exact) < 1.6 * relative_error(gradients(), exact) < 0.1
