"""The benchmarks time only what is right, say what they timed, and stand in for packages the original lacks."""

import json
import sys
import time

import pytest
import torch
from small_models import small_model

from benchmarks import bench_attention, bench_generate, bench_loader, bench_train, common, reference
from benchmarks.models import draw_models, mesh_labels
from benchmarks.oracle import Oracle, WrongResult, require_close
from iflame_hf import IFlameConfig
from iflame_hf.engine_iflame import DecodeEngine, Types
from iflame_hf.implementations_iflame import IMPLEMENTATIONS
from iflame_hf.ops_iflame import recurrent_linear_attention, recurrent_linear_attention_step
from training.convert_checkpoint import BLOCK_NAMES, OTHER_NAMES, SKIP_WEIGHTS, STAGES
from training.rows.pack import pack

CPU = torch.device("cpu")
SIZES = (
    "--device cpu --hidden_size 32 --num_attention_heads 4 --stage_layers 1 1 2 1 1 --batch_size 2 --repeats 1".split()
)
GENERATE = [*SIZES, "--loop", "engine", "--new_tokens", "11", "--prompt_faces", "2", "--warmup_tokens", "3"]
TRAIN = [*SIZES, "--faces", "5", "--warmup", "1"]
FACTS = {"machine", "gpu", "torch", "transformers", "commit", "dtype", "batch_size", "faces", "hidden_size", "rows"}

# What the original's files must offer, made of this project's own model, with the original's names for the weights.
TRANSFORMER = """
import timm
import torch
from einops import pack, rearrange, repeat
from flash_attn import flash_attn_func
from lightning_attn.ops import lightning_attn_func
from lightning_attn.utils import _build_slope_tensor
from tqdm import tqdm

from multihead_flashdiff_2 import FACTOR
from iflame_hf import IFlameConfig, IFlameForCausalLM
from training.convert_checkpoint import convert_weights

SHAPES = {shapes}


class iFlame(torch.nn.Module):
    def __init__(self, embed_dim, num_heads, depth, num_categories, length):
        super().__init__()
        self.heads = num_heads
        self.ours = [IFlameForCausalLM(IFlameConfig(hidden_size=embed_dim, num_attention_heads=num_heads))]
        for name, shape in SHAPES.items():
            *path, leaf = name.split(".")
            owner = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, torch.nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))

    def forward(self, x):
        weights = convert_weights(dict(self.named_parameters()), self.heads)[1]
        options = dict(use_cache=False)
        return FACTOR * torch.func.functional_call(self.ours[0], weights, (x,), options).logits

    def init_kv_cache(self, batch_size, max_len, dtype):
        assert dtype == torch.float16

    def inference_step(self, x):
        return self(x)

    def reset_kv_cache(self):
        pass

    @torch.no_grad()
    def generate_sequence(self, initial_input, pc, max_seq_len, device, top_k, top_p):
        tokens = initial_input
        while tokens.shape[1] < max_seq_len:
            tokens = torch.cat([tokens, self(tokens)[:, -1:].argmax(dim=-1)], dim=1)
        return tokens.numpy()
"""


def run(capsys, main, arguments):
    """Exit status, everything printed, and the JSON of the last line."""
    status = main(arguments)
    printed = capsys.readouterr().out.rstrip("\n")
    return status, printed, json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize(("main", "arguments"), [(bench_generate.main, GENERATE), (bench_train.main, TRAIN)])
def test_a_benchmark_prints_a_table_and_then_its_conditions_and_figures_as_json(capsys, main, arguments):
    status, printed, result = run(capsys, main, [*arguments, "--linear_attn_implementation", "chunked", "eager"])
    assert status == 0 and FACTS <= result.keys()
    assert [row["model"] for row in result["rows"]] == ["iflame_hf, sdpa, chunked", "iflame_hf, sdpa, eager"]
    for row in result["rows"]:
        assert row["batch_size"] == 2 and row["dtype"] == "float32"
        assert len(row["tokens_per_second"]) == 2 and min(row["tokens_per_second"]) > 0
    assert f"torch {torch.__version__}" in printed and "tokens/s" in printed


