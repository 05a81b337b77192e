"""What steps gave is read later than they are taken, in their order, and counts as if it had been read at once."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from training_processes import command_line, log_of

from iflame_cli.errors import CommandError
from iflame_hf import IFlameForCausalLM
from training import train
from training.run.checkpoint import Progress
from training.run.log import Line, RunLog, Window
from training.run.results import StepResult, StepResults
from training.run.steps import Steps

NAN = float("nan")


def result(number, norm, loss, labels=10):
    return StepResult(number, labels, torch.tensor(loss), torch.tensor([norm, loss]))


def line(seconds=60.0):
    window = Window()
    window.add(2.0, rows=4, labels=30)
    return Line(window, learning_rate=0.1, epoch=0.5, seconds=seconds)


@pytest.fixture
def results(tmp_path):
    progress, steps = Progress(), object.__new__(Steps)
    steps.left_out, steps.last = 0, 100
    found = StepResults(progress, steps, RunLog(tmp_path, Accelerator(cpu=True)), row_length=90)
    said = []
    found.log.report = said.append
    return SimpleNamespace(found=found, progress=progress, said=said, path=tmp_path / "log.jsonl")


def test_steps_are_counted_and_logged_when_they_are_read_and_not_before(results):
    for number in (1, 2):
        results.found.add(result(number, 2.0, 3.0 + number), line() if number == 2 else None)
    assert results.progress == Progress() and not results.path.exists() and results.found.said == ""
    results.found.read()
    (logged,) = [json.loads(text) for text in results.path.read_text().splitlines()]
    assert logged["step"] == 2 and logged["loss"] == 4.5 and logged["grad_norm"] == 2 and logged["labels"] == 20
    assert logged["tokens_per_second"] == 4 * 90 / 2 and logged["minutes"] == 1 and logged["learning_rate"] == 0.1
    assert results.progress.labels == 20 and results.progress.loss_steps == 0
    assert results.found.said == "loss 4.5000, 180 tokens/s"
    results.found.read()
    assert len(results.path.read_text().splitlines()) == 1


@pytest.mark.parametrize(("norm", "loss"), [(NAN, 1.0), (float("inf"), 1.0), (1.0, NAN)])
def test_a_step_that_was_left_out_is_said_and_does_not_count(results, norm, loss):
    results.found.add(result(1, 1.0, 2.0), None)
    results.found.add(result(2, norm, loss), line())
    results.found.read()
    assert results.said == [f"step 2 is left out, its gradient is not finite; losses by process: [{loss}]"]
    logged = json.loads(results.path.read_text())
    assert logged["step"] == 2 and logged["loss"] == 2 and logged["grad_norm"] is None and logged["labels"] == 10


def test_a_line_of_which_every_step_was_left_out_is_not_written(results):
    results.found.add(result(1, NAN, NAN), line())
    results.found.read()
    assert not results.path.exists() and results.progress.labels == 0


def test_too_many_steps_left_out_in_a_row_end_the_run(results):
    for number in range(1, 11):
        results.found.add(result(number, NAN, NAN), None)
    with pytest.raises(CommandError, match="not finite in 10 steps in a row"):
        results.found.read()


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_a_step_of_a_run_whose_gradient_is_not_finite_leaves_the_weights_as_they_were(tmp_path, monkeypatch, optim):
    forward, calls = IFlameForCausalLM.forward, []

    def faulty(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 3:
            output.loss = output.loss * NAN
        return output

    weights = []
    for steps, network in ((2, forward), (3, faulty)):
        monkeypatch.setattr(IFlameForCausalLM, "forward", network)
        options = {"max_steps": steps, "save_steps": 0, "num_procedural_validation_meshes": 0, "optim": optim}
        constant = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0}
        folder = tmp_path / str(steps)
        assert train.main(command_line(folder, **options, **constant)) == 0
        weights.append(load_file(folder / "model.safetensors"))
    assert len(calls) == 3 and [entry["step"] for entry in log_of(folder)] == [1, 2]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
