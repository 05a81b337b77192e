"""The command `iflame` for tests: a model it can load, a part to complete, and ways to run it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mesh_fixtures import solids
from small_models import BOS, EOS, PAD, small_model

from iflame_cli.command_line import main
from iflame_hf import IFlameTokenizer, export_mesh

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", name="model")
def model_folder(tmp_path_factory):
    """A folder with a model that now and then ends a mesh, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "small"
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] -= 1
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(name="part")
def part_file(tmp_path):
    """The first faces of a generated mesh."""
    tokenizer = IFlameTokenizer()
    mesh = tokenizer.decode_mesh(tokenizer.encode_mesh(solids()["torus"])[: 9 * 9])
    return export_mesh(mesh, tmp_path / "part.glb", winding="kept")


def command():
    """The console script where it is installed."""
    script = shutil.which("iflame", path=os.path.dirname(sys.executable))
    return [script] if script else [sys.executable, "-m", "iflame_cli"]


def process(*arguments, cwd, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | settings
    return subprocess.run(
        [*command(), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def generate(model, out, *arguments, faces=5):
    return main(["generate", model, "--out", str(out), "--max-faces", str(faces), "--device", "cpu", *arguments])


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_a_fresh_process(*arguments, cwd):
    """A finished process of main(), and which of the packages that take seconds to import it has imported."""
    source = (
        "import sys\n"
        "from iflame_cli.command_line import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('imported', *sorted({'torch', 'transformers', 'trimesh'} & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    run = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    *_, last = run.stdout.splitlines() or [""]
    assert last.startswith("imported"), run.stderr
    return run, set(last.split()[1:])
