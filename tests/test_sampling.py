"""Seeds: the random numbers of a mesh are its own."""

import threading

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from small_models import PAD, ending_model, mesh_rows
from transformers import pipeline
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria

from iflame_hf import IFlameTokenizer, stream_faces
from iflame_hf.sampling_iflame import NUMBERS_AT_ONCE, SeededSampling


@pytest.fixture(scope="module")
def model():
    return ending_model(-1)


@pytest.fixture(scope="module")
def generator(model):
    return pipeline("mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu")


def corners(mesh):
    return np.asarray(mesh.vertices)[np.asarray(mesh.faces)].tolist()


def sample(model, *args, **options):
    return model.generate(
        *args, **{"do_sample": True, "max_new_tokens": 45, "eos_token_id": None, "mesh_grammar": False, **options}
    )


def ids_of(rows, length):
    return torch.zeros(rows, 1, dtype=torch.long).expand(rows, length)


def draw(scores, seeds, number=0):
    """The tokens (B,) that are left of scores (B, V), as the one after `number` others."""
    sampling = SeededSampling(seeds, prompt_length=9)
    for count in range(number + 1):
        left = sampling(ids_of(len(scores), 9 + count), scores)
    assert ((left > -torch.inf).sum(dim=-1) == 1).all(), "one token a row is left"
    return left.argmax(dim=-1)