def test_tokens_per_second_count_every_new_token_of_every_row(capsys):
    _, _, result = run(capsys, bench_generate.main, GENERATE)
    (row,) = result["rows"]
    assert row["tokens_per_second"] == pytest.approx([2 * 1000 / each for each in row["milliseconds_per_step"]])
    assert row["prefill_tokens"] == 27 and min(row["seconds_prefill"]) > 0
    _, _, result = run(capsys, bench_train.main, TRAIN)
    (row,) = result["rows"]
    assert row["row_tokens"] == 63
    assert row["tokens_per_second"] == pytest.approx([126_000 / each for each in row["milliseconds_per_step"]])


@pytest.mark.parametrize(("faces", "meshes"), [([], 2), (["--faces", "9"], 3)])
def test_attention_is_measured_by_itself_and_right_for_rows_of_one_mesh_and_of_several(capsys, faces, meshes):
    options = (
        "--device cpu --batch_size 2 --items 99 --heads 2 --head_dim 16 --repeats 1 --linear chunked eager".split()
    )
    status, printed, result = run(capsys, bench_attention.main, [*options, *faces, "--full", "math"])
    assert [row["implementation"] for row in result["rows"]] == ["chunked", "eager", "math"]
    measured = result["rows"][: 2 if faces else 3]
    for row in measured:
        assert min(row["forward_ms"]) > 0 and len(row["step_ms"]) == 2 and row["meshes"] >= meshes
    assert status == int(bool(faces))
    if faces:
        assert "knows no packed rows" in result["rows"][2]["wrong"] and "knows no packed rows" in printed


def test_attention_that_is_wrong_gets_no_figures(capsys, monkeypatch):
    def without_decay(q, k, v, slopes, *others):
        return recurrent_linear_attention(q, k, v, 0 * slopes, *others)

    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", IMPLEMENTATIONS["chunked"]._replace(function=without_decay))
    options = "--device cpu --batch_size 1 --items 99 --heads 2 --head_dim 16 --repeats 1 --linear chunked".split()
    status, _, result = run(capsys, bench_attention.main, options)
    assert status == 1 and "output: relative error" in result["rows"][0]["wrong"]
    assert "step_ms" not in result["rows"][0]


PACKED = [*SIZES, "--faces", "30", "--mesh_faces", "7", "--warmup", "1", "--optim", "muon"]


def test_steps_on_packed_rows_are_measured_with_train_pys_optimiser_and_count_their_labels(capsys):
    status, printed, result = run(capsys, bench_train.main, PACKED)
    assert status == 0, printed
    (row,) = result["rows"]
    tokens, labels = row["tokens_per_second"], row["labels_per_second"]
    assert row["row_tokens"] == 9 * 32 and result["optim"] == "muon" and row["first_step_seconds"] > 0
    # A row of 32 faces holds at least three meshes of up to 10, whose start faces are not learnt.
    assert all(0.6 < label / token <= 29 / 32 for label, token in zip(labels, tokens, strict=True))


def test_rows_are_packed_with_meshes_of_the_mean_asked_for():
    rows = bench_train.draw_rows(IFlameConfig(hidden_size=32, num_attention_heads=4), 8, 767, 205, seed=0)
    first = rows.input_ids[:, ::9]
    meshes, ends, padding = (int((first == special).sum()) for special in (130, 131, 129))
    faces = first.numel() - meshes - ends - padding
    assert rows.input_ids.shape == (8, 6921) and 195 < faces / meshes < 215
    assert (rows.input_ids == 129).float().mean() < 0.05 and rows.layout.num_meshes > 24


def forgets_where_meshes_begin(q, k, v, slopes, state=None, bounds=None, need_state=True):
    return recurrent_linear_attention(q, k, v, slopes, state, None, need_state)


