"""What the page does for its visitors, without a browser."""

import asyncio
import shutil
import subprocess
import sys
import threading
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import pytest
from app_fixtures import APP, CONDITIONED, box, closes_meshes, sampling, save_endless_model

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[app-test]'")

import gradio as gr  # noqa: E402

from app import EXAMPLES, Page  # noqa: E402

ANN, BEN, EVE = (SimpleNamespace(session_hash=name) for name in ("Ann", "Ben", "Eve"))
SETTINGS = {"number": 2, "faces": 10, "temperature": 1.0, "top_p": 0.8, "seed": 7, "new_seed": False}
PART = {"share": 100, "room": 0}


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return sampling.load(str(save_endless_model(tmp_path_factory.mktemp("model") / "meshes")))


@pytest.fixture
def page(generator):
    return Page(generator, "someone/meshes")


@pytest.fixture
def gate(generator):
    """An event without which the model makes no token."""
    gate = threading.Event()
    gate.set()
    handle = generator.model.register_forward_pre_hook(lambda *_: gate.wait(60) and None)
    yield gate
    gate.set()
    handle.remove()


@pytest.fixture
def closing_model(generator):
    with closes_meshes(generator, {"faces": 6}) as state:
        yield state


class Screen:
    """What a visitor has before the eyes."""

    def __init__(self, page):
        self.page, self.history, self.now = page, [], {}

    async def follow(self, updates):
        async with aclosing(updates):
            async for update in updates:
                self.show(update)

    def show(self, update):
        self.now = {**self.now, **update}
        self.history.append(self.now)

    @property
    def status(self):
        return self.now.get(self.page.status, "")

    @property
    def meshes(self):
        return self.now[self.page.viewer]["meshes"]

    @property
    def faces(self):
        return [len(mesh["faces"]) // 48 for mesh in self.meshes]

    @property
    def offers(self):
        buttons = (self.page.glb, self.page.obj, self.page.zip)
        return [bool(self.now[button].value and self.now[button].interactive) for button in buttons]


async def until(condition):
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("this did not come about within a minute")


def test_who_comes_second_is_told_how_many_are_before_and_has_the_turn_after_them(page, gate):
    ann, ben, eve = (Screen(page) for _ in range(3))

    async def visit():
        gate.clear()
        runs = [asyncio.create_task(ann.follow(page.generate(**SETTINGS, request=ANN)))]
        await until(lambda: "Generating" in ann.status)
        runs.append(asyncio.create_task(ben.follow(page.generate(**SETTINGS, request=BEN))))
        await until(lambda: "Waiting" in ben.status)
        runs.append(asyncio.create_task(eve.follow(page.generate(**SETTINGS, request=EVE))))
        await until(lambda: "Waiting" in eve.status)
        assert "1 visitor before you" in ben.status and "2 visitors before you" in eve.status
        assert "1 visitor before you" in ben.now[page.viewer]["hint"]
        gate.set()
        await asyncio.gather(*runs)

    asyncio.run(visit())
    assert all("Done" in screen.status and screen.faces == ann.faces for screen in (ann, ben, eve))
    assert any("1 visitor before you" in now.get(page.status, "") for now in eve.history)
    began = [
        next(i for i, now in enumerate(screen.history) if "Generating" in now.get(page.status, ""))
        for screen in (ann, ben)
    ]
    assert began[0] < began[1]


def test_who_stops_waiting_or_leaves_does_not_hold_up_the_others(page, gate):
    ann, ben = Screen(page), Screen(page)

    async def visit():
        gate.clear()
        first = asyncio.create_task(ann.follow(page.generate(**SETTINGS, request=ANN)))
        await until(lambda: "Generating" in ann.status)
        second = asyncio.create_task(ben.follow(page.generate(**SETTINGS, request=BEN)))
        await until(lambda: "Waiting" in ben.status)
        await page.stop(BEN)
        await second
        assert "Stopped" in ben.status and ben.meshes == []
        first.cancel()  # as where the tab is closed
        gate.set()
        await asyncio.wait([first])
        await asyncio.wait_for(ben.follow(page.generate(**SETTINGS, request=BEN)), 30)

    asyncio.run(visit())
    assert "Done" in ben.status


def test_a_new_run_of_the_same_visitor_takes_the_place_of_the_old_one(page, gate):
    old, new = Screen(page), Screen(page)

    async def visit():
        run = asyncio.create_task(old.follow(page.generate(**{**SETTINGS, "faces": 1000}, request=ANN)))
        await until(lambda: "Generating" in old.status)
        await new.follow(page.generate(**SETTINGS, request=ANN))
        await run

    asyncio.run(visit())
    assert "Done" in new.status and max(new.faces) <= 10
    assert "Generating" in old.status, "it says nothing any more once there is a new one"
    assert not any("Waiting" in now.get(page.status, "") for now in new.history)


def test_downloads_and_status_are_those_of_the_meshes_shown(page, tmp_path):
    screen = Screen(page)

    def made():
        return screen.now[page.made]

    asyncio.run(screen.follow(page.generate(**SETTINGS, request=ANN)))
    assert "Done · 2 meshes" in screen.status.replace("**", "") and screen.offers == [True, True, True]
    screen.show(page.look(str(box(tmp_path, ".obj")), **PART, made=made(), request=ANN))
    assert "12 faces" in screen.status and screen.faces == [12] and screen.offers == [False, False, False]
    assert made()[0] == []

    looks = page.generate(**SETTINGS, request=ANN)
    asyncio.run(screen.follow(looks))
    growing = [now for now in screen.history if "Generating" in now.get(page.status, "")]
    assert growing and all(not now[page.glb].interactive and now[page.made][0] == [] for now in growing)
    assert screen.offers == [True, True, True]


def test_what_fails_on_the_way_is_told_and_what_was_made_is_kept(page, generator):
    steps = []

    def fail(*_):
        steps.append(1)
        if len(steps) > 40:
            raise RuntimeError("out of memory")

    handle = generator.model.register_forward_pre_hook(fail)
    screen = Screen(page)
    try:
        with pytest.raises(gr.Error, match="out of memory"):
            asyncio.run(screen.follow(page.generate(**SETTINGS, request=ANN)))
    finally:
        handle.remove()
    assert "Failed" in screen.status and "out of memory" in screen.status
    assert screen.offers == [True, True, True] and all(mesh["ended"] for mesh in screen.meshes)


# Asking for something


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    folder = save_endless_model(tmp_path_factory.mktemp("model") / "asked", **CONDITIONED)
    return Page(sampling.load(str(folder)), "someone/chairs", examples=False)


def test_what_a_model_can_be_asked_for_is_shown_and_nothing_else(page, asking):
    assert [each.visible for each in (page.category, page.num_faces, page.guidance)] == [False] * 3
    assert [each.visible for each in (asking.category, asking.num_faces, asking.guidance)] == [True] * 3
    assert [label for label, _ in asking.category.choices] == ["any", "chair", "lamp", "table"]
    assert "From 4 to 64" in asking.num_faces.info


def test_meshes_are_as_asked_for_and_so_is_the_one_that_is_made_again(asking):
    settings = {**SETTINGS, "category": "lamp", "num_faces": 8, "guidance": 2.0}
    screen = Screen(asking)
    asyncio.run(screen.follow(asking.generate(**settings, request=ANN)))
    made = screen.now[asking.made]
    wanted = {"category": "lamp", "num_faces": 8, "guidance_scale": 2.0}
    *_, expected = sampling.grow(asking.generator, number=2, max_faces=10, top_p=0.8, seed=7, asked=wanted)
    assert [mesh.ids.tolist() for mesh in made[0]] == [mesh.ids.tolist() for mesh in expected]
    asyncio.run(screen.follow(asking.make_again(made, 1, request=ANN)))
    (again,) = screen.now[asking.made][0]
    assert again.ids.tolist() == expected[1].ids.tolist()


def test_what_cannot_be_asked_for_is_told_before_the_line(asking):
    screen = Screen(asking)
    with pytest.raises(gr.Error, match="20 faces are asked for, and a mesh may have 10: allow more"):
        asyncio.run(screen.follow(asking.generate(**SETTINGS, num_faces=20, request=ANN)))
    assert screen.history == []


# Completing a part


def test_complete_goes_on_from_the_part_and_generate_does_not(page, tmp_path):
    part, settings = str(box(tmp_path, ".obj")), {**SETTINGS, "faces": 16}
    completed, generated = Screen(page), Screen(page)
    asyncio.run(completed.follow(page.generate(**settings, part=part, **PART, request=ANN)))
    asyncio.run(generated.follow(page.generate(**settings, request=ANN)))
    assert [mesh["given"] for mesh in completed.meshes] == [12, 12] and min(completed.faces) > 12
    assert [mesh["given"] for mesh in generated.meshes] == [0, 0]


@pytest.mark.parametrize("name", [None, "broken.glb", "box.obj"])
def test_without_a_usable_part_complete_makes_nothing(page, tmp_path, name):
    part = None
    if name:
        part = str(tmp_path / name)
        Path(part).write_bytes(b"not a mesh")
    if name == "box.obj":  # as many faces as a mesh may have
        part = str(box(tmp_path, ".obj"))
    screen = Screen(page)
    with pytest.raises(gr.Error, match={None: "give a part", "box.obj": "12 faces.*allow more"}.get(name, name)):
        asyncio.run(screen.follow(page.generate(**SETTINGS, part=part, **PART, request=ANN)))
    assert screen.history == []


def test_complete_can_be_pressed_only_when_there_is_a_usable_part(page, tmp_path):
    screen, bad = Screen(page), tmp_path / "chair.glb"
    bad.write_bytes(b"not a mesh")

    def upload(part):
        screen.show(page.look(part and str(part), **PART, made=screen.now.get(page.made, ([], {})), request=ANN))
        return screen.now[page.complete_part].interactive

    assert not page.complete_part.interactive
    assert upload(box(tmp_path, ".obj")) and screen.faces == [12]
    assert not upload(bad) and "chair.glb" in screen.now[page.part_status]
    assert screen.meshes == [] and "chair.glb" in screen.status, "the part before is no longer the one that was given"
    assert upload(box(tmp_path, ".obj"))
    assert not upload(None) and screen.now[page.part_status] == "" and screen.meshes == []


def test_a_rejected_file_leaves_generated_meshes_on_the_screen_with_their_downloads(page, tmp_path):
    screen, bad = Screen(page), tmp_path / "chair.glb"
    bad.write_bytes(b"not a mesh")
    asyncio.run(screen.follow(page.generate(**SETTINGS, request=ANN)))
    screen.show(page.look(str(bad), **PART, made=screen.now[page.made], request=ANN))
    assert "chair.glb" in screen.now[page.part_status]
    assert len(screen.meshes) == 2 and "Done" in screen.status and screen.offers == [True, True, True]


# One mesh again


def test_a_mesh_that_was_chosen_is_made_again_alone(page):
    first, again = Screen(page), Screen(page)
    asyncio.run(first.follow(page.generate(**SETTINGS, request=ANN)))
    for update in page.choose(first.now[page.made], SimpleNamespace(index=1)):
        first.show(update)
    assert first.now[page.chosen] == 1 and first.now[page.again].value == "Make 2 again"
    asyncio.run(again.follow(page.make_again(first.now[page.made], first.now[page.chosen], ANN)))
    assert [mesh["seed"] for mesh in first.meshes] == [7, 8]
    assert again.meshes == [first.meshes[1]]


# The start page


def test_the_first_visitor_sees_the_examples_grow_and_the_next_has_them_at_once(page, closing_model):
    ann, ben = Screen(page), Screen(page)
    asyncio.run(ann.follow(page.welcome(ANN)))
    asyncio.run(ben.follow(page.welcome(BEN)))
    assert "Making examples" in ann.history[0][page.status]
    for screen in (ann, ben):
        assert screen.status.startswith("**Examples**") and screen.offers == [True, True, True]
        assert [mesh["seed"] for mesh in screen.meshes] == list(range(EXAMPLES)) and min(screen.faces) >= 4
    assert len(ben.history) == 1 and ben.faces == ann.faces


def test_a_model_that_completes_nothing_says_so(page, closing_model):
    closing_model["faces"] = 2  # of which no closed mesh can consist
    screen = Screen(page)
    asyncio.run(screen.follow(page.welcome(ANN)))
    assert "No examples" in screen.status and screen.meshes == [] and screen.offers == [False, False, False]


def test_examples_end_in_time_and_only_complete_ones_are_shown(page, monkeypatch):
    monkeypatch.setattr("app.EXAMPLE_SECONDS", 0.3)
    screen = Screen(page)
    asyncio.run(asyncio.wait_for(screen.follow(page.welcome(ANN)), 30))  # of an endless model
    assert "No examples" in screen.status and "0.3 seconds" in screen.status


def test_who_presses_generate_does_not_wait_for_the_examples(page, closing_model, gate):
    welcomed, generated = Screen(page), Screen(page)
    closing_model["faces"] = 1000

    async def visit():
        welcome = asyncio.create_task(welcomed.follow(page.welcome(ANN)))
        await until(lambda: "Making examples" in welcomed.status)
        await generated.follow(page.generate(**SETTINGS, request=ANN))
        await welcome

    asyncio.run(visit())
    assert "Done" in generated.status and len(generated.meshes) == 2
    assert "Making examples" in welcomed.status, "it says nothing any more"


def test_examples_can_be_switched_off(generator):
    def on_load(page):
        return [fn for fn in page.blocks.fns.values() if ("load" in {event for _, event in fn.targets})]

    assert on_load(Page(generator, "someone/meshes"))
    assert not on_load(Page(generator, "someone/meshes", examples=False))


def test_the_folder_of_a_space_holds_the_viewer_too(tmp_path):
    space = tmp_path / "space"
    shutil.copytree(APP, space)
    shutil.copytree(APP.parent / "iflame_cli" / "viewer", space / "viewer")
    source = "import app; print(app.VIEWER_FOLDER)"
    run = subprocess.run([sys.executable, "-c", source], cwd=space, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == str(space / "viewer")
