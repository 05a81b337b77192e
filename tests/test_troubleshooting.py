"""docs/troubleshooting.md: its messages are those that users read, its table of versions that of tests/versions.py."""

import configparser
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import versions
from accelerate import Accelerator
from safetensors import SafetensorError
from small_models import BOS, small_model
from transformers import DynamicCache, pipeline
from transformers.dynamic_module_utils import resolve_trust_remote_code

from iflame_hf import IFlameForCausalLM, IFlameTokenizer, implementations_iflame, names
from training.arguments import parse_arguments
from training.procedural.make import ProceduralMesh, make_dataset
from training.rows.map import MeshRows, mesh_sizes, require_usable
from training.rows.meshes import ProceduralMeshes
from training.run.create import create_model

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("troubled") / "model"
    small_model().save_pretrained(folder)
    return folder


@pytest.fixture
def part(tmp_path):
    """A mesh file that does not lie within the model's box."""
    mesh = trimesh.creation.box(extents=(1, 2, 1))
    mesh.export(tmp_path / "part.obj")
    return tmp_path / "part.obj"


# Messages of the page that are not provoked here, with the reason.
NOT_PROVOKED = {
    "cannot import name 'PreTrainedConfig' from 'transformers'": "needs an old transformers; 4.57.6 says it",
    "We couldn't connect to": "needs a network that fails; transformers says it, offline too",
    "the package for FlashAttention2 doesn't seem to be installed": "transformers says it where flash-attn is missing",
    "… holds the checkpoints of another run": "tests/test_train.py provokes it",
    "a step cannot be a CUDA graph": "tests/test_captured.py provokes it",
    "triton does not run": "it is a warning; tests/test_ops.py provokes it",
    "the decode engine does not do a GPU on which triton does not run": "needs a GPU",
}


def provoke(message, folder, part, monkeypatch):
    """Does what leads to a message of the page."""
    tokenizer, ids = IFlameTokenizer(), torch.full((2, 18), BOS)
    mask = torch.ones_like(ids)
    one = torch.zeros(1, 2, 1, 8)

    def model(**options):
        return IFlameForCausalLM.from_pretrained(folder, **options)

    if message.startswith("linear_attn_implementation='fla' runs"):
        implementations_iflame.linear_attention(one, one, one, torch.ones(1), implementation="fla")
    elif message.startswith("attn_implementation='flex_attention'"):
        model(attn_implementation="flex_attention")(ids)
    elif message.startswith("linear_attn_implementation='lightning_attn' needs"):
        monkeypatch.setattr(implementations_iflame, "_is_installed", lambda name: False)
        model(linear_attn_implementation="lightning_attn")
    elif message.startswith("linear_attn_implementation='triton' cannot run"):
        monkeypatch.setattr(implementations_iflame, "why_no_kernels", lambda: "a GPU on which triton does not run")
        call = implementations_iflame.LinearAttentionCall(device_type="cuda", head_dim=16, length=9)
        implementations_iflame.choose_linear_attention("triton", call)
    elif message.startswith("this model takes no category"):
        model().generate(category="chair")
    elif message.startswith("this model does not know the category"):
        small_model(categories=["lamp"]).generate(category="chair")
    elif message.startswith("lightning_attn computes heads"):
        call = implementations_iflame.LinearAttentionCall(device_type="cuda", head_dim=16, length=9)
        implementations_iflame.choose_linear_attention("lightning_attn", call)
    elif message.startswith("The repository"):
        resolve_trust_remote_code(False, "user/name", has_local_code=False, has_remote_code=True)
    elif message.startswith("the prompt of row 0 is not"):
        model().generate(torch.cat([ids, torch.full((len(ids), 9), 5)], dim=1), max_new_tokens=9)
    elif message.startswith("a mesh must be padded"):
        mask[0, :3] = 0
        model().generate(ids, attention_mask=mask)
    elif message.startswith("to generate, pad"):
        mask[0, -9:] = 0
        model().generate(ids, attention_mask=mask)
    elif message.startswith("the cache must be"):
        model().generate(ids, past_key_values=DynamicCache())
    elif message.startswith("cache_implementation='quantized'"):
        model().generate(ids, cache_implementation="quantized")
    elif message.startswith("assisted generation"):
        model().generate(ids[:1], prompt_lookup_num_tokens=3)
    elif message.startswith("'chair' is no token"):
        tokenizer("chair")
    elif message.startswith("with normalise=False"):
        tokenizer.encode_mesh(part, normalise=False)
    elif message.startswith("the part does not lie"):
        pipeline("mesh-generation", model=model(), tokenizer=tokenizer)(str(part))
    elif message.startswith("there is no folder"):
        names.model_folder(folder.parent / "mode")
    elif "is as it is made" in message:
        IFlameTokenizer().save_pretrained(folder)
        arguments = parse_arguments(["--model_name_or_path", str(folder), "--hidden_size", "64"])
        create_model(arguments, Accelerator(cpu=True))
    elif message.startswith("not one of"):
        meshes = ProceduralMeshes([ProceduralMesh("chair", np.zeros((3, 3)), np.array([[0, 1, 2]]))])
        require_usable(MeshRows(meshes, tokenizer, 450), np.array([0]), "--train_file", ["a.parquet"])
    elif "longer than a row" in message:
        mesh_sizes(ProceduralMeshes(make_dataset(3, seed=0, max_faces=48)), 27, "error")
    elif message.startswith("Error while deserializing"):
        broken = part.parent / "broken"
        broken.mkdir()
        for path in folder.iterdir():
            (broken / path.name).write_bytes(path.read_bytes()[:1000] if "safe" in path.name else b"{}")
        shutil.copy(folder / "config.json", broken)
        IFlameForCausalLM.from_pretrained(broken)
    else:
        pytest.fail(f"nothing is known to lead to {message!r}")


