"""Training as a whole: what a step learns, and what an interruption costs."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from training_processes import SHARDED, SHARDED_BLOCKS, Trainer, log_of, losses_of, wait_for_step
from transformers import GenerationConfig

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.procedural.make import make_dataset
from training.run.checkpoint import find_defect
from training.run.record import read_run

FULL = {"ema_decay": 0.9, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "dataloader_num_workers": 1}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(tmp_path_factory.mktemp("trainer"))


@pytest.fixture(scope="module")
def undisturbed(trainer, tmp_path_factory):
    """A run of eight steps with checkpoints after four and eight, and everything that has a state."""
    output_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    trainer.run(output_dir, **FULL)
    return output_dir


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def norms_of(output_dir):
    return [line["grad_norm"] for line in log_of(output_dir) if "loss" in line]


def said(trainer, text):
    return text in trainer.messages.read_text()


def test_a_run_leaves_a_model_that_loads_and_generates(undisturbed):
    model = IFlameForCausalLM.from_pretrained(undisturbed)
    tokenizer = IFlameTokenizer.from_pretrained(undisturbed)
    assert model.config.hidden_size == 16
    ids = model.generate(do_sample=True, max_new_tokens=18)
    assert ids.shape[1] <= 27 and len(tokenizer.batch_decode_mesh(ids)) == 1
    config = json.loads((undisturbed / "config.json").read_text())
    assert (undisturbed / f"{config['auto_map']['AutoModel'].split('.')[0]}.py").is_file()
    assert sorted(losses_of(undisturbed)) == list(range(1, 9))
    assert [line["step"] for line in log_of(undisturbed) if "eval_loss" in line] == [4, 8]
    assert [name for name in os.listdir(undisturbed) if name.startswith(".") and name != ".lock"] == []


def test_every_checkpoint_and_the_model_have_a_card_with_their_figures(undisturbed):
    log = {line["step"]: line["eval_loss"] for line in log_of(undisturbed) if "eval_loss" in line}
    for folder, step in ((undisturbed / "checkpoint-4", 4), (undisturbed / "checkpoint-8", 8), (undisturbed, 8)):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "transformers" and card.data.license == "mit"
        losses = [result.metric_value for result in card.data.eval_results if result.metric_type == "loss"]
        assert losses == [log[step]]
        assert f"{step} steps" in card.text and "## Use" in card.text


def test_the_model_samples_as_the_run_did(trainer, tmp_path):
    trainer.run(tmp_path, max_steps=1, save_steps=0, temperature=0.7, top_k=5, top_p=0.8)
    config = GenerationConfig.from_pretrained(tmp_path)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 5, 0.8)


def test_training_learns(trainer, tmp_path):
    trainer.run(tmp_path, max_steps=40, hidden_size=32, save_steps=0, learning_rate=0.01)
    losses = losses_of(tmp_path)
    assert losses[1] > 4.8 and losses[40] < 4.7
    evaluations = [line for line in log_of(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [40] and evaluations[0]["eval_loss"] < 4.7


@pytest.mark.parametrize("optim", ["muon", "adamw_torch"])
def test_accumulated_batches_learn_what_the_whole_batch_does(trainer, tmp_path, optim):
    options = {"max_steps": 3, "save_steps": 0, "optim": optim}
    trainer.run(tmp_path / "whole", per_device_train_batch_size=4, **options)
    trainer.run(tmp_path / "parts", per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    losses, others = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert [others[step] for step in losses] == pytest.approx(list(losses.values()), rel=1e-6)
    assert norms_of(tmp_path / "parts") == pytest.approx(norms_of(tmp_path / "whole"), rel=1e-5)
    labels = [log_of(tmp_path / name)[-2]["labels"] for name in ("whole", "parts")]
    assert labels[0] == labels[1]


def test_two_processes_learn_what_one_does(trainer, tmp_path):
    options = {"max_steps": 3, "save_steps": 3}
    trainer.run(tmp_path / "one", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    trainer.finish(
        *trainer.start_ranks(
            tmp_path / "two", 2, per_device_train_batch_size=1, gradient_accumulation_steps=2, **options
        )
    )
    losses, others = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert sorted(losses) == sorted(others) == [1, 2, 3]
    assert list(others.values()) == pytest.approx(list(losses.values()), rel=1e-5)
    # Clipping and both optimisers forgive a gradient of the wrong size; its norm does not.
    assert norms_of(tmp_path / "two") == pytest.approx(norms_of(tmp_path / "one"), rel=1e-4)
    evaluations = [log_of(tmp_path / name)[-1]["eval_loss"] for name in ("one", "two")]
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-4)
    assert {"random_states_0.pkl", "random_states_1.pkl"} < set(os.listdir(tmp_path / "two" / "checkpoint-3"))


def test_two_processes_that_share_the_weights_learn_what_one_does_and_go_on_later(trainer, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "num_samples": 2, "sample_max_faces": 3}
    trainer.run(tmp_path / "one", per_device_train_batch_size=2, **options)
    trainer.finish(*trainer.start_ranks(tmp_path / "two", 2, SHARDED, per_device_train_batch_size=1, **options))
    losses, others = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert sorted(losses) == sorted(others) == [1, 2, 3, 4]
    assert list(others.values()) == pytest.approx(list(losses.values()), rel=1e-5)
    assert norms_of(tmp_path / "two")[0] == pytest.approx(norms_of(tmp_path / "one")[0], rel=1e-4)
    assert (tmp_path / "two" / "checkpoint-2" / "pytorch_model_fsdp_0").is_dir()
    resumed = {**options, "resume_from_checkpoint": "latest"}
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    trainer.finish(*trainer.start_ranks(tmp_path / "two", 2, SHARDED, per_device_train_batch_size=1, **resumed))
    assert losses_of(tmp_path / "two") == others
    for folder in (tmp_path / "two", tmp_path / "two" / "checkpoint-4"):
        model = IFlameForCausalLM.from_pretrained(folder)
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["IFlameForCausalLM"]
        ours, theirs = model.state_dict(), weights_of(tmp_path / "one")
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in theirs)
    names = set(os.listdir(tmp_path / "two"))
    assert "samples.png" in names
    assert {name for name in names if name.endswith(".py")} == {
        name for name in os.listdir(tmp_path / "one") if name.endswith(".py")
    }


@pytest.mark.parametrize("shared", [SHARDED, SHARDED_BLOCKS], ids=["at once", "by blocks"])
def test_shared_weights_compute_in_the_types_of_weights_that_are_not_shared(trainer, tmp_path, shared):
    options = {"max_steps": 2, "save_steps": 0, "bf16": True, "num_procedural_validation_meshes": 0}
    options |= {"scale_augmentation": 0}
    trainer.run(tmp_path / "one", per_device_train_batch_size=2, **options)
    trainer.finish(*trainer.start_ranks(tmp_path / "two", 2, shared, per_device_train_batch_size=1, **options))
    assert losses_of(tmp_path / "two")[1] == pytest.approx(losses_of(tmp_path / "one")[1], rel=1e-6)
    assert norms_of(tmp_path / "two")[0] == pytest.approx(norms_of(tmp_path / "one")[0], rel=1e-4)


def test_a_moving_average_of_shared_weights_is_refused(trainer, tmp_path):
    for process in trainer.start_ranks(tmp_path, 2, SHARDED, ema_decay=0.9):
        process.join(60)
        assert process.exitcode == 1
    assert said(trainer, "ema_decay is not available while the weights are sharded")


def test_a_resumed_run_is_bit_for_bit_the_run_that_was_not_interrupted(trainer, undisturbed, tmp_path):
    before = losses_of(undisturbed)
    trainer.run(tmp_path / "run", resume_from_checkpoint=undisturbed / "checkpoint-4", **FULL)
    after = losses_of(tmp_path / "run")
    assert sorted(after) == [5, 6, 7, 8]
    assert after == {step: before[step] for step in after}
    assert_same_weights(tmp_path / "run", undisturbed)
    for name in ("model.safetensors", "average.safetensors", "optimizer.bin"):
        contents = [(folder / "checkpoint-8" / name).read_bytes() for folder in (tmp_path / "run", undisturbed)]
        assert contents[0] == contents[1], name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(trainer, undisturbed, tmp_path, number):
    trainer.messages.write_text("")
    process = trainer.start(tmp_path, save_steps=100, eval_steps=4, **FULL)
    wait_for_step(tmp_path, 2, process)
    os.kill(process.pid, number)
    trainer.finish(process)
    stopped = max(losses_of(tmp_path))
    assert 2 <= stopped < 8
    assert [path for path in os.listdir(tmp_path) if "checkpoint" in path] == [f"checkpoint-{stopped}"]
    assert said(trainer, f"stopped after step {stopped} of 8; --resume_from_checkpoint latest")
    assert not said(trainer, "Traceback")
    trainer.run(tmp_path, resume_from_checkpoint="latest", save_steps=100, eval_steps=4, **FULL)
    assert losses_of(tmp_path) == losses_of(undisturbed)
    assert_same_weights(tmp_path, undisturbed)


def test_a_signal_to_the_whole_group_leaves_the_loader_alone_until_the_checkpoint_is_saved(trainer, tmp_path):
    process = trainer.start(tmp_path, {"OWN_GROUP": "1"}, max_steps=10_000, save_steps=0, dataloader_num_workers=2)
    wait_for_step(tmp_path, 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    trainer.finish(process)
    assert [path for path in os.listdir(tmp_path) if "checkpoint" in path] == [
        f"checkpoint-{max(losses_of(tmp_path))}"
    ]


def test_loader_workers_do_not_outlive_a_killed_run(trainer, tmp_path):
    # A batch is more than a pipe holds, so that the workers wait for a reader.
    rows = {"per_device_train_batch_size": 40, "row_length": 2250}
    process = trainer.start(tmp_path, max_steps=10_000, save_steps=0, dataloader_num_workers=2, **rows)
    wait_for_step(tmp_path, 1, process)
    workers = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(workers) >= 2
    process.kill()
    process.join()
    gone, alive = psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=20)
    assert alive == []


def test_killed_at_ten_random_moments_a_run_ends_as_if_undisturbed(trainer, tmp_path):
    options = {"max_steps": 32, "save_steps": 1, "ema_decay": 0.9, "num_procedural_validation_meshes": 0}
    trainer.run(tmp_path / "undisturbed", **options)
    minutes = [line["minutes"] for line in log_of(tmp_path / "undisturbed") if "loss" in line]
    seconds_a_step = 60 * (minutes[-1] - minutes[0]) / (len(minutes) - 1)
    moments, output_dir = random.Random(0), tmp_path / "killed"
    furthest = [0]
    for _ in range(10):
        process = trainer.start(output_dir, resume_from_checkpoint="latest", **options)
        # Most of the time between two steps goes into saving; no step at all is a kill while starting.
        wait_for_step(output_dir, max(losses_of(output_dir), default=0) + moments.randrange(3), process)
        time.sleep(moments.uniform(0, min(seconds_a_step, 0.1)))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        good = [path for path in output_dir.glob("checkpoint-*") if find_defect(path) is None]
        furthest.append(max((int(path.name.split("-")[1]) for path in good), default=0))
        assert furthest[-1] >= furthest[-2], "a checkpoint was lost"
        assert furthest[-1] >= max(losses_of(output_dir), default=0) - 1, "more than the last step was lost"
    assert len(set(furthest)) > 4, f"the kills should fall into different phases, not at {furthest}"
    trainer.run(output_dir, resume_from_checkpoint="latest", **options)
    assert [name for name in os.listdir(output_dir) if name.startswith(".") and name != ".lock"] == []
    assert losses_of(output_dir) == losses_of(tmp_path / "undisturbed")
    assert_same_weights(output_dir, tmp_path / "undisturbed")


def test_a_broken_checkpoint_is_named_and_the_one_before_is_resumed(trainer, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoint-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    trainer.run(tmp_path / "run", resume_from_checkpoint="latest", **FULL)
    assert said(trainer, f"{weights.parent} is broken and passed over: model.safetensors has")
    assert_same_weights(tmp_path / "run", undisturbed)
    assert find_defect(weights.parent) is None


def test_a_full_disk_costs_checkpoints_but_not_the_run(trainer, tmp_path):
    trainer.run(tmp_path, max_steps=4, save_steps=2, save_total_limit=1)
    kept = weights_of(tmp_path / "checkpoint-4")
    process = trainer.start(tmp_path, file_size=20_000, max_steps=6, save_steps=2, resume_from_checkpoint="latest")
    process.join(120)
    assert process.exitcode != 0, "the finished model cannot be written either, and that is no success"
    assert said(trainer, "checkpoint-6 could not be written")
    assert sorted(losses_of(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert find_defect(tmp_path / "checkpoint-4") is None
    assert all(torch.equal(value, kept[name]) for name, value in weights_of(tmp_path / "checkpoint-4").items())
    assert [name for name in os.listdir(tmp_path) if name.startswith(".") and name != ".lock"] == []


def test_checkpoints_of_another_run_are_neither_overwritten_nor_continued(trainer, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for options, message in (
        ({}, "holds the checkpoints of another run"),
        ({"resume_from_checkpoint": "latest", "seed": 1}, "belongs to other training data"),
    ):
        process = trainer.start(tmp_path / "run", **{**FULL, **options})
        process.join(60)
        assert process.exitcode == 1 and said(trainer, message)
    assert log_of(tmp_path / "run") == log_of(undisturbed)


def test_a_finished_run_that_is_resumed_only_finishes_again(trainer, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    trainer.run(tmp_path / "run", resume_from_checkpoint="latest", max_steps=5, **FULL)
    assert said(trainer, "step 8 of 5 is done: there is nothing left to train")
    assert losses_of(tmp_path / "run") == losses_of(undisturbed)
    assert_same_weights(tmp_path / "run", undisturbed)


def test_steps_whose_gradient_is_not_finite_are_left_out_and_end_the_run(trainer, tmp_path):
    process = trainer.start(tmp_path, learning_rate=1e30, max_grad_norm=0, optim="adamw_torch", max_steps=60)
    process.join(120)
    assert process.exitcode == 1
    assert said(trainer, "is left out, its gradient is not finite; losses by process: [nan]")
    assert said(trainer, "lower --learning_rate")


def test_minutes_shorten_the_run_and_its_schedule_which_is_told_everywhere(trainer, tmp_path):
    trainer.messages.write_text("")
    trainer.run(tmp_path, max_steps=100_000, max_minutes=0.05, save_steps=100_000, logging_steps=5)
    log = [line for line in log_of(tmp_path) if "loss" in line]
    last = log[-1]["step"]
    assert 20 < last < 5000
    assert log[-1]["minutes"] < 0.1
    assert log[-1]["learning_rate"] < 0.05 * max(line["learning_rate"] for line in log)
    stopped = f"stopped after {last:,} of 100,000 steps by max_minutes: 0.05; not converged"
    assert [line["ended"] for line in log_of(tmp_path) if "ended" in line] == [stopped]
    assert said(trainer, "max_minutes: 0.05 leaves time for") and said(trainer, stopped)
    for folder in (tmp_path, tmp_path / f"checkpoint-{last}"):
        assert f"S{stopped[1:]}." in (folder / "README.md").read_text()


def test_a_run_that_has_not_learnt_enough_fails_after_everything_is_written_and_can_go_on(trainer, tmp_path):
    trainer.messages.write_text("")
    options = {"num_samples": 2, "sample_max_faces": 3, "resume_from_checkpoint": "latest"}
    process = trainer.start(tmp_path, max_steps=4, required_eval_loss=0.1, **options)
    process.join(120)
    loss = [line["eval_loss"] for line in log_of(tmp_path) if "eval_loss" in line][-1]
    assert process.exitcode == 1 and not said(trainer, "Traceback")
    shortfall = f"not converged: the evaluation loss is {loss:.3f}, required_eval_loss 0.1"
    assert said(trainer, shortfall) and said(trainer, "a larger --max_steps, and --resume_from_checkpoint latest")
    assert [line["ended"] for line in log_of(tmp_path) if "ended" in line] == [shortfall]
    assert f"N{shortfall[1:]}." in (tmp_path / "README.md").read_text()
    assert {"samples.png", "sample-01.glb", "model.safetensors", "checkpoint-4"} <= set(os.listdir(tmp_path))
    trainer.run(tmp_path, max_steps=6, required_eval_loss=10.0, **options)
    assert sorted(losses_of(tmp_path)) == [1, 2, 3, 4, 5, 6]
    assert "converged" not in (tmp_path / "README.md").read_text()


def test_training_goes_on_from_a_model_and_from_parquet_files(trainer, undisturbed, tmp_path):
    meshes = make_dataset(12, seed=9, max_faces=40)
    for name, part in (("train", meshes[:8]), ("test", meshes[8:])):
        table = {
            "vertices": [np.asarray(mesh.vertices).tolist() for mesh in part],
            "faces": [np.asarray(mesh.faces).tolist() for mesh in part],
            "category": [mesh.kind for mesh in part],
        }
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / f"{name}.parquet")
    process = trainer.start(
        tmp_path / "run",
        {"HF_HOME": str(tmp_path / "cache"), "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        model_name_or_path=undisturbed,
        train_file=tmp_path / "train.parquet",
        validation_file=tmp_path / "test.parquet",
        max_steps=2,
        num_samples=2,
        sample_max_faces=3,
        learning_rate=0.0,
        balance="category",
    )
    trainer.finish(process)
    assert_same_weights(tmp_path / "run", undisturbed)
    evaluation = [line for line in log_of(tmp_path / "run") if "eval_loss" in line][-1]
    assert set(evaluation["eval_by_category"]) == {mesh.kind for mesh in meshes[8:]}
    assert (tmp_path / "run" / "samples.png").is_file()
    assert not (tmp_path / "cache" / "hub").exists()


def test_the_best_checkpoint_can_be_the_model_that_is_left_with_its_figures_in_the_card(trainer, tmp_path):
    # The learning rate ruins the model after the warm-up: the first checkpoint is the best, and a step that was not
    # saved is better still.
    options = {"warmup_steps": 6, "learning_rate": 3.0, "load_best_model_at_end": True}
    trainer.run(tmp_path, eval_steps=1, save_steps=2, **options)
    losses = {line["step"]: line["eval_loss"] for line in log_of(tmp_path) if "eval_loss" in line}
    best = min((2, 4, 6, 8), key=losses.get)
    assert best != 8 and min(losses.values()) < losses[best]
    assert {name for name in os.listdir(tmp_path) if "checkpoint" in name} == {f"checkpoint-{best}", "checkpoint-8"}
    assert_same_weights(tmp_path, tmp_path / f"checkpoint-{best}")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [result.metric_value for result in results if result.metric_type == "loss"] == [losses[best]]
    assert read_run(tmp_path).evaluation["eval_loss"] == losses[best], "the card that hub_upload writes has them too"
