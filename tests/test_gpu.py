"""On a CUDA device every implementation computes what attention spelled out and the recurrence compute in float32."""

import importlib.util
import sys
import warnings

import pytest
import torch
from gpu_packages import FLASH_2, FLASH_4
from small_models import BOS, EOS, mesh_rows, relative_error, small_model
from torch.nn import functional as F

from iflame_hf import StaticIFlameCache, linear_kernels_iflame
from iflame_hf.implementations_iflame import fla_linear_attention, lightning_linear_attention
from iflame_hf.layout_iflame import RowLayout
from iflame_hf.linear_kernels_iflame import triton_linear_attention
from iflame_hf.ops_iflame import alibi_slopes, recurrent_linear_attention
from iflame_hf.states_iflame import RecurrentState
from training.optim.average import MovingAverage
from training.optim.groups import create_optimizer
from training.run.results import StepResult

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# lightning-attn rejects heads of 4, 8 and 16.
SIZES = {"hidden_size": 128, "heads": 4}
# Three chunks of 64 items at the coordinates, a part of one at the faces.
FACES = 25


def installed(package, name):
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{name} is not installed")


LIGHTNING = installed("lightning_attn", "lightning-attn")
FLA = installed("fla", "flash-linear-attention")
PAIRS = [
    pytest.param("sdpa", "chunked"),
    pytest.param("sdpa", "triton"),
    pytest.param("sdpa", "lightning_attn", marks=LIGHTNING),
    pytest.param("sdpa", "fla", marks=FLA),
    pytest.param("flash_attention_2", "chunked", marks=FLASH_2),
    pytest.param("flash_attention_2", "fla", marks=[FLASH_2, FLA]),
    pytest.param("flash_attention_4", "triton", marks=FLASH_4),
]
# flex_attention is compiled anew for each length, so it is tested where its masks are.
PAIRS_AND_FLEX = [*PAIRS, pytest.param("flex_attention", "chunked")]
OPERATORS = [
    pytest.param(triton_linear_attention, id="triton"),
    pytest.param(lightning_linear_attention, id="lightning_attn", marks=LIGHTNING),
    pytest.param(fla_linear_attention, id="fla", marks=FLA),
]
# Triton multiplies float32 operands as tf32, of 11 bits; bfloat16 has 8.
OPERATOR_ERRORS = {torch.float32: 3e-3, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="module", autouse=True)
def few_variants_of_each_kernel():
    """flash-linear-attention tries up to 48 variants of a kernel, for minutes; here any that is right will do."""
    if importlib.util.find_spec("fla") is None or not torch.cuda.is_available():
        return
    import fla.ops.simple_gla  # noqa: F401
    from triton.runtime.autotuner import Autotuner

    for name, module in list(sys.modules.items()):
        if name.startswith("fla.ops"):
            for kernel in list(vars(module).values()):
                while hasattr(kernel, "fn"):
                    if isinstance(kernel, Autotuner):
                        kernel.configs = kernel.configs[:2]
                    kernel = kernel.fn


@pytest.fixture(autouse=True)
def without_what_earlier_tests_compiled():
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="lightning_attn computes one mesh a row")
        yield


def model_with(attention, linear_attention, dtype=torch.float32, device=DEVICE, seed=0):
    model = small_model(seed, **SIZES).to(device, dtype)
    model.set_attn_implementation(attention)
    model.config.linear_attn_implementation = linear_attention
    return model


def rows_of(faces=FACES, seed=0, end=False):
    return mesh_rows(2, faces, seed=seed, end=end).to(DEVICE)


@torch.no_grad()
def logits_of(model, input_ids, **inputs):
    return model(input_ids, use_cache=False, **inputs).logits


def gradients_of(model, input_ids, dtype, run=None):
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        labels = input_ids.masked_fill(input_ids == BOS, -100)
        loss = (model if run is None else run)(input_ids, labels=labels, use_cache=False).loss
    assert loss.isfinite()
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture(scope="module")
def oracle():
    return model_with("eager", "eager")


@pytest.fixture(scope="module")
def logits_error(oracle):
    """Twice what the plainest computation loses in bfloat16."""
    rounded = logits_of(model_with("eager", "eager", torch.bfloat16), rows_of())
    return 2 * relative_error(rounded, logits_of(oracle, rows_of()))