def test_an_implementation_that_mixes_the_meshes_of_a_row_has_no_figures(capsys, monkeypatch):
    fault = IMPLEMENTATIONS["chunked"]._replace(function=forgets_where_meshes_begin)
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", fault)
    status, _, result = run(capsys, bench_train.main, PACKED)
    assert status == 1 and "gradients" in result["rows"][0]["wrong"]


LOADER = "--meshes 300 --row_length 6921 1818 --batch_size 3 --num_workers 0 --seconds 0.2 --warmup 0".split()


def test_the_loader_is_measured_from_both_sources_in_meshes_a_second(capsys):
    status, printed, result = run(capsys, bench_loader.main, LOADER)
    assert status == 0, printed
    assert [(row["source"], row["row_tokens"]) for row in result["rows"]] == [
        ("memory-mapped", 6921),
        ("streaming", 6921),
        ("memory-mapped", 1818),
        ("streaming", 1818),
    ]
    for row in result["rows"]:
        assert row["faces_per_mesh"] == pytest.approx(200, abs=2) and min(row["meshes_per_second"]) > 0
        whole, meshes_in_row = row["row_tokens"] // 9, row["row_tokens"] // 9 // 202
        assert row["padding"] == pytest.approx(100 * (1 - 202 * meshes_in_row / whole), abs=2)
        for meshes, tokens in zip(row["meshes_per_second"], row["tokens_per_second"], strict=True):
            assert tokens == pytest.approx(meshes * row["row_tokens"] / meshes_in_row, rel=0.02)


TWIN = [*GENERATE, "--twin", "--do_sample", "--new_tokens", "60"]


def test_a_llama_of_the_same_size_is_measured_beside_ours_for_the_same_tokens(capsys):
    status, printed, result = run(capsys, bench_generate.main, TWIN)
    assert status == 0, printed
    ours, *twins = result["rows"]
    assert [row["model"] for row in twins] == ["Llama, dynamic cache", "Llama, static cache, not compiled"]
    for row in twins:
        assert row["parameters"] == pytest.approx(ours["parameters"], rel=0.05) and not row["compiled"]
        assert (row["new_tokens"], row["prefill_tokens"]) == (60, 27) and min(row["tokens_per_second"]) > 0
        assert "state_gib" not in row
    assert ours["state_gib"] >= 0 and ours["weights_gib"] >= 0


@pytest.mark.parametrize("sample", [True, False])
def test_a_llama_whose_tokens_are_not_its_own_has_no_figures(capsys, monkeypatch, sample):
    def writes_anything(model, prompt, max_new_tokens, **options):
        return torch.cat([prompt, torch.randint(129, (len(prompt), max_new_tokens))], dim=1)

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", writes_anything)
    arguments = TWIN if sample else [argument for argument in TWIN if argument != "--do_sample"]
    status, _, result = run(capsys, bench_generate.main, arguments)
    assert status == 1 and result["rows"][0]["tokens_per_second"]
    for row in result["rows"][1:]:
        assert "its tokens: one is" in row["wrong"] and "tokens_per_second" not in row


def loses_the_last_mesh(rows, length, tokenizer, attributes=None, dtype=None):
    return pack([sequences[:-1] for sequences in rows], length, tokenizer, None, dtype)


def turns_a_face_over(rows, *arguments, **options):
    for sequences in rows:
        for sequence in sequences:
            sequence[12:18] = sequence[[15, 16, 17, 12, 13, 14]]
    return pack(rows, *arguments, **options)


@pytest.mark.parametrize("fault", [loses_the_last_mesh, turns_a_face_over])
def test_a_loader_whose_rows_are_not_the_meshes_has_no_figures(capsys, monkeypatch, fault):
    monkeypatch.setattr("training.rows.map.pack", fault)
    monkeypatch.setattr("training.rows.stream.pack", fault)
    status, _, result = run(capsys, bench_loader.main, [*LOADER, "--row_length", "6921"])
    assert status == 1
    for row in result["rows"]:
        assert "meshes are missing in an epoch, or changed" in row["wrong"] and "meshes_per_second" not in row


