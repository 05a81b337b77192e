"""Category and number of faces: how they enter the network, generate() and the decode engine; guidance."""

import pytest
import torch
from small_models import BOS, EOS, ending_model, mesh_rows, small_config, small_model
from transformers import LogitsProcessor

from iflame_hf import IFlameConfig, IFlameForCausalLM, RowLayout, generate_meshes

CATEGORIES = ["chair", "lamp", "table"]
CONDITIONED = {"categories": CATEGORIES, "num_faces_range": [4, 64]}


@pytest.fixture(scope="module")
def model():
    return small_model(**CONDITIONED)


@pytest.fixture(scope="module")
def sampler():
    """Whose meshes end after a few faces, in float64: no token hangs on how a sum is ordered."""
    return ending_model(7.0, **CONDITIONED)


def by_hand(model, ids, categories, num_faces):
    """Logits of rows whose start faces were embedded outside of the model, as the formula says."""
    conditions, embeds = model.model.conditions, model.model.embed_tokens(ids)
    for row, (category, faces) in enumerate(zip(categories, num_faces, strict=True)):
        added = torch.zeros(ids.shape[1], embeds.shape[2], dtype=embeds.dtype)
        if category >= 0:
            added[:9] += conditions.category.weight[category]
        if faces >= 0:
            # four octaves of four steps each: 17 rows
            place = 4 * torch.log2(torch.tensor(faces / 4, dtype=torch.float64))
            lower = min(int(place), 15)
            table = conditions.num_faces.weight
            added[:9] += (1 - (place - lower)) * table[lower] + (place - lower) * table[lower + 1]
        embeds[row] += added
    return model(inputs_embeds=embeds).logits


def test_conditions_are_added_to_the_start_face_alone(model):
    ids = mesh_rows(4, faces=3)
    categories, num_faces = torch.tensor([0, 2, -1, -1]), torch.tensor([4, -1, 23, -1])
    logits = model(ids, category=categories, num_faces=num_faces).logits
    with torch.no_grad():
        expected = by_hand(model, ids, categories.tolist(), num_faces.tolist())
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    assert (logits[0] - model(ids).logits[0]).abs().max() > 0.1
    torch.testing.assert_close(logits[3], model(ids).logits[3])  # nothing is known


@pytest.mark.parametrize("faces", [4, 5, 16, 50, 64])
def test_numbers_of_faces_lie_between_rows_of_the_table(model, faces):
    ids = mesh_rows(1, faces=1)
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids, num_faces=torch.tensor([faces])).logits,
            by_hand(model, ids, [-1], [faces]),
            atol=2e-5,
            rtol=1e-4,
        )


