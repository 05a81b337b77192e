"""Calling a tokenizer as transformers' are called: batches, padding, truncation, text; saving and loading it."""

import copy
import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import trimesh
from mesh_fixtures import random_mesh, solids
from transformers import AutoTokenizer, DataCollatorWithPadding

from iflame_hf.tokenization_iflame import IFlameTokenizer

PAD, BOS, EOS = 129, 130, 131
START, END = [BOS] * 9, [EOS] * 9


@pytest.fixture
def tokenizer() -> IFlameTokenizer:
    return IFlameTokenizer()


# Calling it


def test_a_mesh_a_scene_arrays_and_a_file_give_the_same_encoding(tokenizer, tmp_path):
    box = trimesh.creation.box(extents=(1.0, 2.0, 3.0))
    box.export(tmp_path / "box.ply")
    ids = tokenizer.encode_mesh(box)
    sources = [box, trimesh.Scene(box), (box.vertices, box.faces), tmp_path / "box.ply", str(tmp_path / "box.ply")]
    for source in sources:
        encoded = tokenizer(source)
        assert encoded == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    for batch in (sources, tuple(sources)):
        assert tokenizer(batch)["input_ids"] == [ids] * 5


def test_one_mesh_as_tensors_is_a_batch_of_one(tokenizer):
    box = trimesh.creation.box()
    ids = tokenizer.encode_mesh(box)
    encoded = tokenizer(box, return_tensors="pt")
    assert encoded["input_ids"].tolist() == [ids] and encoded["input_ids"].dtype == torch.int64
    assert encoded["attention_mask"].tolist() == [[1] * len(ids)]
    assert isinstance(tokenizer(box, return_tensors="np")["input_ids"], np.ndarray)


def test_special_tokens_can_be_left_out_or_the_end_alone(tokenizer):
    box = trimesh.creation.box()
    ids = tokenizer.encode_mesh(box)
    assert tokenizer(box, add_special_tokens=False)["input_ids"] == ids[9:-9]
    assert tokenizer(box, add_end=False)["input_ids"] == ids[:-9]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_by_whole_faces(side, tokenizer):
    meshes = list(solids().values())
    rows = [tokenizer.encode_mesh(mesh) for mesh in meshes]
    longest = max(map(len, rows))
    encoded = tokenizer(meshes, padding=True, padding_side=side, return_tensors="pt")
    assert encoded["input_ids"].shape == (4, longest)
    for row, ids, mask in zip(rows, encoded["input_ids"].tolist(), encoded["attention_mask"].tolist(), strict=True):
        padding = longest - len(row)
        assert padding % 9 == 0
        ones, zeros, pads = [1] * len(row), [0] * padding, [PAD] * padding
        assert ids == (pads + row if side == "left" else row + pads)
        assert mask == (zeros + ones if side == "left" else ones + zeros)
    assert tokenizer.padding_side == "left"


def test_padding_goes_to_a_length_or_a_multiple_when_that_is_of_whole_faces(tokenizer):
    box = trimesh.creation.box()
    assert len(tokenizer(box, padding="max_length", max_length=180)["input_ids"]) == 180
    assert len(tokenizer(box, padding=True, pad_to_multiple_of=72)["input_ids"]) == 144
    with pytest.raises(ValueError, match="max_length must be a multiple of 9, got 200"):
        tokenizer(box, padding="max_length", max_length=200)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be a multiple of 9, got 64"):
        tokenizer([box], padding=True, pad_to_multiple_of=64)


