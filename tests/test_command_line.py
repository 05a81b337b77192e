"""The command `iflame`: help, wrong use, how it ends."""

import configparser
import re

import pytest
from command_fixtures import ROOT, in_a_fresh_process

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


def test_help_and_version_come_without_loading_torch(tmp_path):
    run, imported = in_a_fresh_process("--help", cwd=tmp_path)
    assert run.returncode == 0 and not imported
    assert all(f"    {name} " in run.stdout for name in COMMANDS)
    run, imported = in_a_fresh_process("--version", cwd=tmp_path)
    assert run.returncode == 0 and not imported
    assert re.match(r"iflame \d+\.\d+\.\d+", run.stdout)


def write_files(folder):
    """What the wrong commands below find: a finished mesh, models of another kind or none, a file that is no mesh."""
    for name in ("out", "bare", "other", "torn", "outputs", "outputs/demo"):
        (folder / name).mkdir()
    (folder / "out" / "mesh-00.glb").write_bytes(b"")
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "torn" / "config.json").write_text("{")
    for name in ("bad.obj", "outputs/bad.obj"):
        (folder / name).write_text("nothing")
    (folder / "big.obj").write_text("v 0 0 0\nv 3 0 0\nv 0 3 0\nf 1 2 3\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("generate outputs/nope", "there is no folder outputs/nope"),
        ("generate outputs/dmeo", "there is no folder outputs/dmeo (did you mean outputs/demo?)"),
        ("generate ./nope", "there is no folder ./nope"),
        ("generate bare", "bare holds no model: there is no config.json in it"),
        ("generate bad.obj", "bad.obj is a file"),
        ("generate other", "other is no iFlame model: its model_type is 'gpt2'"),
        ("generate torn", "torn/config.json"),
        ("generate user/name --out out", "mesh-00.glb exists already"),
        ("complete user/name none.obj", "none.obj: no such file"),
        ("complete user/name bad.obj", "bad.obj: "),
        ("complete user/name bad.obj outputs/bad.obj", "the same name"),
        ("complete user/name bare", "bare holds no mesh files"),
        ("tokenize none.obj", "none.obj: no such file"),
        ("view none", "none: no such file or folder"),
    ],
)
def test_what_needs_no_model_is_refused_before_torch_is_imported(arguments, reason, tmp_path):
    write_files(tmp_path)
    run, imported = in_a_fresh_process(*arguments.split(), cwd=tmp_path)
    assert run.returncode == 1 and reason in run.stderr, run.stderr
    assert all(line.startswith("iflame: ") for line in run.stderr.splitlines())
    assert not imported & {"torch", "transformers"} and not (tmp_path / "meshes").exists()


def test_the_working_commands_without_a_model_import_no_torch(tmp_path):
    write_files(tmp_path)
    for arguments in (["tokenize", "big.obj"], ["tokenize", "big.obj", "--json"], ["view", "big.obj", "--no-browser"]):
        run, imported = in_a_fresh_process(*arguments, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        assert imported == {"trimesh"}


@pytest.mark.parametrize("arguments", ["generate bare", "complete bare bad.obj", "tokenize none.obj", "view none"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_where_an_error_came_from(arguments, place, tmp_path, monkeypatch, capsys):
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = arguments.split()
    assert main(words) == 1
    usual = capsys.readouterr().err
    assert "Traceback" not in usual
    assert main(["--debug", *words] if place == "before" else [*words, "--debug"]) == 1
    told = capsys.readouterr().err
    assert "Traceback (most recent call last)" in told and told.endswith(usual.splitlines()[-1] + "\n")


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
        ("generate x --device nonsense", "--device: must be cpu, or a kind of GPU (cuda, "),
        ("generate x --device cuda:first", "got cuda:first"),
        ("complete x", "required: PART"),
        ("complete x y --keep 1.5", "--keep: must be a share between 0 and 1, such as 0.5, or a number of faces"),
        ("complete x y --keep 0", "got 0"),
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
