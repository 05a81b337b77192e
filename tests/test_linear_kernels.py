"""Linear attention in Triton, run by its interpreter, against a formula in float64 and torch's own checks."""

from contextlib import contextmanager

import pytest
import torch
from interpreted_module import interpreted
from linear_attention_formula import SLOPES, agreement, attention_formula, bounds_from, random_inputs
from small_models import relative_error

from iflame_hf import linear_kernels_iflame

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernels():
    with interpreted(linear_kernels_iflame) as module:
        yield module


@pytest.fixture(params=[1, 3], ids=["one segment", "three segments"])
def attention(request, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_segments", lambda q: request.param)
    return kernels.triton_linear_attention


@pytest.fixture
def in_segments(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "_segments", lambda q: 3)
    return kernels.triton_linear_attention


def run(attention, inputs, slopes=SLOPES, bounds=None):
    """Outputs, the last state and all gradients."""
    q, k, v, state = (x.detach().clone().requires_grad_() for x in inputs)
    output, last = attention(q, k, v, slopes, state, bounds)
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum() + (last * last).sum(), [q, k, v, state])
    return [output, last, *gradients]


@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, 32, 33, 200])
def test_linear_attention_is_the_decayed_sum_over_all_pairs(attention, state, length):
    agreement(attention, length, state)


@pytest.mark.parametrize(
    ("length", "starts", "state"),
    [
        (30, [[0, 9], [0, 18, 27]], True),
        (130, [[0, 31, 32, 33, 63, 64, 128], [0]], True),
        (192, [[0, 64, 128], [0, 128]], False),
        (200, [[0, 3, 66, 67, 190], [0, 100]], True),
    ],
)
def test_each_mesh_of_a_row_starts_from_nothing(attention, length, starts, state):
    agreement(attention, length, state, starts)


@pytest.mark.parametrize("size", [24, 64, 96, 128])
def test_heads_have_up_to_128_channels(in_segments, size):
    agreement(in_segments, 100, True, [[0, 40], [0, 99]], heads=2, size=size)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_wider_tiles_of_bfloat16_are_right_too(kernels, monkeypatch, in_segments, size):
    tiles = kernels.choose_tiles
    monkeypatch.setattr(kernels, "choose_tiles", lambda size, dtype: tiles(size, torch.bfloat16))
    agreement(in_segments, 150, True, [[0, 40, 149]], heads=2, size=size)


def test_a_decay_so_slow_that_the_first_item_counts_in_the_last_and_one_so_fast_that_no_other_does(in_segments):
    inputs = random_inputs(1, 300, 2, 16)
    slopes = torch.tensor([2.0**-11, 40.0])
    value, expected = run(in_segments, inputs, slopes), run(attention_formula, inputs, slopes)
    assert all(x.isfinite().all() for x in value)
    assert all(relative_error(a, b) < 5e-6 for a, b in zip(value, expected, strict=True))


def test_half_precision_is_summed_up_in_float32_and_overflows_nowhere_between(in_segments):
    q, k, v, state = random_inputs(2, 150, 3, 16, requires_grad=False)
    inputs = [(x * scale).half() for x, scale in ((q, 200), (k, 200), (v, 1e-3))]
    bounds = bounds_from([[0, 40], [0]], 150)
    assert (inputs[0].float() @ inputs[1].float().mT).abs().max() > torch.finfo(torch.float16).max
    output, last = in_segments(*inputs, SLOPES, state, bounds)
    expected, expected_last = attention_formula(*inputs, SLOPES, state, bounds)
    assert output.dtype == torch.float16 and last.dtype == torch.float32
    assert relative_error(output, expected) < 5e-4 and relative_error(last, expected_last) < 2e-6


def test_inputs_may_be_views_into_one_product_and_gradients_may_be_expanded(in_segments):
    length, heads, size = 70, 3, 16
    merged = torch.randn(2, length, 3 * heads * size, generator=torch.Generator().manual_seed(0))
    separate = [x.view(2, length, heads, size) for x in merged.split(heads * size, dim=-1)]
    assert not separate[0].is_contiguous()
    results = []
    for parts in (separate, [x.contiguous() for x in separate], [x.mT.contiguous().mT for x in separate]):
        parts = [x.detach().requires_grad_() for x in parts]
        output, _ = in_segments(*parts, SLOPES, need_state=False)
        results.append([output, *torch.autograd.grad(output.sum(), parts)])
    for value in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(value, results[0], strict=True))


