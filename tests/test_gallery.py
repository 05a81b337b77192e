"""The picture and the page of generated meshes."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import trimesh
from browser_fixtures import coloured, picture
from mesh_fixtures import solids
from PIL import Image

from iflame_cli.render import BACKGROUND, render_mesh
from iflame_hf import IFlameTokenizer, export_mesh
from iflame_hf.mesh_iflame import normalise
from training.drawing.gallery_page import Exhibit, build_gallery, shape_of
from training.gallery import main


def shapes_of(page):
    """The name, vertices (V, 3) and faces (F, 3) of each shape that a page holds."""
    (value,) = re.findall(r'<script id="shapes" type="application/json">(.*?)</script>', page)
    found = []
    for shape in json.loads(value):
        vertices, faces = (base64.b64decode(shape[key]) for key in ("vertices", "faces"))
        pairs = np.frombuffer(vertices, np.uint8).reshape(-1, 3), np.frombuffer(faces, "<u2").reshape(-1, 3)
        found.append((shape["name"], *pairs))
    return found


def buttons_of(page, section):
    """The shapes, the title and the pictures of each mesh of a section."""
    (part,) = re.findall(rf'<div class="shapes" id="{section}">(.*?)</div>', page, re.DOTALL)
    buttons = re.findall(r'data-shapes="(.*?)" data-given="\d+" title="(.*?)">(.*?)</button>', part)
    return [
        ([*map(int, places.split())], html.unescape(title), re.findall(r"base64,([^\"]+)", images))
        for places, title, images in buttons
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Generated meshes, on the grid of models, and one training mesh in units of its own."""
    folder = tmp_path_factory.mktemp("gallery")
    tokenizer = IFlameTokenizer()
    for name in ("meshes", "train"):
        (folder / name).mkdir()
    for number, solid in enumerate(solids().values()):
        # Not every mesh fills the box.
        half = normalise(np.asarray(solid.vertices)) / 2
        mesh = tokenizer.decode_mesh(tokenizer.encode_mesh((half, solid.faces), normalise=False))
        export_mesh(mesh, folder / "meshes" / f"mesh-{number:06d}.{'stl' if number == 1 else 'glb'}", winding="kept")
    export_mesh(trimesh.creation.cone(radius=3.7, height=11.3, sections=9), folder / "train" / "cone.glb")
    entries = [
        {"file": "meshes/mesh-000002.glb", "caption": "<b>ring</b>", "nearest": "train/cone.glb", "distance": 0.25},
        {"file": "meshes/mesh-000000.glb", "section": "picked", "nearest": "train/cone.glb"},
        {"file": "train/cone.glb", "section": "completions", "caption": "whole", "given": 9},
        {"file": "meshes/mesh-000003.glb", "caption": "after the first three"},
    ]
    (folder / "pairs.json").write_text(json.dumps(entries))
    arguments = ["--samples", folder / "meshes", "--output", folder / "out", "--pairs", folder / "pairs.json"]
    assert main([*map(str, arguments), "--num", "3", "--title", "A & B", "--note", "a < b"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "out" / "index.html").read_text(encoding="utf-8")


def test_the_page_holds_the_meshes_as_they_are(folder, page):
    shapes = {name: (vertices.astype(float), faces) for name, vertices, faces in shapes_of(page)}
    assert [*shapes] == ["mesh-000000.glb", "mesh-000001.stl", "mesh-000002.glb", "cone.glb"], "none twice"
    for name, (vertices, faces) in shapes.items():
        expected = trimesh.load_mesh(folder / ("train" if "cone" in name else "meshes") / name, process=False)
        if name.endswith("stl"):
            expected.apply_transform([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # z was up
        corners = normalise(np.asarray(expected.vertices))[expected.faces]
        found = normalise(vertices)[faces]
        assert found.shape == corners.shape
        assert np.abs(found - corners).max() < (1 / 508 if name == "cone.glb" else 1e-6) * 1.01
        assert trimesh.Trimesh(vertices, faces, process=False).volume > 0


def test_sections_captions_and_the_nearest_mesh(page):
    assert [title for _, title, _ in buttons_of(page, "unpicked")] == [
        "mesh-000000.glb · 12 faces",
        "mesh-000001.stl · 320 faces",
        "<b>ring</b> · mesh-000002.glb · 480 faces; nearest: cone.glb · 18 faces · distance 0.25",
    ]
    assert [places for places, _, _ in buttons_of(page, "unpicked")] == [[0], [1], [2, 3]]
    assert [places for places, _, _ in buttons_of(page, "picked")] == [[0, 3]]
    ((places, title, _),) = buttons_of(page, "completions")
    assert places == [3] and title == "whole · cone.glb · 18 faces · 9 of them given"
    assert "<title>A &amp; B</title>" in page and "<p>a &lt; b</p>" in page and "5 meshes" in page
    assert re.findall(r'data-given="(\d+)"', page) == ["0", "0", "0", "0", "9"]
    assert "<b>" not in page and "after the first three" not in page


def test_the_page_needs_nothing_else(page):
    code = re.sub(r'<script id="shapes".*?</script>|base64,[^"]+', "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|//cdn|\bhref\s*=|\burl\(|\bimport\b|\bfetch\(|<link", code)
    assert set(re.findall(r'\bsrc\s*=\s*"([^"]*)"', code)) == {"data:image/png;"}
    assert "$" not in re.sub(r"\$\{", "", code), "no place of the template is left"


def test_every_mesh_has_a_picture_without_webgl_too(folder, page):
    drawn = set()
    for places, _, pictures in (each for name in ("unpicked", "picked") for each in buttons_of(page, name)):
        assert len(pictures) == len(places)
        for text in pictures:
            image = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB")
            assert (np.asarray(image) != BACKGROUND).any(axis=-1).mean() > 0.05
            drawn.add(text)
    assert len(drawn) == 4
    sheet = np.asarray(Image.open(folder / "out" / "samples.png"))
    cells = np.split(sheet, 3, axis=1)
    assert sheet.shape == (208, 3 * 208, 3) and all((cell != BACKGROUND).any() for cell in cells)


def test_the_picture_of_picked_meshes_has_the_nearest_beside_each(folder, tmp_path):
    sheet = np.asarray(Image.open(folder / "out" / "picked.png"))
    (title,) = {len(sheet) - 208}
    assert sheet.shape[1] == 2 * 208 and title > 0
    for place, file in enumerate(("meshes/mesh-000000.glb", "train/cone.glb")):
        mesh = trimesh.load_mesh(folder / file, process=False)
        expected = render_mesh(mesh.vertices, mesh.faces, 208).astype(int)
        found = sheet[:208, place * 208 : (place + 1) * 208]
        assert (np.abs(found - expected).max(axis=-1) > 100).mean() < 0.01
    options = ["--samples", str(folder / "meshes"), "--output", str(tmp_path), "--num", "1"]
    assert main(options) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "samples.png"], "none is picked"


def test_a_hundred_meshes_of_400_faces_are_less_than_five_megabytes():
    sphere = trimesh.creation.uv_sphere(count=(10, 12))
    assert 380 < len(sphere.faces) < 420
    sizes = []
    for count in (1, 3):
        shapes = [shape_of(f"mesh-{k}", sphere.vertices * [1, 1, 2 + k], sphere.faces) for k in range(count)]
        sizes.append(len(build_gallery("", {"unpicked": [Exhibit(shape) for shape in shapes]}).encode()))
    assert sizes[0] + 99 * (sizes[1] - sizes[0]) / 2 < 5e6
    with pytest.raises(ValueError, match="no meshes to show"):
        build_gallery("", {"unpicked": []})


def test_samples_may_be_arrays(tmp_path):
    arrays = {
        f"{name}/{part}": getattr(solids()[name], part) for name in ("torus", "box") for part in ("vertices", "faces")
    }
    np.savez(tmp_path / "some.npz", **arrays)
    (tmp_path / "pairs.json").write_text('[{"file": "torus", "section": "picked"}]')
    options = ["--samples", str(tmp_path / "some.npz"), "--output", str(tmp_path / "out"), "--num", "1"]
    assert main([*options, "--pairs", str(tmp_path / "pairs.json")]) == 0
    shapes = shapes_of((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert [(name, len(faces)) for name, _, faces in shapes] == [("box", 12), ("torus", 480)]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("no list", "is no JSON"),
        ('{"file": "a"}', "must be a list such as"),
        ('[{"file": "mesh-000000.glb"}, {"caption": "a"}]', "entry 2: file is missing"),
        ('[{"file": "a", "distance": "near"}]', "entry 1: distance is"),
        ('[{"file": "a", "distance": NaN}]', "entry 1: distance is"),
        ('[{"file": "a", "nearst": "b"}]', "entry 1: nearst is"),
        ('[{"file": "a", "section": "best"}]', "section must be one of unpicked, picked, completions, got 'best'"),
        ('[{"file": "a.glb"}]', "a.glb is none of the samples: say with section"),
        ('[{"file": "a.glb", "section": "picked"}]', "a.glb"),
        ('[{"file": "a", "given": 0.5}]', "entry 1: given is"),
    ],
)
def test_a_list_that_cannot_be_is_told_and_nothing_written(folder, tmp_path, entry, reason, capsys):
    (tmp_path / "pairs.json").write_text(entry)
    options = ["--samples", folder / "meshes", "--output", tmp_path / "out", "--pairs", tmp_path / "pairs.json"]
    assert main([*map(str, options), "--num", "1"]) == 1
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_that_cannot_be_are_told(tmp_path, capsys):
    np.savez(tmp_path / "some.npz", a=np.zeros(3))
    for source, reason in ((tmp_path / "some.npz", "NAME/vertices"), (tmp_path / "none", "no such file or folder")):
        assert main(["--samples", str(source), "--output", str(tmp_path / "out")]) == 1
        assert reason in capsys.readouterr().err
    np.savez(tmp_path / "some.npz", **{"box/vertices": solids()["box"].vertices, "box/faces": solids()["box"].faces})
    (tmp_path / "pairs.json").write_text('[{"file": "box", "given": 13}]')
    options = ["--samples", tmp_path / "some.npz", "--output", tmp_path / "out", "--pairs", tmp_path / "pairs.json"]
    assert main([*map(str, options)]) == 1
    assert "box has 12 faces, of which 13 cannot be given" in capsys.readouterr().err
    with pytest.raises(ValueError, match="flat: no face is left"):
        shape_of("flat", np.eye(3) * [1e-9, 1e-9, 1], np.array([[0, 1, 2]]))


@pytest.mark.parametrize("has_webgl", [True, False])
def test_a_browser_shows_the_mesh_that_keys_choose(browser, folder, has_webgl):
    errors = []
    page = browser.new_page(viewport={"width": 1200, "height": 700})
    page.on("pageerror", lambda error: errors.append(str(error)))
    if not has_webgl:
        page.add_init_script("HTMLCanvasElement.prototype.getContext = () => null")
    page.goto((folder / "out" / "index.html").as_uri())
    part = ".viewer canvas" if has_webgl else "#pictures"
    page.locator("#unpicked button").nth(1).click()
    page.wait_for_timeout(300)
    one = picture(page, part)
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(300)
    assert "ring" in page.locator("#caption").inner_text()
    two = picture(page, part)
    assert coloured(one) > 2000 < coloured(two) and (one.shape != two.shape or (one != two).any())
    assert page.locator(".cell").count() == (2 if has_webgl else 0)
    assert page.locator("#pictures img").count() == (0 if has_webgl else 2)
    page.close()
    assert errors == []
