"""The decoding state: pieces of any size equal one pass, and every state follows its row."""

import copy

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_config, small_model
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin

from iflame_hf import IFlameCache
from iflame_hf.states_iflame import KeyValueState, RecurrentState

SIZES = [{}, {"heads": 6, "hidden_size": 48}]


@pytest.fixture(scope="module", params=SIZES, ids=["4 heads", "6 heads"])
def model(request):
    return small_model(**request.param)


def in_pieces(model, ids, lengths, cache=None, **inputs):
    """Logits of ids given in pieces of these lengths, and the cache after them."""
    logits = []
    for part in ids.split(lengths, dim=1):
        output = model(part, past_key_values=cache, use_cache=True, **inputs)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


@pytest.mark.parametrize(("attention", "linear_attention"), [("eager", "eager"), ("sdpa", "chunked")])
@torch.no_grad()
def test_prefill_and_steps_equal_one_pass_wherever_they_meet(model, attention, linear_attention):
    model.set_attn_implementation(attention)
    model.config.linear_attn_implementation = linear_attention
    rows = mesh_rows(2, faces=3)
    expected = model(rows, use_cache=False).logits
    splits = range(1, 36)
    for split in splits:
        logits, cache = in_pieces(model, rows, [split] + [1] * (36 - split))
        assert relative_error(logits, expected) < 1e-5, f"prefill of {split} tokens"
        assert cache.get_seq_length() == 36
    model.config.linear_attn_implementation = "auto"