def test_without_the_final_state_outputs_and_gradients_are_the_same(in_segments):
    inputs = random_inputs(2, 100, 3, 16)
    results = []
    for need_state in (True, False):
        output, last = in_segments(*inputs[:3], SLOPES, inputs[3], None, need_state)
        assert (last is not None) == need_state
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_result_comes_from_memory_that_was_never_written(in_segments):
    inputs = random_inputs(2, 150, 3, 24, requires_grad=False)
    bounds = bounds_from([[0, 2], [0]], 150)
    expected = run(in_segments, inputs, bounds=bounds)
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        value = run(in_segments, inputs, bounds=bounds)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True))


@pytest.mark.parametrize(("with_state", "need_state"), [(False, False), (True, True)])
def test_torch_finds_the_operator_as_it_is_declared(kernels, with_state, need_state):
    q, k, v, state = random_inputs(2, 70, 3, 16)
    meshes = bounds_from([[0, 9], [0]], 70).meshes if with_state else None
    arguments = (q, k, v, SLOPES, state if with_state else None, meshes, need_state)
    results = torch.library.opcheck(kernels._attention, arguments)
    assert len(results) == 4 and set(results.values()) == {"SUCCESS"}


def test_torch_compile_makes_one_graph_of_it_forwards_and_backwards(in_segments):
    inputs = random_inputs(2, 70, 3, 16)
    bounds = bounds_from([[0, 9], [0]], 70)
    expected = run(in_segments, inputs, bounds=bounds)
    compiled = torch.compile(in_segments, fullgraph=True, backend="aot_eager")
    value = run(lambda *a: compiled(*a), inputs, bounds=bounds)
    assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True))


@pytest.mark.parametrize(
    ("rows", "items", "heads", "segments"),
    [(8, 6921, 16, 6), (1, 36009, 16, 49), (48, 6921, 16, 1), (1, 6921, 1, 217), (1024, 6921, 16, 1), (8, 100, 16, 4)],
)
def test_rows_are_cut_where_there_are_too_few_of_them_to_fill_a_gpu(monkeypatch, rows, items, heads, segments):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)

    class Query:
        shape = (rows, items, heads, 32)
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert linear_kernels_iflame._segments(Query) == segments


def test_only_the_last_state_may_be_learnt_from(in_segments):
    inputs = random_inputs(2, 70, 3, 16)
    gradients = []
    for function in (in_segments, attention_formula):
        _, last = function(*inputs[:3], SLOPES, inputs[3])
        gradients.append(torch.autograd.grad(last.square().sum(), inputs[1:]))
    assert all(relative_error(a, b) < 5e-6 for a, b in zip(*gradients, strict=True))


def test_kernels_are_launched_while_the_device_of_the_inputs_is_the_current_one(kernels, in_segments, monkeypatch):
    current, launched, launch = [], [], kernels.launch

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def recorded(kernel, *arguments, **options):
        launched.append(list(current))
        launch(kernel, *arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernels, "launch", recorded)
    inputs = random_inputs(2, 100, 3, 16)
    run(in_segments, inputs)
    assert launched == 6 * [[inputs[0].device]]  # two kernels forwards; the first once and the second thrice backwards


@pytest.mark.parametrize("shape", [(0, 5, 3, 16), (2, 0, 3, 16)])
def test_of_no_items_the_state_is_what_it_was(kernels, shape):
    x, state = torch.zeros(shape), torch.ones(shape[0], 3, 16, 16)
    output, last = kernels.triton_linear_attention(x, x, x, SLOPES, state)
    assert output.shape == shape and torch.equal(last, state)
    output, last = kernels.triton_linear_attention(x, x, x, SLOPES)
    assert output.shape == shape and torch.equal(last, torch.zeros_like(state))
    assert kernels.triton_linear_attention(x, x, x, SLOPES, need_state=False)[1] is None


def test_triton_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(linear_kernels_iflame, "triton", None)
    q, k, v, _ = random_inputs(1, 5, 3, 16)
    with pytest.raises(ImportError, match="pip install triton"):
        linear_kernels_iflame.triton_linear_attention(q, k, v, SLOPES)
