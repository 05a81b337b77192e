"""Going on from a checkpoint otherwise than the run went, and ends of a run that are none."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from accelerate import Accelerator
from training_processes import ENVIRONMENT, Trainer, command_line, log_of, losses_of, wait_for_step

from training.procedural.make import make_dataset
from training.run.checkpoint import find_defect
from training.run.log import RunLog

ROOT = Path(__file__).resolve().parents[1]
FEW = {"num_procedural_validation_meshes": 0}


@pytest.fixture
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of eight steps with checkpoints after four and eight."""
    output_dir = tmp_path_factory.mktemp("done") / "run"
    Trainer(tmp_path_factory.mktemp("trainer")).run(output_dir, **FEW)
    return output_dir


@pytest.fixture
def copy(done, tmp_path):
    return Path(shutil.copytree(done, tmp_path / "run"))


def fail(trainer, output_dir, *messages, environment=None, **options):
    process = trainer.start(output_dir, environment, **{**FEW, **options})
    process.join(60)
    said = trainer.messages.read_text()
    assert process.exitcode == 1 and all(message in said for message in messages), said


def checkpoints_of(output_dir):
    return sorted(name for name in os.listdir(output_dir) if "checkpoint" in name)


def rates_of(output_dir):
    return {line["step"]: line["learning_rate"] for line in log_of(output_dir) if "loss" in line}


def test_a_run_that_goes_back_sets_later_checkpoints_aside(trainer, copy):
    options = {**FEW, "max_steps": 7, "save_steps": 1, "save_total_limit": 1}
    trainer.run(copy, resume_from_checkpoint=copy / "checkpoint-4", **options)
    assert checkpoints_of(copy) == ["checkpoint-7", "checkpoint-8.aside"]
    assert find_defect(copy / "checkpoint-7") is None and find_defect(copy / "checkpoint-8.aside") is None
    assert "checkpoint-8 is of a later step" in trainer.messages.read_text()


def test_another_learning_rate_holds_from_the_checkpoint_on(trainer, done, tmp_path):
    options = {**FEW, "resume_from_checkpoint": done / "checkpoint-4"}
    trainer.run(tmp_path / "same", **options)
    trainer.run(tmp_path / "twice", learning_rate=2e-3, **options)
    before, same, twice = rates_of(done), rates_of(tmp_path / "same"), rates_of(tmp_path / "twice")
    assert sorted(same) == [5, 6, 7, 8] and same == {step: before[step] for step in same}
    assert twice == {step: pytest.approx(2 * rate) for step, rate in same.items()}
    same, twice = losses_of(tmp_path / "same"), losses_of(tmp_path / "twice")
    assert same[5] == twice[5] and same[6] != twice[6], "the first step after a checkpoint has the new rate"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "cannot go on with hidden_size 32 (was 16)"),
        ({"optim": "adamw_torch"}, "cannot go on with optim adamw_torch (was muon)"),
        ({"ema_decay": 0.9}, "cannot go on with ema_decay 0.9 (was None)"),
    ],
)
def test_what_a_checkpoint_does_not_fit_is_refused_in_a_sentence(trainer, copy, options, message):
    fail(trainer, copy, message, "--model_name_or_path", resume_from_checkpoint="latest", **options)
    assert losses_of(copy).keys() == set(range(1, 9)) and checkpoints_of(copy) == ["checkpoint-4", "checkpoint-8"]


def test_passes_through_the_data_remain_what_they_were_with_another_batch(trainer, tmp_path):
    options = {**FEW, "max_steps": -1, "num_train_epochs": 2, "save_steps": 6, "gradient_accumulation_steps": 1}
    trainer.run(tmp_path / "one", per_device_train_batch_size=1, save_total_limit=10, **options)
    whole = log_of(tmp_path / "one")[-1]
    checkpoint = tmp_path / "one" / "checkpoint-6"
    options |= {"per_device_train_batch_size": 2, "resume_from_checkpoint": checkpoint}
    trainer.run(tmp_path / "two", **options)
    last = log_of(tmp_path / "two")[-1]
    assert whole["epoch"] == pytest.approx(2, abs=0.01) and last["epoch"] == pytest.approx(2, abs=0.1)
    assert last["step"] == 6 + round((whole["step"] - 6) / 2)


def test_a_finished_model_without_checkpoints_is_not_written_over(trainer, copy):
    for path in copy.glob("checkpoint-*"):
        shutil.rmtree(path)
    for wanted in ({}, {"resume_from_checkpoint": "latest"}):
        fail(trainer, copy, "holds a finished model and no checkpoint", **wanted)
    assert sorted(losses_of(copy)) == list(range(1, 9))