@pytest.fixture(scope="module")
def gradients_error(oracle):
    exact = gradients_of(oracle, rows_of(), torch.float32)
    return 2 * relative_error(gradients_of(oracle, rows_of(), torch.bfloat16), exact)


def test_the_allowed_errors_are_those_of_a_short_type_and_not_of_anything(logits_error, gradients_error):
    assert 1e-3 < logits_error < 0.2 and 1e-3 < gradients_error < 0.4


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS_AND_FLEX)
def test_logits_in_bfloat16_are_the_oracles(oracle, logits_error, attention, linear_attention):
    model = model_with(attention, linear_attention, torch.bfloat16)
    assert relative_error(logits_of(model, rows_of()), logits_of(oracle, rows_of())) < logits_error


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_logits_in_float32_are_the_oracles_to_four_digits(oracle, attention):
    model = model_with(attention, "chunked")
    # torch's compiled flex attention multiplies float32 as tf32 unless it is told otherwise.
    allowed = 1e-4 if attention == "sdpa" else 2e-2
    assert relative_error(logits_of(model, rows_of()), logits_of(oracle, rows_of())) < allowed


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
@torch.no_grad()
def test_a_prefill_that_ends_inside_a_face_and_steps_give_the_oracles_logits(
    oracle, logits_error, attention, linear_attention
):
    model, input_ids = model_with(attention, linear_attention, torch.bfloat16), rows_of()
    output = model(input_ids[:, :204], use_cache=True)
    pieces = [output.logits]
    for token in input_ids[:, 204:].split(1, dim=1):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    assert output.past_key_values.get_seq_length() == input_ids.shape[1]
    assert relative_error(torch.cat(pieces, dim=1), logits_of(oracle, input_ids)) < logits_error


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS_AND_FLEX)
def test_the_gradients_of_a_training_step_are_the_oracles(oracle, gradients_error, attention, linear_attention):
    model = model_with(attention, linear_attention).train()
    exact = gradients_of(oracle, rows_of(), torch.float32)
    assert relative_error(gradients_of(model, rows_of(), torch.bfloat16), exact) < gradients_error


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
def test_training_steps_lower_the_loss(attention, linear_attention):
    model = model_with(attention, linear_attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    input_ids, losses = rows_of(end=True), []
    for _ in range(6):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(input_ids, labels=input_ids.masked_fill(input_ids == BOS, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS_AND_FLEX)
def test_a_packed_row_gives_each_of_its_meshes_the_oracles_logits(oracle, logits_error, attention, linear_attention):
    meshes = [rows_of(faces, seed=faces, end=True) for faces in (7, 15, 1)]
    positions = torch.cat([torch.arange(mesh.shape[1], device=DEVICE) for mesh in meshes]).expand(2, -1)
    model = model_with(attention, linear_attention, torch.bfloat16)
    packed = logits_of(model, torch.cat(meshes, dim=1), position_ids=positions)
    for mesh, logits in zip(meshes, packed.split([mesh.shape[1] for mesh in meshes], dim=1), strict=True):
        assert relative_error(logits, logits_of(oracle, mesh)) < logits_error


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS_AND_FLEX)
@torch.no_grad()
def test_padding_on_the_left_changes_neither_logits_nor_the_steps_after_it(
    oracle, logits_error, attention, linear_attention
):
    model, prompt, padding = model_with(attention, linear_attention, torch.bfloat16), rows_of(8), 27
    mask = torch.ones_like(prompt)
    mask[0, :padding] = 0
    short = prompt[:1, : prompt.shape[1] - padding]
    padded = torch.cat([F.pad(short, (padding, 0), value=model.config.pad_token_id), prompt[1:]])
    tokens = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=40, eos_token_id=None, mesh_grammar=False
    )
    output = model(padded, attention_mask=mask, use_cache=True)
    pieces = [output.logits]
    for index in range(padded.shape[1], tokens.shape[1]):
        mask = F.pad(mask, (0, 1), value=1)
        token = tokens[:, index : index + 1]
        output = model(token, attention_mask=mask, past_key_values=output.past_key_values, use_cache=True)
        pieces.append(output.logits)
    logits = torch.cat(pieces, dim=1)
    assert relative_error(logits[:1, padding:], logits_of(oracle, tokens[:1, padding:])) < logits_error
    assert relative_error(logits[1:], logits_of(oracle, tokens[1:])) < logits_error


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
def test_generate_gives_tokens_that_are_likeliest_for_the_oracle(oracle, logits_error, attention, linear_attention):
    model, prompt = model_with(attention, linear_attention, torch.bfloat16), rows_of(3)[:, :31]
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=60, eos_token_id=None, mesh_grammar=False)
    assert tokens.shape == (2, 91) and torch.equal(tokens[:, :31], prompt)
    logits = logits_of(oracle, tokens[:, :-1])[:, 30:]
    lost = logits.amax(dim=-1) - logits.gather(-1, tokens[:, 31:, None]).squeeze(-1)
    assert lost.max() < 8 * logits_error * logits.square().mean().sqrt()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_greedy_tokens_in_float32_are_those_of_the_cpu(attention):
    def tokens_on(device):
        # With these weights the two likeliest tokens are never closer than 0.02.
        model = model_with(attention, "chunked", device=device, seed=7)
        return model.generate(
            do_sample=False, max_new_tokens=90, eos_token_id=None, mesh_grammar=False, cache_implementation="dynamic"
        ).tolist()

    expected = tokens_on("cpu")
    assert len(expected[0]) == 99 and len(set(expected[0])) > 10
    assert tokens_on(DEVICE) == expected


