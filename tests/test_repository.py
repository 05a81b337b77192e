"""The repository's own promises: what travels to the Hub can travel, versions are honest, make explains itself."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from transformers.dynamic_module_utils import get_imports, get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
HUB_FILES = sorted(path for path in (ROOT / "iflame_hf").glob("*.py") if path.name != "__init__.py")
# packages that a machine which loads the model from the Hub has anyway: transformers, what it requires, and torch
HUB_PACKAGES = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "tqdm"}

GPU_PACKAGES = {"fla", "flash_attn", "lightning_attn", "triton"}


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in listing.split("\0") if name]
    assert files
    return [path for path in files if path.is_file()]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    assert parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_there_are_files_for_the_hub():
    assert {"configuration_iflame.py", "modeling_iflame.py", "tokenization_iflame.py"} <= {p.name for p in HUB_FILES}
    assert not [path for path in (ROOT / "iflame_hf").iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_a_hub_file_needs_no_package_that_a_hub_user_may_lack(path):
    unguarded = {name for name in get_imports(path) if name not in sys.stdlib_module_names}
    assert unguarded <= HUB_PACKAGES


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_transformers_finds_exactly_the_relative_imports_that_python_runs(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.level]
    assert all(node.level == 1 and node.module and "." not in node.module for node in nodes)
    assert set(get_relative_imports(path)) == {node.module for node in nodes}
    assert all((path.parent / f"{node.module}.py").is_file() for node in nodes)


def test_the_tokenizer_knows_no_network_and_geometry_and_format_nothing():
    imports = {path.stem: set(get_relative_imports(path)) for path in HUB_FILES}
    assert not imports["tokenization_iflame"] & {"modeling_iflame", "ops_iflame", "cache_iflame"}
    assert imports["mesh_iflame"] == {"mesh_errors_iflame"} and not imports["format_iflame"]


def test_no_tracked_file_names_a_path_or_a_registry_of_one_machine():
    words = ["/work" + "/", "/opt" + "/", "/root" + "/", "/tmp" + "/", "index" + "-url", "files.python" + "hosted"]
    pattern = re.compile("|".join(map(re.escape, words)))
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found


def test_make_help_lists_every_target():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    names = re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"help", "demo", "train-demo", "test", "quality", "style", "clean"} <= set(names)
    listing = subprocess.run(["make", "-s"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.findall(r"^make ([a-z-]+) +\S", listing, re.MULTILINE) == names


def test_the_demo_generates_and_the_training_demo_takes_more_minutes_on_demand():
    if shutil.which("make") is None:
        pytest.skip("make is not installed")

    def recipe(*arguments):
        command = ["make", "-n", "VENV=nowhere", *arguments]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    trained = recipe("train-demo")
    assert "training/train.py training/configs/demo.yaml --output_dir outputs/train-demo" in trained
    assert "--max_minutes" not in trained and "--max_minutes 20" in recipe("train-demo", "MINUTES=20")
    shown = recipe("demo")
    assert '-m iflame_cli.demo --model "models/iflame-artist" --out "outputs/demo"' in shown and "[train]" not in shown


def test_ci_is_executable_and_stops_at_the_first_error():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    lines = [line for line in script.read_text().splitlines() if line]
    assert lines[:2] == ["#!/usr/bin/env bash", "set -euo pipefail"]
    assert lines[-1] == "make test", "the summary of pytest ends the output"


def test_the_installed_packages_satisfy_the_ranges_of_setup_cfg():
    sections = setup_cfg()
    wanted = requirements(sections["options"]["install_requires"])
    wanted += requirements(sections["options.extras_require"]["train"])
    wanted += requirements(sections["options.extras_require"]["test"])
    assert {"torch", "transformers", "trimesh", "accelerate", "pytest"} <= {requirement.name for requirement in wanted}
    for requirement in wanted:
        if requirement.name == "iflame-hf":
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            pytest.fail(f"{requirement.name} is required and not installed")
        assert requirement.specifier.contains(installed, prereleases=True), f"{requirement}: {installed} is installed"


def test_whatever_the_command_reads_beside_its_modules_is_installed_with_it():
    patterns = setup_cfg()["options.package_data"]["iflame_cli"].split()
    folder = ROOT / "iflame_cli"
    taken = {path for pattern in patterns for path in folder.glob(pattern)}
    read = {path for path in tracked_files() if folder in path.parents and path.suffix != ".py"}
    assert read and read <= taken


def test_every_package_that_a_script_or_a_test_imports_is_declared():
    sections = setup_cfg()
    texts = [
        sections["options"]["install_requires"],
        *(sections["options.extras_require"][e] for e in ("train", "test", "app")),
    ]
    declared = {requirement.name.lower().replace("_", "-") for text in texts for requirement in requirements(text)}
    files = [path for path in tracked_files() if path.suffix == ".py" and path.parts[len(ROOT.parts)] != "iflame_hf"]
    own = {path.stem for path in files} | {path.parent.name for path in files} | {"iflame_hf"}
    distributions = packages_distributions()
    missing = {}
    for path in files:
        for name in set(get_imports(path)) - own - GPU_PACKAGES - set(sys.stdlib_module_names):
            names = {each.lower().replace("_", "-") for each in distributions.get(name, [name])}
            if not names & declared:
                missing.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert files and not missing


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_constraints_pin_one_version_in_the_declared_range_for_every_python(python):
    assert SpecifierSet(setup_cfg()["options"]["python_requires"]).contains(python)
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, str] = {}
    for pin in requirements((ROOT / "constraints.txt").read_text()):
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in pins, f"{pin.name} is pinned twice for Python {python}"
            (exact,) = pin.specifier
            assert exact.operator == "=="
            pins[pin.name] = exact.version
    sections = setup_cfg()
    optional = sections["options.extras_require"]
    wanted = requirements(sections["options"]["install_requires"])
    wanted += [each for extra in ("train", "test", "dev", "app-test", "app") for each in requirements(optional[extra])]
    for requirement in wanted:
        if requirement.name != "iflame-hf":
            assert requirement.specifier.contains(pins[requirement.name]), f"{requirement} against {pins}"


def test_the_citation_is_the_papers():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    assert "2503.16653" in paper["url"]
    assert [author["family-names"] for author in paper["authors"]] == ["Wang", "Zhang", "Quan", "Yan", "Wonka"]
    assert citation["version"] == setup_cfg()["metadata"]["version"]
