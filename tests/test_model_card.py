"""What the record of a run says of its end; the whole card is tested with the folder that is published."""

import pytest

from training.run.card import RunRecord

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
