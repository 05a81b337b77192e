"""The page: what is behind it, what it needs on a Space, and what a browser shows of it."""

import configparser
import io
import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml
from packaging.requirements import Requirement
from small_models import small_model

from hub_upload import lay_out_cache, run_in_clean_process
from iflame_hf import IFlameTokenizer

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "app"
sys.path.insert(0, str(APP))  # as it is where app.py runs as a script

import sampling  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = (
    "--no-sandbox --headless=new --use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader "
    "--disable-background-networking --disable-component-update --disable-sync --no-first-run"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose meshes have random faces and no end."""
    folder = tmp_path_factory.mktemp("model") / "meshes"
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[129:] = -1e4
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator(folder):
    return sampling.load(str(folder))


def box(tmp_path, suffix, scale=1.0, shift=(0.0, 0.0, 0.0)):
    """A file with the lower half of a box that is as wide as it is deep, half a unit, in the middle of its space."""
    mesh = trimesh.creation.box((0.5, 0.5, 0.5))
    mesh.apply_translation((0, -0.25, 0))
    mesh.apply_scale(scale)
    mesh.apply_translation(shift)
    path = tmp_path / f"lower half{suffix}"
    mesh.export(path)
    return path


def corners(mesh):
    return mesh.vertices[mesh.faces]


# Behind the page


def test_the_meshes_that_grow_are_those_that_generate_makes_with_that_seed(generator):
    *_, grown = sampling.grow(generator, number=3, max_faces=6, temperature=0.9, top_p=0.95, seed=5)
    torch.manual_seed(5)
    rows = generator.model.generate(
        do_sample=True, num_return_sequences=3, max_new_tokens=9 * 6 + 1, temperature=0.9, top_k=0, top_p=0.95
    )
    assert len(grown) == 3
    for mesh, row in zip(grown, rows, strict=True):
        assert mesh.ids.tolist() == row.tolist()
        vertices, faces = generator.tokenizer.decode_arrays(row)
        assert len(faces) > 3
        np.testing.assert_array_equal(corners(mesh), vertices[faces])


def test_faces_that_were_shown_stay_and_new_ones_come_after_them(generator):
    looks = list(sampling.grow(generator, number=2, max_faces=40, interval=0.01))
    sizes = [[len(mesh.faces) for mesh in look] for look in looks]
    assert len({tuple(size) for size in sizes}) > 3
    for before, after in zip(looks[:-1], looks[1:], strict=True):
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(corners(old), corners(new)[: len(old.faces)])


def test_a_mesh_has_ended_when_the_model_has_closed_it(generator):
    eos = generator.tokenizer.eos_token_id
    handle = generator.model.lm_head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor([eos]), 1e4))
    try:
        *_, (mesh,) = sampling.grow(generator, max_faces=9)
    finally:
        handle.remove()
    assert mesh.ended and len(mesh.faces) == 0
    *_, (mesh,) = sampling.grow(generator, max_faces=2)
    assert not mesh.ended


def generating():
    return [thread for thread in threading.enumerate() if thread.name == "grow"]


def test_stop_ends_the_generation_and_keeps_what_there_is(generator):
    stop, looks = threading.Event(), []
    for look in sampling.grow(generator, max_faces=400, stop=stop, interval=0.05):
        looks.append(look)
        if len(look[0].faces) > 1:
            stop.set()
    assert 1 < len(looks[-1][0].faces) < 200
    assert not generating()


def test_the_generation_ends_when_nobody_watches_any_longer(generator):
    looks = sampling.grow(generator, max_faces=400)
    next(looks)
    assert len(generating()) == 1
    looks.close()
    assert not generating()


def test_what_generate_raises_reaches_the_page(generator):
    with pytest.raises(ValueError, match="temperature"):
        list(sampling.grow(generator, temperature=-1.0))


def test_a_part_within_the_box_keeps_its_place_and_any_other_fills_it(generator, tmp_path):
    kept = sampling.read_part(generator, box(tmp_path, ".obj"))
    assert kept.faces == 12 and kept.bounds is None
    vertices, _ = generator.tokenizer.decode_arrays(kept.ids)
    np.testing.assert_array_equal(
        [vertices.min(axis=0), vertices.max(axis=0)], [[-0.25, -0.5, -0.25], [0.25, 0, 0.25]]
    )
    fitted = sampling.read_part(generator, box(tmp_path, ".obj", scale=40))
    vertices, _ = generator.tokenizer.decode_arrays(fitted.ids)
    np.testing.assert_array_equal([vertices.min(axis=0), vertices.max(axis=0)], [[-0.5] * 3, [0.5] * 3])


def test_of_a_part_the_lowest_faces_can_be_kept(generator, tmp_path):
    path = box(tmp_path, ".glb")
    whole, half = (sampling.read_part(generator, path, share=share) for share in (1.0, 0.5))
    assert half.faces == 6 and half.ids == whole.ids[: len(half.ids)]
    assert sampling.read_part(generator, path, share=0.01).faces == 1


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".stl"])
def test_a_completed_part_comes_back_where_it_was(generator, tmp_path, suffix):
    path = box(tmp_path, suffix, scale=30, shift=(100, 20, -7))
    prompt = sampling.read_part(generator, path, room_above=1.0)
    *_, (mesh,) = sampling.grow(generator, max_faces=20, prompt=prompt)
    assert 12 < len(mesh.faces) <= 20
    written = sampling.write(generator, mesh, prompt, tmp_path, "completed")
    assert set(written) == {"glb", "obj"}
    given = trimesh.load(path, force="mesh").vertices
    if suffix == ".stl":  # where z is up; in glb and obj it is y
        given = np.stack([given[:, 0], given[:, 2], -given[:, 1]], axis=1)
    for file in written.values():
        made = trimesh.load(file, force="mesh").vertices
        distances = np.linalg.norm(given[:, None] - made[None], axis=-1).min(axis=1)
        assert distances.max() < 30 / 128, "the corners given, up to the rounding of coordinates"


BAD_UPLOADS = {
    "broken.glb": (b"glTF but no more", "cannot be read as glb"),
    "notes.obj": (b"shopping list", "no vertices|cannot be read"),
    "empty.obj": (b"", "is empty"),
    "nan.obj": (b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
    "picture.png": (b"\x89PNG", "unknown mesh format"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_its_name_without_the_servers_folders(generator, tmp_path, name):
    content, reason = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        sampling.read_part(generator, tmp_path / name)
    assert name in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_part_that_leaves_no_room_is_refused(generator, tmp_path):
    prompt = sampling.read_part(generator, box(tmp_path, ".obj"))
    with pytest.raises(ValueError, match="12 faces already.*may have 12"):
        list(sampling.grow(generator, max_faces=12, prompt=prompt))


def test_all_meshes_are_in_the_zip_but_those_without_faces(generator, tmp_path):
    *_, meshes = sampling.grow(generator, number=2, max_faces=5)
    none = sampling.Growing(meshes[0].ids[:9], np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64), True)
    archive = sampling.write_all(generator, [meshes[0], none, meshes[1]], None, tmp_path, "all")
    names = ["all-1.glb", "all-1.obj", "all-3.glb", "all-3.obj"]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir()) == names
    for name in names:
        assert len(trimesh.load(tmp_path / "unpacked" / name, force="mesh").faces) > 0
    assert sampling.write_all(generator, [none], None, tmp_path, "none") is None


def test_where_there_is_no_model_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no folder outputs/nothing"):
        sampling.load("outputs/nothing")
    with pytest.raises(ValueError, match="no config.json"):
        sampling.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="does not know the task mesh-generation|cannot be loaded"):
        sampling.load(str(tmp_path))
    with pytest.raises(ValueError, match="someone/nothing cannot be loaded"):
        sampling.load("someone/nothing")


# On a Space


def test_the_requirements_of_a_space_are_those_of_the_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    text = parser["options"]["install_requires"] + parser["options.extras_require"]["app"]
    declared = {line for line in text.splitlines() if line}
    wanted = set((APP / "requirements.txt").read_text().splitlines())
    assert {Requirement(line).name for line in wanted} >= {"gradio", "torch", "transformers", "trimesh"}
    assert wanted <= declared


def test_the_card_of_a_space_names_a_file_that_is_there_and_the_tested_gradio():
    _, front, text = (APP / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and (APP / card["app_file"]).is_file() and "IFLAME_MODEL" in text
    assert f"gradio=={card['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_behind_the_page_a_model_of_the_hub_and_its_own_files_are_enough(folder, tmp_path):
    home, space = tmp_path / "home", tmp_path / "space"
    lay_out_cache(folder, home, "someone/meshes")
    shutil.copytree(APP, space)
    source = f"""
sys.path.insert(0, {str(space)!r})
from pathlib import Path
import sampling
generator = sampling.load("someone/meshes")
prompt = sampling.read_part(generator, {str(box(tmp_path, ".obj"))!r})
*_, meshes = sampling.grow(generator, number=2, max_faces=16, prompt=prompt)
files = [sampling.write(generator, mesh, prompt, Path(), f"mesh-{{n}}") for n, mesh in enumerate(meshes)]
assert all(12 < len(mesh.faces) for mesh in meshes) and all(Path(f["glb"]).stat().st_size for f in files)
print("made", len(files), sys.modules["iflame_hf"])
"""
    process = run_in_clean_process(source, home)
    assert process.returncode == 0, process.stderr
    assert "made 2 None" in process.stdout


# In a browser


@pytest.fixture(scope="module")
def served(folder):
    """Address of the page, and a dict whose `seconds` every step of the model takes longer."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app-test]'")
    from app import Page

    generator = sampling.load(str(folder))
    slow = {"seconds": 0.0}
    generator.model.register_forward_pre_hook(lambda *_: time.sleep(slow["seconds"]))
    page = Page(generator, "someone/meshes")
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield address, slow
    page.blocks.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[app-test]'")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, served):
    """The page as a visitor finds it, set to two meshes of at most 30 faces and the seed 7. It reports nothing wrong,
    and asks no machine but the server for anything."""
    address, slow = served
    slow["seconds"] = 0.0
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    page.set_default_timeout(20_000)
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.locator("#viewer canvas").wait_for()
    set_slider(page, "Meshes", 2)
    set_slider(page, "Most faces", 30)
    page.get_by_label("A new one each time").uncheck()
    page.get_by_label("Seed", exact=True).fill("7")
    yield page
    page.close()
    assert errors == []
    local = re.compile(r"(http|ws)://(127\.0\.0\.1|localhost):|data:|blob:")
    assert asked and [url for url in asked if not local.match(url)] == []


