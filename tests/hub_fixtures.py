"""A checkpoint, the folder that is published of it, and a Hub on this machine."""

import json
import shutil
from pathlib import Path

import pytest
from hub_server import LoopbackHub
from huggingface_hub import constants
from small_models import small_model

from hub_upload import (
    build_folder,
    load_checkpoint,
)
from iflame_hf import IFlameTokenizer

ROOT = Path(__file__).resolve().parents[1]
REPO_ID = "someone/small-meshes"
# Made up, in the form of real ones; put together here so that no scanner takes this file for a leak.
TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
OTHER_TOKEN = "hf_" + "HGFEDCBAzyxwvutsrqponmlkjihgfedcba"
EVALUATION = {
    "eval_loss": 1.25,
    "eval_perplexity": 3.49,
    "eval_token_accuracy": 0.61,
    "eval_vertex_accuracy": 0.4,
    "eval_face_accuracy": 0.2,
}


@pytest.fixture(scope="module", name="checkpoint")
def checkpoint_folder(tmp_path_factory):
    """The output folder of a run, with everything in it that must not be published."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = small_model()
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    (folder / "samples.png").write_bytes(b"\x89PNG\r\n picture")
    for number in range(2):
        (folder / f"sample-{number:02d}.glb").write_bytes(b"glTF mesh %d" % number)
    (folder / "sample-02.glb").write_text("not a mesh")
    log = [{"step": 10, "loss": 2.0}, {"step": 10, **EVALUATION, "eval_loss": 1.5}, {"step": 20, **EVALUATION}]
    log[-1]["eval_by_category"] = {"chair": {"loss": 1.0, "face_accuracy": 0.25}}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    state = folder / "checkpoint-20"
    (folder / "samples-10").mkdir()
    state.mkdir()
    arguments = {"train_file": None, "model_name_or_path": None, "sample_max_faces": 4, "top_p": 0.9}
    progress = {"step": 20, "labels": 12345, "seconds": 120.0, "arguments": arguments}
    (state / "trainer_state.json").write_text(json.dumps(progress))
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "events.out.tfevents.host", ".env", "token"):
        (folder / name).write_text(f"secret of this machine {OTHER_TOKEN}")
        (state / name).write_text("secret of this machine")
    return folder


@pytest.fixture(scope="module", name="loaded")
def loaded_checkpoint(checkpoint):
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module", name="built")
def built_folder(checkpoint, loaded, tmp_path_factory):
    """The folder that is published."""
    folder = tmp_path_factory.mktemp("built")
    build_folder(*loaded, checkpoint, folder, REPO_ID)
    return folder


@pytest.fixture(name="hub")
def loopback_hub(monkeypatch):
    """A Hub that this process and clean processes talk to, in which only `someone` may write."""
    with LoopbackHub(someone=TOKEN, stranger=OTHER_TOKEN) as hub:
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        hub.settings = settings
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield hub


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_main(hub):
    return hub.repositories[REPO_ID].branches["main"]


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))
