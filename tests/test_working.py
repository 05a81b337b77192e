"""Weights that are copied for a whole step, and gradients in one buffer, against autograd's."""

import functools

import pytest
import torch
from small_models import mesh_rows, relative_error, small_model
from torch import nn

from iflame_hf import products_iflame
from training.run.working import GradientBuffer, Stack, WorkingWeights

AUTOCAST = functools.partial(torch.autocast, "cpu", torch.bfloat16)


def backward(model, ids, autocast=AUTOCAST):
    with autocast():
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


def plain_gradients(model, ids):
    model.zero_grad()
    loss = backward(model, ids)
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss, gradients


@pytest.fixture(autouse=True)
def joins_few_items(monkeypatch):
    monkeypatch.setattr(products_iflame, "LEAST_ITEMS", 1)


def test_parameters_of_a_stack_have_room_for_more_rows():
    first, second = nn.Parameter(torch.rand(3, 4)), nn.Parameter(torch.rand(2, 4))
    stack = Stack.of(first, second, rows=16)
    whole = torch.arange(32 * 5.0).view(32, 5)
    assert stack.shape == (32, 4)
    assert [part.tolist() for part in stack.parts(whole)] == [whole[:3, :4].tolist(), whole[16:18, :4].tolist()]
    scalar = nn.Parameter(torch.tensor(2.0))
    assert Stack.of(scalar).shape == (1,) and Stack.of(scalar).parts(torch.ones(1))[0].shape == ()


def test_gradients_are_parts_of_one_buffer():
    parameters = [nn.Parameter(torch.rand(size)) for size in ((3, 4), (2, 4), (7,), ())]
    buffer = GradientBuffer([Stack.of(*parameters[:2], rows=3), *map(Stack.of, parameters[2:])])
    sum(((index + 1) * each).sum() for index, each in enumerate(parameters)).backward()
    assert all((each.grad == index + 1).all() for index, each in enumerate(parameters))
    assert buffer.sums.sum() == 12 + 2 * 8 + 3 * 7 + 4 and buffer.of_stacks[0].shape == (6, 4)
    assert all(each.grad.data_ptr() % 256 == buffer.sums.data_ptr() % 256 for each in parameters[::2])
    assert not buffer.was_taken_away()
    parameters[1].grad = None
    assert buffer.was_taken_away()


def test_a_step_with_copied_weights_has_the_gradients_of_autograd():
    model, ids = small_model(intermediate_size=37).train(), mesh_rows(2, faces=6)
    expected_loss, expected = plain_gradients(model, ids)
    working = WorkingWeights(model, torch.bfloat16)
    for times in (1, 2):  # gradients of the second are added
        working.refresh()
        with working.attached():
            loss = backward(model, ids)
        assert torch.equal(loss, expected_loss)
        for name, parameter in model.named_parameters():
            assert relative_error(parameter.grad, times * expected[name]) < 4e-3, name
    assert not working.gradients.was_taken_away()
    kept = working.gradients.sums.norm()
    total = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    assert abs(kept / total - 1) < 1e-6  # what fills up has none


def test_copies_are_those_of_now_and_used_only_where_attached():
    model, ids = small_model().train(), mesh_rows(2, faces=6)
    names = set(model.state_dict())
    working = WorkingWeights(model, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    expected_loss, _ = plain_gradients(model, ids)
    loss = backward(model, ids)
    assert torch.equal(loss, expected_loss)
    with working.attached():
        with AUTOCAST():
            stale = model(ids, labels=ids, use_cache=False).loss
        working.refresh()
        with AUTOCAST():
            fresh = model(ids, labels=ids, use_cache=False).loss
        with torch.no_grad():
            other_type = model(ids, labels=ids, use_cache=False).loss
        assert set(model.state_dict()) == names
    assert stale != expected_loss and fresh == expected_loss
    assert other_type == model(ids, labels=ids, use_cache=False).loss != fresh
    assert all("inward" not in vars(module) for module in model.modules())


def test_blocks_take_the_copies(monkeypatch):
    """All their matrices: none is cast in the step."""
    model, ids = small_model().train(), mesh_rows(2, faces=6)
    working = WorkingWeights(model, torch.bfloat16)
    working.refresh()
    matrices = {parameter.shape for name, parameter in model.model.layers.named_parameters() if parameter.dim() == 2}

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if function is torch.ops.aten._to_copy.default:
                casts.append(arguments[0].shape)
            return function(*arguments, **(options or {}))

    for attached in (False, True):
        casts = []
        with Seen(), working.attached() if attached else AUTOCAST():
            backward(model, ids)
        assert bool(matrices.intersection(casts)) != attached


@pytest.mark.parametrize("why", ["no autocast", "frozen"])
def test_models_that_are_otherwise_keep_no_copies(why):
    model = small_model()
    if why == "frozen":
        model.model.embed_tokens.weight.requires_grad_(False)
    working = WorkingWeights(model, None if why == "no autocast" else torch.bfloat16)
    with working.attached():
        assert all(getattr(block.mlp, "inward", None) is None for block in model.model.layers)
    trained = [each for each in model.parameters() if each.requires_grad]
    assert all(each.grad.shape == each.shape for each in trained)


def test_a_weight_that_two_layers_share_has_one_gradient():
    def shared():
        model = small_model().train()
        first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
        second.gate_proj.weight = second.up_proj.weight = first.gate_proj.weight
        return model

    ids, model = mesh_rows(2, faces=6), shared()
    _, expected = plain_gradients(model, ids)
    working = WorkingWeights(model, torch.bfloat16)
    working.refresh()
    assert not working.gradients.was_taken_away()
    with working.attached():
        assert model.model.layers[0].mlp.inward is not None and model.model.layers[1].mlp.inward is None
        backward(model, ids)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-2, name


def test_layers_that_are_more_than_their_weights_keep_no_copies():
    model, ids = small_model().train(), mesh_rows(2, faces=6)
    model.model.layers[0].mlp.up_proj = nn.Sequential(model.model.layers[0].mlp.up_proj)
    _, expected = plain_gradients(model, ids)
    working = WorkingWeights(model, torch.bfloat16)
    working.refresh()
    with working.attached():
        assert model.model.layers[0].mlp.inward is None and model.model.layers[1].mlp.inward is not None
        # A hook that came later
        model.model.layers[1].mlp.gate_proj.register_forward_hook(lambda *_: None)
        backward(model, ids)
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, expected[name]) < 1e-2, name
