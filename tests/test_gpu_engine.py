"""On a CUDA device the decode engine makes what the plain loop makes, alone, together and refilled."""

import copy

import pytest
import torch
from scipy.stats import chisquare
from small_models import BOS, PAD, ending_model, mesh_rows, relative_error, small_model

from benchmarks.common import engine_memory
from iflame_hf import StaticIFlameCache
from iflame_hf.choosing_iflame import Choice
from iflame_hf.engine_iflame import DecodeEngine, Types
from iflame_hf.format_iflame import known_format
from iflame_hf.grammar_iflame import MeshGrammarLogitsProcessor
from iflame_hf.many_iflame import generate_meshes
from iflame_hf.sampling_iflame import row_numbers

pytestmark = pytest.mark.gpu

SIZES = {"hidden_size": 128, "heads": 4}
CHOICES = [Choice(True, filters, penalty, True, 129, 131) for filters, penalty in ((True, False), (False, True))]


@pytest.fixture(scope="module")
def model():
    return ending_model(2, **SIZES).to("cuda", torch.float32)


@pytest.mark.parametrize("rows", [1, 7, 20, 64])
def test_tokens_in_float32_are_those_of_the_plain_loop(model, rows):
    prompt = torch.full((rows, 9), BOS, device="cuda")
    for options in (
        {"do_sample": False, "min_faces": 25, "max_faces": 25},
        {"do_sample": True, "seed": 3, "max_faces": 25, "top_p": 0.9, "top_k": 30, "temperature": 0.8},
        {"do_sample": True, "seed": 3, "max_faces": 12, "min_p": 0.02, "repetition_penalty": 1.2},
        {"do_sample": True, "seed": 5, "mesh_grammar": False, "max_new_tokens": 70, "eos_token_id": None},
    ):
        found = model.generate(prompt, **options)
        assert torch.equal(found, model.generate(prompt, cache_implementation="dynamic", **options)), options


def test_guided_tokens_in_float32_are_those_of_the_plain_loop():
    model = ending_model(2, **SIZES, categories=["chair", "lamp"], num_faces_range=[4, 64]).to("cuda", torch.float32)
    asked = {"category": ["chair", "lamp", None, "lamp"] * 5, "num_faces": 12, "guidance_scale": 2.5, "max_faces": 20}
    options = {"do_sample": True, "seed": 3, "top_p": 0.9}
    found = model.generate(**asked, **options)
    assert torch.equal(found, model.generate(cache_implementation="dynamic", **asked, **options))
    assert not torch.equal(found, model.generate(**{**asked, "guidance_scale": 1.0}, **options))
    many = {each.number: each.ids for each in generate_meshes(model, range(3, 23), rows=7, **asked, top_p=0.9)}
    for number, row in enumerate(found.cpu()):
        assert torch.equal(many[number], row[: len(many[number])])


@pytest.mark.parametrize(
    "asked",
    [{"closing_strength": 3.0}, {"keep_order": False}, {"closing_strength": 3.0, "keep_order": False}],
    ids=str,
)
def test_tokens_that_close_meshes_or_leave_their_order_are_those_of_the_plain_loop(asked):
    model = ending_model(8, **SIZES).to("cuda", torch.float32)
    options = {"do_sample": True, "seed": 3, "num_return_sequences": 20}
    asked, plain = {**asked, "max_faces": 60}, {"closing_strength": 0.0, "keep_order": True, "max_faces": 60}
    found = model.generate(**asked, **options)
    assert torch.equal(found, model.generate(cache_implementation="dynamic", **asked, **options))
    assert not torch.equal(found, model.generate(**plain, **options))
    many = {each.number: each.ids for each in generate_meshes(model, range(3, 23), rows=7, **asked)}
    for number, row in enumerate(found.cpu()):
        assert torch.equal(many[number], row[: len(many[number])])


def test_greedy_tokens_in_float32_are_the_plain_loops_for_4000_tokens(model):
    prompt = torch.full((64, 9), BOS, device="cuda")
    prompt = model.generate(prompt, do_sample=True, seed=1, temperature=2.0, min_faces=3, max_faces=3)[:, :36]
    options = {"do_sample": False, "min_faces": 450, "max_faces": 450, "max_new_tokens": 4000}
    plain = model.generate(prompt, cache_implementation="dynamic", **options)
    for rows in (64, 7, 1):
        different = model.generate(prompt[:rows], **options) != plain[:rows]
        parted = different.any(dim=1).nonzero().flatten().tolist()
        assert len(parted) <= rows // 8
        for row in parted:  # two tokens were as good as equally likely
            place = int(different[row].nonzero()[0])
            best = model(plain[row : row + 1, :place], use_cache=False).logits[0, -1].topk(2).values
            assert best[0] - best[1] < 1e-4, (rows, row, place)


