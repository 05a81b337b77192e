"""Whatever is generated is a mesh: the grammar of sequences, and what generate() does with it."""

import copy
import itertools

import numpy as np
import pytest
import torch
from small_models import BOS, EOS, PAD, mesh_rows, small_model
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TopKLogitsWarper

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from iflame_hf.format_iflame import known_format
from iflame_hf.grammar_iflame import (
    MeshGrammarLogitsProcessor,
    allowed_digits,
    check_prompts,
    vertex_interval,
)
from training.procedural.make import make_mesh

LAYOUT = known_format()


def tiny_layout(levels):
    return known_format(coordinate_resolution=levels - 1, special_ids=(levels, levels + 1, levels + 2))


def grammar_of(layout, rows=1, **options):
    vocabulary = layout.eos_token_id + 1
    return MeshGrammarLogitsProcessor(layout, vocabulary, torch.zeros(rows, dtype=torch.long), **options)


def start(layout, rows=1):
    return torch.full((rows, 9), layout.bos_token_id)


def drive(grammar, layout, rows, scores_of, length):
    """Rows of ids that follow the largest score of those that are left, in the way of generate()."""
    ids = start(layout, rows)
    while ids.shape[1] < length:
        left = grammar(ids, scores_of(ids))
        assert (left.amax(dim=1) > -torch.inf).all(), "nothing may follow"
        ids = torch.cat([ids, left.argmax(dim=1, keepdim=True)], dim=1)
    return ids


def faces_of_canonical(ids, layout):
    """The number of faces of ids (T,), which are a start face, faces as a tokenizer writes them, and, unless they were
    cut off, an end face: by plain comparison."""
    ids, levels = list(ids), layout.coordinate_resolution + 1
    end = ids.index(layout.eos_token_id) if layout.eos_token_id in ids else len(ids)
    assert ids[:9] == layout.start_face and end % 9 == 0 and ids[end : end + 9] in ([], layout.end_face)
    assert set(ids[end + 9 :]) <= {layout.pad_token_id, layout.eos_token_id}
    before = (-1, -1, -1)
    for at in range(9, end, 9):
        face = ids[at : at + 9]
        assert all(0 <= token < levels for token in face)
        # By the last coordinate, then the second one, then the first one.
        vertices = [tuple(reversed(face[3 * corner : 3 * corner + 3])) for corner in range(3)]
        assert vertices[0] == min(vertices) and len(set(vertices)) == 3
        now = tuple(sorted(vertices))
        assert before == (-1, -1, -1) or now > before
        before = now
    return (end - 9) // 9


def ranks(levels):
    """All faces of a grid of so few coordinates, (a, b, c) ranks with a the lowest, by their place in the order."""
    last = levels**3
    return [(a, *pair) for a in range(last) for pair in itertools.permutations(range(a + 1, last), 2)]


