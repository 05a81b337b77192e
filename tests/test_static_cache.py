"""A cache whose tensors stay where they are holds the same state as one that grows; meshes may begin anew in it."""

import pytest
import torch
from small_models import PAD, mesh_rows, relative_error, small_model
from torch.nn import functional as F

from iflame_hf import IFlameCache, StaticIFlameCache
from iflame_hf.states_iflame import dequantize, quantize


@pytest.fixture(scope="module")
def model():
    return small_model()


def static(model, rows, faces=12):
    return StaticIFlameCache(model.config, max_faces=faces, batch_size=rows)


def logits_of(model, parts, cache, **inputs):
    return torch.cat([model(part, past_key_values=cache, **inputs).logits for part in parts], dim=1)


def tensors(cache):
    """The memory of all that a cache holds."""
    layers = [
        getattr(layer, name) for layer in cache.layers for name in ("keys", "values", "state") if hasattr(layer, name)
    ]
    return [cache.positions, *layers, *(group.handed_up for group in cache.open_groups)]


@pytest.mark.parametrize(("attention", "linear_attention"), [("eager", "eager"), ("sdpa", "chunked")])
@torch.no_grad()
def test_prefill_and_steps_equal_one_pass_wherever_they_meet(model, attention, linear_attention):
    model.set_attn_implementation(attention)
    model.config.linear_attn_implementation = linear_attention
    rows = mesh_rows(2, faces=3)
    expected = model(rows, use_cache=False).logits
    for split in range(0, 36):
        lengths = [split] * (split > 0) + [1] * (36 - split)
        cache = static(model, 2)
        assert relative_error(logits_of(model, rows.split(lengths, dim=1), cache), expected) < 1e-5
        assert cache.get_seq_length() == 36
    for split in range(1, 36):
        cache = static(model, 2)
        logits = logits_of(model, rows.split([split, 36 - split], dim=1), cache)
        assert relative_error(logits, expected) < 1e-5, f"pieces of {split} and {36 - split} tokens"
    model.set_attn_implementation("sdpa")
    model.config.linear_attn_implementation = "auto"


@torch.no_grad()
def test_its_tensors_stay_where_they_are(model):
    rows = mesh_rows(2, faces=4)
    cache = static(model, 2)
    places = [tensor.data_ptr() for tensor in tensors(cache)]
    logits_of(model, rows.split([10] + [1] * 35, dim=1), cache)
    cache.begin_mesh([0])
    logits_of(model, mesh_rows(2, faces=0).split(1, dim=1), cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    cache.reset()
    assert [tensor.data_ptr() for tensor in tensors(cache)] == places


@pytest.mark.parametrize("padding", [9, 27])
@torch.no_grad()
def test_rows_padded_on_the_left_go_on_as_in_a_cache_that_grows(model, padding):
    rows = mesh_rows(2, faces=6)
    ids = torch.cat([F.pad(rows[:1, :-padding], (padding, 0), value=PAD), rows[1:]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[padding], [0]])).long()
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    for first in (padding - 9, padding, padding + 4):
        if first == 0:
            continue
        cache, seen, logits = static(model, 2), 0, []
        for part in ids.split([first, 7] + [1] * (ids.shape[1] - first - 7), dim=1):
            seen += part.shape[1]
            logits.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
        logits = torch.cat(logits, dim=1)
        assert relative_error(logits[0, padding:], expected[0, padding:]) < 1e-5
        assert relative_error(logits[1], expected[1]) < 1e-5


@torch.no_grad()
def test_the_last_mesh_of_a_packed_row_may_go_on(model):
    meshes = mesh_rows(2, faces=4)
    row = torch.cat([meshes[:1, :27], meshes[1:]], dim=1)
    positions = torch.cat([torch.arange(27), torch.arange(45)])[None]
    expected = model(row, position_ids=positions, use_cache=False).logits
    cache = static(model, 1)
    first = model(row[:, :50], position_ids=positions[:, :50], past_key_values=cache).logits
    rest = logits_of(model, row[:, 50:].split(1, dim=1), cache)
    assert relative_error(torch.cat([first, rest], dim=1), expected) < 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make",
    [lambda model: IFlameCache(model.config), lambda model: static(model, 3, faces=16)],
    ids=["growing", "static"],
)
@pytest.mark.parametrize("lengths", [[9] + [1] * 36, [1] * 45, [45], [11, 34]], ids=str)
@torch.no_grad()
def test_a_mesh_that_begins_in_a_used_row_is_as_in_a_fresh_one(model, make, lengths, implementation):
    model.set_attn_implementation(implementation)
    rows, others = mesh_rows(3, faces=9), mesh_rows(3, faces=9, seed=1)
    going_on = model(rows, use_cache=False).logits
    cache = make(model)
    for times in range(2):  # and again in the same row
        chosen = [1] if times == 0 else torch.tensor([False, True, False])
        before = 27 if times == 0 else 45
        if times == 0:
            model(rows[:, :27], past_key_values=cache)
        cache.begin_mesh(chosen)
        fresh = mesh_rows(3, faces=4, seed=2 + times)
        expected = model(fresh, use_cache=False).logits[1]
        ids = rows[:, 27:72].clone() if times == 0 else others[:, :45].clone()
        ids[1] = fresh[1]
        logits = logits_of(model, ids.split(lengths, dim=1), cache)
        assert relative_error(logits[1], expected) < 1e-5
        if times == 0:
            assert relative_error(logits[::2], going_on[::2, before : before + 45]) < 1e-5
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    "make", [lambda model: IFlameCache(model.config), lambda model: static(model, 1)], ids=["growing", "static"]
)
@torch.no_grad()
def test_a_mesh_begins_after_whole_faces(model, make):
    cache = make(model)
    with pytest.raises(ValueError, match="after whole faces, of 9 tokens, and the cache has seen 4 tokens"):
        model(mesh_rows(1, faces=1)[:, :4], past_key_values=cache)
        cache.begin_mesh([0])


