"""`iflame view`, as a process and by its main()."""

import io
import re
import webbrowser

import pytest
import trimesh
from command_fixtures import process
from mesh_fixtures import solids

from iflame_cli.command_line import main
from iflame_cli.viewing import MARK
from iflame_hf import export_mesh


def test_view_writes_one_page_that_needs_nothing_else_as_a_process(tmp_path):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.{'stl' if name == 'torus' else 'glb'}")
    run = process("view", ".", "--no-browser", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "view.html"
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    for name, mesh in solids().items():
        assert re.search(rf"{name}\.(glb|stl), {len(mesh.faces)} faces", page)
    assert MARK in page and "http" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=", page)


def test_the_page_holds_every_mesh_of_one_size_side_by_side_on_a_floor(tmp_path):
    import base64

    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.glb")
    assert main(["view", str(tmp_path), "--no-browser"]) == 0
    (data,) = re.findall(r'base64_data="([^"]+)"', (tmp_path / "view.html").read_text(encoding="utf-8"))
    scene = trimesh.load_scene(io.BytesIO(base64.b64decode(data)), file_type="glb")
    assert len(scene.geometry) == len(solids())
    boxes = [mesh.bounds for mesh in scene.geometry.values()]
    for low, high in boxes:
        assert (high - low).max() == pytest.approx(1) and low[1] == pytest.approx(0, abs=1e-6)
    apart = [((a[0] > b[1]) | (b[0] > a[1]))[[0, 2]].any() for i, a in enumerate(boxes) for b in boxes[:i]]
    assert all(apart) and len(apart) == 6


def test_view_opens_the_browser_unless_told_not_to(tmp_path, monkeypatch, capsys):
    export_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) or True)
    assert main(["view", str(tmp_path)]) == 0
    assert opened == [(tmp_path / "view.html").resolve().as_uri()]
    assert main(["view", str(tmp_path), "--no-browser"]) == 0, "its own page is written anew"
    assert len(opened) == 1
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    assert main(["view", str(tmp_path)]) == 0
    assert "open the page yourself" in capsys.readouterr().err


def test_view_leaves_others_pages_alone_and_says_what_is_not_there(tmp_path, capsys):
    box = export_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    (tmp_path / "view.html").write_text("my own page")
    assert main(["view", str(tmp_path), "--no-browser"]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "view.html").read_text() == "my own page"
    assert main(["view", str(box), "--page", str(tmp_path / "b.html"), "--no-browser"]) == 0
    (tmp_path / "empty").mkdir()
    for source, reason in (("empty", "holds no mesh files"), ("none", "no such file or folder")):
        assert main(["view", str(tmp_path / source), "--no-browser"]) == 1
        assert reason in capsys.readouterr().err
    (tmp_path / "empty" / "bad.obj").write_text("nothing")
    assert main(["view", str(tmp_path / "empty"), "--no-browser"]) == 1
    assert "left out" in capsys.readouterr().err


def test_a_name_that_is_html_stays_a_name(tmp_path):
    path = export_mesh(trimesh.creation.box(), tmp_path / "<img src=x>.glb")
    assert main(["view", str(path), "--page", str(tmp_path / "p.html"), "--no-browser"]) == 0
    assert "<img" not in (tmp_path / "p.html").read_text(encoding="utf-8")
