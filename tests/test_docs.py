"""README.md and docs/: every block of code is run or checked, every option exists, every link leads somewhere.

A page's python blocks run one after the other in an empty folder with a small random model where the released one or a
Hub name stands. Commands are run where that is cheap, and otherwise given to the program's own parser.
"""

import argparse
import ast
import configparser
import importlib.util
import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
import trimesh
import yaml
from accelerate.commands.launch import launch_command_parser
from code_cache import own_code_cache  # noqa: F401
from mesh_fixtures import solids
from small_models import BOS, EOS, PAD, small_model

import hub_upload
from iflame_cli import command_line
from iflame_hf import IFlameTokenizer
from training import evaluate, generate, prepare_data
from training.arguments import parse_arguments
from training.evaluation.options import parse_options as evaluation_options
from training.publish.verify import run_in_clean_process
from training.sampling.options import parse_options

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
# Commands that are not even parsed here, by their first words, with the reason.
NOT_TRIED = {
    "hf auth login": "asks for an account",
    "hf repos create": "needs the Hub and an account",
    "hf upload": "needs the Hub and an account",
}
# Lengths are cut down: what a page shows in a hundred faces, a random model shows in six.
SHORTER = [
    (r"(max_new_tokens=9 \* )\d+", r"\g<1>6"),
    (r"(max_faces=)\d+", r"\g<1>12"),
    (r"(--max-faces )\d+", r"\g<1>6"),
    (r"(num_faces=)\d+", r"\g<1>9"),
    (r"(--num-faces )\d+", r"\g<1>5"),
]
HUB_NAMES = r"\b(you/iflame-furniture|user/name)\b"
# Options in the text that are those of `accelerate launch`.
FOREIGN_OPTIONS = {"--config_file", "--num_processes", "--machine_rank", "--cpu", "--quiet"}


class Block:
    def __init__(self, page, number, language, text):
        self.page, self.number, self.language, self.text = page, number, language, text

    def __repr__(self):
        return f"{self.page}, block {self.number} ({self.language or 'plain'})"


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), re.MULTILINE | re.DOTALL)
    assert read(page).count("\n```") == 2 * len(found), f"{page}: a block is not closed"
    return [Block(page, number, *block) for number, block in enumerate(found, 1)]


