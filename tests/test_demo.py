"""What `make demo` runs, with a small model in the place of the released one."""

import re
import subprocess
import sys

import pytest
import torch
import trimesh
from PIL import Image
from small_models import BOS, EOS, PAD, small_model

from iflame_cli import demo
from iflame_hf import IFlameTokenizer


@pytest.fixture(scope="module", name="folder")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = small_model(categories=["chair", "lamp"], num_faces_range=[4, 60])
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS, EOS]] -= 30
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def test_the_demo_writes_meshes_a_part_with_completions_and_a_picture(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(demo.SAMPLING, "max_faces", 60)
    monkeypatch.setattr(demo, "WANTED", {"chair": 4, "lamp": 6})
    assert demo.main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 0
    meshes = {path.stem: trimesh.load_mesh(path, process=False) for path in (tmp_path / "out").glob("*.glb")}
    completed = [f"completed-{number}" for number in range(demo.COMPLETIONS)]
    assert set(meshes) == {f"mesh-{number:02d}" for number in range(demo.MESHES)} | {"part", *completed}
    assert all(len(meshes["part"].faces) < len(meshes[name].faces) for name in completed)
    with Image.open(tmp_path / "out" / demo.PICTURE) as picture:
        assert picture.size[1] > picture.size[0], "five rows of four"
    printed = capsys.readouterr().out
    assert (
        re.search(r"mesh-01\.glb: lamp, \d+ faces", printed) and f"Open {tmp_path / 'out' / demo.PICTURE}" in printed
    )


def test_a_demo_without_its_model_says_so_before_torch_is_loaded(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "iflame_cli.demo", "--model", "./nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and "there is no folder ./nowhere" in ended.stderr.splitlines()[-1]
    assert "| torch" not in ended.stderr


def test_a_model_is_asked_only_for_what_it_takes():
    assert demo.requests_for(small_model().config) == {}
    asked = demo.requests_for(small_model(categories=["egg", "lamp"], num_faces_range=[50, 70]).config)
    assert asked == {"category": ["lamp"] * 16, "num_faces": [70] * 16}
    assert set(demo.requests_for(small_model(categories=["egg"]).config)["category"]) == {"egg"}
