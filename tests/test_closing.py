"""The bias of sampling to closed meshes: which edge the next face should close, and what generate() does with it."""

import inspect
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
import trimesh
from small_models import BOS, EOS, PAD, ending_model
from test_engine import engines  # noqa: F401
from transformers import RepetitionPenaltyLogitsProcessor

from iflame_hf import IFlameForCausalLM, IFlameTokenizer, generate_meshes
from iflame_hf.closing_iflame import (
    NO_EDGE,
    edge_keys,
    expected_vertices,
    follow_face,
    pending_edges,
)
from iflame_hf.format_iflame import known_format
from iflame_hf.grammar_iflame import MeshGrammarLogitsProcessor

LAYOUT = known_format()
DIGITS = 129 ** np.arange(3)


@pytest.fixture(scope="module")
def model():
    return ending_model(1)


def place_in_order(face):
    return face[0], *sorted(face[1:])


def directed(face):
    return [(face[side], face[(side + 1) % 3]) for side in range(3)]


def expected_by_trying(faces, ranks):
    """Of the pending edges, by their lower and then their higher vertex, the first one that some face which may follow
    closes and begins with: every such face is tried. None where the edges that could be closed at the lowest vertex
    all run the same way."""
    counts = Counter(edge for face in faces for edge in directed(face))
    pending = sorted((min(a, b), max(a, b), a, b) for a, b in counts if counts[a, b] > counts[b, a])
    found = {}
    for low, high, a, b in pending:
        for third in set(range(low + 1, ranks)) - {high}:
            face = (low, high, third) if (a, b) == (high, low) else (low, third, high)
            assert (b, a) in directed(face)
            if place_in_order(face) > place_in_order(faces[-1]):
                found.setdefault(low, {}).setdefault(face.index(high), high)
    if not found:
        return [-1, -1, -1]
    low = min(found)
    if len(found[low]) == 1:
        return [-1, -1, -1]
    side = min(found[low], key=found[low].get)
    return [low, *(found[low][side] if side == each else -1 for each in (1, 2))]


def random_faces(ranks, number, seed):
    """Faces in order on few vertices, so that edges meet, some more than once."""
    random = np.random.default_rng(seed)
    every = [(a, *pair) for a in range(ranks) for pair in itertools.permutations(range(a + 1, ranks), 2)]
    chosen = {place_in_order(every[place]): every[place] for place in random.permutation(len(every))[:number]}
    return [chosen[place] for place in sorted(chosen)]


@pytest.mark.parametrize("seed", range(20))
def test_the_expected_edge_is_the_first_that_a_face_can_still_close(seed):
    # Vertices above those in use leave every edge a third one.
    used, ranks = 9, 12
    faces = random_faces(used, (6, 20, 60)[seed % 3], seed)
    edges = np.full((1, 3 * len(faces)), NO_EDGE)
    kinds = Counter()
    for number in range(len(faces)):
        so_far = np.array(faces[: number + 1])
        follow_face(edges, np.array([number]), edge_keys(so_far[-1:], ranks))
        assert sorted(edges[edges != NO_EDGE]) == pending_edges(so_far, ranks).tolist()
        expected = expected_by_trying(faces[: number + 1], ranks)
        found = expected_vertices(edges, np.sort(so_far[-1:]), ranks)
        assert found[0].tolist() == expected
        kinds[tuple(rank < 0 for rank in expected)] += 1
    assert kinds[False, True, False] and kinds[False, False, True]
    assert kinds[True, True, True] or len(faces) < 20


def ids_of(mesh, **options):
    return IFlameTokenizer().encode_mesh((mesh.vertices, mesh.faces), **options)


MESHES = {"cube": trimesh.creation.box(), "ring": trimesh.creation.annulus(1, 2, 1, sections=8)}


@pytest.mark.parametrize("name", MESHES)
def test_every_face_of_a_closed_mesh_is_expected_until_it_is_whole(name):
    mesh = MESHES[name]
    ids = torch.tensor([ids_of(mesh)])
    processor = MeshGrammarLogitsProcessor(LAYOUT, 132, torch.tensor([0]), closing_strength=100.0)
    held = 0
    for length in range(9, ids.shape[1]):
        left = processor(ids[:, :length], torch.zeros(1, 132))[0]
        assert left[ids[0, length]] == 0, "lowered, though it closes an edge or may do so"
        is_between = 9 < length < ids.shape[1] - 9 and length % 9 == 0
        if is_between:
            assert left[EOS] == -100, "the end, though an edge is open"
        held += int((left == 0).sum() == 1)
    faces = len(mesh.faces)
    assert held >= 6 * (faces - 1), "two vertices of each face but the first are known"


