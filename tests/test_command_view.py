"""`iflame view`, as a process and by its main()."""

import base64
import json
import re
import webbrowser

import numpy as np
import pytest
import trimesh
from browser_fixtures import coloured, picture
from command_fixtures import process
from mesh_fixtures import solids

from iflame_cli.command_line import main
from iflame_cli.viewing import MARK
from iflame_hf import export_mesh


def shown(page):
    """The name and the corners, (F, 3, 3), of each mesh that a page shows."""
    (value,) = re.findall(r'<script id="meshes" type="application/json">(.*?)</script>', page.read_text("utf-8"))
    return {
        mesh["name"]: np.frombuffer(base64.b64decode(mesh["faces"]), "<f4").reshape(-1, 3, 3)
        for mesh in json.loads(value)["meshes"]
    }


def test_view_writes_one_page_that_needs_nothing_else_as_a_process(tmp_path):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.{'stl' if name == 'torus' else 'glb'}")
    run = process("view", ".", "--no-browser", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "view.html"
    faces = {name: len(corners) for name, corners in shown(tmp_path / "view.html").items()}
    assert faces == {
        f"{name}.{'stl' if name == 'torus' else 'glb'}": len(mesh.faces) for name, mesh in solids().items()
    }
    page = (tmp_path / "view.html").read_text(encoding="utf-8")
    assert MARK in page and f"{len(solids())} meshes" in page
    assert not re.search(r"https?:|//cdn|\b(src|href)\s*=|\burl\(|\bimport\b|\bfetch\(", page)


def test_the_page_holds_every_mesh_of_one_size_in_the_middle_and_as_it_was_wound(tmp_path):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.glb")
    assert main(["view", str(tmp_path), "--no-browser"]) == 0
    meshes = shown(tmp_path / "view.html")
    assert meshes.keys() == {f"{name}.glb" for name in solids()}
    for name, mesh in solids().items():
        corners = meshes[f"{name}.glb"]
        low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
        assert (high - low).max() == pytest.approx(1) and low + high == pytest.approx(np.zeros(3), abs=1e-6)
        volume = np.linalg.det(corners.astype(np.float64)).sum() / 6
        assert volume == pytest.approx(mesh.volume / mesh.extents.max() ** 3, rel=1e-4) and volume > 0


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


def test_view_leaves_others_pages_alone_and_says_where_there_is_nothing_to_see(tmp_path, capsys):
    box = export_mesh(trimesh.creation.box(), tmp_path / "box.glb")
    (tmp_path / "view.html").write_text("my own page")
    assert main(["view", str(tmp_path), "--no-browser"]) == 1
    assert "was not written by this command" in capsys.readouterr().err
    assert (tmp_path / "view.html").read_text() == "my own page"
    assert main(["view", str(box), "--page", str(tmp_path / "b.html"), "--no-browser"]) == 0
    (tmp_path / "empty").mkdir()
    assert main(["view", str(tmp_path / "empty"), "--no-browser"]) == 1
    assert "holds no mesh files" in capsys.readouterr().err
    (tmp_path / "empty" / "bad.obj").write_text("nothing")
    assert main(["view", str(tmp_path / "empty"), "--no-browser"]) == 1
    assert "left out" in capsys.readouterr().err


def test_a_name_that_is_html_stays_a_name(tmp_path):
    path = export_mesh(trimesh.creation.box(), tmp_path / "<img src=x>.glb")
    assert main(["view", str(path), "--page", str(tmp_path / "p.html"), "--no-browser"]) == 0
    assert "<img" not in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert list(shown(tmp_path / "p.html")) == ["<img src=x>.glb"]


def test_a_browser_shows_the_meshes_by_their_names_and_asks_no_other_machine(browser, tmp_path):
    for name, mesh in solids().items():
        export_mesh(mesh, tmp_path / f"{name}.glb")
    assert main(["view", str(tmp_path), "--no-browser"]) == 0
    asked, errors = [], []
    page = browser.new_page(viewport={"width": 1000, "height": 700})
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((tmp_path / "view.html").resolve().as_uri())
    page.wait_for_timeout(500)
    labels = page.locator(".cell").all_inner_texts()
    assert labels == [f"{name} · {len(corners)} faces" for name, corners in shown(tmp_path / "view.html").items()]
    before = picture(page, ".viewer canvas")
    assert coloured(before) > 0.02 * before.shape[0] * before.shape[1]
    page.get_by_role("slider").fill("1")
    page.wait_for_timeout(300)
    assert 0 < coloured(picture(page, ".viewer canvas")) < coloured(before)
    page.close()
    assert errors == [] and asked == [(tmp_path / "view.html").resolve().as_uri()]