def decays_twice_as_fast(q, k, v, slopes, *arguments):
    return recurrent_linear_attention(q, k, v, 2 * slopes, *arguments)


def forgets_its_state(q, k, v, slopes, state):
    state.zero_()
    return recurrent_linear_attention_step(q, k, v, slopes, state)


@pytest.mark.parametrize(
    ("main", "arguments", "fault", "message"),
    [
        (bench_generate.main, GENERATE, {"function": decays_twice_as_fast}, "logits in one pass"),
        (bench_generate.main, GENERATE, {"step": forgets_its_state}, "logits of prefill and steps"),
        (bench_train.main, TRAIN, {"function": decays_twice_as_fast}, "gradients"),
    ],
)
def test_a_wrong_result_has_no_figures(capsys, monkeypatch, main, arguments, fault, message):
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", IMPLEMENTATIONS["chunked"]._replace(**fault))
    status, printed, result = run(capsys, main, [*arguments, "--linear_attn_implementation", "chunked"])
    assert status == 1
    (row,) = result["rows"]
    assert message in row["wrong"] and row["wrong"] in printed
    assert row.keys() == {"model", "dtype", "batch_size", "wrong"} | (
        row.keys() & {"new_tokens", "step", "row_tokens"}
    )


def test_a_variant_that_fails_leaves_the_others_their_figures(capsys):
    variants = ["--linear_attn_implementation", "fla", "chunked"]
    status, _, result = run(capsys, bench_generate.main, [*GENERATE, *variants])
    assert status == 1
    assert "runs on a GPU only" in result["rows"][0]["wrong"] or "flash-linear" in result["rows"][0]["wrong"]
    assert "tokens_per_second" not in result["rows"][0] and result["rows"][1]["tokens_per_second"]


def test_greedy_tokens_are_right_only_if_they_are_the_likeliest():
    models = draw_models(IFlameConfig(32 + 100, 32, 4, stage_layers=[1, 1, 2, 1, 1]), 0, None, CPU)
    oracle = Oracle(models.config, models.weights, 0)
    tokens = oracle.input_ids[:, :9]
    while tokens.shape[1] < 20:
        tokens = torch.cat([tokens, oracle.logits_of(tokens)[:, -1:].argmax(dim=-1)], dim=1)
    oracle.require_greedy(tokens, 9, 1e-4)
    tokens[1, 13] = (tokens[1, 13] + 1) % 129
    with pytest.raises(WrongResult, match="below the likeliest"):
        oracle.require_greedy(tokens, 9, 1e-2)


def test_a_value_that_is_not_a_number_is_never_close():
    expected = torch.ones(3)
    require_close("it", expected + 1e-6, expected, 1e-5)
    for wrong in (expected + 1, expected * float("nan")):
        with pytest.raises(WrongResult, match="it: relative error"):
            require_close("it", wrong, expected, 1e-5)


def test_the_clock_reports_medians_and_twice():
    pauses = iter([0.0, 0.06, 0.0] + [0.03, 0.03, 0.0])
    seconds, memory = common.measure(lambda: time.sleep(next(pauses)), CPU, 3)
    assert memory is None and len(seconds) == 2
    assert seconds[0] < 0.02 and 0.03 <= seconds[1] < 0.06


def test_labels_leave_the_start_face_out():
    rows = torch.tensor([[130] * 9 + [5] * 9 + [131] * 9])
    assert mesh_labels(rows).tolist() == [[-100] * 9 + [5] * 9 + [131] * 9]


