"""Layers that are computed in one product, against the layers themselves."""

import pytest
import torch
from small_models import mesh_rows, relative_error, small_model
from torch import nn
from torch.nn import functional as F

from iflame_hf import products_iflame
from iflame_hf.fused_products_iflame import linear
from iflame_hf.products_iflame import LEAST_ITEMS, inward, joined, may_join, outward, swiglu


def layers(channels=24, units=65, dtype=torch.float64):
    torch.manual_seed(0)
    return (
        nn.Linear(channels, units, dtype=dtype),
        nn.Linear(channels, units, dtype=dtype),
        nn.Linear(units, channels, dtype=dtype),
    )


def plain_swiglu(x, gate, up, down):
    return down(F.silu(gate(x)) * up(x))


def joined_swiglu(x, gate, up, down):
    return swiglu(x, inward(gate, up), outward(down))


def joined_linear(x, *layers):
    return linear(x, joined(*layers))


def results(function, x, modules):
    x = x.clone().requires_grad_()
    output = function(x, *modules)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return [output, *torch.autograd.grad((output * weights).sum(), [x, *parameters])]


@pytest.mark.parametrize("units", [65, 80, 341, 1365])
def test_swiglu_over_padded_units_is_swiglu(units):
    modules = layers(units=units)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    found, expected = results(joined_swiglu, x, modules), results(plain_swiglu, x, modules)
    assert len(found) == 8 and modules[0].weight.shape == (units, 24)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)


def test_inner_units_of_a_product_are_a_multiple_of_16(monkeypatch):
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda x, w, bias=None: sizes.append(w.shape) or linear(x, w, bias))
    joined_swiglu(torch.randn(3, 24), *layers(units=65, dtype=torch.float32))
    assert [tuple(size) for size in sizes] == [(160, 24), (24, 80)]


def test_layers_that_are_joined_give_what_each_gives():
    modules = [nn.Linear(24, 24, bias=False, dtype=torch.float64) for _ in range(3)]
    x = torch.randn(2, 7, 24, dtype=torch.float64)

    def separate(x, *modules):
        return torch.cat([module(x) for module in modules], dim=-1)

    found, expected = results(joined_linear, x, modules), results(separate, x, modules)
    assert found[0].shape == (2, 7, 72)
    for value, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)


class Adapter(nn.Linear):
    pass


class Quantised(torch.Tensor):
    pass


def changed(how):
    layer = nn.Linear(4, 4)
    if how == "a module around it":
        layer = nn.Sequential(layer)
    elif how == "another class":
        layer = Adapter(4, 4)
    elif how == "a hook before":
        layer.register_forward_pre_hook(lambda *_: None)
    elif how == "a hook after":
        layer.register_forward_hook(lambda *_: None)
    elif how == "a hook of gradients":
        layer.register_full_backward_hook(lambda *_: None)
    elif how == "a forward of its own":
        layer.forward = lambda x: x
    elif how == "another kind of weight":
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised))
    elif how == "a parametrisation":
        torch.nn.utils.parametrizations.weight_norm(layer)
    return layer