def test_sampling_ends_at_the_end_face_or_at_the_length_asked_for():
    model = model_with("sdpa", "auto", torch.bfloat16)
    tokens = model.generate(do_sample=True, num_return_sequences=3, max_new_tokens=45)
    assert tokens.shape[0] == 3 and 9 < tokens.shape[1] <= 54
    assert (tokens[:, :9] == BOS).all() and ((tokens >= 0) & (tokens <= EOS)).all()


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
def test_generate_does_not_compile_the_model_unasked(attention, linear_attention):
    model = model_with(attention, linear_attention, torch.bfloat16)
    model.generate(do_sample=False, max_new_tokens=20, cache_implementation="dynamic")
    assert not hasattr(model, "_compiled_call")


def test_no_step_waits_for_a_plan_that_fits_one_length_only():
    # cuDNN's attention, which torch prefers on some GPUs, builds one for each.
    model = model_with("sdpa", "chunked", torch.bfloat16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        model.generate(do_sample=False, max_new_tokens=20, eos_token_id=None, cache_implementation="dynamic")
    attention = {event.key for event in profile.key_averages() if "scaled_dot_product" in event.key}
    assert attention and not any("cudnn" in name for name in attention), attention


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
@torch.no_grad()
def test_recurrent_states_stay_in_float32(attention, linear_attention):
    model = model_with(attention, linear_attention, torch.bfloat16)
    cache = model(rows_of(), use_cache=True).past_key_values
    model(rows_of()[:, :1], past_key_values=cache, use_cache=True)
    states = [layer.state for layer in cache.layers if isinstance(layer, RecurrentState)]
    assert len(states) == model.config.layer_types.count("linear_attention") > 0
    assert all(state.dtype == torch.float32 and state.isfinite().all() for state in states)


@pytest.mark.parametrize("linear_attention", ["chunked", "triton"])
def test_a_compiled_training_step_has_no_graph_break_and_the_same_gradients(linear_attention):
    model = model_with("sdpa", linear_attention).train()
    compiled = torch.compile(model, fullgraph=True)
    expected = gradients_of(model, rows_of(), torch.float32)
    assert relative_error(gradients_of(model, rows_of(), torch.float32, compiled), expected) < 1e-3


@pytest.mark.parametrize(
    ("attention", "linear_attention"),
    [
        pytest.param("sdpa", "lightning_attn", marks=LIGHTNING),
        pytest.param("flash_attention_2", "fla", marks=[FLASH_2, FLA]),
    ],
)
def test_a_compiled_training_step_has_the_oracles_gradients(oracle, gradients_error, attention, linear_attention):
    model = model_with(attention, linear_attention).train()
    exact = gradients_of(oracle, rows_of(), torch.float32)
    found = gradients_of(model, rows_of(), torch.bfloat16, torch.compile(model))
    assert relative_error(found, exact) < gradients_error


def operands(dtype, batch=2, length=201, heads=4, size=32):
    random = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, length, heads, size)
    q, k, v = (torch.randn(shape, generator=random, device=DEVICE).to(dtype).requires_grad_() for _ in range(3))
    state = torch.randn(batch, heads, size, size, generator=random, device=DEVICE)
    # The third mesh of the first row lies within one chunk; the rows have different bounds.
    begins = torch.zeros(2, 201, dtype=torch.bool)
    begins[[0, 0, 0, 0, 1, 1, 1, 1], [63, 100, 111, 190, 9, 18, 128, 200]] = True
    bounds = RowLayout.of_begins(begins, 201, (1,)).to(DEVICE).bounds()
    return q, k, v, state, bounds