# The original and what stands in for its packages


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 6), (3, 8)])
def test_the_stand_in_for_flash_attn_lets_the_last_query_see_all_keys(queries, keys):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 4, generator=random) for n in (queries, keys, keys))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) / 2
    age = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)
    weights = scores.masked_fill(age < 0, float("-inf")).softmax(dim=-1)
    expected = torch.einsum("bhts,bshd->bthd", weights, v.double())
    torch.testing.assert_close(reference.flash_attn_by_sdpa(q, k, v, causal=True).double(), expected)
    half = reference.flash_attn_by_sdpa(q, k.half(), v.half(), causal=True)
    assert half.dtype == torch.float32


def test_the_stand_in_for_lightning_attn_is_the_recurrence_with_its_slopes():
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 70, 8, generator=random) for _ in range(3))
    slopes = reference.slopes_by_heads(4)
    assert slopes.shape == (4, 1, 1) and slopes.flatten().tolist() == [2**-2, 2**-4, 2**-6, 2**-8]
    state, outputs = torch.zeros(2, 4, 8, 8), []
    for t in range(70):
        state = torch.exp(-slopes) * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append((q[:, :, t, None] @ state)[:, :, 0])
    torch.testing.assert_close(
        reference.lightning_attn_by_chunks(q, k, v, slopes), torch.stack(outputs, dim=2), atol=1e-4, rtol=1e-4
    )


def test_the_stand_in_for_einops_knows_the_one_pattern_and_refuses_others():
    tensor = torch.arange(48.0).view(2, 2, 3, 4)
    joined = reference.join_heads(tensor, "b h n d -> b n (h d)")
    assert joined.shape == (2, 3, 8) and joined[1, 2].tolist() == [*tensor[1, 0, 2], *tensor[1, 1, 2]]
    with pytest.raises(NotImplementedError, match="b n d -> n b d"):
        reference.join_heads(tensor, "b n d -> n b d")