def test_prompts_inside_a_face_and_behind_padding_are_gone_on_from(model):
    rows = [mesh_rows(1, faces=faces, seed=faces)[0] for faces in (1, 3, 2)]
    ids = torch.stack([torch.nn.functional.pad(row, (36 - len(row), 0), value=PAD) for row in rows]).to("cuda")
    for length in (36, 32, 28):
        options = {"attention_mask": (ids != PAD).long()[:, :length], "mesh_grammar": False, "eos_token_id": None}
        options |= {"max_new_tokens": 25, "do_sample": True, "seed": 1}
        found = model.generate(ids[:, :length], **options)
        assert torch.equal(found, model.generate(ids[:, :length], cache_implementation="dynamic", **options))


def logits_of_steps(engine, model, ids, first, others):
    """Logits (T, B, V) of `ids` after a prompt of `first` tokens, one at a time: those of the engine of `model`, and
    of each network and cache of `others`."""
    for network, cache in ((model, engine.cache), *others):
        network(ids[:, :first], cache=cache, use_cache=True)
    engine.steps.begin()
    made = [[] for _ in range(1 + len(others))]
    for place in range(first, ids.shape[1]):
        engine.steps.tokens.copy_(ids[:, place])
        engine.steps.places.put(engine.cache.positions, model.config.level_strides)
        engine.steps.step(place % 9)
        engine.cache.positions.add_(1)
        made[0].append(engine.steps.logits.clone())
        for (network, cache), logits in zip(others, made[1:], strict=True):
            logits.append(network(ids[:, place : place + 1], cache=cache, use_cache=True).logits[:, 0])
    return [torch.stack(each) for each in made]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 20, 150])
@torch.inference_mode()
def test_logits_in_short_types_are_as_near_to_float32_as_the_networks(rows, dtype):
    exact = small_model(**SIZES).to("cuda")
    short = small_model(**SIZES).to("cuda", dtype)
    ids = mesh_rows(rows, faces=6).to("cuda")
    engine = DecodeEngine(short, rows, 8, Types(dtype))
    others = [(exact, torch.float32), (short, dtype)]
    others = [(network, StaticIFlameCache(exact.config, 8, rows, "cuda", each)) for network, each in others]
    found, expected, plain = logits_of_steps(engine, short, ids, 20, others)
    errors = [relative_error(each, expected) for each in (found, plain)]
    assert errors[0] < 1.5 * errors[1] and errors[1] < 0.1


def test_meshes_of_refilled_rows_are_those_that_are_made_alone(model):
    alone = {mesh.number: mesh.ids for mesh in generate_meshes(model, range(30), rows=30, max_faces=20)}
    assert len({len(ids) for ids in alone.values()}) > 5
    for rows in (4, 20, 30):
        parted = 0
        for mesh in generate_meshes(model, range(30), rows=rows, max_faces=20):
            if not torch.equal(mesh.ids, alone[mesh.number]):
                # Other numbers of rows add up in another order.
                assert rows != 30 and hangs_on_rounding(model, mesh.number, mesh.ids, alone[mesh.number])
                parted += 1
        assert parted <= 2


@pytest.mark.parametrize("rows", [4, 40, 256])
def test_refilled_rows_in_a_short_type_make_exactly_what_fresh_rows_of_that_number_make(model, rows):
    model, most = copy.deepcopy(model).to(torch.bfloat16), 3 * rows
    refilled = {mesh.seed: mesh.ids for mesh in generate_meshes(model, range(most), rows=rows, max_faces=30)}
    fresh = {}
    for first in range(0, most, rows):
        for mesh in generate_meshes(model, range(first, first + rows), rows=rows, max_faces=30):
            fresh[mesh.seed] = mesh.ids
    assert [seed for seed in range(most) if not torch.equal(refilled[seed], fresh[seed])] == []


def hangs_on_rounding(model, seed, ids, others):
    """Whether two meshes of a seed part where its random number lies on the border between two tokens."""
    place = int((ids[: len(others)] != others[: len(ids)]).nonzero()[0])
    options = {"do_sample": True, "seed": 0, "max_faces": 20, "return_dict_in_generate": True, "output_scores": True}
    scores = model.generate(ids[None, :place].to("cuda"), **options).scores[0][0].double()
    reached = scores.softmax(dim=-1).cumsum(dim=-1).cpu()
    return float((reached - row_numbers([seed], place)[0, place - 9]).abs().min()) < 1e-5