@pytest.mark.parametrize("max_length", [9, 17, 18, 53, 54, 125, 126, 127])
def test_truncation_keeps_whole_faces_from_the_front(max_length, tokenizer):
    box = trimesh.creation.box()
    ids = tokenizer.encode_mesh(box)
    truncated = tokenizer(box, truncation=True, max_length=max_length)
    assert truncated["input_ids"] == ids[: max_length // 9 * 9]
    assert len(truncated["attention_mask"]) == len(truncated["input_ids"])


def test_truncation_follows_the_tokenizers_own_length_and_not_less_than_a_face():
    box = trimesh.creation.box()
    short = IFlameTokenizer(model_max_length=45)
    assert len(short(box, truncation=True)["input_ids"]) == 45
    assert len(short(box)["input_ids"]) == 126
    with pytest.raises(ValueError, match="must hold a face"):
        short(box, truncation=True, max_length=8)


def test_text_goes_the_text_way(tokenizer):
    assert tokenizer("<bos> 5 7")["input_ids"] == [BOS, 5, 7]
    assert tokenizer(["<bos><eos>", "128"])["input_ids"] == [[BOS, EOS], [128]]
    assert tokenizer(text="1 2", return_tensors="pt")["input_ids"].tolist() == [[1, 2]]
    assert tokenizer.encode("0 128 <pad>") == [0, 128, PAD]


def test_text_and_ids_are_each_others_inverse(tokenizer):
    ids = [PAD, BOS, 0, 12, 128, EOS]
    assert tokenizer.decode(ids) == "<pad> <bos> 0 12 128 <eos>"
    assert tokenizer.decode(torch.tensor(ids), skip_special_tokens=True) == "0 12 128"
    assert tokenizer(tokenizer.decode(ids))["input_ids"] == ids
    assert tokenizer.batch_decode([ids[:2], ids[2:4]]) == ["<pad> <bos>", "0 12"]
    everything = list(range(132))
    assert tokenizer.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(everything)) == everything


@pytest.mark.parametrize("text", ["a chair", "129", "-1", "chair.xyz", "007"])
def test_a_word_that_is_no_token_is_refused(text, tokenizer):
    with pytest.raises(ValueError, match="is no token"):
        tokenizer(text)


def test_a_mixed_list_and_things_that_are_neither_are_refused(tokenizer):
    box = trimesh.creation.box()
    with pytest.raises(ValueError, match="meshes alone or text alone"):
        tokenizer([box, "<bos> 5"])
    with pytest.raises(ValueError, match="neither a mesh nor text: ndarray"):
        tokenizer([np.asarray(box.vertices), np.asarray(box.faces)])
    with pytest.raises(ValueError, match="neither a mesh nor text: dict"):
        tokenizer({"vertices": box.vertices})
    with pytest.raises(TypeError, match="stride"):
        tokenizer(box, stride=3)


def test_a_bad_mesh_in_a_list_is_named_by_its_place_and_file(tokenizer, tmp_path):
    box = trimesh.creation.box()
    with pytest.raises(ValueError, match="mesh 1 of the list: a coordinate is NaN"):
        tokenizer([box, (box.vertices * np.nan, box.faces)])
    (tmp_path / "chair.glb").write_text("a chair")
    with pytest.raises(ValueError, match="mesh 1 of the list: .*chair.glb: not a binary glTF file"):
        tokenizer([box, tmp_path / "chair.glb"])
    with pytest.raises(FileNotFoundError, match="missing.obj"):
        tokenizer("missing.obj")


# A tokenizer's life


