"""How programs end: a sentence and a status for their users, a traceback for who programs them."""

import errno
import math
import re
import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from small_models import small_model
from training_processes import command_line, log_of

import hub_upload
from iflame_cli.errors import CommandError
from iflame_hf import IFlameTokenizer
from training import convert_checkpoint, prepare_data, train
from training.arguments import parse_arguments
from training.drawing import contact_sheet, curves
from training.run.ending import ends_in_words

ROOT = Path(__file__).resolve().parents[1]
TABLE = ("vertices", "faces")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small"
    small_model().save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def ended(error):
    """The status with which a program ends whose main function raises this."""

    @ends_in_words("tool")
    def main(argv=None):
        raise error

    return main([])


def error_of_training(capsys, folder, **options):
    """The line with which training refuses something."""
    assert train.main(command_line(folder / "run", **options)) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not (folder / "run").exists() or not list((folder / "run").glob("*.safetensors"))
    return said.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("the row is\n  too long"), "the row is too long"),
        (CommandError("no"), "no"),
        (ImportError("--report_to aim needs a package"), "--report_to aim needs a package"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (OSError(errno.EFBIG, "File too large", "a.py", None, "b.py"), "a.py -> b.py: File too large"),
        (FileExistsError("out exists and is not empty"), "out exists and is not empty"),
        (OSError(errno.ENOSPC, "No space left on device", "a.bin"), "the disk is full: .*a.bin.*"),
        (ValueError(), "ValueError"),
        (MemoryError("Unable to allocate 3 GiB"), "memory does not suffice, .*: Unable to allocate 3 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), "memory does not suffice, .*: CUDA out .* Tried"),
        (RuntimeError("[pair.cc:547] Connection closed by peer [::1]"), "another process of the run has ended; .*"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(capsys, error, sentence):
    assert ended(error) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(f"tool: {sentence}\n", said), said


@pytest.mark.parametrize("kind", [TypeError, AttributeError, KeyError, RuntimeError, AssertionError])
def test_a_fault_of_the_program_keeps_its_traceback(kind):
    with pytest.raises(kind):
        ended(kind("a fault"))


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("IFLAME_DEBUG", "1")
    with pytest.raises(ValueError, match="no such thing"):
        ended(ValueError("no such thing"))
    monkeypatch.setenv("IFLAME_DEBUG", "0")
    assert ended(ValueError("no such thing")) == 1


def test_ctrl_c_ends_a_program_with_the_status_that_shells_expect(capsys):
    assert ended(KeyboardInterrupt()) == 130 and capsys.readouterr().err == "tool: stopped\n"


def test_of_a_loader_process_its_last_error_is_said(capsys):
    class Broken(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            try:
                raise KeyError("inner")
            except KeyError as error:
                raise ValueError("mesh 3: it has no faces") from error

    @ends_in_words("tool")
    def main():
        next(iter(torch.utils.data.DataLoader(Broken(), num_workers=1, multiprocessing_context="fork")))

    assert main() == 1
    assert capsys.readouterr().err == "tool: mesh 3: it has no faces\n"


def test_processes_of_one_launch_say_the_same_once(monkeypatch, tmp_path, capsys):
    for rank in (0, 1):
        (tmp_path / f"{rank}").mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"{rank}" / "error.json"))
        assert ended(ValueError("all say this")) == 1 and ended(ValueError(f"only {rank} says this")) == 1
        with pytest.raises(SystemExit) as end:
            parse_arguments(["--max_steps", "0"])
        assert end.value.code == 2
    said = capsys.readouterr().err
    assert [said.count(words) for words in ("all say this", "only 0", "only 1", "nothing to train")] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "nowhere.parquet"}, "nowhere.parquet"),
        ({"report_to": "aim"}, "--report_to aim needs a package"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2"),
        ({"resume_from_checkpoint": "nowhere"}, "there is no checkpoint folder nowhere"),
        ({"num_procedural_meshes": 2, "procedural_max_faces": 12}, "procedural meshes"),
    ],
)
def test_training_refuses_in_a_sentence(tmp_path, capsys, options, message):
    said = error_of_training(capsys, tmp_path, **options)
    assert said.startswith("train: ") and message in said


