"""
What the record of a run says of its end, and what a card says of conditions; the whole card is tested with the folder
that is published.
"""

import pytest
from small_models import small_model

from iflame_hf import IFlameTokenizer
from training.run.card import RunRecord, model_card, pipeline_snippet, usage_snippet

SHORT = {"step": 153, "max_steps": 153, "planned_steps": 2000}
WHOLE = {"step": 2000, "max_steps": 0, "planned_steps": 2000}


@pytest.mark.parametrize(
    ("progress", "required", "loss", "shortfall"),
    [
        (SHORT, None, 0.9, "stopped after 153 of 2,000 steps by max_minutes: 8; not converged"),
        (
            SHORT,
            0.1,
            0.9,
            "stopped after 153 of 2,000 steps by max_minutes: 8; "
            "not converged: the evaluation loss is 0.900, required_eval_loss 0.1",
        ),
        (SHORT, 0.1, 0.09, "stopped after 153 of 2,000 steps by max_minutes: 8"),
        (SHORT | {"step": 1500, "max_steps": 1500}, None, 0.9, "stopped after 1,500 of 2,000 steps by max_minutes: 8"),
        (WHOLE, 0.1, 0.9, "not converged: the evaluation loss is 0.900, required_eval_loss 0.1"),
        (WHOLE, 0.1, float("nan"), "not converged: the evaluation loss is nan, required_eval_loss 0.1"),
        (WHOLE, 0.1, 0.09, ""),
        (WHOLE, None, 0.9, ""),
        # runs that go on
        (SHORT | {"step": 100}, 0.1, 0.9, ""),
        (WHOLE | {"step": 100}, 0.1, 0.9, ""),
        ({}, None, 0.9, ""),
    ],
)
def test_a_run_says_at_its_end_and_not_before_what_it_lacks(progress, required, loss, shortfall):
    arguments = {"max_minutes": 8.0, "required_eval_loss": required}
    run = RunRecord(progress={**progress, "arguments": arguments}, evaluation={"eval_loss": loss})
    assert run.shortfall() == shortfall
    assert run.missed_loss == ("required_eval_loss" in shortfall)


@pytest.mark.parametrize(
    ("conditions", "told", "asked"),
    [
        (
            {"categories": ["arm chair", "lamp"], "num_faces_range": [4, 1600]},
            "asked for a category (arm chair, lamp); and for a number of faces from 4 to 1,600, which meshes have "
            'about: `generator(category="arm chair", num_faces=80)`',
            'category="arm chair", ',
        ),
        ({"categories": ["lamp"]}, 'asked for a category (lamp): `generator(category="lamp")`', 'category="lamp", '),
        ({"num_faces_range": [4, 9]}, "asked for a number of faces from 4 to 9", "num_faces=6, "),
        ({}, None, ""),
    ],
    ids=str,
)
def test_a_card_tells_what_a_model_can_be_asked_for_and_shows_how(conditions, told, asked):
    most = 8 if conditions.get("num_faces_range") == [4, 9] else 100
    model, run = small_model(**conditions), RunRecord(progress={"arguments": {"sample_max_faces": most}})
    text = model_card(model, run, "you/lamps").text
    assert ("## Asking for something" in text) == (told is not None) and (told or "## Use") in text
    assert f"generate({asked}num_return_sequences=4, " in usage_snippet(model, run, "you/lamps")
    assert f"generator(num_meshes=4, {asked}max_faces={most}, " in pipeline_snippet(model, run, "you/lamps")


def test_what_a_card_shows_runs(tmp_path, monkeypatch):
    model = small_model(categories=["chair", "lamp"], num_faces_range=[4, 64])
    run = RunRecord(progress={"arguments": {"sample_max_faces": 4}})
    for each in (model, IFlameTokenizer()):
        each.save_pretrained(tmp_path / "lamps")
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in (usage_snippet, pipeline_snippet):
        exec(snippet(model, run, "lamps"), names)
    assert names["mesh"].metadata["asked_for"] == {"category": "chair"}