def prose_of(page):
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def commands_of(block):
    """The commands of a shell block, as lists of words, without comments and variables set before them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for command in line.split(" && "):
            words = shlex.split(command, comments=True)
            words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), words))
            if words:
                yield words


COMMANDS = [(block, words) for block in BLOCKS if block.language == "bash" for words in commands_of(block)]


def test_there_are_pages_with_blocks_of_python_and_commands():
    assert {"README.md", "docs/use.md", "docs/tokens.md", "docs/troubleshooting.md"} <= set(PAGES)
    assert sum(block.language == "python" for block in BLOCKS) > 15 and len(COMMANDS) > 30


@pytest.mark.parametrize("block", BLOCKS, ids=repr)
def test_a_block_is_python_or_commands_or_shows_files(block):
    assert block.language in ("python", "bash", ""), "say what it is, and let this file check it"
    if block.language == "":
        assert re.search(r"→|^\S+/$", block.text, re.MULTILINE), "neither a path of data nor a tree of files"


# Python


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A model that never ends a mesh early, so that there are faces to show, and that can be asked for some."""
    folder = tmp_path_factory.mktemp("docs") / "demo"
    model = small_model(categories=["boat", "chair", "lamp", "table"], num_faces_range=[4, 800])
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS, EOS]] -= 30
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def desk(model_folder, tmp_path, monkeypatch):
    """A folder with the files that the pages speak of; the working directory."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "iflame-artist").symlink_to(model_folder, target_is_directory=True)
    tokenizer = IFlameTokenizer()
    part = tokenizer.decode_mesh(tokenizer.encode_mesh(trimesh.creation.box(extents=(1, 2, 1)))[: 9 * 5])
    part.apply_translation((0.5, 0.5, 0.5))
    for name in ("part.obj", "other.ply"):
        part.export(tmp_path / name)
    solids()["box"].export(tmp_path / "sample-00.glb")
    (tmp_path / "collection").mkdir()
    solids()["box"].export(tmp_path / "collection" / "box.glb")
    (tmp_path / "collection" / "list.csv").write_text("file,category,license,author\nbox.glb,box,cc0-1.0,Ada\n")
    for split in ("train", "validation"):
        path = tmp_path / "data" / "mine" / "data" / f"{split}-00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda *_: True)
    torch.manual_seed(0)
    return tmp_path


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    mesh = solids()["box"]
    row = {"name": "box", "num_faces": 12, "vertices": mesh.vertices.tolist(), "faces": mesh.faces.tolist()}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)


def adapted(text):
    for pattern, replacement in SHORTER:
        text = re.sub(pattern, replacement, text)
    return re.sub(HUB_NAMES, "models/iflame-artist", text)


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.language == "python" for b in blocks_of(page))])
def test_the_python_of_a_page_runs_from_top_to_bottom(page, desk, capsys):
    variables = {"__name__": "__main__"}
    for block in blocks_of(page):
        if block.language == "python":
            try:
                exec(compile(adapted(block.text), repr(block), "exec"), variables)
            except Exception as error:
                raise AssertionError(f"{block} does not run: {type(error).__name__}: {error}") from error
    assert len(variables) > 2


def test_what_imports_nothing_of_this_project_runs_where_it_is_not_installed(desk):
    blocks = [block for page in ("README.md", "docs/use.md", "docs/hub.md") for block in blocks_of(page)]
    sources = [adapted(block.text) for block in blocks if block.language == "python" and "iflame_hf" not in block.text]
    end = "print('classes', *{type(each).__module__.split('.')[0] for each in (model, tokenizer, generator)})"
    process = run_in_clean_process("\n".join([*sources, end]), desk)
    assert len(sources) >= 8 and process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == "classes transformers_modules"
    for number in range(4):
        assert len(trimesh.load_mesh(desk / f"generated-{number}.glb").faces) > 0
    assert (desk / "chair.glb").is_file()


# Commands


class Parsed(Exception):
    """In place of what a program would do with its arguments."""


@pytest.fixture
def parse_only(monkeypatch):
    original = argparse.ArgumentParser.parse_known_args

    def parse(self, *arguments, **options):
        namespace, rest = original(self, *arguments, **options)
        if rest:
            self.error(f"unrecognised: {rest}")
        raise Parsed(namespace)

    def start():
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)

    return start


def load_script(path):
    assert (ROOT / path).is_file(), f"there is no {path}"
    spec = importlib.util.spec_from_file_location(re.sub(r"\W", "_", path), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    return module


def check_train(arguments):
    """The options of train.py, and the files in the repository that they name."""
    if arguments == ["--help"]:
        with pytest.raises(SystemExit) as ended:
            parse_arguments(arguments)
        assert ended.value.code == 0
        return
    parse_arguments([str(ROOT / word) if word.startswith("training/configs/") else word for word in arguments])


def check_script(launch):
    """The options of the script that a launcher starts."""
    if launch.training_script == "training/generate.py":
        parse_options(launch.training_script_args, "")
    elif launch.training_script == "training/evaluate.py":
        evaluation_options(launch.training_script_args, "")
    else:
        assert launch.training_script == "training/train.py"
        check_train(launch.training_script_args)


def check_launch(arguments):
    launch = launch_command_parser().parse_args(arguments)
    if launch.config_file is not None:
        assert (ROOT / launch.config_file).is_file()
    check_script(launch)


def check_pip(arguments):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert arguments[0] == "install"
    local = [word for word in arguments if word.startswith(".")]
    for word in local:
        wanted = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)[1]
        for extra in (wanted or "").split(",") if wanted else []:
            assert extra in setup["options.extras_require"], f"setup.cfg has no extra {extra}"


def check_make(arguments):
    targets = re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [word for word in arguments if "=" not in word] and set(arguments) - set(targets) <= {
        word for word in arguments if re.fullmatch(r"[A-Z_]+=.+", word)
    }


@pytest.mark.parametrize(
    ("block", "words"), COMMANDS, ids=lambda value: " ".join(value) if type(value) is list else ""
)
def test_a_command_is_run_or_taken_by_its_programs_parser(block, words, desk, parse_only, capsys):
    program, arguments = words[0], words[1:]
    for known, reason in NOT_TRIED.items():
        if " ".join(words).startswith(known):
            pytest.skip(reason)
    if program == "iflame":
        arguments = shlex.split(adapted(shlex.join(arguments)))
        if arguments[0] in ("generate", "complete") and "--max-faces" not in arguments:
            arguments += ["--max-faces", "6"]
        if "view" in arguments:
            (desk / "boats").mkdir()
            solids()["box"].export(desk / "boats" / "mesh-00.glb")
        assert command_line.main(arguments) == 0, f"{block}: {capsys.readouterr().err}"
    elif program == "accelerate":
        assert arguments[0] == "launch"
        check_launch(arguments[1:])
    elif program == "torchrun":
        check_script(torch.distributed.run.get_args_parser().parse_args(arguments))
    elif program == "pip":
        check_pip(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file()
    elif program == "python" and arguments[0] == "-m":
        module = importlib.import_module(arguments[1])
        parse_only()
        with pytest.raises(Parsed):
            module.main(arguments[2:])
    elif program == "python" and arguments[0] == "-c":
        ast.parse(arguments[1])
    elif program == "python" and arguments[0].startswith("app/"):  # gradio may be missing
        known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', (ROOT / arguments[0]).read_text()))
        assert {word for word in arguments if word.startswith("--")} <= known
    elif program == "python":
        script = load_script(arguments[0])
        parse_only()
        with pytest.raises(Parsed):
            script.main(arguments[1:])
    else:
        pytest.fail(f"{block}: what is {program}? Let this test check it, or say in NOT_TRIED why it cannot")


def test_commands_that_are_not_tried_stand_on_a_page():
    shown = [" ".join(words) for _, words in COMMANDS]
    unused = [known for known in NOT_TRIED if not any(command.startswith(known) for command in shown)]
    assert not unused, "take it out of NOT_TRIED"


def known_options(monkeypatch):
    """Every option of the project's programs."""
    found = set()
    original = argparse._ActionsContainer._add_action

    def add(self, action):
        found.update(action.option_strings)
        return original(self, action)

    monkeypatch.setattr(argparse._ActionsContainer, "_add_action", add)
    command_line.build_parser()
    for main in (hub_upload.main, prepare_data.parse_options, parse_arguments, generate.main, evaluate.main):
        with pytest.raises(SystemExit):
            main(["--help"])
    for script in [*sorted(ROOT.glob("examples/*.py")), ROOT / "tests" / "versions.py", *_mains()]:
        module = load_script(str(script.relative_to(ROOT)))
        with pytest.raises(SystemExit):
            module.main(["--help"])
    monkeypatch.undo()
    return found


