"""A page that generates meshes with an iFlame model and shows them growing, face by face.

python app/app.py --model models/iflame-artist
"""

import argparse
import asyncio
import itertools
import os
import random
import sys
import tempfile
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from sampling import Growing, Prompt, asked_for, grow, known, load, read_part, write, write_all
from transformers import Pipeline
from waiting_line import Line, Place

APP_FOLDER = Path(__file__).resolve().parent
# The viewer is that of `iflame view`; a Space has a copy beside this file.
VIEWER_FOLDER = (
    APP_FOLDER / "viewer" if (APP_FOLDER / "viewer").is_dir() else APP_FOLDER.parent / "iflame_cli" / "viewer"
)
DEFAULT_MODEL = "models/iflame-artist"
PART_SUFFIXES = [".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae"]
MOST_MESHES = 9
MOST_FACES = 1600
LARGEST_SEED = 999_999
TEMPERATURE, TOP_P = 1.0, 0.8
EXAMPLES, EXAMPLE_SECONDS = 6, 20
FEWEST_FACES = 4  # of an example: with fewer no mesh is closed
LARGEST_UPLOAD = "20mb"
KEPT_SECONDS = 3600  # how long files that were downloaded or uploaded stay on the server
TITLE = "# iFlame\nLow-poly meshes, written face by face by a small transformer."
PART_HELP = (
    "A mesh is built from the bottom up: give its lower part, or a whole mesh of which only the lowest faces are "
    "kept, and the model goes on from there. What lies within half a unit of the origin, as meshes of this page do, "
    "keeps its place; anything else is fitted into the model's box, and comes back in its own units."
)
CSS = "#viewer .html-container { padding: 0; }"
Settings = dict[str, Any]  # of a run, as `grow` takes them
Made = tuple[list[Growing], Settings]
NOTHING: Made = ([], {})
Update = dict[Any, Any]  # new values of components
FONT = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]


def viewer_value(
    run: str, meshes: list[Growing], given: int = 0, is_over: bool = False, hint: str | None = None
) -> dict[str, Any]:
    """What viewer.js takes: for each mesh its seed and its corners in base64, 48 characters a face, of which the first
    `given` were not generated. Within a run the text only grows at its end, and gradio sends the end alone. `is_over`
    says that no more is to come, ended or not; `hint` is said where there is no mesh."""
    shown = []
    for mesh in meshes:
        corners = mesh.vertices[mesh.faces].astype("<f4")  # (F, 3 corners, 3)
        faces = b64encode(corners.tobytes()).decode()
        shown.append({"faces": faces, "given": given, "ended": is_over or mesh.ended, "seed": mesh.seed})
    return {"run": run, "meshes": shown, "is_over": is_over, "hint": hint}


def status(word: str, meshes: list[Growing], given: int = 0, seconds: float | None = None) -> str:
    """A line of Markdown that says how far the meshes are."""
    made = sum(len(mesh.faces) - given for mesh in meshes)
    parts = [f"**{word}**", _count(len(meshes), "mesh", "meshes"), _count(made, "new face", "new faces")]
    if seconds:
        parts.append(f"{seconds:.1f} s, {made / seconds:.0f} faces a second")
    return " · ".join(parts)


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def settings_of(
    number: int,
    faces: int,
    temperature: float,
    top_p: float,
    seed: int,
    prompt: Prompt | None = None,
    asked: dict[str, Any] | None = None,
) -> Settings:
    """What `grow` takes, of what the page calls by other names, and has as floats."""
    sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return {"number": int(number), "max_faces": int(faces), **sampling, "prompt": prompt, "asked": asked}


def _given(settings: Settings) -> int:
    return settings["prompt"].faces if settings["prompt"] else 0


async def _watch(looks: Iterator[list[Growing]]) -> AsyncIterator[list[Growing]]:
    """The same, from a thread, so that the page answers meanwhile; closes `looks` in the end."""
    try:
        while (meshes := await asyncio.to_thread(next, looks, None)) is not None:
            yield meshes
    finally:
        await asyncio.to_thread(looks.close)