def set_slider(page, label, value):
    number = page.get_by_label(f"number input for {label}")
    number.fill(str(value))
    number.blur()


def wait_for_status(page, word):
    page.wait_for_function("word => document.querySelector('#status').innerText.startsWith(word)", arg=word)


def picture(page):
    """What the viewer shows, (H, W, 3)."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(page.locator("#viewer canvas").screenshot()))
    return np.asarray(image.convert("RGB")).astype(int)


def coloured(picture):
    """How many pixels are of faces: blue, red or yellow, where all else is grey."""
    return int((np.ptp(picture, axis=-1) > 45).sum())


def dark(picture):
    return int((picture.max(axis=-1) < 90).sum())


def faces_shown(page):
    return int(page.locator("#viewer .viewer").get_attribute("data-faces"))


def download(page, button, tmp_path):
    with page.expect_download() as waiting:
        page.locator(button).click()
    path = tmp_path / waiting.value.suggested_filename
    waiting.value.save_as(path)
    return path


def test_a_click_on_generate_leads_to_meshes_that_grow(page, served):
    empty = coloured(picture(page))
    served[1]["seconds"] = 0.004
    page.locator("#generate").click()
    page.wait_for_function("Number(document.querySelector('#viewer .viewer').dataset.faces) >= 2")
    early_faces, early = faces_shown(page), coloured(picture(page))
    wait_for_status(page, "Done")
    page.wait_for_timeout(300)
    late = coloured(picture(page))
    assert 0 < early_faces < 30 < faces_shown(page) <= 60
    assert empty < early < 0.8 * late
    assert page.locator("#viewer .cell.growing").count() == 0


def test_edges_can_be_switched_off_and_on(page):
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    page.wait_for_timeout(2500)  # until new faces have the colour of the others
    button = page.get_by_role("button", name="Wireframe")
    pictures = [picture(page)]
    for pressed in ("false", "true"):
        button.click()
        assert button.get_attribute("aria-pressed") == pressed
        page.wait_for_timeout(200)
        pictures.append(picture(page))
    assert dark(pictures[1]) < 0.5 * dark(pictures[0])
    assert dark(pictures[2]) == pytest.approx(dark(pictures[0]), rel=0.02)


def test_dragging_turns_the_view_and_reset_brings_it_back(page):
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    page.wait_for_timeout(2500)
    before = picture(page)
    box = page.locator("#viewer canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 300)
    page.mouse.down()
    page.mouse.move(box["x"] + 420, box["y"] + 330, steps=4)
    page.mouse.up()
    page.wait_for_timeout(200)
    assert (np.abs(picture(page) - before).max(axis=-1) > 40).mean() > 0.05
    page.get_by_role("button", name="Reset view").click()
    page.wait_for_timeout(200)
    assert (np.abs(picture(page) - before).max(axis=-1) > 40).mean() < 0.01


def test_the_mesh_that_was_clicked_is_downloaded_as_it_was_generated(page, generator, tmp_path):
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    *_, expected = sampling.grow(generator, number=2, max_faces=30, top_p=0.8, seed=7)
    first = trimesh.load(download(page, "#glb", tmp_path), force="mesh")
    assert len(first.faces) == len(expected[0].faces)
    box = page.locator("#viewer canvas").bounding_box()
    page.mouse.click(box["x"] + 0.75 * box["width"], box["y"] + 0.5 * box["height"])
    page.locator("#obj", has_text="mesh 2 as obj").wait_for()
    path = download(page, "#obj", tmp_path)
    second = trimesh.load(path, force="mesh")
    assert path.suffix == ".obj" and len(second.faces) == len(expected[1].faces)
    np.testing.assert_allclose(second.bounds, [expected[1].vertices.min(axis=0), expected[1].vertices.max(axis=0)])
    shutil.unpack_archive(download(page, "#zip", tmp_path), tmp_path / "all")
    assert len(list((tmp_path / "all").iterdir())) == 4


def test_an_uploaded_part_is_shown_and_completed(page, tmp_path):
    page.get_by_role("button", name="Complete a part").click()
    page.locator("#part input[type=file]").set_input_files(box(tmp_path, ".glb"))
    page.locator("#part-status", has_text="12 faces to go on from").wait_for()
    assert faces_shown(page) == 12
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    assert faces_shown(page) > 2 * 12
    completed = trimesh.load(download(page, "#glb", tmp_path), force="mesh")
    given = trimesh.creation.box((0.5, 0.5, 0.5)).vertices - (0, 0.25, 0)
    distances = np.linalg.norm(given[:, None] - completed.vertices[None], axis=-1).min(axis=1)
    assert len(completed.faces) > 12 and distances.max() < 1e-6


def test_a_file_that_is_no_mesh_is_refused_on_the_page(page, tmp_path):
    path = tmp_path / "chair.glb"
    path.write_bytes(b"not a mesh at all")
    page.get_by_role("button", name="Complete a part").click()
    page.locator("#part input[type=file]").set_input_files(path)
    page.locator("#part-status", has_text="chair.glb: not a binary glTF file").wait_for()
    page.locator("#generate").click()
    page.locator(".toast-body", has_text="chair.glb: not a binary glTF file").wait_for()


def test_stop_ends_the_generation_and_what_there_is_can_be_downloaded(page, served, tmp_path):
    set_slider(page, "Most faces", 600)
    set_slider(page, "Meshes", 1)
    served[1]["seconds"] = 0.002
    page.locator("#generate").click()
    page.wait_for_function("Number(document.querySelector('#viewer .viewer').dataset.faces) >= 3")
    page.locator("#stop").click()
    wait_for_status(page, "Stopped")
    assert 3 <= len(trimesh.load(download(page, "#glb", tmp_path), force="mesh").faces) < 300