def _mains():
    benchmarks = [ROOT / "benchmarks" / f"bench_{name}.py" for name in ("generate", "many", "train", "loader")]
    benchmarks.append(ROOT / "benchmarks" / "peers.py")
    return [
        *benchmarks,
        *(ROOT / "training" / f"{name}.py" for name in ("choose_sampling", "convert_checkpoint", "gallery")),
    ]


def test_every_option_that_a_page_speaks_of_exists(monkeypatch, capsys):
    assert set(launch_command_parser()._option_string_actions) >= FOREIGN_OPTIONS
    known = known_options(monkeypatch)
    assert {"--room-above", "--repo-id", "--row_length", "--decimate", "--preset", "--keep", "--python"} <= known
    missing, seen = [], 0
    for page in PAGES:
        for code in re.findall(r"`([^`]+)`", prose_of(page)):
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
                seen += 1
                if option not in known | FOREIGN_OPTIONS:
                    missing.append(f"{page}: {option}")
    assert seen > 30 and not missing


# Links and names


def anchors_of(page):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links_of(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings_that_are_there(page):
    for link in links_of(page):
        if re.match(r"[a-z]+://", link):
            assert link.startswith("https://")
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert target.resolve().is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors_of(target.resolve().relative_to(ROOT)), f"{page} links to {link}"


def test_every_page_and_example_can_be_found_from_the_documentations_first_page():
    linked = {((ROOT / "docs") / link.partition("#")[0]).resolve() for link in links_of("docs/README.md")}
    wanted = {*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")} - {ROOT / "docs" / "README.md"}
    assert len(wanted) >= 12 and wanted <= linked


def test_pictures_are_whole_and_drawings_are_xml():
    from xml.etree import ElementTree

    pictures = {link for page in PAGES for link in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", prose_of(page))}
    assert {"architecture.svg", "app.png"} <= pictures
    assert ElementTree.parse(ROOT / "docs" / "architecture.svg").getroot().tag.endswith("svg")


def test_the_yaml_files_that_pages_link_to_can_be_read():
    names = {link for page in PAGES for link in links_of(page) if link.endswith(".yaml")}
    assert names
    for name in names:
        assert yaml.safe_load((ROOT / "docs" / name).read_text())
