"""
What the record of a run says of its end, and what a card says of conditions; the whole card is tested with the folder
that is published.
"""

import json

import pytest
from small_models import small_model

from iflame_hf import IFlameTokenizer
from training.run.card import model_card, pipeline_snippet, usage_snippet
from training.run.record import RunRecord, read_run

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
            'category="arm chair", num_faces=80, ',
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
    assert ("`guidance_scale=2.0` gives what is asked for more weight" in text) == (told is not None)
    model.generation_config.guidance_scale = 1.5
    text = model_card(model, run, "you/lamps").text
    assert ("by `guidance_scale=1.5`, at twice the work of `guidance_scale=1`" in text) == (told is not None)


def test_a_card_tells_how_a_model_samples_and_what_a_run_of_which_there_is_only_a_log_has_done(tmp_path):
    model = small_model()
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=0.8, top_k=0, max_length=9 * 52)
    lines = [{"step": 20, "labels": 500, "minutes": 2.0}, {"step": 20, "ended": "not converged"}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = model_card(model, read_run(tmp_path), "you/lamps").text
    assert "sample with `temperature=1`, `top_p=0.8`" in text and "at most 50 faces" in text
    assert "keep_order" not in text
    model.generation_config.keep_order = False
    assert (
        "may leave their canonical order (`keep_order=False`)"
        in model_card(model, read_run(tmp_path), "you/lamps").text
    )
    run = RunRecord(progress={"arguments": {"top_p": 0.95}})  # of its samples, which were chosen better later
    for snippet in (usage_snippet, pipeline_snippet):
        assert "top_p" not in snippet(model, run, "you/lamps") and "top_p=0.95" in snippet(
            small_model(), run, "you/lamps"
        )
    assert "20 steps, 500 tokens learnt from, 2.0 minutes.\n\nNot converged." in text
    settings = {"optim": "muon", "learning_rate": 6e-3, "lr_scheduler_type": "linear", "row_length": 7218}
    settings |= {"per_device_train_batch_size": 8, "bf16": True, "turn_augmentation": "quarter", "balance": ["pack"]}
    run = RunRecord(progress={"arguments": {"train_file": ["x"], **settings}})
    assert (
        "Settings: muon, learning rate 0.006 (linear); 8 rows of 7,218 tokens a step and device; bf16; "
        "turn augmentation quarter; balance pack." in model_card(model, run, "you/lamps").text
    )


def test_what_a_card_shows_runs(tmp_path, monkeypatch):
    model = small_model(categories=["chair", "lamp"], num_faces_range=[4, 64])
    run = RunRecord(progress={"arguments": {"sample_max_faces": 4}})
    for each in (model, IFlameTokenizer()):
        each.save_pretrained(tmp_path / "lamps")
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in (usage_snippet, pipeline_snippet):
        exec(snippet(model, run, "lamps"), names)
    assert names["mesh"].metadata["asked_for"] == {"category": "chair", "num_faces": 4}