@pytest.mark.parametrize(
    "how",
    [
        "a module around it",
        "another class",
        "a hook before",
        "a hook after",
        "a hook of gradients",
        "a forward of its own",
        "another kind of weight",
        "a parametrisation",
    ],
)
def test_a_layer_that_is_more_than_its_weights_is_called(how):
    x = torch.zeros(2, LEAST_ITEMS // 2, 4)
    assert may_join(x, nn.Linear(4, 4), nn.Linear(4, 4), bias=True)
    assert not may_join(x, nn.Linear(4, 4), changed(how), bias=True)


@pytest.mark.parametrize("bias", [True, False])
def test_layers_with_another_bias_than_their_product_has_are_called(bias):
    x = torch.zeros(2, LEAST_ITEMS // 2, 4)
    assert may_join(x, nn.Linear(4, 4, bias=bias), bias=bias)
    assert not may_join(x, nn.Linear(4, 4, bias=bias), bias=not bias)


@pytest.mark.parametrize("items", [LEAST_ITEMS, LEAST_ITEMS - 1])
def test_a_compiled_graph_has_joined_layers_too(items):
    linears = []

    def look(graph, _):
        linears.append(sum(node.target in (F.linear, torch._C._nn.linear) for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    mlp = small_model().model.layers[0].mlp
    x = torch.randn(1, items, mlp.gate_proj.in_features)
    compiled = torch.compile(mlp, backend=look, fullgraph=True)
    assert relative_error(compiled(x), mlp(x)) < 1e-5
    assert linears == [2 if items == LEAST_ITEMS else 3]


def test_layers_are_called_while_somebody_looks_at_all_modules():
    x = torch.zeros(2, LEAST_ITEMS // 2, 4)
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not may_join(x, nn.Linear(4, 4), bias=True)
    finally:
        hook.remove()
    assert may_join(x, nn.Linear(4, 4), bias=True)


def test_few_items_are_not_worth_a_copy_of_the_weights():
    assert not may_join(torch.zeros(1, LEAST_ITEMS - 1, 4), nn.Linear(4, 4), bias=True)


@pytest.fixture
def joins(monkeypatch):
    """Says how often layers were joined; they are, however few the items."""
    calls = []
    monkeypatch.setattr(products_iflame, "LEAST_ITEMS", 1)
    for name in ("joined", "swiglu"):
        function = getattr(products_iflame, name)
        monkeypatch.setattr(
            "iflame_hf.blocks_iflame." + name, lambda *a, _of=function, _name=name: calls.append(_name) or _of(*a)
        )
    return calls


def gradients_and_logits(model, ids):
    output = model(ids, labels=ids, use_cache=False)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    return [output.logits, *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_whose_layers_are_joined_is_the_same_network(joins, monkeypatch, dtype):
    model, ids = small_model().train(), mesh_rows(2, faces=6)
    blocks = model.config.num_hidden_layers
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        found = gradients_and_logits(model, ids)
        assert joins.count("joined") == joins.count("swiglu") == blocks
        monkeypatch.setattr(products_iflame, "LEAST_ITEMS", 10**6)
        expected = gradients_and_logits(model, ids)
        assert len(joins) == 2 * blocks
    error = 5e-6 if dtype == torch.float32 else 3e-2
    assert all(relative_error(a, b) < error for a, b in zip(found, expected, strict=True))


def test_an_adapter_on_one_projection_leaves_the_others_of_its_block_to_themselves(joins):
    peft = pytest.importorskip("peft")
    model, ids = small_model(), mesh_rows(2, faces=6)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    different = adapted(ids, use_cache=False).logits
    assert joins.count("joined") == 0 and joins.count("swiglu") == model.config.num_hidden_layers
    with adapted.disable_adapter():
        plain = adapted(ids, use_cache=False).logits
    assert relative_error(different, plain) > 1e-3
    assert relative_error(plain, small_model()(ids, use_cache=False).logits) < 5e-6


def test_a_projection_that_is_wrapped_is_the_same_network(joins):
    model, ids = small_model(), mesh_rows(2, faces=6)
    expected = model(ids, use_cache=False).logits
    joins.clear()
    for block in model.model.layers:
        block.self_attn.k_proj = nn.Sequential(block.self_attn.k_proj)
        block.mlp.up_proj = nn.Sequential(block.mlp.up_proj)
    assert relative_error(model(ids, use_cache=False).logits, expected) < 5e-6
    assert joins == []


def test_an_exported_network_takes_any_number_of_rows(joins):
    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    network, ids = Logits().eval(), mesh_rows(2, faces=6)
    shapes = {"ids": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(network, (ids,), dynamic_shapes=shapes, strict=False).module()
    more = mesh_rows(5, faces=6, seed=1)
    assert relative_error(exported(more), network(more)) < 5e-6