def test_training_says_what_is_in_the_way_of_its_folder(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert train.main(command_line(tmp_path / "run")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"train: {tmp_path / 'run'}: File exists"


def test_other_programs_end_in_a_sentence_too(model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {1: torch.ones(1)}}, "x.pth")
    (tmp_path / "file").write_text("x")
    publish = [str(model), "--repo-id", "a/b", "--dry-run"]
    for main, arguments, message in (
        (hub_upload.main, [*publish, "--max-shard-size", "much"], "hub_upload: .*much"),
        (hub_upload.main, [*publish, "--folder", "file"], "hub_upload: file: Not a directory"),
        (convert_checkpoint.main, ["x.pth", "out", "--num_attention_heads=4"], "convert_checkpoint: x.pth"),
        (prepare_data.main, ["nowhere", "--out", "out"], "prepare_data: there is no folder or file nowhere"),
        (curves.main, ["nowhere", "--out", "a.svg"], "curves: nowhere has no log"),
        (contact_sheet.main, ["nowhere", "--data", "file", "--out", "a.png"], "contact_sheet: .*in nowhere"),
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err.splitlines()
        assert re.match(message, said[-1]) and "Traceback" not in "".join(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["training/train.py", "--train_file=nowhere.parquet", "--use_cpu", "--max_steps=1"], "train"),
        (["hub_upload.py", "nowhere", "--repo-id=a/b", "--dry-run"], "hub_upload"),
        (["training.prepare_data", "nowhere", "--out=nowhere/out"], "prepare_data"),
        (["training.convert_checkpoint", "nowhere.pth", "out", "--num_attention_heads=4"], "convert_checkpoint"),
        # the commands of earlier versions
        (["training.curves", "nowhere", "--out=nowhere.svg"], "curves"),
        (["training.contact_sheet", "nowhere", "--data=nowhere", "--out=nowhere.png"], "contact_sheet"),
    ],
)
def test_a_script_ends_with_the_status_that_its_main_function_returns(command, name, monkeypatch, capfd):
    """As `python FILE` and `python -m MODULE` run it, without a new process, which would import everything again."""
    script = command[0]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", list(command))
    monkeypatch.delitem(sys.modules, script, raising=False)
    with pytest.raises(SystemExit) as end:
        if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
    said = capfd.readouterr().err
    assert end.value.code == 1 and len(said.splitlines()) == 1
    assert said.startswith(f"{name}: ") and "nowhere" in said


def write_meshes(path, *meshes):
    columns = {name: [np.asarray(mesh[index]).tolist() for mesh in meshes] for index, name in enumerate(TABLE)}
    pyarrow.parquet.write_table(
        pyarrow.table({**columns, "name": [f"m{index}" for index in range(len(meshes))]}), path
    )
    return str(path)


@pytest.fixture
def meshes(tmp_path, monkeypatch):
    """Files of meshes of which none can be used, of which one can, and of which all can."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    point, good = (np.zeros((3, 3)), [[0, 1, 2]]), (np.eye(3), [[0, 1, 2]])
    return {
        "none": write_meshes(tmp_path / "none.parquet", *[point] * 300),
        "one": write_meshes(tmp_path / "one.parquet", *[point] * 300, good),
        "all": write_meshes(tmp_path / "all.parquet", *[good] * 4),
    }


@pytest.mark.filterwarnings("ignore:.* is left out")
def test_data_without_one_usable_mesh_are_refused_before_anything_is_done(tmp_path, capsys, meshes):
    for options in ({"max_steps": 2}, {"max_steps": 50}, {"validation_file": meshes["all"]}):
        said = error_of_training(capsys, tmp_path, train_file=meshes["none"], **options)
        assert re.match(
            "train: not one of the 300 meshes of --train_file .*none.parquet can be used: .*m0.*point", said
        )
    said = error_of_training(capsys, tmp_path, train_file=meshes["all"], validation_file=meshes["none"])
    assert "not one of the 300 meshes of --validation_file" in said and "none.parquet" in said
    said = error_of_training(capsys, tmp_path, train_file=meshes["none"], streaming=True, max_steps=2)
    assert "there is no mesh in the stream that a row can hold" in said
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock", "log.jsonl"}


@pytest.mark.filterwarnings("ignore:.* is left out")
def test_one_usable_mesh_is_enough(tmp_path, meshes):
    options = {"train_file": meshes["one"], "validation_file": meshes["one"], "row_length": 9 * 999}
    assert train.main(command_line(tmp_path / "run", **options, max_steps=1)) == 0
    log = log_of(tmp_path / "run")
    assert math.isfinite(log[0]["loss"]) and math.isfinite(log[-1]["eval_loss"]) and log[-1]["eval_loss"] > 0


def test_a_run_of_which_no_step_was_learnt_from_saves_nothing_and_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.Run, "update", lambda run, loss: torch.full((2,), torch.nan))
    assert "the gradient was not finite in 3 steps in a row" in error_of_training(
        capsys, tmp_path, max_steps=3, save_steps=3, num_procedural_validation_meshes=0
    )
    assert not list((tmp_path / "run").glob("checkpoint-*"))