@torch.no_grad()
def test_several_tokens_may_be_given_to_a_filled_cache_wherever_they_meet(model):
    rows = mesh_rows(2, faces=3)
    expected = model(rows, use_cache=False).logits
    for split in range(1, 36):
        logits, _ = in_pieces(model, rows, [split, 36 - split])
        assert relative_error(logits, expected) < 1e-5, f"pieces of {split} and {36 - split} tokens"


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 5, 6, 7, 8], [7] * 5 + [1], [2] * 18, [10, 16, 10]])
@pytest.mark.parametrize("padding", [0, 18])
@torch.no_grad()
def test_pieces_of_any_lengths_equal_one_pass_also_after_padding(model, lengths, padding):
    rows = mesh_rows(2, faces=3)
    expected = model(rows, use_cache=False).logits
    ids = torch.cat([F.pad(rows[:1], (padding, 0), value=PAD), rows[1:].repeat(1, 2)[:, : 36 + padding]])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    # the second row has no padding: as many more tokens of it belong to the first piece
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    lengths = [lengths[0] + padding, *lengths[1:]]
    assert sum(lengths) == ids.shape[1]
    cache, seen, logits = None, 0, []
    for part in ids.split(lengths, dim=1):
        seen += part.shape[1]
        output = model(part, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    logits = torch.cat(logits, dim=1)
    assert relative_error(logits[0, padding:], expected[0]) < 1e-5
    assert relative_error(logits[1], whole[1]) < 1e-5


@torch.no_grad()
def test_the_last_mesh_of_a_packed_row_may_go_on(model):
    rows = mesh_rows(2, faces=9)
    starts = torch.tensor([54, 27])
    ids = torch.stack([rows[i].roll(int(start)) for i, start in enumerate(starts)])
    index = torch.arange(90)
    positions = torch.where(index >= starts[:, None], index - starts[:, None], index)
    expected = model(ids, position_ids=positions, use_cache=False).logits
    for split in (60, 62, 71):
        first = model(ids[:, :split], position_ids=positions[:, :split], use_cache=True)
        logits, _ = in_pieces(model, ids[:, split:], [5] + [1] * (85 - split), first.past_key_values)
        assert relative_error(logits, expected[:, split:]) < 1e-5


@pytest.mark.parametrize(
    "stage_layers", [(1, 1, 2, 1, 1), (0, 0, 2, 0, 0), (0, 2, 0, 1, 0), (3, 0, 0, 0, 0), (0, 1, 2, 0, 0)]
)
@torch.no_grad()
def test_the_length_counts_tokens_and_keys_stand_at_their_own_level(stage_layers):
    model = small_model(stage_layers=stage_layers)
    levels = model.config.layer_levels()
    rows, cache = mesh_rows(2, faces=2), IFlameCache(model.config)
    assert cache.get_seq_length() == 0
    assert not cache.is_initialized and not cache.has_previous_state() and len(cache) == len(levels)
    for tokens in range(1, 28):
        model(rows[:, tokens - 1 : tokens], past_key_values=cache)
        assert [cache.get_seq_length(layer) for layer in range(len(levels))] == [tokens] * len(levels)
        items = [tokens // (1, 3, 9)[level] for level in levels]
        for layer, count in enumerate(items):
            state = cache.layers[layer]
            if model.config.layer_types[layer] == "full_attention":
                assert isinstance(state, KeyValueState) and state.get_seq_length() == count
                assert count == 0 or state.keys.shape == state.values.shape == (2, 4, count, 8)
                assert not cache.has_previous_state(layer)
            else:
                assert isinstance(state, RecurrentState) and cache.has_previous_state(layer) == (count > 0)
                assert count == 0 or (state.state.shape == (2, 4, 8, 8) and state.state.dtype == torch.float32)
        waiting = [group.waiting for group in cache.open_groups]
        assert [group.shape[1] for group in waiting if group is not None] == (
            [tokens % 3] + [tokens // 3 % 3] * (tokens >= 3)
        )
    assert cache.is_linear == [kind == "linear_attention" for kind in model.config.layer_types]
    assert cache.is_initialized and cache.batch_size == 2


@torch.no_grad()
def test_a_cache_comes_back_by_default_in_evaluation_only(model):
    rows = mesh_rows(1, faces=1)
    assert isinstance(model(rows).past_key_values, IFlameCache)
    assert model(rows, use_cache=False).past_key_values is None
    assert model.train()(rows).past_key_values is None
    assert model(rows, use_cache=True).past_key_values.get_seq_length() == 18
    model.eval()
    cache = IFlameCache(model.config)
    assert model(rows, past_key_values=cache).past_key_values is cache


def states(value, name="cache"):
    """Every tensor that a cache holds, by name, wherever it is kept; spare room after keys left out."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    found = {}
    if isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            found |= states(item, f"{name}[{number}]")
    elif hasattr(value, "__dict__"):
        for key, item in vars(value).items():
            if not key.startswith("_"):
                found |= states(item, f"{name}.{key}")
    return found


def assert_same_states(cache, expected):
    ours, theirs = states(cache), states(expected)
    assert ours.keys() == theirs.keys() and len(ours) >= 11
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert cache.get_seq_length() == expected.get_seq_length()


CHANGES = {
    "reorder_cache": (lambda cache, rows: cache.reorder_cache(rows), [2, 0, 0]),
    "batch_select_indices": (lambda cache, rows: cache.batch_select_indices(rows), [2, 1]),
    "batch_repeat_interleave": (lambda cache, rows: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@torch.no_grad()
def test_every_state_follows_its_row_in_mid_vertex_and_in_mid_face(model, change, padded):
    function, order = CHANGES[change]
    order = torch.tensor(order)
    ids = mesh_rows(3, faces=5)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9], mask[2, :18] = 0, 0
    for length in range(19, 29):
        cache = IFlameCache(model.config)
        model(ids[:, :length], attention_mask=mask[:, :length], past_key_values=cache)
        expected = IFlameCache(model.config)
        model(ids[order, :length], attention_mask=mask[order, :length], past_key_values=expected)
        assert all(tensor.shape[0] == 3 for tensor in states(cache).values())
        # by a step, so that the keys lie in their spare room
        model(ids[:, length : length + 1], past_key_values=cache)
        model(ids[order, length : length + 1], past_key_values=expected)
        function(cache, order)
        assert_same_states(cache, expected)
        following = ids[order, length + 1 : length + 11]
        logits, _ = in_pieces(model, following, [1] * 10, cache)
        expected_logits, _ = in_pieces(model, following, [1] * 10, expected)
        assert relative_error(logits, expected_logits) < 1e-5
        assert_same_states(cache, expected)


@torch.no_grad()
def test_rows_that_were_one_go_their_own_ways(model):
    ids = mesh_rows(2, faces=5)
    ids[1, :20] = ids[0, :20]
    cache = model(ids[:1, :19], use_cache=True).past_key_values
    model(ids[:1, 19:20], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    kept = copy.deepcopy(cache)
    logits, _ = in_pieces(model, ids[:, 20:], [1] * 34, cache)
    assert relative_error(logits, model(ids).logits[:, 20:]) < 1e-5
    # a copy is not written to by what goes on with the first
    again, _ = in_pieces(model, ids[:, 20:], [3] * 10 + [4], kept)
    assert relative_error(again, logits) < 1e-5


@torch.no_grad()
def test_a_reset_cache_is_as_new(model):
    ids = mesh_rows(2, faces=3)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    cache = model(ids[:, :32], attention_mask=mask[:, :32], use_cache=True).past_key_values
    model(ids[:, 32:33], past_key_values=cache)
    assert len(states(cache)) >= 11
    cache.reset()
    assert cache.get_seq_length() == 0 and not states(cache) and cache.batch_size is None
    logits, _ = in_pieces(model, ids, [14] + [1] * 22, cache)
    assert relative_error(logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_spare_room_is_made_seldom_and_never_read(model):
    ids = mesh_rows(2, faces=30)
    expected = model(ids).logits
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        cache = IFlameCache(model.config)
        addresses, logits = [], []
        for part in ids.split([10] + [1] * 200 + [69], dim=1):
            logits.append(model(part, past_key_values=cache).logits)
            addresses.append(cache.layers[5].keys.data_ptr())
    finally:
        torch.use_deterministic_algorithms(False)
    assert relative_error(torch.cat(logits, dim=1), expected) < 1e-5
    moves = sum(a != b for a, b in zip(addresses[:-1], addresses[1:], strict=True))
    assert moves <= 8, "keys are copied in every step"


@torch.no_grad()
def test_a_step_may_be_undone_by_a_copy_but_not_by_cropping(model):
    cache = model(mesh_rows(1, faces=2), use_cache=True).past_key_values
    for arguments in ((9,), (-1,), ()):
        with pytest.raises(ValueError, match="cannot be cropped: linear attention keeps one running state"):
            cache.crop(*arguments)
    assert cache.is_croppable is False
    assert cache.get_seq_length() == 27


@pytest.mark.parametrize(
    "make",
    [
        lambda config: DynamicCache(),
        lambda config: DynamicCache(config=config),
        lambda config: StaticCache(config=config, max_cache_len=99),
        lambda config: ((torch.zeros(1), torch.zeros(1)),),
    ],
    ids=["DynamicCache", "DynamicCache of the configuration", "StaticCache", "tuple"],
)
def test_other_caches_are_refused_by_name(model, make):
    other = make(model.config)
    for call in (model, model.model):
        with pytest.raises(ValueError, match=f"must be an IFlameCache .* got a {type(other).__name__}"):
            call(mesh_rows(1, faces=1), past_key_values=other)


def test_generate_must_not_compile_for_this_cache_by_itself():
    # three kinds of step, chosen by position; transformers would hand masks of tokens to all levels
    assert IFlameCache.is_compileable is False
    assert IFlameCache(small_config()).is_compileable is False


@torch.no_grad()
def test_a_cache_of_too_many_tokens_is_refused_before_anything_is_written():
    model = small_model(max_position_embeddings=27)
    cache = model(mesh_rows(1, faces=2), use_cache=True).past_key_values
    before = {name: tensor.clone() for name, tensor in states(cache).items()}
    with pytest.raises(ValueError, match="28 tokens is longer than max_position_embeddings = 27"):
        model(torch.tensor([[5]]), past_key_values=cache)
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(cache).items())
    assert cache.get_seq_length() == 27


@torch.no_grad()
def test_layers_answer_what_transformers_asks_of_layers(model):
    cache = IFlameCache(model.config)
    assert not any(layer.is_initialized for layer in cache.layers)
    model(mesh_rows(2, faces=3), cache=cache)
    asked = {name for name in vars(CacheLayerMixin) if not name.startswith("_")}
    asked -= {"lazy_initialization", "offload", "prefetch", "supports_early_init", "update"}  # by IFlameCache alone
    for layer, kind, level in zip(cache.layers, model.config.layer_types, model.config.layer_levels(), strict=True):
        assert asked <= set(dir(layer)), asked - set(dir(layer))
        items = 36 // (1, 3, 9)[level] if kind == "full_attention" else 0
        assert layer.is_initialized and layer.get_seq_length() == items and layer.get_max_length() == -1
        assert layer.get_mask_sizes(1) == (items + 1, 0)
        with pytest.raises(ValueError, match="cannot be cropped"):
            layer.crop(-1)
        layer.batch_repeat_interleave(2)
        layer.reorder_cache(torch.tensor([0, 2, 3]))
        assert next(value for value in vars(layer).values() if value is not None).shape[0] == 3


@torch.no_grad()
def test_spare_room_holds_zeros_and_no_memory_of_others(model):
    cache = IFlameCache(model.config)
    for tokens in (mesh_rows(2, faces=3), mesh_rows(2, faces=1)):
        model(tokens, cache=cache)
    full = [layer for layer, linear in zip(cache.layers, cache.is_linear, strict=True) if not linear]
    spare = [buffer[:, :, layer.get_seq_length() :] for layer in full for buffer in layer._buffers]
    assert all(each.numel() > 0 and not each.any() for each in spare)