# One token


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_come_as_often_as_their_probabilities_say_over_seeds_and_over_tokens(dtype):
    scores = torch.randn(132, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[[3, 40, 131]] = -torch.inf
    expected = scores.double().softmax(dim=-1).numpy()
    draws = 6000
    over_seeds = draw(scores.expand(draws, -1), range(draws))
    sampling, over_tokens = SeededSampling([5], prompt_length=9), []
    for count in range(draws):
        over_tokens.append(sampling(ids_of(1, 9 + count), scores[None]).argmax().item())
    for found in (over_seeds.numpy(), np.array(over_tokens)):
        counts = np.bincount(found, minlength=132)
        assert counts[[3, 40, 131]].sum() == 0
        often = expected * draws >= 5
        observed, wanted = [*counts[often], counts[~often].sum()], [*expected[often], expected[~often].sum()]
        assert 80 < often.sum() < 129 and chisquare(observed, np.array(wanted) * draws).pvalue > 1e-3


def test_what_neighbouring_seeds_and_tokens_give_has_nothing_to_do_with_each_other():
    """Pairs of tokens fall on the cells of a square alike."""
    scores = torch.zeros(40, 10)
    sampling = SeededSampling(range(40), prompt_length=9)
    tokens = torch.stack([sampling(ids_of(40, 9 + n), scores).argmax(dim=-1) for n in range(500)]).numpy()
    for first, second in ((tokens[1:], tokens[:-1]), (tokens[:, 1:], tokens[:, :-1])):
        assert chisquare(np.bincount((first * 10 + second).ravel(), minlength=100)).pvalue > 1e-3


def test_a_row_depends_on_its_seed_and_the_number_of_the_token_alone():
    scores = torch.randn(3, 132, generator=torch.Generator().manual_seed(1))
    for number in (0, 1, 7, NUMBERS_AT_ONCE - 1, NUMBERS_AT_ONCE, NUMBERS_AT_ONCE + 1):
        together = draw(scores, [4, 9, 2**70], number)
        assert torch.equal(together.flip(0), draw(scores.flip(0), [2**70, 9, 4], number))
        alone = [draw(scores[[row]], [seed], number).item() for row, seed in enumerate([4, 9, 2**70])]
        assert alone == together.tolist()
    flat = torch.zeros(1, 10**6)
    assert len({draw(flat, [seed], number).item() for seed in (0, 1, 2**32, 2**64) for number in (0, 1)}) == 8


def test_a_token_without_probability_is_never_left():
    scores = torch.full((4000, 132), -torch.inf)
    scores[:, 17], scores[:, 90] = 0.0, -30.0
    assert set(draw(scores, range(4000)).tolist()) == {17}
    scores[:, 90] = 1e4
    assert set(draw(scores, range(4000)).tolist()) == {90}


def test_scores_that_are_no_numbers_are_an_error():
    for bad in (torch.nan, torch.inf):
        scores = torch.zeros(2, 132)
        scores[1, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            draw(scores, [0, 1])


# generate()


def test_the_same_mesh_comes_whatever_the_batch_and_whatever_else_is_drawn(model):
    rows = {size: sample(model, num_return_sequences=size, seed=20) for size in (1, 3, 8)}
    torch.manual_seed(99)
    assert torch.equal(rows[8], sample(model, num_return_sequences=8, seed=20))
    assert torch.equal(rows[8], sample(model, num_return_sequences=8, seed=list(range(20, 28))))
    assert torch.equal(rows[1], rows[8][:1]) and torch.equal(rows[3], rows[8][:3])
    for number in (1, 7):
        assert torch.equal(sample(model, seed=20 + number), rows[8][number : number + 1])
    assert len({tuple(row) for row in rows[8].tolist()}) == 8


def test_rows_padded_on_the_left_get_what_they_get_alone(model):
    long, short = mesh_rows(1, faces=3, seed=1), mesh_rows(1, faces=1, seed=2)
    padded = torch.cat([long, torch.cat([torch.full((1, 18), PAD), short], dim=1)])
    mask = (padded != PAD).long()
    found = sample(model, padded, attention_mask=mask, num_return_sequences=2, seed=[5, 6, 7, 8])
    for row, (prompt, seed) in enumerate([(long, 5), (long, 6), (short, 7), (short, 8)]):
        alone = sample(model, prompt, seed=seed)[0, prompt.shape[1] :]
        assert torch.equal(found[row, 36:], alone)


def test_the_numbers_of_everyone_else_stay_as_they_are(model):
    torch.manual_seed(3), np.random.seed(3)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    sample(model, num_return_sequences=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_without_a_seed_torchs_own_numbers_decide_as_ever(model):
    ids = [(torch.manual_seed(seed), sample(model))[1] for seed in (0, 0, 1)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    assert torch.equal(ids[0], (torch.manual_seed(0), sample(model, seed=None))[1])


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.3}, {"temperature": 0.05}, {"min_p": 0.5}], ids=str)
def test_the_choice_comes_after_all_that_narrows_it(model, options):
    shared = {"num_return_sequences": 2, "seed": 0, "top_k": 0}
    ids = sample(model, mesh_rows(2, 2), **shared | options)
    wide = sample(model, mesh_rows(2, 2), **shared)
    with torch.no_grad():
        logits = model(ids).logits[:, 26:-1]
    ranks = (logits > logits.gather(-1, ids[:, 27:, None])).sum(dim=-1)
    assert ranks.max() < 12 and not torch.equal(ids, wide)
    if "top_k" in options:
        assert ranks.max() == 2


def test_a_processor_that_was_given_comes_before_the_choice(model):
    class OnlyOnes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.where(torch.arange(132) == 1, -torch.inf)

    ids = sample(model, seed=0, logits_processor=LogitsProcessorList([OnlyOnes()]))
    assert (ids[:, 9:] == 1).all()


def test_scores_that_are_asked_for_are_those_the_choice_was_made_from(model):
    options = {"return_dict_in_generate": True, "output_scores": True, "top_k": 5, "max_new_tokens": 12}
    found = sample(model, num_return_sequences=2, seed=3, **options)
    assert len(found.scores) == 12 and all((step > -torch.inf).sum() == 10 for step in found.scores)
    sums = model.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    assert (sums < 0).any() and (sums > -10).all()
    assert sample(model, seed=3, return_dict_in_generate=True, max_new_tokens=2).scores is None


def test_greedy_tokens_do_not_change_with_a_seed(model):
    for beams in (1, 3):
        options = {"do_sample": False, "num_beams": beams}
        assert torch.equal(sample(model, seed=5, **options), sample(model, **options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"seed": -1}, "seed must be a whole number from 0 on, or a list of one for each mesh, got -1"),
        ({"seed": 1.5}, "got 1.5"),
        ({"seed": True}, "got True"),
        ({"seed": "12"}, "got '12'"),
        ({"seed": [1, "a"]}, r"got \[1, 'a'\]"),
        ({"seed": [1, 2]}, "3 meshes need as many seeds, got 2"),
        ({"seed": 1, "num_beams": 4}, "num_beams"),
    ],
    ids=str,
)
def test_seeds_that_cannot_be_are_refused_in_plain_words(model, options, reason):
    with pytest.raises(ValueError, match=reason):
        sample(model, num_return_sequences=3, **options)


def test_other_words_are_still_refused(model):
    with pytest.raises(ValueError, match="sede"):
        model.generate(sede=3)


# The pipeline, and faces as they come