@torch.no_grad()
def test_what_has_no_room_is_refused_before_anything_is_written(model):
    rows = mesh_rows(2, faces=3)
    cache = static(model, 2, faces=3)
    with pytest.raises(ValueError, match="holds meshes of 3 faces, and one would have 0 and 36 more tokens"):
        model(rows, past_key_values=cache)
    with pytest.raises(ValueError, match="the cache is of 2 rows, got 1"):
        model(rows[:1, :9], past_key_values=cache)
    model(rows[:, :27], past_key_values=cache)
    with pytest.raises(ValueError, match="one would have 27 and 1 more"):
        model(rows[:, 27:28], past_key_values=cache)
    cache.begin_mesh([0])
    with pytest.raises(ValueError, match="one would have 27 and 9 more"):  # of the other row
        model(rows[:, :9], past_key_values=cache)
    cache.begin_mesh([0, 1])
    expected = model(rows[:, :27], use_cache=False).logits
    assert relative_error(model(rows[:, :27], past_key_values=cache).logits, expected) < 1e-5


def test_it_takes_no_gradients_and_no_size_below_one(model):
    with pytest.raises(ValueError, match="torch.no_grad"):
        model(mesh_rows(1, faces=1), past_key_values=static(model, 1))
    for sizes in ({"max_faces": 0}, {"max_faces": 3, "batch_size": 0}, {"max_faces": 2.5}):
        with pytest.raises(ValueError, match="must be a positive whole number"):
            StaticIFlameCache(model.config, **sizes)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "seed": 4}], ids=str)
def test_generate_gives_the_same_tokens_in_either_cache(model, options):
    rows = mesh_rows(2, faces=6)
    ids = torch.cat([F.pad(rows[:1, :-18], (18, 0), value=PAD), rows[1:]])
    mask = (torch.arange(ids.shape[1]) >= torch.tensor([[18], [0]])).long()
    options = {"attention_mask": mask, "max_new_tokens": 40, **options}
    options = {**options, "mesh_grammar": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    if "num_beams" not in options:
        assert torch.equal(model.generate(ids, past_key_values=static(model, 2), **options), expected)


@torch.no_grad()
def test_keys_and_values_in_int8_make_nearly_the_same_logits(model):
    rows = mesh_rows(2, faces=12)
    expected = model(rows, use_cache=False).logits
    for lengths in ([60] + [1] * 57, [1] * 117, [10, 70, 37]):
        cache = StaticIFlameCache(model.config, 14, 2, kv_cache_dtype="int8")
        found = logits_of(model, rows.split(lengths, dim=1), cache)
        assert 0 < relative_error(found, expected) < 0.01
    halved, whole = (
        sum(each.nbytes for layer in one.layers if hasattr(layer, "keys") for each in layer.tensors())
        for one in (cache, StaticIFlameCache(model.config, 14, 2, dtype=torch.bfloat16))
    )
    size = model.config.head_dim
    assert halved / whole == pytest.approx((size + 2) / (2 * size))


def test_numbers_in_int8_are_off_by_half_a_step_at_most():
    x = torch.randn(3, 5, 4, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[:, None, None]
    x[1, 2, 3] = 0.0
    whole, scales = quantize(x)
    assert whole.dtype == torch.int8 and scales.shape == x.shape[:-1]
    step = x.abs().amax(dim=-1) / 127
    error = (dequantize(whole, scales, torch.float32) - x).abs().amax(dim=-1)
    assert (error <= 0.56 * step + 1e-7).all() and (dequantize(whole, scales, torch.float32)[1, 2, 3] == 0).all()


@torch.no_grad()
def test_rows_of_keys_in_int8_move_with_their_scales(model):
    rows = mesh_rows(3, faces=6)
    cache = StaticIFlameCache(model.config, 8, 3, kv_cache_dtype="int8")
    logits_of(model, [rows[:, :30]], cache)
    places = [each.data_ptr() for layer in cache.layers if hasattr(layer, "keys") for each in layer.tensors()]
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    moved = rows[[2, 0, 1]]
    found = logits_of(model, moved[:, 30:].split(1, dim=1), cache)
    assert relative_error(found, model(moved, use_cache=False).logits[:, 30:]) < 0.01
    assert places == [each.data_ptr() for layer in cache.layers if hasattr(layer, "keys") for each in layer.tensors()]


def test_another_type_of_keys_and_values_is_refused_in_words(model):
    with pytest.raises(ValueError, match='kv_cache_dtype must be "int8"'):
        StaticIFlameCache(model.config, 8, 2, kv_cache_dtype="fp8")
