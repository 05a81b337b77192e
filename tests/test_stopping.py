"""A run that is asked to stop while it evaluates, draws samples or saves, and goes on later as if it had not been."""

import os
import signal
import time

import psutil
import pytest
from training_processes import Trainer, command_line, log_of, losses_of, wait_for_step

from training import train
from training.run import assess
from training.run.checkpoint import Progress, find_defect
from training.run.interruption import Interruption
from training.run.write import ModelWriter

OPTIONS = {"save_steps": 4, "eval_steps": 2, "sample_steps": 4, "num_samples": 1, "sample_max_faces": 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of eight steps that nothing disturbs."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(command_line(output_dir, **OPTIONS)) == 0
    return output_dir


def stop_in(monkeypatch, name, step):
    """Lets the run be asked to stop as soon as it does this after a step; counts how far it still gets."""
    done, forwards = getattr(assess, name), []

    def stopped(model, *arguments, **options):
        if not forwards and state["run"].progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            forwards.append(0)
            model.register_forward_hook(lambda *_: forwards.append(1))
        return done(model, *arguments, **options)

    state, begin = {}, train.Run.start
    monkeypatch.setattr(assess, name, stopped)
    monkeypatch.setattr(train.Run, "start", lambda run: (state.update(run=run), begin(run)))
    return forwards


def essence(output_dir):
    """What the log of a run says, but for the time it took and its folder."""
    kept = ("step", "loss", "grad_norm", "eval_loss", "sample_faces")
    return [{name: line[name] for name in kept if name in line} for line in log_of(output_dir)]


def checkpoints_of(output_dir):
    return sorted(path.name for path in output_dir.glob("checkpoint-*") if find_defect(path) is None)


@pytest.mark.parametrize(("name", "step"), [("evaluate", 2), ("draw_samples", 4), ("evaluate", 8)])
def test_a_signal_in_an_evaluation_or_in_samples_saves_that_step_at_once_and_loses_nothing(
    whole, tmp_path, monkeypatch, capsys, name, step
):
    with monkeypatch.context() as patched:
        forwards = stop_in(patched, name, step)
        assert train.main(command_line(tmp_path, **OPTIONS)) == 0
    assert forwards and sum(forwards) <= 10, "it was not stopped after a face"
    assert max(losses_of(tmp_path)) == step and checkpoints_of(tmp_path)[-1] == f"checkpoint-{step}"
    assert f"stopped after step {step} of 8; --resume_from_checkpoint latest goes on" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()
    assert train.main(command_line(tmp_path, **OPTIONS, resume_from_checkpoint="latest")) == 0
    assert essence(tmp_path) == essence(whole)
    pictures = sorted(path.relative_to(whole) for path in whole.rglob("samples.png"))
    assert len(pictures) == 3 and all((tmp_path / picture).exists() for picture in pictures)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for checkpoint in ("checkpoint-4", "checkpoint-8"):
        ours, theirs = Progress.read(tmp_path / checkpoint), Progress.read(whole / checkpoint)
        assert (ours.eval_loss, ours.due) == (theirs.eval_loss, [])


def test_a_signal_while_a_checkpoint_is_saved_costs_no_further_step(tmp_path, monkeypatch):
    save = ModelWriter.write_checkpoint

    def stopped(writer, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        save(writer, folder)

    monkeypatch.setattr(ModelWriter, "write_checkpoint", stopped)
    assert train.main(command_line(tmp_path)) == 0
    assert checkpoints_of(tmp_path) == ["checkpoint-4"] and max(losses_of(tmp_path)) == 4


@pytest.mark.parametrize("save_steps", [4, 0])
def test_a_signal_in_the_last_samples_leaves_the_model_and_a_checkpoint_from_which_they_are_drawn(
    tmp_path, monkeypatch, capsys, save_steps
):
    options = {"num_samples": 1, "sample_max_faces": 6, "save_steps": save_steps}
    with monkeypatch.context() as patched:
        forwards = stop_in(patched, "draw_samples", 8)
        assert train.main(command_line(tmp_path, **options)) == 0
    assert forwards and sum(forwards) <= 10
    assert (tmp_path / "model.safetensors").exists() and not (tmp_path / "samples.png").exists()
    assert "without samples: --resume_from_checkpoint latest draws them" in capsys.readouterr().err
    assert checkpoints_of(tmp_path)[-1] == "checkpoint-8"
    assert train.main(command_line(tmp_path, **options, resume_from_checkpoint="latest")) == 0
    assert (tmp_path / "samples.png").exists() and sorted(losses_of(tmp_path)) == list(range(1, 9))


def test_a_signal_to_a_process_that_waits_for_samples_stops_the_one_that_draws_them(tmp_path, tmp_path_factory):
    trainer = Trainer(tmp_path_factory.mktemp("trainer"))
    slow = {"sample_steps": 2, "num_samples": 64, "sample_max_faces": 50000, "top_p": 1.0, "save_steps": 0}
    processes = trainer.start_ranks(tmp_path, 2, per_device_train_batch_size=1, eval_steps=100, **slow)
    wait_for_step(tmp_path, 2, processes[0])
    time.sleep(0.5)
    began = time.monotonic()
    os.kill(processes[1].pid, signal.SIGTERM)
    trainer.finish(*processes)
    assert time.monotonic() - began < 20
    assert max(losses_of(tmp_path)) == 2 and checkpoints_of(tmp_path) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("words", "is_launcher"),
    [
        (["/usr/bin/python", "/venv/bin/accelerate", "launch", "train.py"], True),
        (["/usr/bin/python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["/bin/bash", "-c", "accelerate launch train.py"], False),
        (["/bin/bash"], False),
    ],
)
def test_only_the_end_of_accelerates_launcher_stops_a_run(monkeypatch, words, is_launcher):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which users set, too
    monkeypatch.setattr(psutil.Process, "cmdline", lambda process: words)
    interruption = Interruption()
    assert not interruption.asked
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert interruption.asked == is_launcher