def test_a_mesh_names_the_seed_that_makes_it_again(generator):
    meshes = generator(num_meshes=5, max_faces=6, seed=40, batch_size=2)
    assert [mesh.metadata["seed"] for mesh in meshes] == [40, 41, 42, 43, 44]
    assert [corners(mesh) for mesh in generator(num_meshes=5, max_faces=6, seed=40, batch_size=5)] == [
        corners(mesh) for mesh in meshes
    ]
    for mesh in (meshes[1], meshes[4]):
        (again,) = generator(max_faces=6, seed=mesh.metadata["seed"])
        assert corners(again) == corners(mesh) and again.metadata == mesh.metadata
    assert len({str(corners(mesh)) for mesh in meshes}) == 5
    chosen = generator(num_meshes=3, max_faces=6, seed=[44, 7, 40])
    assert [corners(chosen[0]), corners(chosen[2])] == [corners(meshes[4]), corners(meshes[0])]
    with pytest.raises(ValueError, match="2 meshes need as many seeds, got 3"):
        generator(num_meshes=2, seed=[1, 2, 3])


def test_seeds_are_counted_over_all_prompts_and_their_meshes(generator):
    tokenizer = generator.tokenizer
    prompts = [tokenizer.decode_mesh(mesh_rows(1, faces, seed=faces, end=True)[0]) for faces in (2, 4)]
    found = generator(prompts, num_meshes=2, max_faces=9, seed=10, batch_size=3)
    assert [[mesh.metadata["seed"] for mesh in meshes] for meshes in found] == [[10, 11], [12, 13]]
    for prompt, meshes in zip(prompts, found, strict=True):
        for mesh in meshes:
            (again,) = generator(prompt, max_faces=9, seed=mesh.metadata["seed"])
            assert corners(again) == corners(mesh)


def test_without_a_seed_one_is_drawn_and_told(generator):
    torch.manual_seed(0)
    first, second = generator(max_faces=6), generator(max_faces=6)
    assert first[0].metadata["seed"] != second[0].metadata["seed"]
    assert corners(generator(max_faces=6, seed=second[0].metadata["seed"])[0]) == corners(second[0])
    torch.manual_seed(0)
    assert corners(generator(max_faces=6)[0]) == corners(first[0])
    before = torch.get_rng_state()
    assert generator(max_faces=2, do_sample=False)[0].metadata["seed"] is None
    assert torch.equal(before, torch.get_rng_state())
    assert generator(max_faces=2, num_beams=2)[0].metadata["seed"] is None


def test_a_reader_who_draws_between_faces_gets_the_same_faces_and_keeps_its_own_numbers(generator):
    """The first lines are what a reader gets who reads nothing in between."""
    expected = corners(generator(max_faces=10, seed=6)[0])
    torch.manual_seed(8), np.random.seed(8)
    numbers = [(torch.rand(1).item(), np.random.rand()) for _ in range(len(expected))]
    assert len(expected) > 5
    torch.manual_seed(8), np.random.seed(8)
    faces, found = [], []
    for face in generator.stream(max_faces=10, seed=6):
        faces.append(face.tolist())
        found.append((torch.rand(1).item(), np.random.rand()))
    assert faces == expected and found == numbers


def test_two_streams_and_a_call_at_once_do_not_disturb_each_other(generator, model):
    expected = {seed: corners(generator(max_faces=10, seed=seed)[0]) for seed in (1, 2, 3)}
    turn = threading.Barrier(2, timeout=60)

    class TakeTurns(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if input_ids.shape[1] < 9 + 27:
                turn.wait()
            return torch.zeros(len(input_ids), dtype=torch.bool)

    streams = [generator.stream(max_faces=10, seed=seed, stopping_criteria=[TakeTurns()]) for seed in (1, 2)]
    found = [[], []]
    readers = [
        threading.Thread(target=lambda faces, out: out.extend(face.tolist() for face in faces), args=pair)
        for pair in zip(streams, found, strict=True)
    ]
    for reader in readers:
        reader.start()
    assert corners(generator(max_faces=10, seed=3)[0]) == expected[3]
    for reader in readers:
        reader.join()
    assert found == [expected[1], expected[2]]


def test_streamed_faces_of_a_model_take_a_seed_too(model):
    tokenizer = IFlameTokenizer()
    expected = corners(tokenizer.decode_mesh(model.generate(do_sample=True, max_new_tokens=90, seed=1)[0]))
    faces = list(stream_faces(model, tokenizer, do_sample=True, max_new_tokens=90, seed=1))
    assert len(expected) > 3 and np.array(faces).tolist() == expected
