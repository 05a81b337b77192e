"""Checkpoints are whole or not there."""

import json
import os
import shutil

import pytest
from accelerate import Accelerator

from training.run.checkpoint import MANIFEST, Checkpoints, Progress, find_defect


@pytest.fixture
def reports():
    return []


@pytest.fixture
def checkpoints(tmp_path, reports):
    return Checkpoints(tmp_path / "run", 2, Accelerator(cpu=True), reports.append)


def writer(step, eval_loss=None, files=("model.bin", "ranks/0.bin")):
    def write(folder):
        for name in files:
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(f"{name} of step {step}".encode() * 100)
        Progress(step=step, eval_loss=eval_loss).write(folder)

    return write


def save(checkpoints, *steps, **options):
    for step in steps:
        assert checkpoints.save(step, writer(step, **options))


def names(checkpoints):
    return sorted(os.listdir(checkpoints.output_dir))


def test_a_checkpoint_is_found_again_with_what_was_written(checkpoints):
    assert checkpoints.find("latest") is None
    save(checkpoints, 3)
    found = checkpoints.find("latest")
    assert found == checkpoints.output_dir / "checkpoint-3" and find_defect(found) is None
    assert (found / "ranks/0.bin").read_bytes() == b"ranks/0.bin of step 3" * 100
    assert Progress.read(found) == Progress(step=3)
    assert checkpoints.find(str(found)) == found
    assert names(checkpoints) == ["checkpoint-3"]


def test_latest_is_the_highest_step_not_the_last_name(checkpoints):
    save(checkpoints, 9, 100)
    assert checkpoints.find("latest").name == "checkpoint-100"


def damage_byte(folder):
    content = bytearray((folder / "model.bin").read_bytes())
    content[700] ^= 1
    (folder / "model.bin").write_bytes(content)


DAMAGES = {
    "the content of model.bin has changed": damage_byte,
    "model.bin has 5 bytes instead of": lambda folder: (folder / "model.bin").write_bytes(b"short"),
    "ranks/0.bin is missing": lambda folder: (folder / "ranks/0.bin").unlink(),
    "has no manifest.json": lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json cannot be read": lambda folder: (folder / MANIFEST).write_text('{"files": {"mod'),
    "trainer_state.json has": lambda folder: (folder / "trainer_state.json").write_text(""),
}


@pytest.mark.parametrize(("message", "damage"), DAMAGES.items(), ids=DAMAGES)
def test_a_broken_checkpoint_is_named_and_passed_over(checkpoints, reports, message, damage):
    save(checkpoints, 1, 2)
    broken = checkpoints.output_dir / "checkpoint-2"
    damage(broken)
    assert checkpoints.find("latest").name == "checkpoint-1"
    assert len(reports) == 1 and str(broken) in reports[0] and message in reports[0]
    with pytest.raises(ValueError, match=rf"checkpoint-2 cannot be resumed from: .*{message}"):
        checkpoints.find(str(broken))


def test_a_folder_that_is_not_there_is_named(checkpoints):
    with pytest.raises(ValueError, match="no checkpoint folder .*nowhere"):
        checkpoints.find("nowhere")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_checkpoint_that_cannot_be_written_leaves_those_before_it(checkpoints, reports, error):
    save(checkpoints, 1, 2)

    def fail(folder):
        writer(3)(folder)
        raise error

    assert not checkpoints.save(3, fail)
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-2"]
    assert find_defect(checkpoints.output_dir / "checkpoint-2") is None
    assert "checkpoint-3 could not be written" in reports[0] and str(error) in reports[0]


def test_a_process_that_ends_while_it_writes_leaves_nothing_that_looks_like_a_checkpoint(checkpoints):
    save(checkpoints, 1)

    def interrupt(folder):
        writer(2)(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, interrupt)
    assert checkpoints.folders() == [checkpoints.output_dir / "checkpoint-1"]
    checkpoints.clean()
    assert names(checkpoints) == ["checkpoint-1"]


def test_old_checkpoints_go_but_the_best_and_the_latest_stay(checkpoints):
    for step, loss in ((1, 0.9), (2, 0.3), (3, 0.5), (4, 0.6), (5, None)):
        save(checkpoints, step, eval_loss=loss)
    assert names(checkpoints) == ["checkpoint-2", "checkpoint-5"]
    assert checkpoints.best().name == "checkpoint-2"
    checkpoints.limit = 1
    save(checkpoints, 6, eval_loss=0.7)
    assert names(checkpoints) == ["checkpoint-2", "checkpoint-6"]


def test_the_one_just_written_stays_beside_a_broken_one_of_a_later_step(checkpoints):
    checkpoints.limit = 1
    save(checkpoints, 9)
    (checkpoints.output_dir / "checkpoint-9" / "model.bin").unlink()
    save(checkpoints, 3)
    assert checkpoints.find("latest").name == "checkpoint-3"


def test_a_broken_checkpoint_is_not_the_best(checkpoints):
    save(checkpoints, 1, eval_loss=0.1)
    save(checkpoints, 2, eval_loss=0.5)
    (checkpoints.output_dir / "checkpoint-1" / "model.bin").write_bytes(b"short")
    assert checkpoints.best().name == "checkpoint-2"


def test_checkpoints_of_later_steps_are_set_aside_under_names_of_their_own(checkpoints, reports):
    checkpoints.limit = None
    save(checkpoints, 1, 2, 10)
    checkpoints.set_aside(1)
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-10.aside", "checkpoint-2.aside"]
    save(checkpoints, 2)
    checkpoints.set_aside(1)
    checkpoints.set_aside(1)
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-10.aside", "checkpoint-2.aside", "checkpoint-2.aside-2"]
    assert checkpoints.find("latest").name == "checkpoint-1" and len(reports) == 3


def test_without_a_limit_every_checkpoint_stays(checkpoints):
    checkpoints.limit = None
    save(checkpoints, *range(1, 6))
    assert len(checkpoints.folders()) == 5


def test_a_step_that_is_saved_again_replaces_its_checkpoint(checkpoints):
    save(checkpoints, 1, files=("old.bin",))
    save(checkpoints, 1, files=("new.bin",))
    folder = checkpoints.output_dir / "checkpoint-1"
    assert find_defect(folder) is None and not (folder / "old.bin").exists()
    assert names(checkpoints) == ["checkpoint-1"]


def test_folders_of_others_are_left_alone(checkpoints):
    save(checkpoints, 1, 2)
    for name in ("checkpoint-best", "checkpoint-7.bak", ".checkpoint-x.partial"):
        shutil.copytree(checkpoints.output_dir / "checkpoint-1", checkpoints.output_dir / name)
    (checkpoints.output_dir / "checkpoint-9").write_text("a file")
    checkpoints.clean()
    save(checkpoints, 3)
    assert checkpoints.find("latest").name == "checkpoint-3"
    assert {"checkpoint-best", "checkpoint-7.bak", ".checkpoint-x.partial", "checkpoint-9"} < set(names(checkpoints))


def test_the_manifest_lists_every_file_with_its_size(checkpoints):
    save(checkpoints, 1)
    folder = checkpoints.output_dir / "checkpoint-1"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert {name: entry["size"] for name, entry in files.items()} | {MANIFEST: found[MANIFEST]} == found