def test_packed_meshes_have_the_logits_that_they_have_alone(model):
    first, second = mesh_rows(1, faces=2, seed=1, end=True), mesh_rows(1, faces=3, seed=2)
    row = torch.cat([first, second], dim=1)
    begins = torch.zeros(1, row.shape[1] // 9, dtype=torch.bool)
    begins[0, first.shape[1] // 9] = True
    attributes = {"category": torch.tensor([1, 0]), "num_faces": torch.tensor([-1, 9])}
    layout = RowLayout.of_begins(begins, row.shape[1], model.config.level_strides, attributes=attributes)
    logits = model(row, layout=layout).logits[0]
    alone = [
        model(first, category=torch.tensor([1])).logits[0],
        model(second, category=torch.tensor([0]), num_faces=torch.tensor([9])).logits[0],
    ]
    torch.testing.assert_close(logits, torch.cat(alone), atol=2e-5, rtol=1e-4)
    # Room for more meshes changes nothing.
    roomy = model(row, layout=layout.with_room(8)).logits[0]
    torch.testing.assert_close(roomy, logits, atol=2e-5, rtol=1e-4)


def test_conditions_are_learnt_and_what_is_unknown_is_not(model):
    ids = mesh_rows(2, faces=1, end=True)
    model.zero_grad()
    model(ids, labels=ids, category=torch.tensor([1, -1]), num_faces=torch.tensor([-1, -1])).loss.backward()
    gradient = model.model.conditions.category.weight.grad
    assert (gradient[1] != 0).any() and (gradient[[0, 2]] == 0).all()
    assert (model.model.conditions.num_faces.weight.grad == 0).all()
    model.zero_grad()


def test_a_model_without_conditions_has_no_weights_of_them():
    plain, conditioned = small_model(), small_model(**CONDITIONED)
    assert set(conditioned.state_dict()) - set(plain.state_dict()) == {
        "model.conditions.category.weight",
        "model.conditions.num_faces.weight",
    }
    only_category = IFlameForCausalLM(small_config(categories=CATEGORIES))
    with pytest.raises(ValueError, match="takes no num_faces: .* trained with are category"):
        only_category.generate(num_faces=10)
    with pytest.raises(ValueError, match="takes no category: .* without any"):
        plain.generate(category="chair")


def test_conditions_outlive_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = IFlameForCausalLM.from_pretrained(tmp_path)
    assert (loaded.config.categories, loaded.config.num_faces_range) == (CATEGORIES, [4, 64])
    ids, asked = mesh_rows(1, faces=1), {"category": torch.tensor([2]), "num_faces": torch.tensor([33])}
    torch.testing.assert_close(loaded.eval()(ids, **asked).logits, model(ids, **asked).logits)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"category": "sofa"}, "does not know the category 'sofa': it was trained with chair, lamp, table"),
        ({"category": 1}, "does not know the category 1"),
        ({"num_faces": 3}, "from 4 to 64, as of training; got 3"),
        ({"num_faces": 9.5}, "whole number from 4 to 64"),
        ({"category": ["chair", "lamp"], "num_faces": [5]}, "2 meshes need as many values of num_faces, got 1"),
        ({"guidance_scale": 2.0}, "guidance_scale is of a condition"),
        ({"category": "chair", "guidance_scale": 2.0, "num_beams": 2}, "leave out num_beams"),
        ({"category": "chair", "guidance_scale": 2.0, "return_dict_in_generate": True}, "return_dict_in_generate"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_in_words(model, asked, words):
    with pytest.raises(ValueError, match=words):
        model.generate(**asked, max_new_tokens=9)


def test_the_model_itself_takes_tensors_that_fit_its_rows(model):
    ids = mesh_rows(2, faces=1)
    for wrong in (torch.tensor([1]), torch.tensor([1.0, 2.0]), ["chair", "lamp"]):
        with pytest.raises(ValueError, match="category must be a tensor of 2 whole numbers"):
            model(ids, category=wrong)
    with pytest.raises(ValueError, match="start face"):
        model(inputs_embeds=model.model.embed_tokens(ids), category=torch.tensor([1, 1]))


@pytest.mark.parametrize(
    "wrong",
    [{"categories": ["a", "a"]}, {"categories": [1]}, {"num_faces_range": [4]}, {"num_faces_range": [9, 4]}],
    ids=str,
)
def test_conditions_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IFlameConfig(**wrong)


LOOP = {"cache_implementation": "dynamic"}


def test_a_list_makes_a_mesh_for_each_of_its_values(sampler):
    asked = {"category": ["chair", None, "table"], "num_faces": [10, 20, None]}
    options = {"do_sample": True, "seed": 3, "max_faces": 6}
    together = sampler.generate(**asked, **options)
    assert together.shape[0] == 3 and torch.equal(together, sampler.generate(**asked, **options, **LOOP))
    start = torch.full((1, 9), BOS)
    for row, (category, faces) in enumerate(zip(*asked.values(), strict=True)):
        alone = sampler.generate(start, category=category, num_faces=faces, **{**options, "seed": 3 + row})[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert (together[row, len(alone) :] == sampler.config.pad_token_id).all()
    assert not torch.equal(together, sampler.generate(start.expand(3, -1), **options))
    # several of one
    four = sampler.generate(category="lamp", num_return_sequences=4, **options)
    assert torch.equal(four[:1, :18], sampler.generate(category="lamp", **options)[:, :18]) and len(four) == 4


class ByHand(LogitsProcessor):
    """Guidance by two passes over all tokens, in transformers' words: uncond + scale (cond - uncond)."""

    def __init__(self, model, scale, **asked):
        self.model, self.scale, self.asked = model, scale, asked

    def __call__(self, input_ids, scores):
        without = self.model(input_ids).logits[:, -1].log_softmax(dim=-1)
        with_them = self.model(input_ids, **self.asked).logits[:, -1].log_softmax(dim=-1)
        return without + self.scale * (with_them - without)


@pytest.mark.parametrize("options", [{}, LOOP, {"cache_implementation": "static"}, {"mesh_grammar": False}], ids=str)
def test_guided_tokens_are_those_of_two_passes(sampler, options):
    prompt = mesh_rows(2, faces=1, seed=5)[:, :15] if "mesh_grammar" in options else torch.full((2, 9), BOS)
    common = {"do_sample": True, "seed": 11, "max_new_tokens": 30, "top_p": 0.9, **options}
    made = sampler.generate(prompt, category=["chair", "table"], guidance_scale=2.5, **common)
    asked = {"category": torch.tensor([0, 2])}
    expected = sampler.generate(
        prompt, logits_processor=[ByHand(sampler, 2.5, **asked)], **{**common, "cache_implementation": "dynamic"}
    )
    assert torch.equal(made, expected)
    assert not torch.equal(made, sampler.generate(prompt, category=["chair", "table"], **common))


def test_a_scale_of_the_generation_config_guides_where_there_are_conditions(sampler):
    options = {"do_sample": True, "seed": 2, "max_faces": 4}
    unconditional, guided = sampler.generate(**options), sampler.generate(num_faces=8, guidance_scale=3.0, **options)
    sampler.generation_config.guidance_scale = 3.0
    try:
        assert torch.equal(sampler.generate(**options), unconditional)
        assert torch.equal(sampler.generate(num_faces=8, **options), guided)
        assert not torch.equal(sampler.generate(num_faces=8, guidance_scale=1.0, **options), guided)
    finally:
        sampler.generation_config.guidance_scale = None


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}], ids=str)
@pytest.mark.parametrize("rows", [2, 5])
def test_many_meshes_are_those_of_generate(sampler, rows, guidance):
    categories = ["chair", None, "lamp", "table", "lamp"]
    options = {"max_faces": 5, **guidance}
    made = {
        mesh.number: mesh.ids
        for mesh in generate_meshes(sampler, range(20, 25), rows=rows, category=categories, num_faces=12, **options)
    }
    for number, category in enumerate(categories):
        (alone,) = sampler.generate(category=category, num_faces=12, do_sample=True, seed=20 + number, **options)
        ended = (alone[9:] == EOS).any()
        assert torch.equal(made[number], alone) if ended else torch.equal(made[number], alone[: len(made[number])])
    assert len({tuple(ids.tolist()) for ids in made.values()}) == 5


def test_a_guided_mesh_can_be_streamed(sampler):
    class Streamer:
        def __init__(self):
            self.values = []

        def put(self, value):
            self.values.append(value.flatten().tolist())

        def end(self):
            self.values.append("end")

    for options in ({}, LOOP):
        streamer = Streamer()
        options = {"category": "lamp", "guidance_scale": 2.0, "do_sample": True, "seed": 1, "max_faces": 3, **options}
        (ids,) = sampler.generate(streamer=streamer, **options)
        assert streamer.values.pop() == "end"
        assert [token for value in streamer.values for token in value] == ids.tolist()