def test_a_token_is_allowed_exactly_where_some_canonical_face_has_it():
    """By looking at all faces of a grid of two coordinates after all faces."""
    levels, faces = 2, ranks(2)
    digits = {rank: [rank // levels**place % levels for place in range(3)] for rank in range(levels**3)}
    tokens = {face: [digit for rank in face for digit in digits[rank]] for face in faces}
    random = np.random.default_rng(0)
    befores = [(-1, 0, 0), *(tuple(sorted(faces[index])) for index in random.integers(len(faces), size=60))]
    checked = 0
    for before in befores:
        following = [tokens[face] for face in faces if tuple(sorted(face)) > before]
        for place in range(9):
            vertex, digit = divmod(place, 3)
            for begun in {tuple(each[:place]) for each in following}:
                made = [sum(begun[3 * at + p] * levels**p for p in range(3)) if vertex > at else 0 for at in (0, 1)]
                first, second = (torch.tensor([rank]) for rank in made)
                open_digits = sum(token * levels**p for p, token in enumerate(begun[3 * vertex :]))
                interval = vertex_interval(
                    torch.tensor([before]), first, second, vertex, levels**3 - 1, torch.tensor([0])
                )
                found = allowed_digits(*interval, torch.tensor([open_digits]), digit, levels)[0]
                expected = {each[place] for each in following if tuple(each[:place]) == begun}
                assert set(found.nonzero().flatten().tolist()) == expected, (before, begun)
                checked += 1
    assert checked > 1000


@pytest.mark.parametrize("levels", [2, 3, 129])
@pytest.mark.parametrize("kind", ["random", "towards the end of the order", "towards what is forbidden"])
def test_thousands_of_meshes_of_random_lengths_are_canonical(levels, kind):
    layout = known_format() if levels == 129 else tiny_layout(levels)
    vocabulary, rows, length = layout.eos_token_id + 1, 1200, 9 * 14
    random = torch.Generator().manual_seed(levels)
    ending = torch.rand(rows, 1, generator=random) * 4 - 4

    def scores_of(ids):
        scores = torch.randn(rows, vocabulary, generator=random)
        scores[:, layout.eos_token_id :] += ending
        if kind == "towards the end of the order":
            scores[:, : layout.coordinate_resolution + 1] += torch.arange(layout.coordinate_resolution + 1) * 0.3
        elif kind == "towards what is forbidden":
            scores[:, layout.pad_token_id : layout.bos_token_id + 1] += 50
            place = ids.shape[1] % 9
            scores[:, layout.eos_token_id] += 50 * (place > 0)
            # the vertices of the face before, and of this one, again
            scores.scatter_add_(1, ids[:, -9 + place % 3 :: 3], torch.full((rows, 3), 8.0))
        return scores

    ids = drive(grammar_of(layout, rows, max_length=length), layout, rows, scores_of, length)
    counts = [faces_of_canonical(row, layout) for row in ids.tolist()]
    assert min(counts) < max(counts) <= 13


def test_the_faces_of_a_tokenizer_come_back_as_they_were():
    """The order of the tokenizer itself is the oracle."""
    random = torch.Generator().manual_seed(0)
    length = 9 * 30
    ids = drive(
        grammar_of(LAYOUT, 60, max_length=length),
        LAYOUT,
        60,
        lambda ids: torch.randn(60, 132, generator=random),
        length,
    )
    tokenizer = IFlameTokenizer()
    for row in ids:
        mesh = tokenizer.decode_mesh(row)
        expected = [token for token in row.tolist() if token != EOS]
        assert len(mesh.faces) == len(expected) // 9 - 1
        assert tokenizer.encode_mesh(mesh, normalise=False, add_end=False) == expected


@pytest.mark.parametrize("reversed_winding", [False, True])
def test_every_token_of_a_mesh_is_allowed(reversed_winding):
    tokenizer = IFlameTokenizer(reversed_winding=reversed_winding)
    random = np.random.default_rng(0)
    total = 0
    for number in range(600):
        ids = torch.tensor([tokenizer.encode_mesh(make_mesh(random))])
        faces = ids.shape[1] // 9 - 2
        # All places of one kind at once: a row for each face, which ends before its place.
        grammar = grammar_of(LAYOUT, faces + 1, min_faces=0, max_faces=None)
        windows = ids[0].unfold(0, 18, 9)  # each face, and the one after it
        for length in range(9, 18):
            allowed = grammar.allowed(windows[:, :length])
            assert allowed.gather(1, windows[:, length, None]).all(), (number, length)
            total += len(windows)
        # From its beginning, with as many faces and as much room as it has: the first, the last, and the end.
        grammar = grammar_of(LAYOUT, min_faces=faces, max_faces=faces, max_length=ids.shape[1])
        for length in {9, 10, *range(ids.shape[1] - 20, ids.shape[1])}:
            assert grammar.allowed(ids[:, :length])[0, ids[0, length]], (number, length)
    assert total > 300_000


def _wishing_to_end(rows, wish, random):
    return lambda ids: torch.randn(rows, 132, generator=random) + wish


def test_faces_are_no_fewer_and_no_more_than_asked_for():
    for fewest, most in ((3, 3), (0, 2), (4, 9)):
        grammar = grammar_of(LAYOUT, 50, min_faces=fewest, max_faces=most)
        random = torch.Generator().manual_seed(1)
        wants_to_end = torch.zeros(132)
        wants_to_end[EOS] = 3
        ids = drive(grammar, LAYOUT, 50, _wishing_to_end(50, wants_to_end, random), 9 * (most + 2))
        counts = [faces_of_canonical(row, LAYOUT) for row in ids.tolist()]
        assert min(counts) >= fewest and max(counts) <= most


def test_room_is_left_for_the_fewest_faces_however_the_scores_push():
    layout = tiny_layout(3)
    push = torch.arange(layout.eos_token_id + 1).float()
    for fewest in (1, 8, 25):
        grammar = grammar_of(layout, min_faces=fewest)
        ids = drive(grammar, layout, 1, lambda ids: push[None], 9 * (fewest + 2))
        assert faces_of_canonical(ids[0].tolist(), layout) == fewest


def test_where_nothing_is_left_of_the_scores_what_is_allowed_is_equally_likely():
    grammar = grammar_of(LAYOUT, 2)
    scores = torch.full((2, 132), -torch.inf)
    scores[0, PAD], scores[1, 7] = 3.0, 2.0
    left = grammar(start(LAYOUT, 2), scores)
    assert (left[0] == 0).sum() == 130 and left[0, PAD] == -torch.inf
    assert left[1].argmax() == 7 and left[1, 7] == 2 and (left[1] > -torch.inf).sum() == 1


# generate()


@pytest.fixture(scope="module")
def model():
    """It likes to end, to repeat and to write what stands nowhere."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] += 5
        model.lm_head.bias[EOS] += 2
    return model


@pytest.mark.parametrize("implementation", [None, "dynamic"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}, {"min_p": 0.2}])
def test_what_generate_makes_is_canonical(model, options, implementation):
    ids = model.generate(
        do_sample=True, num_return_sequences=6, max_new_tokens=9 * 9, cache_implementation=implementation, **options
    )
    counts = [faces_of_canonical(row, LAYOUT) for row in ids.tolist()]
    assert max(counts) <= 9


def test_beams_are_canonical_too(model):
    for options in ({}, {"do_sample": True}):
        ids = model.generate(
            num_beams=3, num_return_sequences=2, max_new_tokens=9 * 6, **{"do_sample": False, **options}
        )
        assert [faces_of_canonical(row, LAYOUT) for row in ids.tolist()]


def test_a_budget_that_ends_within_a_face_leaves_whole_faces(model):
    for new_tokens in range(1, 30):
        ids = model.generate(max_new_tokens=new_tokens, do_sample=True, seed=new_tokens)[0].tolist()
        body = ids[9:] if EOS not in ids else ids[9 : ids.index(EOS)]
        assert len(body) % 9 == 0 and all(token <= 128 for token in body)


def test_the_grammar_comes_after_the_callers_processors_and_before_what_chooses(model):
    class Push(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, [PAD, BOS]] = 1e4
            return scores

    names = []
    real = model._get_logits_processor

    def watched(*args, **kwargs):
        processors = real(*args, **kwargs)
        names[:] = [type(each).__name__ for each in processors]
        return processors

    model._get_logits_processor = watched
    try:
        options = {"top_k": 2, "top_p": 0.9, "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.2}
        ids = model.generate(
            do_sample=True, max_new_tokens=45, logits_processor=LogitsProcessorList([Push()]), **options
        )
    finally:
        del model._get_logits_processor
    assert [name.split("Logits")[0] for name in names] == [
        *("RepetitionPenalty", "Push", "MeshGrammar", "Temperature", "TopK", "TopP", "MinP")
    ]
    faces_of_canonical(ids[0].tolist(), LAYOUT)
    scores = torch.randn(1, 132)
    left = TopKLogitsWarper(2)(None, grammar_of(LAYOUT)(start(LAYOUT), scores))
    assert (left > -torch.inf).sum() == 2, "top-k counts tokens that may follow"


def test_it_is_a_field_of_the_generation_config_that_is_saved(tmp_path):
    model = small_model()
    assert model.generation_config.mesh_grammar is True
    model.save_pretrained(tmp_path / "on")
    model.generation_config.mesh_grammar = False
    model.generation_config.max_faces = 4
    model.save_pretrained(tmp_path / "off")
    assert IFlameForCausalLM.from_pretrained(tmp_path / "on").generation_config.mesh_grammar is True
    loaded = IFlameForCausalLM.from_pretrained(tmp_path / "off")
    assert (loaded.generation_config.mesh_grammar, loaded.generation_config.max_faces) == (False, 4)
    loaded.generate(mesh_rows(1, faces=1), max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match="not in order|not the beginning of a mesh"):
        loaded.generate(mesh_rows(1, faces=3), max_new_tokens=3, do_sample=False, mesh_grammar=True)


def test_a_generation_config_of_the_caller_has_the_models_default(model):
    config = GenerationConfig(max_new_tokens=36, do_sample=True, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    faces_of_canonical(model.generate(generation_config=config)[0].tolist(), LAYOUT)


def test_a_number_of_faces_needs_no_number_of_tokens(model):
    ids = model.generate(do_sample=True, min_faces=5, max_faces=5, num_return_sequences=2)
    assert ids.shape == (2, 63) and [faces_of_canonical(row, LAYOUT) for row in ids.tolist()] == [5, 5]
    for wrong in ({"max_faces": -1}, {"min_faces": 1.5}, {"min_faces": 4, "max_faces": 3}):
        with pytest.raises(ValueError, match="faces"):
            model.generate(**wrong)


def test_without_it_anything_may_come_as_ever(model):
    ids = model.generate(do_sample=True, seed=0, max_new_tokens=60, mesh_grammar=False, eos_token_id=None)
    assert set(ids[0, 9:].tolist()) & {PAD, BOS, EOS}


# Prompts


def beginning(faces, seed=0):
    tokenizer = IFlameTokenizer()
    mesh = make_mesh(np.random.default_rng(seed))
    return torch.tensor([tokenizer.encode_mesh(mesh, add_end=False)[: 9 * (1 + faces)]])


def test_the_lowest_faces_of_a_mesh_are_gone_on_from(model):
    prompt = beginning(6)
    for length in (63, 62, 58, 56, 9):
        ids = model.generate(prompt[:, :length], do_sample=True, seed=3, min_faces=9, max_faces=12)
        assert torch.equal(ids[:, :length], prompt[:, :length])
        assert 9 <= faces_of_canonical(ids[0].tolist(), LAYOUT) <= 12


def test_prompts_of_different_lengths_are_padded_by_whole_faces(model):
    rows = [beginning(faces, seed=faces)[0] for faces in (1, 4, 6)]
    padded = torch.stack([torch.nn.functional.pad(row, (63 - len(row), 0), value=PAD) for row in rows])
    exact = copy.deepcopy(model).double()  # so that no token hangs on how the rows of a batch are summed
    ids = exact.generate(padded, attention_mask=(padded != PAD).long(), do_sample=True, seed=5, max_faces=10)
    for row, (ids_of_row, prompt) in enumerate(zip(ids, rows, strict=True)):
        mesh = ids_of_row[63 - len(prompt) :]
        assert faces_of_canonical(mesh.tolist(), LAYOUT) <= 10
        alone = exact.generate(prompt[None], do_sample=True, seed=5 + row, max_faces=10)[0]
        length = min(len(alone), len(mesh))
        assert torch.equal(alone[:length], mesh[:length]) and (mesh[length:] == PAD).all()
        assert length > len(prompt) + 9


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda ids: ids[9:], "does not begin with a start face"),
        (lambda ids: [PAD] * 4 + [5] + ids, "does not begin with a start face"),
        (lambda ids: ids[:13] + [PAD] + ids[14:], "has the id 129 in face 1"),
        (lambda ids: ids + [EOS] * 9, "has ended in face 4"),
        (lambda ids: ids[:9] + ids[18:27] + ids[9:18], "face 2 is not in order"),
        (lambda ids: ids[:18] + ids[9:18], "face 2 repeats the one before"),
        (lambda ids: ids[:9] + ids[9:12] + ids[9:12] + ids[15:18], "two vertices of face 1 are the same"),
        (lambda ids: ids[:9] + ids[12:18] + ids[9:12], "face 1 is not in order"),
        (lambda ids: ids + [0, 0, 0], "no face can begin as face 4 does"),
    ],
)
def test_a_prompt_that_no_mesh_begins_with_is_refused_in_words(model, spoil, words):
    prompt = torch.tensor([spoil(beginning(3)[0].tolist())])
    for implementation in (None, "dynamic"):
        with pytest.raises(ValueError, match=f"prompt of row 0 .*{words}.*encode_mesh.*mesh_grammar=False"):
            model.generate(prompt, max_new_tokens=9, do_sample=True, cache_implementation=implementation)


def test_embeddings_alone_are_refused_in_words(model):
    with pytest.raises(ValueError, match="mesh grammar reads the ids.*mesh_grammar=False"):
        model.generate(inputs_embeds=torch.zeros(1, 9, 32), max_new_tokens=9)


def test_prompts_that_begin_a_mesh_are_no_error():
    ids = beginning(5)
    for length in range(9, 9 * 6 + 1):
        check_prompts(LAYOUT, ids[:, :length].numpy(), np.zeros(1, dtype=int))
