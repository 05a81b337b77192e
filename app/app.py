"""A page that generates meshes with an iFlame model and shows them growing, face by face.

python app/app.py --model outputs/demo
"""

import argparse
import itertools
import os
import random
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from sampling import FACE, Growing, Prompt, grow, load, read_part, write, write_all
from transformers import Pipeline

HERE = Path(__file__).resolve().parent
DEFAULT_MODEL = "outputs/demo"
PART_SUFFIXES = [".glb", ".gltf", ".obj", ".ply", ".stl", ".off", ".dae"]
MOST_MESHES = 9
MOST_FACES = 1600
LARGEST_SEED = 999_999
LARGEST_UPLOAD = "20mb"
KEPT_SECONDS = 3600  # how long files that were downloaded or uploaded stay on the server
TITLE = "# iFlame\nLow-poly meshes, written face by face by a small transformer."
PART_HELP = (
    "A mesh is built from the bottom up: give its lower part, or a whole mesh of which only the lowest faces are "
    "kept, and the model goes on from there. What lies within half a unit of the origin, as meshes of this page do, "
    "keeps its place; anything else is fitted into the model's box, and comes back in its own units."
)
CSS = "#viewer .html-container { padding: 0; }"
FONT = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]


def viewer_value(run: str, meshes: list[Growing], given: int = 0, is_over: bool = False) -> dict[str, Any]:
    """What viewer.js takes: for each mesh its corners in base64, 48 characters a face, of which the first `given`
    were not generated. Within a run the text only grows at its end, and gradio sends the end alone. `is_over` says
    that no more is to come, ended or not."""
    shown = []
    for mesh in meshes:
        corners = mesh.vertices[mesh.faces].astype("<f4")  # (F, 3 corners, 3)
        shown.append({"faces": b64encode(corners.tobytes()).decode(), "given": given, "ended": is_over or mesh.ended})
    return {"run": run, "meshes": shown}


def status(word: str, meshes: list[Growing], given: int = 0, seconds: float | None = None) -> str:
    """A line of Markdown that says how far the meshes are."""
    made = sum(len(mesh.faces) - given for mesh in meshes)
    parts = [f"**{word}**", _count(len(meshes), "mesh", "meshes"), _count(made, "new face", "new faces")]
    if seconds:
        parts.append(f"{seconds:.1f} s, {made / seconds:.0f} faces a second")
    return " · ".join(parts)


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


