"""Many meshes: rows that are refilled give what each mesh gives alone."""

import pytest
import torch
from small_models import BOS, EOS, PAD, ending_model, small_model
from transformers import LogitsProcessor, LogitsProcessorList

from iflame_hf import engine_iflame, many_iflame
from iflame_hf.many_iflame import generate_meshes


@pytest.fixture(scope="module")
def model():
    return ending_model(6)


def alone(model, seed, **options):
    ids = model.generate(do_sample=True, seed=seed, **options)[0]
    return ids[ids != PAD].tolist()


OPTIONS = [{}, {"top_k": 6, "temperature": 0.8}, {"top_p": 0.7}, {"repetition_penalty": 1.3}, {"min_faces": 3}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_each_mesh_is_the_one_that_its_seed_gives_alone(model, rows, options):
    options = {"max_faces": 9, **options}
    seeds = [*range(5, 18), 2**70, 3]
    meshes = list(generate_meshes(model, seeds, rows=rows, **options))
    assert sorted(mesh.number for mesh in meshes) == list(range(15))
    assert len({len(mesh.ids) for mesh in meshes}) > 2, "meshes of one length refill nothing"
    for mesh in meshes:
        assert mesh.seed == seeds[mesh.number]
        assert mesh.ids.tolist() == alone(model, mesh.seed, **options)


def test_short_meshes_do_not_wait_for_long_ones(model):
    order = [mesh.number for mesh in generate_meshes(model, range(20), rows=4, max_faces=20)]
    assert order != sorted(order)


def test_meshes_go_on_from_a_prompt(model):
    first = next(mesh for mesh in generate_meshes(model, range(9), max_faces=9) if len(mesh.ids) > 9 * 6)
    prompt = first.ids[: 9 * 4]
    for mesh in generate_meshes(model, range(5), rows=2, prompt=prompt, max_faces=8):
        expected = model.generate(prompt[None], do_sample=True, seed=mesh.seed, max_faces=8)[0]
        assert mesh.ids.tolist() == expected[expected != PAD].tolist()


def test_a_mesh_may_be_without_a_face_or_cut_off(model):
    silent = small_model()
    with torch.no_grad():
        silent.lm_head.bias[EOS] += 1e4
    assert [mesh.ids.tolist() for mesh in generate_meshes(silent, [1, 2])] == [[BOS] * 9 + [EOS] * 9] * 2
    for mesh in generate_meshes(model, range(4), rows=2, mesh_grammar=False, eos_token_id=None, max_new_tokens=31):
        expected = model.generate(
            do_sample=True, seed=mesh.seed, mesh_grammar=False, eos_token_id=None, max_new_tokens=31
        )
        assert mesh.ids.tolist() == expected[0].tolist()


def test_what_an_engine_does_not_do_is_made_in_batches(model, monkeypatch):
    class Same(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores

    monkeypatch.setattr(many_iflame, "take_engine", None)
    options = {"max_faces": 6, "logits_processor": LogitsProcessorList([Same()])}
    meshes = list(generate_meshes(model, range(7), rows=3, **options))
    assert [mesh.number for mesh in meshes] == list(range(7))
    assert all(mesh.ids.tolist() == alone(model, mesh.seed, max_faces=6) for mesh in meshes)


def test_every_prompt_is_looked_at_not_the_longest_alone(model):
    good = next(mesh for mesh in generate_meshes(model, range(9), max_faces=9) if len(mesh.ids) > 9 * 6).ids[: 9 * 5]
    bad = torch.cat([good[:9], good[18:27], good[9:18]])
    with pytest.raises(ValueError, match="not the beginning of a mesh: face 2 is not in order"):
        generate_meshes(model, [1, 2], prompt=[good, bad])
    assert len(list(generate_meshes(model, [1, 2], prompt=[good, bad], mesh_grammar=False, max_faces=6))) == 2


def test_leaving_early_gives_the_engine_back(model):
    meshes = generate_meshes(model, range(50), rows=4, max_faces=5)
    next(meshes)
    meshes.close()
    assert any(engine.rows == 4 for engine in engine_iflame._idle[model])


@pytest.mark.parametrize(
    ("seeds", "options", "words"),
    [
        ([-1], {}, "seed must be a whole number"),
        ([1, 2.5], {}, "seed must be a whole number"),
        ([1], {"rows": 0}, "rows must be"),
        ([1], {"num_return_sequences": 2}, "leave out num_return_sequences"),
        ([1], {"max_faces": -1}, "max_faces"),
        ([1], {"prompt": torch.tensor([5, 6])}, "a prompt begins with the start face"),
    ],
)
def test_what_cannot_be_is_said_at_once(model, seeds, options, words):
    with pytest.raises(ValueError, match=words):
        generate_meshes(model, seeds, **options)
    assert list(generate_meshes(model, [])) == []
