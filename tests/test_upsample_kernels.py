"""What stands between the levels, by Triton's interpreter, against formulas in float64."""

import pytest
import torch
from interpreted_module import interpreted
from small_models import mesh_rows, relative_error, small_model, switch_checkpointing

from iflame_hf import RowLayout, blocks_iflame, modeling_iflame, upsample_kernels_iflame
from iflame_hf.blocks_iflame import IFlameUpsample

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
SIZE = 3


@pytest.fixture(scope="module")
def copy():
    with interpreted(upsample_kernels_iflame) as module:
        yield module


@pytest.fixture(params=["cpu", CUDA])
def place(request, copy):
    """The kernels, and the device that they run on."""
    return (copy if request.param == "cpu" else upsample_kernels_iflame), request.param


def run(function, inputs, dtype, device):
    """Outputs and gradients, of inputs in a type on a device; what comes back is rounded as the inputs are."""
    leaves = [x.detach().to(device, dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.linspace(-1, 2, x.numel()).view(x.shape).to(inputs[0].dtype).to(x) for x in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]


def agreement(found, expected, dtype):
    for value, exact in zip(found, expected, strict=True):
        assert value.dtype == dtype and relative_error(value.cpu(), exact) < ALLOWED[dtype]


def items(batch, length, channels, offset, dtype, spare=0):
    """Items, what is handed up to them (more of it than they read, if `spare`), and the scale."""
    random = torch.Generator().manual_seed(0)
    groups = 1 + (offset + length) // SIZE + spare
    sizes = (batch, length, channels), (batch, groups, channels)
    return [*(torch.randn(size, generator=random).to(dtype) for size in sizes), torch.tensor([0.7]).to(dtype)]


def places(batch, length):
    """Positions of items in rows of several meshes, of which one has a single item."""
    begins = torch.zeros(batch, length, dtype=torch.bool)
    for row, each in enumerate(begins):
        each[[row % length, (row + 1) % length, length // 2]] = True
    index = torch.arange(length)
    return index - torch.where(begins, index, 0).cummax(dim=1).values


def plain(hidden_states, coarse, scale, positions, offset):
    module = IFlameUpsample(SIZE).to(hidden_states.device)
    del module.scale
    module.scale = scale
    return module(hidden_states, coarse, offset, positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.parametrize("meshes", ["one", "several"])
@pytest.mark.parametrize(
    ("batch", "length", "channels"), [(2, 9, 16), (3, 10, 24), (1, 11, 130), (2, 1, 8), (1, 4, 520)]
)
def test_what_is_handed_up_is_that_of_float64(place, dtype, offset, meshes, batch, length, channels):
    kernels, device = place
    inputs = items(batch, length, channels, offset, dtype)
    positions = None if meshes == "one" else places(batch, length)

    def fused(*leaves):
        return kernels.upsampled(*leaves, None if positions is None else positions.to(device), offset, SIZE)

    found = run(fused, inputs, dtype, device)
    expected = run(lambda *leaves: plain(*leaves, positions, offset), inputs, torch.float64, "cpu")
    if expected[3].abs().max() > 0:
        agreement(found, expected, dtype)
    else:  # nothing is handed up
        agreement(found[:2], expected[:2], dtype)
        assert not found[2].any() and not found[3].any()


def test_what_nobody_reads_has_no_gradient(place):
    kernels, device = place
    inputs = items(2, 7, 16, 2, torch.float32, spare=3)
    found = run(lambda *leaves: kernels.upsampled(*leaves, None, 2, SIZE), inputs, torch.float32, device)
    expected = run(lambda *leaves: plain(*leaves, None, 2), inputs, torch.float64, "cpu")
    agreement(found, expected, torch.float32)
    read = found[2].abs().amax(dim=(0, 2)) > 0
    assert read.tolist() == [False] + [True] * 3 + [False] * 3  # of the first group all members came before


def test_under_autocast_the_scale_stays_in_float32(place):
    kernels, device = place
    hidden_states, coarse, _ = (each.to(device) for each in items(2, 10, 16, 1, torch.bfloat16))
    scale = torch.tensor([0.7], device=device, requires_grad=True)
    found = kernels.upsampled(hidden_states, coarse, scale, None, 1, SIZE)
    (to_scale,) = torch.autograd.grad(found, scale, torch.ones_like(found))
    handed = coarse.double().repeat_interleave(SIZE, dim=1)[:, 2:12]
    assert found.dtype == torch.bfloat16 and to_scale.dtype == torch.float32
    # Rounded once, or by the interpreter cut off; the plain formula rounds scale, product and sum.
    exact = hidden_states.double() + scale.double() * handed
    rounded = plain(hidden_states, coarse, scale, None, 1)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if device == "cuda" else 2**-7, atol=0)
    torch.testing.assert_close(found, rounded, rtol=2**-6, atol=2**-6)
    assert relative_error(to_scale, handed.sum().view(1)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "length", "channels"), [(2, 9, 16), (3, 10, 24), (1, 11, 130), (1, 3, 520)])
def test_means_of_groups_are_those_of_float64(place, dtype, batch, length, channels):
    kernels, device = place
    x = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(1)).to(dtype)

    def formula(x):
        return x, x[:, : length // SIZE * SIZE].unflatten(1, (-1, SIZE)).mean(dim=2)

    found = run(lambda x: kernels.with_means(x, SIZE), [x], dtype, device)
    assert torch.equal(found[0].cpu(), x)
    agreement(found, run(formula, [x], torch.float64, "cpu"), dtype)


@pytest.mark.parametrize("used", [[0], [1]])
def test_of_items_and_means_one_may_be_left_alone(place, used):
    kernels, device = place
    x = torch.randn(2, 10, 16, device=device, requires_grad=True)
    output = kernels.with_means(x, SIZE)[used[0]]
    (found,) = torch.autograd.grad(output, x, torch.ones_like(output))
    expected = torch.ones_like(x) if used == [0] else torch.where(torch.arange(10, device=device) < 9, 1 / 3, 0.0)
    torch.testing.assert_close(found, expected.view(-1, 10, 1).expand_as(x) if used == [1] else expected)


def test_only_what_is_learnt_has_a_gradient(place):
    kernels, device = place
    inputs = [each.to(device) for each in items(2, 10, 16, 1, torch.float32)]
    grad = torch.randn(2, 16, 10, device=device).mT  # of any strides

    def gradients(learnt):
        leaves = [each.clone().requires_grad_(index in learnt) for index, each in enumerate(inputs)]
        output = kernels.upsampled(*leaves, None, 1, SIZE)
        return dict(zip(learnt, torch.autograd.grad(output, [leaves[index] for index in learnt], grad), strict=True))

    expected = gradients((0, 1, 2))
    assert torch.equal(expected[0], grad)
    for learnt in ((0,), (1,), (2,), (0, 2), (1, 2)):
        found = gradients(learnt)
        assert all(torch.equal(found[index], expected[index]) for index in learnt)


def test_the_same_numbers_come_of_every_run(place):
    kernels, device = place
    inputs = items(3, 50, 48, 1, torch.float32)
    positions = places(3, 50).to(device)

    def results():
        found = run(lambda *leaves: kernels.upsampled(*leaves, positions, 1, SIZE), inputs, torch.float32, device)
        return found + run(lambda x: kernels.with_means(x, SIZE), inputs[:1], torch.float32, device)

    assert all(torch.equal(x, y) for x, y in zip(results(), results(), strict=True))


@pytest.mark.parametrize("name", ["_spread", "_gather"])
def test_the_operators_are_what_torch_wants_of_one(copy, name):
    hidden_states, coarse, scale = items(2, 10, 16, 1, torch.float32)
    positions = places(2, 10)
    arguments = {
        "_spread": [
            (hidden_states, coarse, scale, positions, 2, SIZE, 10),
            (None, coarse, None, None, 0, SIZE, 10),
        ],
        "_gather": [
            (hidden_states, coarse, scale, positions, 2, SIZE, coarse.shape[1]),
            (hidden_states, None, None, None, 0, SIZE, 3),
        ],
    }
    for each in arguments[name]:
        torch.library.opcheck(getattr(copy, name), each)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_code_may_have_them(backend, copy):
    kernels, device = (copy, "cpu") if backend == "aot_eager" else (upsample_kernels_iflame, "cuda")
    inputs, positions = items(2, 10, 16, 1, torch.float32), places(2, 10).to(device)

    def function(*leaves):
        return 2 * kernels.upsampled(*leaves, positions, 1, SIZE)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    found, expected = (run(each, inputs, torch.float32, device) for each in (compiled, function))
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.gpu
def test_there_may_be_very_many_items():
    """A GPU runs at most 65,535 programs along all dimensions but the first."""
    inputs = items(1, 12 * 65_535 + 5, 32, 1, torch.float32)
    found = run(
        lambda *leaves: upsample_kernels_iflame.upsampled(*leaves, None, 1, SIZE), inputs, torch.float32, "cuda"
    )
    agreement(found, run(lambda *leaves: plain(*leaves, None, 1), inputs, torch.float64, "cpu"), torch.float32)
    found = run(lambda x: upsample_kernels_iflame.with_means(x, SIZE), inputs[:1], torch.float32, "cuda")
    assert relative_error(found[1], found[0][:, :-2].unflatten(1, (-1, SIZE)).mean(dim=2)) < 1e-5


@pytest.mark.gpu
def test_they_are_for_many_items_of_one_type():
    hidden_states, coarse, scale = (each.to("cuda") for each in items(2, 600, 16, 0, torch.bfloat16))
    may = upsample_kernels_iflame.has_upsample_kernels
    assert may(hidden_states, coarse, scale) and may(hidden_states, coarse, scale.float())
    assert not may(hidden_states, coarse.float(), scale) and not may(hidden_states[:1], coarse[:1], scale)
    assert upsample_kernels_iflame.has_pool_kernels(hidden_states)
    assert not upsample_kernels_iflame.has_pool_kernels(hidden_states.cpu())


def switch_kernels(patch, on, kernels=upsample_kernels_iflame, calls=None):
    """The network takes the kernels, however few the items, or does not; `calls` says which it took."""
    calls = [] if calls is None else calls
    patch.setattr(blocks_iflame, "has_upsample_kernels", lambda *tensors: on)
    patch.setattr(modeling_iflame, "has_pool_kernels", lambda x: on and not torch.compiler.is_compiling())
    for module, name in ((blocks_iflame, "upsampled"), (modeling_iflame, "with_means")):
        function = getattr(kernels, name)
        patch.setattr(module, name, lambda *a, _of=function, _as=name: calls.append(_as) or _of(*a))


def packed_rows():
    """Ids (B, T) of rows of two meshes each, and their layout; the last face is not complete."""
    ids = torch.cat([mesh_rows(2, faces=2), mesh_rows(2, faces=4, seed=1)], dim=1)[:, :-5]
    begins = torch.zeros(2, 8, dtype=torch.bool)
    begins[:, [0, 3]] = True
    return ids, RowLayout.of_begins(begins, length=ids.shape[1], strides=small_model().config.level_strides)


def logits_and_gradients(model, ids, **inputs):
    output = model(ids, labels=ids, use_cache=False, **inputs)
    return [output.logits, *torch.autograd.grad(output.loss, list(model.parameters()))]


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointing"])
@pytest.mark.parametrize("rows", ["one mesh", "packed"])
def test_a_network_whose_levels_take_them_is_the_same_network(how, rows, copy, monkeypatch):
    ids, layout = packed_rows()
    # Blocks take most of the time to compile, and what stands between levels is asked about.
    stages = (1, 0, 1, 0, 0) if how == "compiled" else (1, 1, 2, 1, 1)

    def results(on, calls):
        switch_kernels(monkeypatch, on, copy, calls)
        model = small_model(stage_layers=stages).train()
        if on and how == "compiled":
            torch._dynamo.reset()
            model.compile(backend="aot_eager", dynamic=False)
        elif on and how == "checkpointing":
            switch_checkpointing(model)
        return logits_and_gradients(model, ids, layout=layout if rows == "packed" else None)

    calls = []
    found, expected = results(True, calls), results(False, [])
    assert calls == [*([] if how == "compiled" else ["with_means"] * 2), "upsampled", "upsampled"]
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 1e-5


@pytest.mark.parametrize("hooked", ["model.upsamplers.0", "model.layers.0"])
def test_who_looks_at_a_module_sees_what_it_gave(hooked, copy, monkeypatch):
    """Outputs, and their gradients: by both ways that lead on from the items of a level."""

    def results(on):
        switch_kernels(monkeypatch, on, copy)
        model, seen = small_model(), []

        def look(module, inputs, output):
            output = output if isinstance(output, torch.Tensor) else output[0]
            seen.append(output)
            output.register_hook(seen.append)

        model.get_submodule(hooked).register_forward_hook(look)
        ids = mesh_rows(2, faces=5)
        output = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
        kept = output.hidden_states[1:3]
        return [*torch.autograd.grad(output.loss, kept), *seen, *output.hidden_states]

    found, expected = results(True), results(False)
    assert len(found) == len(expected)
    for value, other in zip(found, expected, strict=True):
        assert relative_error(value, other) < 1e-5


@pytest.mark.parametrize("split", [27, 31, 38])
def test_prefill_in_parts_is_the_same(split, copy, monkeypatch):
    ids = mesh_rows(2, faces=6)

    def logits(on):
        switch_kernels(monkeypatch, on, copy)
        model = small_model()
        with torch.no_grad():
            first = model(ids[:, :split], use_cache=True)
            return torch.cat([first.logits, model(ids[:, split:], cache=first.cache).logits], dim=1)

    assert relative_error(logits(True), logits(False)) < 1e-5


def test_frozen_weights_have_no_gradient_and_the_others_theirs(copy, monkeypatch):
    def gradients(on):
        switch_kernels(monkeypatch, on, copy)
        model, (ids, layout) = small_model().requires_grad_(False), packed_rows()
        learnt = [model.model.upsamplers[0].scale, model.model.layers[3].mlp.up_proj.weight]
        for parameter in learnt:
            parameter.requires_grad_()
        return torch.autograd.grad(model(ids, labels=ids, layout=layout, use_cache=False).loss, learnt)

    for value, other in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(value, other) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["eager", "compiled blocks", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_on_a_gpu_has_the_same_gradients(how, dtype, monkeypatch):
    ids = mesh_rows(4, faces=60).to("cuda")

    def gradients(on, dtype=dtype):
        torch._dynamo.reset()
        with monkeypatch.context() as patch:
            switch_kernels(patch, on)
            model = small_model(hidden_size=128).to("cuda").train()
            if how == "compiled":
                model.compile(dynamic=False)
            elif how == "compiled blocks":
                for block in model.model.layers:
                    block.compile(dynamic=False)
            with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = model(ids, labels=ids, use_cache=False).loss
            return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))])

    found, plain_ones = gradients(True), gradients(False)
    if dtype == torch.float32:
        assert relative_error(found, plain_ones) < 1e-3  # products of compiled code may be of other tilings
    else:
        exact = gradients(False, torch.float32)
        assert relative_error(found, exact) < 1.2 * relative_error(plain_ones, exact) < 0.1