@pytest.mark.parametrize("dtype", list(OPERATOR_ERRORS), ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", ["plain", "from a state", "several meshes in a row", "shorter than a chunk"])
def test_an_operator_gives_the_recurrences_outputs_state_and_gradients(operator, case, dtype):
    q, k, v, state, bounds = operands(dtype, length=20 if case == "shorter than a chunk" else 201)
    if operator is lightning_linear_attention and case in ("from a state", "several meshes in a row"):
        pytest.skip("lightning_attn knows neither")
    state = state.requires_grad_() if case == "from a state" else None
    bounds = bounds if case == "several meshes in a row" else None
    slopes = alibi_slopes(4, DEVICE)
    inputs = [q, k, v] + ([state] if state is not None else [])

    def outputs_and_gradients(function):
        output, final = function(q, k, v, slopes, state, bounds)
        assert final.dtype == torch.float32
        return output, final, *torch.autograd.grad(output.float().square().mean() + final.square().mean(), inputs)

    found, expected = outputs_and_gradients(operator), outputs_and_gradients(recurrent_linear_attention)
    names = ["output", "state", "q", "k", "v", "initial state"]
    errors = {name: relative_error(x, y) for name, x, y in zip(names, found, expected, strict=False)}
    assert len(errors) == 2 + len(inputs)
    assert all(error < OPERATOR_ERRORS[dtype] for error in errors.values()), errors


@pytest.mark.parametrize("size", [16, 24, 32, 64, 128])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.float16, 3e-3), (torch.bfloat16, 1.5e-2)])
@pytest.mark.parametrize("segments", [1, 3, None])
def test_our_kernels_take_every_size_and_type_and_give_the_same_numbers_in_every_run(
    monkeypatch, size, dtype, error, segments
):
    if segments is not None:  # of many chunks each; of few rows a GPU gets segments of one
        monkeypatch.setattr(linear_kernels_iflame, "_segments", lambda like: segments)
    random = torch.Generator(DEVICE).manual_seed(0)
    inputs = [torch.randn(2, 900, 3, size, generator=random, device=DEVICE).to(dtype) for _ in range(3)]
    inputs.append(torch.randn(2, 3, size, size, generator=random, device=DEVICE))
    begins = torch.zeros(2, 900, dtype=torch.bool)
    begins[[0, 0, 0, 1], [63, 64, 500, 200]] = True
    bounds = RowLayout.of_begins(begins, 900, (1,)).to(DEVICE).bounds()

    def results(function):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output, final = function(*leaves[:3], alibi_slopes(3, DEVICE), leaves[3], bounds)
        loss = output.float().square().mean() + final.square().mean()
        return [output, final, *torch.autograd.grad(loss, leaves)]

    found, expected = results(triton_linear_attention), results(recurrent_linear_attention)
    assert all(relative_error(x, y) < error for x, y in zip(found, expected, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found, results(triton_linear_attention), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_our_kernels_run_on_the_device_of_their_inputs():
    inputs = [torch.randn(2, 100, 3, 32, device="cuda:1") for _ in range(3)]
    found, _ = triton_linear_attention(*inputs, alibi_slopes(3, "cuda:1"))
    expected, _ = recurrent_linear_attention(*inputs, alibi_slopes(3, "cuda:1"))
    assert found.device == inputs[0].device and relative_error(found, expected) < 2e-5


def packed_batch():
    """Two rows of random meshes on the device, with the layout that a packer makes on the host."""
    begins = torch.zeros(2, 25, dtype=torch.bool)
    begins[[0, 0, 1, 1], [7, 19, 3, 4]] = True
    layout = RowLayout.of_begins(begins, 225, (1, 3, 9)).pin_memory().to(DEVICE, non_blocking=True)
    return {"input_ids": rows_of(24), "labels": rows_of(24), "layout": layout}


def waits_of(function):
    """How often the host waits for the device while a function runs."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [str(each.message) for each in caught if "synchronizing CUDA operation" in str(each.message)]


@pytest.mark.parametrize(
    ("attention", "linear_attention"), [("sdpa", "chunked"), ("sdpa", "triton"), ("flex_attention", "chunked")]
)
def test_a_training_step_on_packed_rows_does_not_wait_for_the_device(attention, linear_attention):
    model = model_with(attention, linear_attention).train()
    optimizer = create_optimizer(model, "muon", 1e-3, 0.1, fused=True)
    batch = packed_batch()
    results = []

    def step():
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        found = torch.stack([norm, loss.detach()])
        optimizer.found_inf = (~found.isfinite().all()).float()
        optimizer.step()
        optimizer.zero_grad()
        results.append(StepResult(1, 1, loss.detach(), found))

    step()
    assert 0 < results[0].read()[1] < 20
    assert waits_of(step) == []
    assert waits_of(lambda: model(batch["input_ids"], position_ids=batch["layout"].positions(), use_cache=False))


def test_an_update_of_the_moving_average_does_not_wait_for_the_device():
    model = small_model().to(DEVICE)
    average = MovingAverage(model, 0.9, DEVICE)
    for _ in range(2):  # the first copies, later ones average
        assert waits_of(lambda: average.update_parameters(model)) == []


@pytest.mark.parametrize(("attention", "linear_attention"), PAIRS)
def test_logits_of_a_layout_are_those_of_positions(attention, linear_attention):
    model, batch = model_with(attention, linear_attention, torch.bfloat16), packed_batch()
    expected = logits_of(model, batch["input_ids"], position_ids=batch["layout"].positions())
    assert torch.equal(logits_of(model, batch["input_ids"], layout=batch["layout"]), expected)


@torch.no_grad()
def test_the_callers_choice_of_an_attention_kernel_holds_also_with_a_cache():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = model_with("sdpa", "chunked", torch.bfloat16)

    def attention_of(*backends):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            if backends:
                with sdpa_kernel(list(backends)):
                    model.generate(do_sample=False, max_new_tokens=9, cache_implementation="dynamic")
            else:
                model.generate(do_sample=False, max_new_tokens=9, cache_implementation="dynamic")
        return " ".join(event.key for event in profile.key_averages() if "scaled_dot_product" in event.key)

    assert "efficient" in attention_of(SDPBackend.EFFICIENT_ATTENTION)
    assert "math" in attention_of(SDPBackend.MATH)
    assert "flash" in attention_of(SDPBackend.FLASH_ATTENTION) and "flash" in attention_of()


@torch.no_grad()
def test_the_steps_of_a_face_are_captured_once_and_replayed_on_a_static_cache():
    model = model_with("sdpa", "chunked")
    rows = rows_of(8)
    expected = logits_of(model, rows)
    cache = StaticIFlameCache(model.config, max_faces=12, batch_size=2, device=DEVICE)
    tokens = torch.zeros(2, 9, dtype=torch.long, device=DEVICE)

    def face():
        parts = [model(tokens[:, place : place + 1], past_key_values=cache).logits for place in range(9)]
        return torch.cat(parts, dim=1)

    model(rows[:, :9], past_key_values=cache)
    tokens.copy_(rows[:, 9:18])
    face()  # on a warm cache, as every later one
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tokens.copy_(rows[:, 18:27])
        logits = face()
    torch.cuda.current_stream().wait_stream(stream)
    assert relative_error(logits, expected[:, 18:27]) < 1e-3
    with torch.cuda.graph(graph):
        logits = face()
    for first in range(27, 81, 9):
        tokens.copy_(rows[:, first : first + 9])
        graph.replay()
        assert relative_error(logits, expected[:, first : first + 9]) < 1e-3
