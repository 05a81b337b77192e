"""What attention computes, against float64 formulas written out in full, and the choice between implementations."""

import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from linear_attention_formula import SLOPES, agreement, attention_formula, bounds_from, random_inputs
from small_models import relative_error, small_model

from iflame_hf import IFlameForCausalLM, implementations_iflame, kernels_iflame
from iflame_hf.implementations_iflame import (
    LinearAttentionCall,
    check_linear_attention_implementation,
    choose_linear_attention,
    fla_linear_attention,
    lightning_linear_attention,
    linear_attention,
    linear_attention_step,
)
from iflame_hf.layout_iflame import MeshBounds
from iflame_hf.ops_iflame import (
    CHUNK_SIZE,
    alibi_slopes,
    apply_rotary,
    chunked_linear_attention,
    recurrent_linear_attention,
    recurrent_linear_attention_step,
    rotary_tables,
)

PLAIN = [recurrent_linear_attention, chunked_linear_attention]


@pytest.fixture(autouse=True)
def known_packages():
    """What is installed is asked once in a process; tests that pretend must not leave their answer behind."""
    implementations_iflame._finds.cache_clear()
    yield
    implementations_iflame._finds.cache_clear()


def published_alibi_slopes(heads):
    """As in the code that came with ALiBi, in exact powers: a geometric sequence that begins with its own ratio."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    ratio = 2.0 ** (-(2.0 ** -(power.bit_length() - 1 - 3)))
    slopes = [ratio**number for number in range(1, power + 1)]
    return slopes if power == heads else slopes + published_alibi_slopes(2 * power)[0::2][: heads - power]


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 17, 24, 31, 32, 40, 48, 64, 100])
def test_decay_rates_are_the_published_alibi_slopes(heads):
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    expected = torch.tensor(published_alibi_slopes(heads), dtype=torch.float64)
    torch.testing.assert_close(slopes.double(), expected, rtol=3e-7, atol=0)


def test_decay_rates_of_a_power_of_two_run_from_the_root_of_one_half_to_the_256th():
    assert alibi_slopes(4).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert alibi_slopes(16)[[0, -1]].tolist() == pytest.approx([2**-0.5, 2**-8], rel=1e-6)


def rotated_by_complex_numbers(x, positions, base):
    """(x1 + i x2) exp(-i angle) in float64: a quarter of D turns, at frequencies from 1 to 1 / base."""
    half = x.shape[-1] // 2
    turning = half // 2
    frequencies = torch.zeros(half, dtype=torch.float64)
    for index in range(turning):
        frequencies[index] = base ** (-index / (turning - 1)) if turning > 1 else 1.0
    angles = positions.double()[..., None, None] * frequencies
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(-1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("head_dim", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("base", [1024.0, 10.0])
def test_rotary_embedding_turns_backwards_by_position_times_frequency(head_dim, base):
    torch.manual_seed(0)
    positions = torch.stack([torch.arange(50), torch.randint(0, 300, (50,))])
    x = torch.randn(2, 50, 3, head_dim)
    turned = apply_rotary(x, *rotary_tables(positions, head_dim, base))
    expected = rotated_by_complex_numbers(x, positions, base)
    assert (expected - x).abs().max() > 1
    torch.testing.assert_close(turned.double(), expected, atol=1e-4, rtol=0)


def test_the_sign_of_the_rotation_in_one_number():
    # one quarter turn at frequency 1: y1 = x2, y2 = -x1; the zero frequency leaves the other pair alone
    cos, sin = rotary_tables(torch.tensor([[1.0]]) * (torch.pi / 2), 4, 1024.0)
    turned = apply_rotary(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), cos, sin)
    torch.testing.assert_close(turned.flatten(), torch.tensor([3.0, 2.0, -1.0, 4.0]), atol=1e-6, rtol=0)


def test_scores_of_rotated_vectors_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 32)

    def score(at_query, at_key):
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([[p]]), 32, 1024.0)) for x, p in ((q, at_query), (k, at_key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(1005, 1000) == pytest.approx(score(5, 0), abs=2e-3)
    assert score(36005, 36000) == pytest.approx(score(5, 0), abs=2e-2)
    assert abs(score(9, 0) - score(5, 0)) > 0.1


def test_angles_are_float32_whatever_the_dtype_of_positions_and_inputs():
    positions = torch.tensor([[900]])
    tables = rotary_tables(positions, 32, 1024.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rotary_tables(positions, 32, 1024.0)
        turned = apply_rotary(torch.ones(1, 1, 1, 32, dtype=torch.bfloat16), *inside)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(tables, inside, strict=True))
    expected = rotated_by_complex_numbers(torch.ones(1, 1, 1, 32), positions, 1024.0)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.double(), expected, atol=1e-2, rtol=0)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 128, 130, 200])
def test_linear_attention_is_the_decayed_sum_over_all_pairs(function, state, length):
    agreement(function, length, state)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("state", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (30, [[0, 9], [0, 18, 27]]),
        (65, [[0, 64], [0, 1]]),
        (130, [[0, 63, 64, 65, 128], [0]]),
        (200, [[0, 3, 66, 67, 190], [0, 100]]),
        (192, [[0, 64, 128], [0, 128]]),
    ],
)
def test_each_mesh_of_a_row_starts_from_nothing(function, state, length, starts):
    agreement(function, length, state, starts)


@pytest.mark.parametrize("starts", [None, [[0, 1000, 4096]], [[0, 64, 4095, 4160]]])
def test_rows_of_more_than_64_chunks_are_taken_in_groups(starts):
    length = 4200
    assert length > CHUNK_SIZE * CHUNK_SIZE
    q, k, v, initial = random_inputs(1, length, 1, 4)
    # a decay so slow that the first chunk still counts in the last
    slopes = torch.tensor([2.0**-11])
    bounds = None if starts is None else bounds_from(starts, length)
    results = []
    for compute in (attention_formula, chunked_linear_attention):
        output, last = compute(q, k, v, slopes, initial, bounds)
        loss = (output * torch.linspace(-1, 2, length).view(1, -1, 1, 1)).sum() + last.square().sum()
        results.append([output, last, *torch.autograd.grad(loss, [q, k, v, initial])])
    for expected, value in zip(*results, strict=True):
        assert relative_error(value, expected) < 5e-6


def test_a_state_of_an_early_chunk_reaches_the_last_of_many():
    q, k, v, _ = random_inputs(1, 4200, 1, 4, requires_grad=False)
    slopes = torch.tensor([2.0**-11])
    changed = k.clone()
    changed[:, 10] += 5
    outputs = [chunked_linear_attention(q, keys, v, slopes)[0] for keys in (k, changed)]
    difference = torch.linalg.vector_norm(outputs[0] - outputs[1], dim=(0, 2, 3))
    assert (difference[:10] == 0).all()
    assert difference[4100:].mean() > 0.1


@pytest.mark.parametrize("function", PLAIN)
def test_a_row_may_be_given_in_pieces(function):
    q, k, v, state = random_inputs(2, 300, 3, 8, requires_grad=False)
    slopes = SLOPES
    whole, last = function(q, k, v, slopes, state)
    pieces, first = [], 0
    for length in (1, 64, 70, 2, 100, 63):
        part = slice(first, first + length)
        output, state = function(q[:, part], k[:, part], v[:, part], slopes, state)
        pieces.append(output)
        first += length
    assert first == 300
    assert relative_error(torch.cat(pieces, dim=1), whole) < 2e-6
    assert relative_error(state, last) < 2e-6


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("length", [3, 64, 150])
def test_no_result_comes_from_memory_that_was_never_written(function, length):
    q, k, v, state = random_inputs(2, length, 3, 8, requires_grad=False)
    bounds = bounds_from([[0, 2], [0]], length)
    expected = function(q, k, v, SLOPES, state, bounds)
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        value = function(q, k, v, SLOPES, state, bounds)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(value, expected, strict=True))


@pytest.mark.parametrize("function", PLAIN)
def test_decays_far_below_the_smallest_number_give_zeros_and_finite_gradients(function):
    q, k, v, state = random_inputs(1, 300, 2, 4)
    output, last = function(q, k, v, torch.tensor([40.0, 0.9]), state)
    gradients = torch.autograd.grad(output.sum() + last.sum(), [q, k, v, state])
    assert all(x.isfinite().all() for x in (output, last, *gradients))
    expected, _ = attention_formula(q, k, v, torch.tensor([40.0, 0.9]), state)
    assert relative_error(output, expected) < 2e-6


@pytest.mark.parametrize("name", ["eager", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_state_is_float32_and_exact_for_half_precision_inputs(name, dtype, autocast):
    q, k, v, _ = (x.to(dtype) for x in random_inputs(2, 150, 3, 8, requires_grad=False))
    slopes = SLOPES
    state, outputs = None, []
    with torch.autocast("cpu", dtype, enabled=autocast):
        for part in (slice(0, 149), slice(149, 150)):
            output, state = linear_attention(q[:, part], k[:, part], v[:, part], slopes, state, implementation=name)
            assert state.dtype == torch.float32
            outputs.append(output)
    expected, last = attention_formula(q, k, v, slopes)
    assert relative_error(state, last) < 2e-6
    assert relative_error(torch.cat(outputs, dim=1), expected) < (2e-6 if outputs[0].dtype == torch.float32 else 5e-3)


def test_the_default_on_a_cpu_is_the_chunked_implementation():
    q, k, v, state = random_inputs(1, 100, 3, 8, requires_grad=False)
    slopes = SLOPES
    chosen = linear_attention(q, k, v, slopes, state)
    for value, expected in zip(chosen, chunked_linear_attention(q, k, v, slopes, state), strict=True):
        assert torch.equal(value, expected)
    assert not torch.equal(chosen[0], recurrent_linear_attention(q, k, v, slopes, state)[0])


@pytest.mark.parametrize("name", ["auto", "eager", "chunked"])
def test_a_single_item_is_the_recurrence_itself(name):
    q, k, v, state = random_inputs(2, 1, 3, 8, requires_grad=False)
    slopes = SLOPES
    output, last = linear_attention(q, k, v, slopes, state, implementation=name)
    expected = torch.exp(-slopes)[:, None, None] * state + k.view(2, 3, 8, 1) * v.view(2, 3, 1, 8)
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(output.view(2, 3, 1, 8), q.view(2, 3, 1, 8) @ expected)


PACKAGES = [("fla", "flash-linear-attention"), ("lightning_attn", "lightning-attn"), ("triton", "triton")]


@pytest.mark.parametrize(("name", "package"), PACKAGES)
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        check_linear_attention_implementation(name)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        small_model(linear_attn_implementation=name)
    q, k, v, _ = random_inputs(1, 5, 3, 8)
    if name == "triton":  # which its module looks for once
        return
    direct = {"fla": fla_linear_attention, "lightning_attn": lightning_linear_attention}[name]
    with pytest.raises(ImportError, match=f"pip install {package}"):
        direct(q, k, v, SLOPES)


@pytest.mark.parametrize("name", ["auto", "eager", "chunked"])
def test_what_needs_no_package_is_always_available(name):
    check_linear_attention_implementation(name)


@pytest.mark.parametrize(("name", "package"), PACKAGES)
def test_a_gpu_package_is_not_run_on_a_cpu(monkeypatch, tmp_path, name, package):
    module = types.ModuleType(name)
    module.__spec__ = types.SimpleNamespace(name=name)
    monkeypatch.setitem(sys.modules, name, module)
    small_model().save_pretrained(tmp_path)
    model = IFlameForCausalLM.from_pretrained(tmp_path, linear_attn_implementation=name)
    with pytest.raises(ValueError, match=f"'{name}' runs on a GPU only"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=f"'{name}' runs on a GPU only"):
        model.generate(max_new_tokens=2)


@pytest.mark.parametrize("function", PLAIN)
@pytest.mark.parametrize("starts", [None, [[0, 70], [0, 9, 150]]])
@pytest.mark.parametrize("length", [2, 64, 200])
def test_without_the_final_state_outputs_and_gradients_are_the_same(function, starts, length):
    starts = None if starts is None else [[item for item in row if item < length] for row in starts]
    bounds = None if starts is None else bounds_from(starts, length)
    q, k, v, state = random_inputs(2, length, 3, 8)
    results = []
    for need_state in (True, False):
        output, last = function(q, k, v, SLOPES, state, bounds, need_state)
        assert (last is not None) == need_state
        gradients = torch.autograd.grad(output.square().sum(), [q, k, v, state])
        results.append([output, *gradients])
    for value, expected in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("step", [recurrent_linear_attention_step, linear_attention_step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_writes_its_state_in_place_and_is_the_recurrence(step, dtype):
    q, k, v, state = random_inputs(2, 5, 3, 8, requires_grad=False)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    expected, last = recurrent_linear_attention(q, k, v, SLOPES, state)
    written = state.clone()
    outputs = [step(*(x[:, t : t + 1] for x in (q, k, v)), SLOPES, written) for t in range(5)]
    assert torch.equal(torch.cat(outputs, dim=1), expected) and torch.equal(written, last)


@pytest.fixture
def stand_in_for_fla(monkeypatch):
    """chunk_simple_gla as its documentation tells, computed by the formula."""

    def chunk_simple_gla(
        q, k, v, g_gamma, scale, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None
    ):
        assert scale == 1.0 and (g_gamma < 0).all()
        if cu_seqlens is None:
            output, last = attention_formula(q, k, v, -g_gamma, initial_state)
            return output, last if output_final_state else None
        assert q.shape[0] == 1 and cu_seqlens.dtype == torch.int32 and initial_state is None
        assert cu_seqlens[0] == 0 and cu_seqlens[-1] == q.shape[1] and (cu_seqlens.diff() > 0).all()
        assert torch.equal(cu_seqlens, cu_seqlens_cpu)
        parts = [
            attention_formula(q[:, a:b], k[:, a:b], v[:, a:b], -g_gamma)
            for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        ]
        last = torch.cat([state for _, state in parts]) if output_final_state else None
        return torch.cat([output for output, _ in parts], dim=1), last

    for name in ("fla", "fla.ops", "fla.ops.simple_gla"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["fla.ops.simple_gla"].chunk_simple_gla = chunk_simple_gla


@pytest.fixture
def stand_in_for_lightning_attn(monkeypatch):
    def lightning_attn_func(q, k, v, s):
        assert s.shape == (q.shape[1], 1, 1) and all(x.is_contiguous() for x in (q, k, v))
        return attention_formula(*(x.transpose(1, 2) for x in (q, k, v)), s.flatten())[0].transpose(1, 2)

    for name in ("lightning_attn", "lightning_attn.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lightning_attn.ops"].lightning_attn_func = lightning_attn_func


def check_package(function, with_state=False, starts=None):
    q, k, v, state = random_inputs(2, 100, 3, 32, requires_grad=False)
    state = state if with_state else None
    bounds = None if starts is None else bounds_from(starts, 100)
    value = function(q, k, v, SLOPES, state, bounds)
    expected = attention_formula(q, k, v, SLOPES, state, bounds)
    assert all(relative_error(a, b) < 5e-6 for a, b in zip(value, expected, strict=True))
    output, last = function(q, k, v, SLOPES, state, bounds, need_state=False)
    assert last is None and relative_error(output, expected[0]) < 5e-6


@pytest.mark.parametrize(
    ("with_state", "starts"), [(False, None), (True, None), (False, [[0, 18, 90], [0]]), (False, [[0], [0, 9]])]
)
def test_fla_is_asked_for_the_same_operator(stand_in_for_fla, with_state, starts):
    check_package(fla_linear_attention, with_state, starts)


def test_lightning_attn_is_asked_for_the_same_operator(stand_in_for_lightning_attn):
    check_package(lightning_linear_attention)


def call(device="cuda", size=32, length=90, has_state=False, several=False, compiled=False):
    bounds = bounds_from([[0, 9]], length) if several else None
    if compiled:
        bounds = MeshBounds(bounds.meshes)
    return LinearAttentionCall(device, size, length, has_state, bounds)


@pytest.mark.parametrize(
    ("installed", "arguments", "chosen"),
    [
        ("triton fla lightning_attn chunked", {}, "triton"),
        ("triton fla lightning_attn chunked", {"several": True, "has_state": True, "compiled": True}, "triton"),
        ("triton fla lightning_attn chunked", {"size": 192}, "fla"),
        ("triton chunked", {"device": "cpu"}, "chunked"),
        ("fla lightning_attn chunked", {}, "lightning_attn"),
        ("fla lightning_attn chunked", {"several": True}, "fla"),
        ("fla lightning_attn chunked", {"has_state": True}, "fla"),
        ("fla lightning_attn chunked", {"has_state": True, "several": True}, "chunked"),
        ("fla lightning_attn chunked", {"several": True, "compiled": True}, "chunked"),
        ("fla lightning_attn chunked", {"size": 16}, "fla"),
        ("fla lightning_attn chunked", {"length": 1, "has_state": True}, "fla"),
        ("fla lightning_attn chunked", {"device": "cpu"}, "chunked"),
        ("lightning_attn chunked", {"several": True}, "chunked"),
        ("lightning_attn chunked", {"has_state": True}, "chunked"),
        ("lightning_attn chunked", {"size": 16}, "chunked"),
        ("fla chunked", {}, "fla"),
        ("chunked", {}, "chunked"),
    ],
)
def test_auto_is_on_a_gpu_the_first_that_is_installed_and_can_do_the_call(monkeypatch, installed, arguments, chosen):
    monkeypatch.setattr(implementations_iflame, "_is_installed", lambda name: name in installed.split())
    monkeypatch.setattr(implementations_iflame, "why_no_kernels", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_linear_attention("auto", call(**arguments)) == chosen


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("lightning_attn", {"several": True}, "one mesh a row"),
        ("lightning_attn", {"has_state": True}, "begins without a state"),
        ("fla", {"several": True, "has_state": True}, "a state for every mesh"),
        ("fla", {"several": True, "compiled": True}, "where meshes begin"),
    ],
)
def test_what_an_implementation_cannot_do_is_chunked_and_said(name, arguments, reason):
    with pytest.warns(UserWarning, match=f"{reason}.*'chunked'"):
        assert choose_linear_attention(name, call(**arguments)) == "chunked"


@pytest.mark.parametrize("name", ["eager", "chunked", "fla", "lightning_attn"])
def test_the_step_of_an_implementation_is_its_own_unless_a_mesh_begins(name):
    assert choose_linear_attention(name, call(length=1, has_state=True)) == name
    assert choose_linear_attention(name, call(length=1)) == "eager"


def test_triton_refuses_heads_that_are_too_large_for_its_kernels_and_takes_every_other_call(monkeypatch):
    monkeypatch.setattr(implementations_iflame, "why_no_kernels", lambda: None)
    with pytest.raises(ValueError, match=r"up to 128 channels, and hidden_size / num_attention_heads is 192"):
        choose_linear_attention("triton", call(size=192))
    with pytest.raises(ValueError, match="does not run on a mps device"):
        choose_linear_attention("triton", call(device="mps"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_linear_attention("triton", call(several=True, has_state=True, compiled=True)) == "triton"


class NoCompiler:
    """What stands for Triton where it cannot build what it needs."""

    class runtime:
        class driver:
            @property
            def active(self):
                raise RuntimeError("Failed to find C compiler. Please specify via CC\nor else.")

    runtime.driver = runtime.driver()


@pytest.mark.parametrize(("triton", "reason"), [(NoCompiler, "Failed to find C compiler"), (None, "pip install")])
def test_where_triton_cannot_run_auto_takes_what_can_and_triton_says_why(monkeypatch, triton, reason):
    monkeypatch.setattr(kernels_iflame, "triton", triton)
    monkeypatch.setattr(implementations_iflame, "_is_installed", lambda name: name in ("triton", "chunked"))
    kernels_iflame._fault_of_triton.cache_clear()
    try:
        with pytest.warns(match=f"slower: .*{reason}") if triton else nullcontext():
            assert choose_linear_attention("auto", call()) == "chunked"
        with pytest.raises(ValueError, match=f"'triton' cannot run, because of .*{reason}"):
            choose_linear_attention("triton", call())
    finally:
        kernels_iflame._fault_of_triton.cache_clear()


def test_lightning_attn_refuses_head_sizes_that_its_kernel_does():
    with pytest.raises(ValueError, match=r"sizes \(32, 64, 128\), and hidden_size / num_attention_heads is 16"):
        choose_linear_attention("lightning_attn", call(size=16))