def test_a_folder_is_for_one_run_at_a_time(trainer, tmp_path):
    first = trainer.start(tmp_path, max_steps=100_000, save_steps=0, **FEW)
    wait_for_step(tmp_path, 1, first)
    fail(trainer, tmp_path, "another process trains in", resume_from_checkpoint="latest")
    os.kill(first.pid, signal.SIGTERM)
    trainer.finish(first)


def write_meshes(path, meshes, row_group_size=1000):
    columns = {name: [np.asarray(mesh[name]).tolist() for mesh in meshes] for name in ("vertices", "faces")}
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)


def test_a_step_is_finished_and_saved_before_rows_that_cannot_be_had_end_the_run(trainer, tmp_path):
    good = [{"vertices": mesh.vertices, "faces": mesh.faces} for mesh in make_dataset(6, seed=2, max_faces=40)]
    corners = np.random.default_rng(0).random((180, 3))
    too_long = {"vertices": corners, "faces": np.arange(180).reshape(60, 3)}
    write_meshes(tmp_path / "a.parquet", [*good, *[too_long] * 6], row_group_size=6)
    options = {"streaming": True, "streaming_row_groups": 1, "train_file": tmp_path / "a.parquet", "seed": 1}
    options |= {**FEW, "per_device_train_batch_size": 1, "save_steps": 0}
    environment = {"HF_HOME": str(tmp_path), "HF_DATASETS_CACHE": str(tmp_path)}
    process = trainer.start(tmp_path / "one", environment, max_steps=1, **options)
    trainer.finish(process)  # a row that is not needed is not read
    assert sorted(losses_of(tmp_path / "one")) == [1]
    fail(trainer, tmp_path / "all", "faces", "row", environment=environment, max_steps=100, **options)
    (name,) = checkpoints_of(tmp_path / "all")
    assert name == f"checkpoint-{max(losses_of(tmp_path / 'all'))}" and name != "checkpoint-0"
    assert find_defect(tmp_path / "all" / name) is None


def test_a_stop_that_cannot_be_saved_is_no_success(trainer, tmp_path):
    process = trainer.start(tmp_path, file_size=20_000, max_steps=10_000, save_steps=0, **FEW)
    wait_for_step(tmp_path, 2, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    said = trainer.messages.read_text()
    assert process.exitcode == 1 and "which could not be saved" in said and "latest goes on" not in said


def test_a_log_that_cannot_be_written_does_not_end_the_run(trainer, tmp_path):
    process = trainer.start(tmp_path, file_size=5_000, max_steps=24, save_steps=0, **FEW)
    process.join(60)
    said = trainer.messages.read_text()  # of which there are no more than 5,000 bytes either
    missing = {int(step) for step in re.findall(r"step (\d+) is missing in", said)}
    assert missing and "File too large" in said
    assert process.exitcode == 1 and "train: " in said, "the model cannot be written either"
    steps = set(losses_of(tmp_path))
    assert len(steps) > 2 and not steps & missing and steps | missing == set(range(1, 25))
    assert (tmp_path / "log.jsonl").read_bytes().endswith(b"}\n")


def test_the_log_gives_the_latest_evaluation_up_to_a_step(tmp_path):
    log = RunLog(tmp_path, Accelerator(cpu=True))
    assert log.evaluation(3) == {}
    for step, values in ((2, {"eval_loss": 1.0}), (3, {"loss": 9.0}), (4, {"eval_loss": 0.5})):
        log.write(step, values)
    assert [log.evaluation(step).get("eval_loss") for step in (1, 2, 3, 4, 9)] == [None, 1.0, 1.0, 0.5, 0.5]


def test_a_number_in_the_environment_does_not_divide_gradients(trainer, done, tmp_path):
    process = trainer.start(tmp_path / "run", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, **FEW)
    trainer.finish(process)
    assert log_of(tmp_path / "run")[0]["grad_norm"] == log_of(done)[0]["grad_norm"]


def test_a_signal_to_accelerate_launch_saves_and_stops_the_run(tmp_path):
    arguments = command_line(tmp_path / "run", max_steps=100_000, save_steps=0, **FEW)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    launcher = subprocess.Popen(
        [*launch, "training/train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    wait_for_step(tmp_path / "run", 2, _Alive(launcher))
    children = psutil.Process(launcher.pid).children(recursive=True)
    assert children
    launcher.terminate()
    launcher.wait(30)
    assert psutil.wait_procs(children, timeout=30)[1] == []
    (name,) = checkpoints_of(tmp_path / "run")
    assert name == f"checkpoint-{max(losses_of(tmp_path / 'run'))}"


class _Alive:
    """A subprocess as `wait_for_step` asks for it."""

    def __init__(self, process):
        self.process = process

    def is_alive(self):
        return self.process.poll() is None