def test_scores_are_lowered_by_the_strength_and_no_more():
    ids = torch.tensor([ids_of(trimesh.creation.box())[: 9 * 3]])
    scores = torch.randn(1, 132)
    plain, biased = (
        MeshGrammarLogitsProcessor(LAYOUT, 132, torch.tensor([0]), closing_strength=strength)(ids, scores)
        for strength in (0.0, 2.5)
    )
    change = (plain - biased)[plain > -torch.inf]
    assert torch.equal(plain > -torch.inf, biased > -torch.inf)
    assert (change == 0).sum() == 1
    torch.testing.assert_close(change[change != 0], torch.full((len(change) - 1,), 2.5))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"top_p": 0.8, "temperature": 0.9},
        {"top_k": 9, "repetition_penalty": 1.4},
        {"min_p": 0.02, "min_faces": 11},
    ],
    ids=str,
)
def test_the_engines_tokens_are_those_of_the_plain_loop(model, engines, options):  # noqa: F811
    options = {"do_sample": True, "seed": 4, "closing_strength": 6.0, "max_faces": 12, **options}
    box, sphere = (ids_of(each, add_end=False) for each in (trimesh.creation.box(), trimesh.creation.icosphere(1)))
    rows = [box[: 9 * 5], sphere[: 9 * 8], [BOS] * 9, sphere[: 9 * 3]]
    longest = max(map(len, rows))
    prompt = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    for part in (prompt, torch.tensor([box[: 9 * 5 + 4], sphere[: 9 * 5 + 4]])):
        mask = (part != PAD).long()
        found = model.generate(part, attention_mask=mask, **options)
        plain = model.generate(part, attention_mask=mask, cache_implementation="dynamic", **options)
        assert torch.equal(found, plain)
        without = model.generate(part, attention_mask=mask, **{**options, "closing_strength": 0.0})
        assert found.shape != without.shape or not torch.equal(found, without), "the bias changes nothing"
    # From some version on transformers leaves padding out of the penalty, row by row, which is not for engines.
    ignored = inspect.signature(RepetitionPenaltyLogitsProcessor).parameters["prompt_ignore_length"].annotation
    assert len(engines) == (2 if "repetition_penalty" in options and "Tensor" in str(ignored) else 4)


def test_a_strong_bias_makes_every_face_go_on_from_the_lowest_open_edge(model):
    ids = model.generate(do_sample=True, seed=1, closing_strength=1e4, max_faces=40)[0, 9:].numpy()
    coordinates = ids[: np.flatnonzero(ids == EOS)[0]] if (ids == EOS).any() else ids
    faces = [tuple(face) for face in (coordinates.reshape(-1, 3, 3) @ DIGITS).tolist()]
    assert len(faces) == 40
    closed = 0
    for number in range(1, len(faces)):
        so_far = np.array(faces[:number])
        expected = expected_vertices(pending_edges(so_far, 129**3)[None], np.sort(so_far[-1:]), 129**3)[0]
        assert faces[number][0] == expected[0]
        closed += all(rank in (-1, vertex) for rank, vertex in zip(expected, faces[number], strict=True))
    assert closed > 30


def test_meshes_that_come_one_by_one_are_those_of_generate(model):
    options = {"max_faces": 12, "top_p": 0.9, "closing_strength": 3.0}
    box, sphere = (ids_of(each, add_end=False) for each in (trimesh.creation.box(), trimesh.creation.icosphere(1)))
    prompts = [box[: 9 * 9], sphere[: 9 * 4], box[: 9 * 2], box[: 9 * 9], [BOS] * 9]
    meshes = sorted(generate_meshes(model, range(5), rows=2, prompt=prompts, **options))
    for mesh, prompt in zip(meshes, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), do_sample=True, seed=mesh.seed, **options)[0]
        assert torch.equal(mesh.ids, alone)


def test_beams_may_use_it_too(model):
    ids = model.generate(num_beams=3, num_return_sequences=2, do_sample=False, max_faces=4, closing_strength=2.0)
    assert ids.shape[0] == 2


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), True, "2"])
def test_what_is_no_number_of_nats_is_refused_in_words(model, value):
    with pytest.raises(ValueError, match="closing_strength must be a number of nats from 0 on"):
        model.generate(do_sample=True, max_faces=2, closing_strength=value)


def test_it_is_a_field_of_the_generation_config_that_is_saved(tmp_path):
    model = ending_model(1)
    options = {"do_sample": True, "seed": 3, "max_faces": 12}
    assert model.generation_config.closing_strength == 0
    given = model.generate(closing_strength=4.0, **options)
    model.generation_config.closing_strength = 4.0
    model.save_pretrained(tmp_path)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path).double()
    assert torch.equal(loaded.generate(**options), given)
    assert not torch.equal(loaded.generate(closing_strength=0.0, **options), given)
