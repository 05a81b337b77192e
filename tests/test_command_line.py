"""The command `iflame`: help, wrong use, how it ends."""

import configparser
import re
import subprocess
import sys

import pytest
import torch
from command_fixtures import ROOT

from iflame_cli import command_line
from iflame_cli.command_line import build_parser, main

COMMANDS = ("generate", "complete", "tokenize", "view")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_that_can_be_parsed(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(rf"^  iflame ({name} .+)$", text.split("examples:")[1], re.MULTILINE)
    assert len(examples) >= 2
    for example in examples:
        assert build_parser().parse_args(example.split()).command == name


def test_help_comes_without_loading_torch(tmp_path):
    source = (
        "import sys, iflame_cli.command_line as c\n"
        "try:\n    c.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'trimesh'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"    {name} " in run.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("", "required: COMMAND"),
        ("polish x", "invalid choice: 'polish'"),
        ("generate", "required: MODEL"),
        ("generate x --num 0", "--num: must be a whole number from 1 on, got 0"),
        ("generate x --num many", "--num: invalid whole_number value: 'many'"),
        ("generate x --temperature 0", "--temperature: must be above 0, got 0"),
        ("generate x --top-p 1.5", "--top-p: must be above 0 and at most 1, got 1.5"),
        ("generate x --temperature nan", "--temperature: must be"),
        ("generate x --format fbx", "--format: invalid choice: 'fbx'"),
        ("complete x", "required: PART"),
        ("complete x y --room-above 1 --bounds 0 0 0 1 1 1", "not allowed with"),
        ("complete x y --room-above -1", "must be at least 0"),
        ("view", "required: DIR|MESH"),
    ],
)
def test_wrong_use_ends_with_2_and_the_reason(arguments, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    assert reason in capsys.readouterr().err


def test_the_command_is_a_console_script():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    assert parser["options.entry_points"]["console_scripts"].split("\n")[1:] == [
        "iflame = iflame_cli.command_line:main"
    ]
    packages = {path.parent.name for path in ROOT.glob("iflame_*/__init__.py")}
    assert set(parser["options"]["packages"].split()) == packages == {"iflame_cli", "iflame_hf"}


def test_too_little_memory_is_told_with_advice(monkeypatch, capsys):
    def full(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(command_line, "_run", full)
    assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err == (
        "iflame: the memory of the device does not suffice: try a smaller --batch-size, or --device cpu\n"
    )