def test_stand_ins_are_gone_once_the_original_is_imported():
    before = {name: sys.modules.get(name) for name in ("flash_attn", "lightning_attn.ops", "timm", "einops")}
    with reference.stand_ins(CPU) as computed_by:
        from flash_attn import flash_attn_func

        assert flash_attn_func is reference.flash_attn_by_sdpa
        assert "flash-attn by torch SDPA" in computed_by
    assert {name: sys.modules.get(name) for name in before} == before


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A folder with the original's interface, and with this project's model behind it."""
    models = draw_models(IFlameConfig(hidden_size=32, num_attention_heads=4), 0, None, CPU)
    shapes = {theirs: tuple(models.weights[ours].shape) for theirs, ours in OTHER_NAMES.items()}
    for layer in range(24):
        for theirs, ours in BLOCK_NAMES.items():
            weight = models.weights.get(f"model.layers.{layer}.{ours}")
            if weight is not None:
                shapes[f"{list(STAGES)[layer // 4]}.{layer % 4}.{theirs}"] = tuple(weight.shape)
    (tmp_path / "transformer.py").write_text(TRANSFORMER.replace("{shapes}", repr({**shapes, SKIP_WEIGHTS: (2,)})))
    (tmp_path / "multihead_flashdiff_2.py").write_text("FACTOR = 1.0\n")
    (tmp_path / "rms_norm.py").write_text("")
    yield tmp_path
    for name in reference.MODULES:
        sys.modules.pop(name, None)


def with_reference(arguments, folder):
    """The arguments, at the stages that the original has."""
    first = arguments.index("--stage_layers")
    return [*arguments[:first], *arguments[first + 6 :], "--reference", str(folder)]


@pytest.mark.parametrize(("main", "arguments"), [(bench_generate.main, GENERATE), (bench_train.main, TRAIN)])
def test_the_original_is_measured_with_the_same_weights_and_said_to_run_on_stand_ins(
    capsys, original, main, arguments
):
    status, printed, result = run(capsys, main, with_reference(arguments, original))
    assert status == 0, printed
    assert [row["model"] for row in result["rows"]] == ["iflame_hf, sdpa, auto", "original"]
    assert all(min(row["tokens_per_second"]) > 0 for row in result["rows"])
    assert "flash-attn by torch SDPA" in printed and str(original) not in printed


@pytest.mark.parametrize(("main", "arguments"), [(bench_generate.main, GENERATE), (bench_train.main, TRAIN)])
def test_an_original_that_computes_something_else_has_no_figures(capsys, original, main, arguments):
    (original / "multihead_flashdiff_2.py").write_text("FACTOR = 1.01\n")
    status, _, result = run(capsys, main, with_reference(arguments, original))
    assert status == 1
    assert result["rows"][0]["tokens_per_second"]
    assert "relative error" in result["rows"][1]["wrong"] and "tokens_per_second" not in result["rows"][1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*GENERATE, "--reference", "."], "there is no transformer.py of the original code"),
        ([*GENERATE, "--device", "cuda"], "argument --device: torch sees no device cuda, only cpu"),
        ([*GENERATE, "--device", "cuda:77"], "argument --device: torch sees no device cuda:77, only cpu"),
        ([*GENERATE, "--device", "gpu"], "argument --device: torch sees no device gpu, only cpu"),
        ([*GENERATE, "--hidden_size", "30"], "multiple of num_attention_heads"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_plain_words(capsys, arguments, message):
    if torch.cuda.is_available() and arguments[-1] == "cuda":
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as end:
        bench_generate.main(arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_originals_labels_are_those_of_one_mesh_a_row_where_ours_packs(capsys, original):
    arguments = [*TRAIN, "--mesh_faces", "2"]
    status, printed, result = run(capsys, bench_train.main, with_reference(arguments, original))
    assert status == 0, printed
    ours, theirs = result["rows"]
    assert theirs["labels_per_second"][0] == pytest.approx(theirs["tokens_per_second"][0] * 6 / 7 / 2)
    assert ours["labels_per_second"][0] / ours["tokens_per_second"][0] > 0.5


def test_the_original_cannot_be_built_with_other_stages(capsys, original):
    with pytest.raises(SystemExit):
        bench_train.main([*TRAIN, "--reference", str(original)])
    assert "stage_layers [1, 1, 2, 1, 1]" in capsys.readouterr().err


def test_data_that_are_not_there_are_named(capsys, tmp_path):
    assert bench_loader.main(["--data", str(tmp_path / "none.parquet")]) == 1
    assert "none.parquet" in capsys.readouterr().err.splitlines()[-1]


def test_the_memory_of_an_engines_state_and_weights_is_counted_by_their_shapes():
    model = small_model().float()
    config, rows, faces = model.config, 3, 100
    engine = DecodeEngine(model, rows, faces, Types(torch.float32))
    heads, size, channels = config.num_attention_heads, config.head_dim, config.hidden_size
    linear = rows * heads * size * size * 4
    cache = 2 * rows * 3 * channels * 4 + rows * 8  # open groups, and positions
    for kind, level in zip(config.layer_types, config.layer_levels(), strict=True):
        full = 2 * rows * heads * engine.cache.room(level) * size * 4
        cache += full if kind == "full_attention" else linear
    assert common.memory_of(engine.cache) == cache
    # On a CPU steps keep states of their own, and tables of rotary embedding.
    state, weights = common.engine_memory(engine)
    steps = state - cache - linear * config.layer_types.count("linear_attention")
    tables = sum(engine.cache.room(level) * size // 2 * 8 for level in range(3))
    small = rows * 4 * (config.vocab_size + 40 * channels)  # what a step writes
    assert tables < steps < tables + small
    parameters = sum(4 * each.numel() for each in model.parameters())
    assert 0.9 * parameters < weights < 1.5 * parameters
    engine.load(small_model(1).float())
    assert common.engine_memory(engine)[0] == cache + linear * config.layer_types.count("linear_attention") + steps
