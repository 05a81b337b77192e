"""Meshes whose faces need not stand in order: `keep_order=False`."""

import random

import numpy as np
import pytest
import torch
import trimesh
from small_models import ending_model
from test_closing import ids_of
from test_engine import engines  # noqa: F401
from test_grammar import LAYOUT, grammar_of, ranks, start, tiny_layout

from iflame_hf import IFlameForCausalLM, IFlameTokenizer, generate_meshes


@pytest.fixture(scope="module")
def model():
    return ending_model(1)


def tokens_of(face, levels):
    return [rank // levels**digit % levels for rank in face for digit in range(3)]


def in_order(face):
    return face[0], *sorted(face[1:])


def test_a_token_is_left_exactly_where_some_face_goes_on_so():
    """Every face of a small grid is tried."""
    layout, levels, drawn = tiny_layout(2), 2, random.Random(0)
    faces = [(face, tokens_of(face, levels)) for face in ranks(levels)]
    grammar, strict = (grammar_of(layout, keep_order=keep_order) for keep_order in (False, True))
    left_out = more = 0
    for _ in range(300):
        last, wanted = drawn.choice(faces)[1], drawn.choice(faces)[1]
        for place in range(9):
            begun = wanted[:place]
            ids = torch.tensor([[*layout.start_face, *last, *begun]])
            found = grammar.allowed(ids)[0].tolist()
            for token in range(levels):
                assert found[token] == any(tokens[: place + 1] == [*begun, token] for _, tokens in faces)
                left_out += not found[token]
            assert found[levels:] == [False, False, place == 0]
            in_order = strict.allowed(ids)[0].tolist()
            more += found != in_order
            assert not any(strictly and not freely for strictly, freely in zip(in_order, found, strict=True))
    assert left_out > 300 and more > 300


def test_a_model_that_is_sure_of_a_vertex_gets_it():
    """In order, a vertex that is begun with the first two coordinates of another ends somewhere else."""
    box = ids_of(trimesh.creation.box(), add_end=False)
    wanted = box[9:18]  # the first face, once more
    for keep_order in (True, False):
        ids, grammar = torch.tensor([box[: 9 * 8]]), grammar_of(LAYOUT, keep_order=keep_order)
        for token in wanted:
            scores = torch.full((1, 132), -9.0)
            scores[0, token] = 9.0
            ids = torch.cat([ids, grammar(ids, scores).argmax(dim=1, keepdim=True)], dim=1)
        assert (ids[0, 9 * 8 :].tolist() == wanted) != keep_order


@pytest.mark.parametrize("fewest", [0, 11])
def test_a_face_out_of_order_leaves_the_limits_as_they_are(fewest):
    """Also where the last vertices of the grid, after which no face has room, have been used."""
    layout, draws, rows = tiny_layout(2), torch.Generator().manual_seed(0), 40
    grammar = grammar_of(layout, rows, min_faces=fewest, max_faces=12, keep_order=False)
    ids = start(layout, rows)
    while ids.shape[1] < 9 * 14:
        scores = torch.randn(rows, 5, generator=draws)
        scores[:, layout.eos_token_id] += 1 if fewest else -1
        ids = torch.cat([ids, grammar(ids, scores).argmax(dim=1, keepdim=True)], dim=1)
    back = 0
    for row in ids.tolist():
        end = row.index(layout.eos_token_id)
        faces = np.reshape(row[9:end], (-1, 3, 3)) @ (2 ** np.arange(3))
        assert fewest <= len(faces) <= 12 and end % 9 == 0
        assert (faces[:, :1] < faces[:, 1:]).all() and (faces[:, 1] != faces[:, 2]).all()
        ordered = [in_order(face) for face in faces.tolist()]
        back += sum(one >= other for one, other in zip(ordered, ordered[1:], strict=False))
    assert back > rows


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"top_p": 0.8, "temperature": 0.9},
        {"closing_strength": 3.0},
        {"min_p": 0.02, "min_faces": 11},
    ],
    ids=str,
)
def test_the_engines_tokens_are_those_of_the_plain_loop(model, engines, options):  # noqa: F811
    options = {"do_sample": True, "seed": 4, "keep_order": False, "max_faces": 12, **options}
    box, sphere = (ids_of(each, add_end=False) for each in (trimesh.creation.box(), trimesh.creation.icosphere(1)))
    for prompt in (torch.tensor([box[: 9 * 5 + 4], sphere[: 9 * 5 + 4]]), torch.tensor([sphere[: 9 * 8]])):
        found = model.generate(prompt, **options)
        plain = model.generate(prompt, cache_implementation="dynamic", **options)
        assert torch.equal(found, plain)
        kept = model.generate(prompt, **{**options, "keep_order": True})
        assert found.shape != kept.shape or not torch.equal(found, kept), "it changes nothing"
    assert len(engines) == 4


def test_meshes_out_of_order_are_decoded_as_others_are(model):
    tokenizer, options = IFlameTokenizer(), {"keep_order": False, "max_faces": 12}
    for mesh in generate_meshes(model, range(6), rows=3, **options):
        alone = model.generate(do_sample=True, seed=mesh.seed, **options)[0]
        assert torch.equal(mesh.ids, alone)
        ids = [token for token in alone.tolist() if token < 129]
        faces = [in_order(face) for face in (np.reshape(ids, (-1, 3, 3)) @ (129 ** np.arange(3))).tolist()]
        assert faces != sorted(faces)
        found = tokenizer.decode_mesh(alone)
        assert len(found.faces) == len(set(faces))
        again = tokenizer.encode_mesh(found, normalise=False, add_end=False)[9:]
        assert [in_order(face) for face in (np.reshape(again, (-1, 3, 3)) @ (129 ** np.arange(3))).tolist()] == sorted(
            set(faces)
        )


def test_prompts_out_of_order_are_taken_where_meshes_may_be(model):
    box = ids_of(trimesh.creation.box(), add_end=False)
    swapped = torch.tensor([[*box[:9], *box[18:27], *box[9:18], *box[27:36]]])
    options = {"do_sample": True, "seed": 1, "max_faces": 6}
    with pytest.raises(ValueError, match="face 2 is not in order"):
        model.generate(swapped, **options)
    found = model.generate(swapped, keep_order=False, **options)
    assert torch.equal(found[:, :36], swapped)
    (mesh,) = generate_meshes(model, [1], prompt=swapped[0], max_faces=6, keep_order=False)
    assert torch.equal(mesh.ids, found[0])
    within = swapped.clone()
    within[0, 9:12], within[0, 12:15] = swapped[0, 12:15], swapped[0, 9:12]
    with pytest.raises(ValueError, match="face 1 is not in order"):
        model.generate(within, keep_order=False, **options)


@pytest.mark.parametrize("value", ["no", 0, 1.0])
def test_what_is_no_switch_is_refused_in_words(model, value):
    with pytest.raises(ValueError, match="keep_order must be True or False"):
        model.generate(do_sample=True, max_faces=2, keep_order=value)


def test_it_is_a_field_of_the_generation_config_that_is_saved(tmp_path):
    model, options = ending_model(1), {"do_sample": True, "seed": 3, "max_faces": 12}
    plain = model.generate(**options)
    assert torch.equal(model.generate(keep_order=True, **options), plain)
    given = model.generate(keep_order=False, **options)
    assert not torch.equal(given, plain)
    model.generation_config.keep_order = False
    model.save_pretrained(tmp_path)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path).double()
    assert torch.equal(loaded.generate(**options), given)
    assert torch.equal(loaded.generate(keep_order=True, **options), plain)