class Page:
    """The page of one model: its components and what they do. Visitors generate one after the other.

    What is below the viewer always belongs to what is in it: whatever changes the one changes the other, too.
    With `examples` the page shows, when it is opened, meshes that the model has made for its first visitor.
    `blocks` is the gradio app.
    """

    def __init__(self, generator: Pipeline, name: str, examples: bool = True):
        self.generator = generator
        longest = generator.model.config.max_position_embeddings
        self.most_faces = min(MOST_FACES, generator.tokenizer.format.most_faces(longest))
        self.default_faces = min(200, self.most_faces)
        self._line = Line()
        self._runs = itertools.count(1)
        self._examples: list[Growing] | None = None
        self._of_examples = settings_of(EXAMPLES, self.default_faces, TEMPERATURE, TOP_P, seed=0)
        with gr.Blocks(title="iFlame", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
            gr.Markdown(f"{TITLE} Model: `{name}` on {generator.device.type.upper()}.")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self._build_controls()
                with gr.Column(scale=3, min_width=360):
                    self._build_results()
            self._connect()
            if examples:
                blocks.load(self.welcome, None, self.results, show_progress="hidden", concurrency_limit=None)
            blocks.unload(self.stop)
        self.blocks = blocks

    def launch(self, **options: Any) -> tuple:
        """Serves the page; `options` and what is returned are those of gradio's `launch`."""
        theme = gr.themes.Default(
            primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=["ui-monospace", "monospace"]
        )
        options = {"max_file_size": LARGEST_UPLOAD, "footer_links": ["gradio", "settings"], **options}
        return self.blocks.launch(theme=theme, css=CSS, **options)

    def _build_controls(self) -> None:
        self.number = gr.Slider(1, MOST_MESHES, value=4, step=1, label="Meshes")
        self.faces = gr.Slider(10, self.most_faces, value=self.default_faces, step=10, label="Most faces")
        self.temperature = gr.Slider(
            0.1, 1.5, value=TEMPERATURE, step=0.05, label="Temperature", info="Lower is more regular."
        )
        self.top_p = gr.Slider(0.05, 1.0, value=TOP_P, step=0.05, label="Top-p", info="Lower is safer.")
        self._build_asking()
        with gr.Row():
            self.seed = gr.Number(value=0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=110)
            self.new_seed = gr.Checkbox(value=True, label="A new one each time", container=False, min_width=110)
        with gr.Row():
            self.start = gr.Button("Generate", variant="primary", scale=2, min_width=140, elem_id="generate")
            self.end = gr.Button("Stop", min_width=80, elem_id="stop")
        with gr.Accordion("Complete a part of a mesh", open=False, elem_id="part-box"):
            gr.Markdown(PART_HELP)
            self.part = gr.File(label="Part of a mesh", file_types=PART_SUFFIXES, elem_id="part")
            self.part_status = gr.Markdown("", elem_id="part-status")
            self.share = gr.Slider(5, 100, value=100, step=5, label="Faces to keep, from the bottom (%)")
            self.room = gr.Slider(0, 3, value=0, step=0.1, label="Room above it, in its heights")
            self.complete_part = gr.Button("Complete", variant="primary", interactive=False, elem_id="complete")

    def _build_asking(self) -> None:
        """Only of a model that can be asked for something."""
        can = known(self.generator)
        choices = [("any", ""), *((name, name) for name in can.categories)]
        self.category = gr.Dropdown(choices, value="", label="Category", visible=bool(can.categories))
        self.num_faces = gr.Number(
            value=0,
            precision=0,
            minimum=0,
            label="Faces, about",
            info="0: any. From {:,} to {:,}.".format(*can.faces or (0, 0)),
            visible=can.faces is not None,
        )
        own = self.generator.model.generation_config.guidance_scale
        self.guidance = gr.Slider(
            1,
            max(5, own or 1),
            value=own or 1,
            step=0.25,
            label="Guidance",
            info="Above 1: more weight on what is asked for, in twice the time.",
            visible=bool(can.categories or can.faces),
        )

    def _build_results(self) -> None:
        self.viewer = gr.HTML(
            html_template=(VIEWER_FOLDER / "viewer.html").read_text(encoding="utf-8"),
            css_template=(VIEWER_FOLDER / "viewer.css").read_text(encoding="utf-8"),
            js_on_load=(VIEWER_FOLDER / "viewer.js").read_text(encoding="utf-8"),
            elem_id="viewer",
        )
        self.status = gr.Markdown("", elem_id="status")
        with gr.Row():
            self.glb = gr.DownloadButton("Download (glb)", size="md", interactive=False, elem_id="glb")
            self.obj = gr.DownloadButton("Download (obj)", size="md", interactive=False, elem_id="obj")
            self.zip = gr.DownloadButton("Download all (zip)", size="md", interactive=False, elem_id="zip")
            self.again = gr.Button("Make again", size="md", interactive=False, elem_id="again")
        self.made = gr.State(NOTHING)
        self.chosen = gr.State(0)  # which of the meshes is downloaded, and made again
        self.results = [
            *(self.viewer, self.status, self.made, self.chosen),
            *(self.glb, self.obj, self.zip, self.again),
        ]

    def _connect(self) -> None:
        settings = [self.number, self.faces, self.temperature, self.top_p, self.seed, self.new_seed]
        settings += [self.category, self.num_faces, self.guidance]
        part = [self.part, self.share, self.room]
        options = {"show_progress": "hidden", "concurrency_limit": None}  # the line sees to one at a time
        self.start.click(self.generate, settings, [*self.results, self.seed], **options)
        self.complete_part.click(self.generate, [*settings, *part], [*self.results, self.seed], **options)
        self.again.click(self.make_again, [self.made, self.chosen], self.results, **options)
        self.end.click(self.stop, queue=False)
        for event in (self.part.change, self.share.change, self.room.change):
            outputs = [self.part_status, self.complete_part, *self.results]
            event(self.look, [*part, self.made], outputs, show_progress="hidden", trigger_mode="always_last")
        choice = [self.chosen, self.glb, self.obj, self.again]
        self.viewer.select(self.choose, self.made, choice, show_progress="hidden")

    async def generate(
        self,
        number: int,
        faces: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        new_seed: bool,
        request: gr.Request,
        category: str = "",
        num_faces: int | None = 0,
        guidance: float = 1.0,
        part: str | None = None,
        share: float | None = None,
        room: float = 0.0,
    ) -> AsyncIterator[Update]:
        """Makes meshes, and yields new values of components while they grow; the files come with the last.

        They begin from nothing, or, where a `share` is given, with that many percent of the faces of the file `part`;
        without a usable one it says so and makes nothing."""
        prompt = None if share is None else await self._read_part_to_complete(part, share, room, faces)
        seed = random.randint(0, LARGEST_SEED) if new_seed or seed is None else int(seed) % (LARGEST_SEED + 1)
        try:
            asked = asked_for(self.generator, category, num_faces, guidance, int(faces), prompt.faces if prompt else 0)
        except ValueError as error:
            raise gr.Error(str(error), duration=None, title="This cannot be made") from error
        settings = settings_of(number, faces, temperature, top_p, seed, prompt, asked)
        yield {self.seed: seed}
        async with aclosing(self._in_turn(request, partial(self._make, settings))) as updates:
            async for update in updates:
                yield update

    async def _read_part_to_complete(self, part: str | None, share: float, room: float, most_faces: int) -> Prompt:
        try:
            if not part:
                raise ValueError("give a part of a mesh first, a file that can be read")
            prompt = await asyncio.to_thread(self._read_part, part, share, room)
            if prompt.faces >= most_faces:
                raise ValueError(
                    f"the part has {_count(prompt.faces, 'face', 'faces')}, and a mesh may have {most_faces:,}: allow "
                    "more faces, or keep fewer of the part"
                )
        except ValueError as error:
            raise gr.Error(str(error), duration=None, title="There is nothing to complete") from error
        return prompt

    async def make_again(self, made: Made, chosen: int, request: gr.Request) -> AsyncIterator[Update]:
        """Makes the chosen mesh alone, from its own seed."""
        meshes, settings = made
        if not meshes:
            return
        settings = {**settings, "number": 1, "seed": meshes[chosen].seed}
        async with aclosing(self._in_turn(request, partial(self._make, settings))) as updates:
            async for update in updates:
                yield update

    async def welcome(self, request: gr.Request) -> AsyncIterator[Update]:
        """Shows the examples; the first visitor sees them grow."""
        if self._examples is not None:
            with tempfile.TemporaryDirectory() as folder:
                yield await asyncio.to_thread(self._show_examples, Path(folder))
            return
        async with aclosing(self._in_turn(request, self._make_examples, wait_quietly=True)) as updates:
            async for update in updates:
                yield update

    async def stop(self, request: gr.Request) -> None:
        """Ends the visitor's generation at the next token, or the waiting for it."""
        self._line.stop(request.session_hash)

    async def _in_turn(
        self, request: gr.Request, work: Callable[[Place, Path], AsyncIterator[Update]], wait_quietly: bool = False
    ) -> AsyncIterator[Update]:
        """What `work` yields when the visitor has the turn, as long as nothing newer is asked for. It may offer files
        of the folder that it is given: gradio copies them before it asks for more. Before that it says who is before
        the visitor, but for `wait_quietly`."""
        place = self._line.enter(request.session_hash)
        folder = tempfile.TemporaryDirectory()
        try:
            async for others in self._line.wait(place):
                before = f"{_count(others, 'visitor', 'visitors')} before you"
                text = f"**Waiting** · {before} · one generates at a time, **Stop** gives the place up"
                if not wait_quietly:
                    yield self._empty(text, hint=f"Waiting: {before}")
            if place.stop.is_set():
                if self._line.is_latest(place):
                    yield self._empty("**Stopped** before there was a face")
                return
            async with aclosing(work(place, Path(folder.name))) as updates:
                async for update in updates:
                    if not self._line.is_latest(place):
                        return
                    yield update
        finally:
            self._line.leave(place)
            folder.cleanup()

    async def _make(self, settings: Settings, place: Place, folder: Path) -> AsyncIterator[Update]:
        """Meshes while they grow, and what can be done with them in the end."""
        run, given, began = str(next(self._runs)), _given(settings), time.perf_counter()
        meshes, failure = [], None
        try:
            async with aclosing(_watch(grow(self.generator, **settings, stop=place.stop))) as looks:
                async for meshes in looks:
                    text = status("Generating", meshes, given, time.perf_counter() - began)
                    yield self._screen(viewer_value(run, meshes, given), text)
        except Exception as error:
            failure = error
        text = status("Stopped" if place.stop.is_set() else "Done", meshes, given, time.perf_counter() - began)
        open_ends = sum(not mesh.ended for mesh in meshes)
        if failure:
            text = f"**Failed** · {failure}"
        elif open_ends and not place.stop.is_set():
            text += f" · {open_ends} would go on: allow more faces"
        yield await asyncio.to_thread(self._finished, run, meshes, settings, text, folder)
        if failure:
            raise gr.Error(str(failure), duration=None, title="This does not work") from failure

    async def _make_examples(self, place: Place, folder: Path) -> AsyncIterator[Update]:
        """Makes the meshes that the page begins with, unless there are some, and shows them."""
        if self._examples is None:
            run, began = str(next(self._runs)), time.perf_counter()
            try:
                async with aclosing(_watch(grow(self.generator, **self._of_examples, stop=place.stop))) as looks:
                    async for meshes in looks:
                        text = status("Making examples", meshes) + " · **Generate** need not wait for them"
                        yield self._screen(viewer_value(run, meshes), text)
                        if time.perf_counter() - began > EXAMPLE_SECONDS:
                            break
            except Exception as error:
                yield self._empty(f"**This model makes no meshes.** {error}")
                return
            if place.stop.is_set():  # the next visitor may see them to their end
                text = status("Stopped", meshes)
                yield await asyncio.to_thread(self._finished, run, meshes, self._of_examples, text, folder)
                return
            self._examples = [mesh for mesh in meshes if mesh.ended and len(mesh.faces) >= FEWEST_FACES]
        yield await asyncio.to_thread(self._show_examples, folder)

    def _show_examples(self, folder: Path) -> Update:
        if not self._examples:
            return self._empty(
                f"**No examples.** Of {EXAMPLES} meshes that this model began, it completed none within "
                f"{self.default_faces} faces and {EXAMPLE_SECONDS} seconds: train it for longer, or allow more faces "
                "where its meshes have more, and press **Generate**."
            )
        which = "" if len(self._examples) == EXAMPLES else f"{len(self._examples)} of "
        text = f"**Examples** · {which}the {EXAMPLES} meshes that this model made first"
        text += ", those that it completed" if which else ""
        return self._finished(str(next(self._runs)), self._examples, self._of_examples, text, folder)

    def _screen(self, value: dict[str, Any], text: str, made: Made = NOTHING) -> Update:
        """The viewer with what belongs to it, and nothing to download yet."""
        return {
            self.viewer: value,
            self.status: text,
            self.made: made,
            self.chosen: 0,
            self.glb: gr.DownloadButton("Download (glb)", value=None, interactive=False),
            self.obj: gr.DownloadButton("Download (obj)", value=None, interactive=False),
            self.zip: gr.DownloadButton(value=None, interactive=False),
            self.again: gr.Button("Make again", interactive=False),
        }

    def _empty(self, text: str = "", hint: str | None = None) -> Update:
        return self._screen(viewer_value(str(next(self._runs)), [], is_over=True, hint=hint), text)

    def _finished(self, run: str, meshes: list[Growing], settings: Settings, text: str, folder: Path) -> Update:
        """Meshes that grow no further, and their files, written into `folder`."""
        value = viewer_value(run, meshes, _given(settings), is_over=True)
        update = self._screen(value, text, made=(meshes, settings))
        if meshes:
            update |= self._offer((meshes, settings), 0, folder)
        if len(meshes) > 1:
            archive = write_all(self.generator, meshes, settings["prompt"], folder, "iflame")
            update[self.zip] = gr.DownloadButton(value=archive, interactive=archive is not None)
        return update

    def _offer(self, made: Made, index: int, folder: Path) -> Update:
        meshes, settings = made
        paths = write(self.generator, meshes[index], settings["prompt"], folder, f"iflame-{index + 1}")
        number = f"{index + 1} " if len(meshes) > 1 else ""
        offer = {
            button: gr.DownloadButton(f"Download {number}({suffix})", value=paths.get(suffix), interactive=bool(paths))
            for suffix, button in (("glb", self.glb), ("obj", self.obj))
        }
        return {**offer, self.again: gr.Button(f"Make {number}again", interactive=True)}

    def choose(self, made: Made, event: gr.EventData) -> Iterator[Update]:
        """Offers the files of the mesh that was clicked in the viewer."""
        if 0 <= event.index < len(made[0]):
            with tempfile.TemporaryDirectory() as folder:
                yield {self.chosen: event.index, **self._offer(made, event.index, Path(folder))}

    def _read_part(self, part: str, share: float, room: float) -> Prompt:
        prompt = read_part(self.generator, part, share / 100, room)
        if prompt.faces >= self.most_faces:
            raise ValueError(
                f"{prompt.faces:,} faces are too many to go on from, {self.most_faces:,} at most: keep fewer"
            )
        return prompt

    def look(self, part: str | None, share: float, room: float, made: Made, request: gr.Request) -> Update:
        """Shows the part that was given and lets it be completed, or says what is wrong with it."""
        text, prompt = "", None
        if part:
            try:
                prompt = self._read_part(part, share, room)
                text = f"{_count(prompt.faces, 'face', 'faces')} to go on from. Press **Complete**."
            except ValueError as error:
                text = f"**This file does not work.** {error}"
        update = {self.part_status: text, self.complete_part: gr.Button(interactive=prompt is not None)}
        if request.session_hash in self._line:  # the viewer shows what is generated
            return update
        if prompt:
            arrays = self.generator.tokenizer.decode_arrays(prompt.ids)
            mesh = Growing(np.array(prompt.ids), *arrays, ended=True)
            value = viewer_value(str(next(self._runs)), [mesh], given=len(mesh.faces), is_over=True)
            name = Path(part).name
            return {
                **update,
                **self._screen(value, f"**Part** · {_count(len(mesh.faces), 'face', 'faces')} of {name}"),
            }
        # Without meshes it is another part that is shown, or nothing.
        return update if made[0] else {**update, **self._empty(text)}


def main(arguments: list[str] | None = None) -> None:
    """Loads the model and serves the page until it is interrupted."""
    parser = argparse.ArgumentParser(description="A page that generates meshes with an iFlame model.")
    parser.add_argument(
        "--model",
        default=os.environ.get("IFLAME_MODEL") or DEFAULT_MODEL,
        help="a folder or the name of a model on the Hub, whose code is run; by default the environment variable "
        f"IFLAME_MODEL, else {DEFAULT_MODEL}, the released model",
    )
    parser.add_argument("--host", help="the address to listen at; by default this machine alone")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument(
        "--no-examples",
        action="store_true",
        help=f"begin with an empty page; without this option the model makes {EXAMPLES} meshes for the first visitor, "
        f"in {EXAMPLE_SECONDS} seconds at most",
    )
    options = parser.parse_args(arguments)
    try:
        generator = load(options.model)
    except ValueError as error:
        sys.exit(
            f"There is no model to show: {error}.\n"
            "Run it in the repository, or name a model: --model FOLDER_OR_HUB_NAME, or the environment variable "
            "IFLAME_MODEL."
        )
    Page(generator, options.model, examples=not options.no_examples).launch(
        server_name=options.host, server_port=options.port
    )


if __name__ == "__main__":
    main()