MESSAGES = re.findall(r"\*\*`([^`]+)`\*\*", PAGE)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_of_the_troubleshooting_page_is_what_users_read(message, model_folder, part, monkeypatch):
    assert len(MESSAGES) > 12 and set(NOT_PROVOKED) <= set(MESSAGES)
    if message in NOT_PROVOKED:
        pytest.skip(NOT_PROVOKED[message])
    pattern = ".*".join(map(re.escape, re.split(r"\s*…\s*", message)))
    with pytest.raises(Exception, match=pattern) as raised:
        provoke(message, model_folder, part, monkeypatch)
    assert isinstance(raised.value, (ValueError, ImportError, FileNotFoundError, SafetensorError))


def test_the_table_of_versions_begins_with_the_oldest_that_setup_cfg_allows_and_has_no_failure():
    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \|(.+)\|$", PAGE, re.MULTILINE)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    oldest = re.search(r"transformers>=(\S+?),", setup["options"]["install_requires"])[1]
    assert rows[0][0].startswith(oldest) and len(rows) >= 3
    numbers = [tuple(map(int, version.split("."))) for version, _ in rows]
    assert numbers == sorted(set(numbers))
    for _, cells in rows:
        assert [cell.strip() for cell in cells.split("|")][3:] == ["ok"] * len(versions.CHECKS)


def test_versions_are_chosen_from_the_supported_ends_and_the_middle_and_a_failure_is_told():
    released = ["6.0.0", "5.23.0", "5.22.1", "5.20.2", "5.20.10", "5.20.0", "5.18.0", "5.17.1", "5.17.0", "5.16.9"]
    assert versions.choose_versions(released, "5.17", 6) == ["5.17.0", "5.20.10", "5.23.0"]
    assert versions.choose_versions(["5.17.0"], "5.17", 6) == ["5.17.0"]
    results = [{"versions": {"transformers": "5.17.0"}, "checks": dict.fromkeys(versions.CHECKS, "ok")}]
    assert "fails" not in versions.table(results)
    results[0]["checks"]["train"] = "ValueError: no"
    assert "**fails**" in versions.table(results) and "5.17.0, train: ValueError: no" in versions.table(results)