@pytest.mark.parametrize("resolution", [1, 64, 128, 1024])
def test_special_ids_follow_the_resolution(resolution):
    tokenizer = IFlameTokenizer(resolution)
    specials = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert specials == [resolution + 1, resolution + 2, resolution + 3]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == resolution + 4
    assert sorted(tokenizer.all_special_ids) == specials
    vertices, faces = tokenizer.decode_arrays(tokenizer.encode_mesh(trimesh.creation.box()))
    assert faces.shape == (12, 3) and np.abs(vertices).max() == 0.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"coordinate_resolution": 0}, "coordinate_resolution"),
        ({"coordinate_resolution": 12.5}, "coordinate_resolution"),
        ({"coordinate_resolution": 2**21}, "coordinate_resolution"),
        ({"up_axis": "x"}, "up_axis must be one of y, z"),
        ({"pad_token": "<eos>"}, "pad_token of an IFlameTokenizer is always <pad>"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        IFlameTokenizer(**arguments)


def test_saving_and_loading_keeps_every_setting(tmp_path):
    saved = IFlameTokenizer(64, up_axis="z", reversed_winding=True, padding_side="right", model_max_length=900)
    saved.save_pretrained(tmp_path)
    loaded = IFlameTokenizer.from_pretrained(tmp_path)
    for name in ("coordinate_resolution", "up_axis", "reversed_winding", "padding_side", "model_max_length"):
        assert getattr(loaded, name) == getattr(saved, name)
    assert loaded.get_vocab() == saved.get_vocab()
    mesh = solids()["torus"]
    assert loaded.encode_mesh(mesh) == saved.encode_mesh(mesh)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["auto_map"]["AutoTokenizer"][0] == "tokenization_iflame.IFlameTokenizer"


def test_a_resolution_changed_while_loading_changes_all_ids_with_it(tmp_path):
    IFlameTokenizer().save_pretrained(tmp_path)
    loaded, fresh = IFlameTokenizer.from_pretrained(tmp_path, coordinate_resolution=64), IFlameTokenizer(64)
    assert loaded.get_vocab() == fresh.get_vocab() and len(loaded) == 68
    assert loaded.added_tokens_decoder.keys() == {65, 66, 67}
    assert loaded.encode_mesh(trimesh.creation.box()) == fresh.encode_mesh(trimesh.creation.box())
    assert loaded.decode([65, 66, 67]) == "<pad> <bos> <eos>"


def test_added_tokens_are_kept_but_not_at_another_resolution(tmp_path):
    tokenizer = IFlameTokenizer()
    tokenizer.add_tokens(["<chair>"])
    tokenizer.save_pretrained(tmp_path)
    loaded = IFlameTokenizer.from_pretrained(tmp_path)
    assert (
        loaded("<chair> 5")["input_ids"] == [132, 5] and loaded.decode([132, 5]) == "<chair> 5" and len(loaded) == 133
    )
    with pytest.raises(ValueError, match="coordinate_resolution cannot change: .*<chair>"):
        IFlameTokenizer.from_pretrained(tmp_path, coordinate_resolution=64)


def test_the_resolution_of_a_tokenizer_cannot_be_changed_under_its_vocabulary(tokenizer):
    with pytest.raises(AttributeError):
        tokenizer.coordinate_resolution = 64


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_copy_is_the_same_tokenizer(copier):
    tokenizer = IFlameTokenizer(64, up_axis="z", reversed_winding=True)
    same = copier(tokenizer)
    mesh = solids()["annulus"]
    assert same.encode_mesh(mesh) == tokenizer.encode_mesh(mesh) and same.get_vocab() == tokenizer.get_vocab()
    assert same("<bos> 5")["input_ids"] == [66, 5]


def test_transformers_padding_collator_pads_its_encodings(tokenizer):
    meshes = [solids()["box"], solids()["torus"]]
    batch = DataCollatorWithPadding(tokenizer)([tokenizer(mesh) for mesh in meshes])
    expected = tokenizer(meshes, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])


CLEAN_PROCESS = """
import sys
sys.modules["iflame_hf"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
assert type(tokenizer).__module__.startswith("transformers_modules."), type(tokenizer)
square = ([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], [[0, 1, 2], [0, 2, 3]])
ids = tokenizer(square, return_tensors="np")["input_ids"][0]
vertices, faces = tokenizer.decode_arrays(ids)
assert faces.shape == (2, 3) and vertices.shape == (4, 3)
if sys.argv[2] == "with trimesh":
    assert tokenizer.decode_mesh(ids).area == 1.0
    tokenizer.save_pretrained(sys.argv[3])
else:
    assert "trimesh" not in sys.modules
    sys.modules["trimesh"] = None
    for work in (lambda: tokenizer.decode_mesh(ids), lambda: tokenizer.encode_mesh(sys.argv[3])):
        try:
            work()
        except ImportError as error:
            assert "pip install trimesh" in str(error)
        else:
            raise AssertionError("no ImportError")
print("all is well")
"""


@pytest.mark.parametrize("case", ["with trimesh", "without trimesh"])
def test_autotokenizer_loads_it_where_the_package_is_not_installed(case, tmp_path):
    folder, again = tmp_path / "model", tmp_path / "again"
    IFlameTokenizer(up_axis="z").save_pretrained(folder)
    last = again
    if case == "without trimesh":
        last = tmp_path / "box.obj"
        trimesh.creation.box().export(last)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), case, str(last)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "all is well" in result.stdout, result.stderr
    if case == "with trimesh":
        assert {"tokenization_iflame.py", "mesh_iflame.py", "tokenizer_config.json"} <= set(os.listdir(again))


def test_the_auto_class_returns_it_in_this_process_too(tmp_path):
    IFlameTokenizer(up_axis="z").save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "IFlameTokenizer" and loaded.up_axis == "z"


def test_a_data_loader_gets_its_meshes_fast_enough(tokenizer):
    """From arrays to ids at 200 faces; on a quiet core it does several thousand a second."""
    meshes = [random_mesh(seed) for seed in range(50)]
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for mesh in meshes:
            ids = tokenizer.encode_mesh(mesh)
        best = min(best, (time.perf_counter() - begin) / len(meshes))
    assert len(ids) >= 9 * 190
    assert 1 / best >= 1000