class Page:
    """The page of one model: its components and what they do. Visitors generate one after the other.

    `blocks` is the gradio app.
    """

    def __init__(self, generator: Pipeline, name: str):
        self.generator = generator
        self._stops: dict[str | None, threading.Event] = {}
        self._runs = itertools.count(1)
        self.most_faces = min(MOST_FACES, generator.model.config.max_position_embeddings // FACE - 2)
        with gr.Blocks(title="iFlame", analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as blocks:
            gr.Markdown(f"{TITLE} Model: `{name}` on {generator.device.type.upper()}.")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self._build_controls()
                with gr.Column(scale=3, min_width=360):
                    self._build_results()
            self._connect()
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
        default = min(200, self.most_faces)
        self.faces = gr.Slider(10, self.most_faces, value=default, step=10, label="Most faces")
        self.temperature = gr.Slider(
            0.1, 1.5, value=1.0, step=0.05, label="Temperature", info="Lower is more regular."
        )
        self.top_p = gr.Slider(0.05, 1.0, value=0.8, step=0.05, label="Top-p", info="Lower is safer.")
        with gr.Row():
            self.seed = gr.Number(value=0, precision=0, minimum=0, maximum=LARGEST_SEED, label="Seed", min_width=110)
            self.new_seed = gr.Checkbox(value=True, label="A new one each time", container=False, min_width=110)
        with gr.Row():
            self.start = gr.Button("Generate", variant="primary", scale=2, min_width=140, elem_id="generate")
            self.end = gr.Button("Stop", min_width=80, elem_id="stop")
        with gr.Accordion("Complete a part of a mesh", open=False, elem_id="part-box"):
            gr.Markdown(PART_HELP)
            self.part = gr.File(label="Part of a mesh", file_types=PART_SUFFIXES, elem_id="part")
            self.share = gr.Slider(5, 100, value=100, step=5, label="Faces to keep, from the bottom (%)")
            self.room = gr.Slider(0, 3, value=0, step=0.1, label="Room above it, in its heights")
            self.part_status = gr.Markdown("", elem_id="part-status")

    def _build_results(self) -> None:
        self.viewer = gr.HTML(
            html_template=(HERE / "viewer.html").read_text(encoding="utf-8"),
            css_template=(HERE / "viewer.css").read_text(encoding="utf-8"),
            js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
            elem_id="viewer",
        )
        self.status = gr.Markdown("", elem_id="status")
        with gr.Row():
            self.glb = gr.DownloadButton("Download glb", interactive=False, elem_id="glb")
            self.obj = gr.DownloadButton("Download obj", interactive=False, elem_id="obj")
            self.zip = gr.DownloadButton("Download all (zip)", interactive=False, elem_id="zip")
        self.made = gr.State(([], None))  # meshes and their prompt

    def _connect(self) -> None:
        settings = [self.number, self.faces, self.temperature, self.top_p, self.seed, self.new_seed]
        part = [self.part, self.share, self.room]
        results = [self.viewer, self.status, self.seed, self.made, self.glb, self.obj, self.zip]
        self.start.click(self.generate, [*settings, *part], results, show_progress="hidden", concurrency_limit=1)
        self.end.click(self.stop, queue=False)
        for event in (self.part.change, self.share.release, self.room.release):
            event(self.look, part, [self.part_status, self.viewer], show_progress="hidden")
        self.viewer.select(self.choose, self.made, [self.glb, self.obj], show_progress="hidden")

    def generate(
        self,
        number: int,
        faces: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        new_seed: bool,
        part: str | None,
        share: float,
        room: float,
        request: gr.Request,
    ) -> Iterator[dict[Any, Any]]:
        """Makes meshes, and yields new values of components while they grow; the files come with the last."""
        seed = random.randint(0, LARGEST_SEED) if new_seed or seed is None else int(seed) % (LARGEST_SEED + 1)
        stop = self._stops[request.session_hash] = threading.Event()
        run, began = str(next(self._runs)), time.perf_counter()
        idle = {button: gr.DownloadButton(interactive=False) for button in (self.glb, self.obj, self.zip)}
        try:
            prompt = self._read_part(part, share, room) if part else None
            given = prompt.faces if prompt else 0
            settings = {"temperature": temperature, "top_p": top_p, "seed": seed, "prompt": prompt, "stop": stop}
            for meshes in grow(self.generator, number=int(number), max_faces=int(faces), **settings):
                text = status("Generating", meshes, given, time.perf_counter() - began)
                yield {self.viewer: viewer_value(run, meshes, given), self.status: text, self.seed: seed, **idle}
        except ValueError as error:
            raise gr.Error(str(error), duration=None, title="This does not work") from error
        finally:
            self._stops.pop(request.session_hash, None)
        text = status("Stopped" if stop.is_set() else "Done", meshes, given, time.perf_counter() - began)
        open_ends = sum(not mesh.ended for mesh in meshes)
        if open_ends and not stop.is_set():
            text += f" · {open_ends} would go on: allow more faces"
        with tempfile.TemporaryDirectory() as folder:  # gradio copies what it is to offer
            archive = write_all(self.generator, meshes, prompt, Path(folder), "iflame") if len(meshes) > 1 else None
            yield {
                self.viewer: viewer_value(run, meshes, given, is_over=True),
                self.status: text,
                self.made: (meshes, prompt),
                **self._offer(meshes, prompt, 0, Path(folder)),
                self.zip: gr.DownloadButton(value=archive, interactive=archive is not None),
            }

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's generation at the next token."""
        running = self._stops.get(request.session_hash)
        if running:
            running.set()

    def _read_part(self, part: str, share: float, room: float) -> Prompt:
        prompt = read_part(self.generator, part, share / 100, room)
        if prompt.faces >= self.most_faces:
            raise ValueError(
                f"{prompt.faces:,} faces are too many to go on from, {self.most_faces:,} at most: keep fewer"
            )
        return prompt

    def look(self, part: str | None, share: float, room: float) -> tuple[str, dict[str, Any]]:
        """Shows the part that was given, or says what is wrong with it."""
        if not part:
            return "", gr.skip()
        try:
            prompt = self._read_part(part, share, room)
        except ValueError as error:
            return f"**This file does not work.** {error}", gr.skip()
        mesh = Growing(np.array(prompt.ids), *self.generator.tokenizer.decode_arrays(prompt.ids), True)
        count = _count(len(mesh.faces), "face", "faces")
        value = viewer_value(str(next(self._runs)), [mesh], given=len(mesh.faces))
        return f"{count} to go on from. Press **Generate**.", value

    def choose(self, made: tuple[list[Growing], Prompt | None], event: gr.EventData) -> Iterator[dict[Any, Any]]:
        """Offers the files of the mesh that was clicked in the viewer."""
        meshes, prompt = made
        if 0 <= event.index < len(meshes):
            with tempfile.TemporaryDirectory() as folder:
                yield self._offer(meshes, prompt, event.index, Path(folder))

    def _offer(self, meshes: list[Growing], prompt: Prompt | None, index: int, folder: Path) -> dict[Any, Any]:
        paths = write(self.generator, meshes[index], prompt, folder, f"iflame-{index + 1}")
        which = f"mesh {index + 1} as " if len(meshes) > 1 else ""
        return {
            button: gr.DownloadButton(f"Download {which}{suffix}", value=paths.get(suffix), interactive=bool(paths))
            for suffix, button in (("glb", self.glb), ("obj", self.obj))
        }


def main(arguments: list[str] | None = None) -> None:
    """Loads the model and serves the page until it is interrupted."""
    parser = argparse.ArgumentParser(description="A page that generates meshes with an iFlame model.")
    parser.add_argument(
        "--model",
        default=os.environ.get("IFLAME_MODEL") or DEFAULT_MODEL,
        help="a folder or the name of a model on the Hub, whose code is run; by default the environment variable "
        f"IFLAME_MODEL, else {DEFAULT_MODEL}, the model of `make demo`",
    )
    parser.add_argument("--host", help="the address to listen at; by default this machine alone")
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    options = parser.parse_args(arguments)
    try:
        generator = load(options.model)
    except ValueError as error:
        sys.exit(
            f"There is no model to show: {error}.\n"
            "Run `make demo` first, or name a model: --model FOLDER_OR_HUB_NAME, or the environment variable "
            "IFLAME_MODEL."
        )
    Page(generator, options.model).launch(server_name=options.host, server_port=options.port)


if __name__ == "__main__":
    main()
