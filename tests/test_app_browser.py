"""What a browser shows of the page."""

import re
import shutil
import time

import numpy as np
import pytest
import trimesh
from app_fixtures import CONDITIONED, box, closes_meshes, sampling, save_endless_model
from browser_fixtures import coloured, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_endless_model(tmp_path_factory.mktemp("model") / "meshes")


@pytest.fixture(scope="module")
def generator(folder):
    return sampling.load(str(folder))


@pytest.fixture(scope="module")
def served(folder):
    """Address of the page, and a dict whose `seconds` every step of the model takes longer."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app-test]'")
    from app import Page

    generator = sampling.load(str(folder))
    slow = {"seconds": 0.0}
    generator.model.register_forward_pre_hook(lambda *_: time.sleep(slow["seconds"]))
    page = Page(generator, "someone/meshes", examples=False)
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    yield address, slow
    page.blocks.close()


@pytest.fixture
def visit(browser):
    """Opens the page of an address. It reports nothing wrong, and asks no machine but the server for anything."""
    pages, errors, asked = [], [], []

    def visit(address):
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        pages.append(page)
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("#viewer canvas").wait_for()
        return page

    yield visit
    for page in pages:
        page.close()
    assert errors == []
    local = re.compile(r"(http|ws)://(127\.0\.0\.1|localhost):|data:|blob:")
    assert asked and [url for url in asked if not local.match(url)] == []


@pytest.fixture
def page(visit, served):
    """The page as a visitor finds it, set to two meshes of at most 30 faces and the seed 7."""
    address, slow = served
    slow["seconds"] = 0.0
    page = visit(address)
    set_slider(page, "Meshes", 2)
    set_slider(page, "Most faces", 30)
    page.get_by_label("A new one each time").uncheck()
    page.get_by_label("Seed", exact=True).fill("7")
    return page


def set_slider(page, label, value):
    number = page.get_by_label(f"number input for {label}")
    number.fill(str(value))
    number.blur()


def wait_for_status(page, word):
    page.wait_for_function("word => document.querySelector('#status').innerText.startsWith(word)", arg=word)


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
    page.locator("#obj", has_text="Download 2 (obj)").wait_for()
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
    page.locator("#complete").click()
    wait_for_status(page, "Done")
    assert faces_shown(page) > 2 * 12
    completed = trimesh.load(download(page, "#glb", tmp_path), force="mesh")
    given = trimesh.creation.box((0.5, 0.5, 0.5)).vertices - (0, 0.25, 0)
    distances = np.linalg.norm(given[:, None] - completed.vertices[None], axis=-1).min(axis=1)
    assert len(completed.faces) > 12 and distances.max() < 1e-6


def test_after_a_file_that_is_no_mesh_nothing_can_be_completed(page, tmp_path):
    path = tmp_path / "chair.glb"
    path.write_bytes(b"not a mesh at all")
    page.get_by_role("button", name="Complete a part").click()
    complete = page.locator("#complete")
    assert complete.is_disabled()
    page.locator("#part input[type=file]").set_input_files(path)
    page.locator("#part-status", has_text="chair.glb: not a binary glTF file").wait_for()
    assert complete.is_disabled() and faces_shown(page) == 0
    page.get_by_label("Clear").first.click()
    page.wait_for_function("document.querySelector('#part-status').innerText === ''")
    page.locator("#part input[type=file]").set_input_files(box(tmp_path, ".glb"))
    page.locator("#part-status", has_text="12 faces to go on from").wait_for()
    assert complete.is_enabled()


def test_status_and_downloads_go_with_the_meshes_that_they_belong_to(page, tmp_path):
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    assert page.locator("#glb").is_enabled() and page.locator("#again").is_enabled()
    page.get_by_role("button", name="Complete a part").click()
    page.locator("#part input[type=file]").set_input_files(box(tmp_path, ".glb"))
    wait_for_status(page, "Part")
    for button in ("#glb", "#obj", "#zip", "#again"):
        assert page.locator(button).is_disabled()
        assert "1" not in page.locator(button).inner_text()


def test_a_second_tab_says_that_it_waits_and_how_many_are_before_it(page, visit, served):
    address, slow = served
    slow["seconds"] = 0.02
    page.locator("#generate").click()
    wait_for_status(page, "Generating")
    second = visit(address)
    second.locator("#generate").click()
    wait_for_status(second, "Waiting · 1 visitor before you")
    assert second.locator("#viewer .hint").inner_text() == "Waiting: 1 visitor before you"
    slow["seconds"] = 0.0
    wait_for_status(page, "Done")
    wait_for_status(second, "Generating")


def test_who_closes_a_tab_does_not_hold_up_the_next(page, visit, served):
    address, slow = served
    first = visit(address)
    slow["seconds"] = 0.05
    first.locator("#generate").click()  # 200 faces, a minute and a half
    wait_for_status(first, "Generating")
    page.locator("#generate").click()
    wait_for_status(page, "Waiting")
    first.close()
    wait_for_status(page, "Generating")
    slow["seconds"] = 0.0
    wait_for_status(page, "Done")


def test_a_finished_mesh_is_scrubbed_back_face_by_face(page, served):
    scrub = page.locator("#viewer .scrub input")
    assert scrub.is_disabled()
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    page.wait_for_timeout(2500)
    whole, faces = picture(page), faces_shown(page)
    most = int(scrub.get_attribute("max"))
    assert faces / 2 <= most <= 30 and scrub.input_value() == str(most)
    scrub.fill(str(most // 2))
    page.wait_for_timeout(300)
    half = coloured(picture(page))
    assert page.locator("#viewer .cell").first.inner_text().startswith(f"1 · {most // 2} of ")
    scrub.press("ArrowLeft")
    scrub.press("ArrowLeft")
    scrub.press("ArrowRight")
    assert page.locator("#viewer .viewer").get_attribute("data-shown") == str(2 * (most // 2 - 1))
    scrub.press("Home")
    page.wait_for_timeout(300)
    assert coloured(picture(page)) < half < coloured(whole)
    scrub.press("End")
    page.wait_for_timeout(300)
    assert (np.abs(picture(page) - whole).max(axis=-1) > 40).mean() < 0.01


def test_a_mesh_that_was_clicked_is_made_again_alone(page):
    page.locator("#generate").click()
    wait_for_status(page, "Done")
    cell = page.locator("#viewer .cell").nth(1)
    assert cell.inner_text().endswith("· seed 8")
    area = cell.bounding_box()
    page.mouse.click(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
    label = cell.inner_text().split(" · ")[1:]
    page.locator("#again", has_text="Make 2 again").click()
    wait_for_status(page, "Done · 1 mesh")
    assert page.locator("#viewer .cell").inner_text().split(" · ")[1:] == label


def test_a_category_and_a_number_of_faces_are_chosen_and_asked_for(visit, page, tmp_path):
    assert page.get_by_label("Category").count() == page.get_by_label("Guidance").count() == 0
    from app import Page

    generator = sampling.load(str(save_endless_model(tmp_path / "asked", **CONDITIONED)))
    start = Page(generator, "someone/chairs", examples=False)
    _, address, _ = start.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        page = visit(address)
        set_slider(page, "Meshes", 1)
        set_slider(page, "Most faces", 20)
        page.get_by_label("A new one each time").uncheck()
        page.get_by_label("Category").click()
        page.get_by_role("option", name="lamp").click()
        page.get_by_label("Faces, about").fill("12")
        set_slider(page, "Guidance", 2)
        page.locator("#generate").click()
        wait_for_status(page, "Done")
        asked = {"category": "lamp", "num_faces": 12, "guidance_scale": 2.0}
        *_, (expected,) = sampling.grow(generator, max_faces=20, top_p=0.8, seed=0, asked=asked)
        shown = trimesh.load(download(page, "#glb", tmp_path), force="mesh")
        assert len(shown.faces) == len(expected.faces)
        np.testing.assert_allclose(shown.bounds, [expected.vertices.min(axis=0), expected.vertices.max(axis=0)])
    finally:
        start.blocks.close()


def test_the_page_begins_with_finished_meshes(visit, folder):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app-test]'")
    from app import Page

    generator = sampling.load(str(folder))
    with closes_meshes(generator, {"faces": 8}):
        start = Page(generator, "someone/meshes")
        _, address, _ = start.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
        try:
            for _ in range(2):
                page = visit(address)
                wait_for_status(page, "Examples")
                assert page.locator("#viewer .cell").count() == 6 and 24 <= faces_shown(page) <= 48
                assert page.locator("#glb").is_enabled()
        finally:
            start.blocks.close()


def test_stop_ends_the_generation_and_what_there_is_can_be_downloaded(page, served, tmp_path):
    set_slider(page, "Most faces", 600)
    set_slider(page, "Meshes", 1)
    served[1]["seconds"] = 0.002
    page.locator("#generate").click()
    page.wait_for_function("Number(document.querySelector('#viewer .viewer').dataset.faces) >= 3")
    page.locator("#stop").click()
    wait_for_status(page, "Stopped")
    assert 3 <= len(trimesh.load(download(page, "#glb", tmp_path), force="mesh").faces) < 300