@pytest.mark.parametrize("rows", [1, 20])
@torch.inference_mode()
def test_keys_and_values_in_int8_are_those_of_the_static_cache(rows):
    model = small_model(**SIZES).to("cuda")
    ids = mesh_rows(rows, faces=30).to("cuda")
    engine = DecodeEngine(model, rows, 32, Types(torch.float32, "int8"))
    caches = [StaticIFlameCache(model.config, 32, rows, "cuda", kv_cache_dtype=each) for each in ("int8", None)]
    found, twin, exact = logits_of_steps(engine, model, ids, 200, [(model, cache) for cache in caches])
    # A number that lies between two whole ones may become the other one.
    assert relative_error(found, twin) < 0.3 * relative_error(twin, exact)
    assert relative_error(twin, exact) < 0.01


@pytest.mark.parametrize("options", [{"top_k": 12}, {"top_p": 0.9}, {"min_p": 0.05}, {"mesh_grammar": False}])
def test_tokens_come_as_often_as_the_plain_loops_scores_say(model, options):
    draws = 4000
    options = {"do_sample": True, "temperature": 20.0, "top_k": 0, "max_new_tokens": 9, **options}
    found = model.generate(num_return_sequences=draws, seed=0, **options)[:, 9].cpu()
    scores = model.generate(return_dict_in_generate=True, output_scores=True, **options).scores[0][0].double().cpu()
    expected = scores.softmax(dim=-1) * draws
    often = expected >= 5
    counts = torch.bincount(found, minlength=132)
    assert counts[expected == 0].sum() == 0 and often.sum() > 5
    observed = [*counts[often].tolist(), int(counts[~often].sum())]
    wanted = [*expected[often].tolist(), float(expected[~often].sum())]
    if wanted[-1] == 0:
        observed.pop(), wanted.pop()
    assert chisquare(observed, wanted, sum_check=False).pvalue > 1e-3


def test_the_grammar_waits_for_nothing_and_may_be_captured():
    """transformers' loop asks the processor before every token."""
    layout = known_format()
    ids = torch.tensor([[BOS] * 9 + [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]] * 3, device="cuda")
    scores = torch.randn(3, 132, device="cuda")
    grammar = MeshGrammarLogitsProcessor(layout, 132, torch.zeros(3, dtype=torch.long, device="cuda"), 2, 9, 900)
    for length in range(9, ids.shape[1] + 1):
        expected = grammar(ids[:, :length], scores)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = grammar(ids[:, :length], scores)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = grammar(ids[:, :length], scores)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_model_on_a_gpu_that_is_not_the_current_one_decodes_there(model):
    options = {"do_sample": True, "seed": 3, "max_faces": 9}
    expected = model.generate(num_return_sequences=2, **options)
    other = copy.deepcopy(model).to("cuda:1")
    assert torch.cuda.current_device() == 0
    found = other.generate(num_return_sequences=2, **options)
    assert found.device == torch.device("cuda:1") and torch.equal(found.cpu(), expected.cpu())
    for mesh in generate_meshes(other, [3, 4], rows=2, max_faces=9):
        row = expected[mesh.number].cpu()
        assert torch.equal(mesh.ids, row[row != PAD])


@pytest.mark.parametrize("choice", CHOICES)
def test_a_face_waits_for_nothing(model, choice):
    with torch.inference_mode():
        engine = DecodeEngine(model, 2, 8, Types(torch.float32))
        engine.prepare(choice)
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokens = engine.next_face(choice)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert engine.read(tokens).shape == (9, 2)


@pytest.mark.parametrize("rows", [2, 40])
def test_the_memory_of_its_state_is_that_of_the_cache_and_of_states_that_take_turns(model, rows):
    config, faces = model.config, 700
    engine = DecodeEngine(model, rows, faces, Types(torch.float32))
    heads, size = config.num_attention_heads, config.head_dim
    expected = 0
    for kind, level in zip(config.layer_types, config.layer_levels(), strict=True):
        linear = rows * heads * size * size * 4 * (2 if rows <= 16 else 1)
        expected += 2 * rows * heads * engine.cache.room(level) * size * 4 if kind == "full_attention" else linear
    tables = 2 * max(engine.cache.room(level) for level in range(3)) * size // 2 * 4
    state, weights = engine_memory(engine)
    assert expected + tables < state < expected + tables + rows * 4 * 100 * config.hidden_size
    assert weights > 0.9 * sum(4 * each.numel() for each in model.parameters())
