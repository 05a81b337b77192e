"""The format of sequences: ids, faces and their arithmetic, on which tokenizer, config and programs agree."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mesh_fixtures import reference_meshes

from iflame_hf import IFlameConfig, IFlameTokenizer
from iflame_hf.format_iflame import DEFAULT_MESH_FORMAT, MESH_FORMATS, MeshFormat, known_format

PAD, BOS, EOS = 129, 130, 131


def random_corners(seed: int, faces: int, resolution: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, resolution + 1, size=(faces, 3, 3))


def test_the_default_is_what_the_published_model_was_trained_on():
    layout = known_format()
    assert layout.name == DEFAULT_MESH_FORMAT == "zxy-faces"
    assert layout.tokens_per_face == 9 and layout.level_strides == (1, 3, 9)
    assert layout.start_face == [BOS] * 9 and layout.end_face == [EOS] * 9 and layout.pad_token_id == PAD
    assert list(MESH_FORMATS) == [layout.name] and MESH_FORMATS[layout.name] == layout


@pytest.mark.parametrize("reversed_winding", [False, True])
def test_ids_are_the_corners_one_after_the_other_each_as_z_x_y(reversed_winding):
    layout = known_format(reversed_winding=reversed_winding)
    corners = random_corners(0, faces=7)
    expected = []
    for first, second, third in corners.tolist():
        for x, y, z in (first, third, second) if reversed_winding else (first, second, third):
            expected += [z, x, y]
    assert layout.to_ids(corners).tolist() == expected
    assert layout.to_ids(corners, start=True).tolist() == [BOS] * 9 + expected
    assert layout.to_ids(corners, start=True, end=True).tolist() == [BOS] * 9 + expected + [EOS] * 9


@pytest.mark.parametrize("name", reference_meshes())
def test_corners_of_the_original_codes_tokens_lie_on_the_grid_points_of_its_mesh(name):
    vertices, _, tokens = reference_meshes()[name]
    grid = IFlameTokenizer(reversed_winding=True).encode_mesh(reference_meshes()[name][:2], add_start=False)
    corners = known_format(reversed_winding=True).to_corners(tokens.ravel())
    assert corners.shape == (len(tokens), 3, 3) and corners.dtype == np.int64
    assert grid[: tokens.size] == tokens.ravel().tolist()
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    normalised = (vertices - (low + high) / 2) / (high - low).max()
    points = {tuple(point) for point in np.rint((normalised + 0.5) * 128).astype(int).tolist()}
    assert {tuple(corner) for corner in corners.reshape(-1, 3).tolist()} <= points


@given(
    seed=st.integers(0, 999), faces=st.integers(0, 20), resolution=st.sampled_from([1, 7, 128]), backward=st.booleans()
)
def test_corners_come_back_from_their_ids_and_a_broken_face_does_not(seed, faces, resolution, backward):
    layout = known_format(coordinate_resolution=resolution, reversed_winding=backward)
    corners = random_corners(seed, faces, resolution)
    ids = layout.to_ids(corners)
    assert layout.is_coordinate(ids).all()
    for broken in range(9):
        assert np.array_equal(layout.to_corners(np.append(ids, [0] * broken)), corners)


@pytest.mark.parametrize("options", [{}, {"coordinate_resolution": 7}, {"up_axis": "z", "reversed_winding": True}])
def test_a_tokenizer_writes_and_reads_what_its_format_says(options):
    tokenizer = IFlameTokenizer(**options)
    layout = tokenizer.format
    assert layout == known_format(**options)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (layout.pad_token_id, layout.bos_token_id, layout.eos_token_id)
    for seed in range(5):
        points = np.random.default_rng(seed).normal(size=(12, 3))
        faces = np.array([[i, i + 1, i + 2] for i in range(10)])
        ids = tokenizer.encode_mesh((points, faces))
        assert ids[:9] == layout.start_face and ids[-9:] == layout.end_face and layout.is_whole(len(ids))
        assert layout.most_faces(len(ids)) == len(tokenizer.decode_mesh(ids).faces) > 0
        assert layout.to_ids(layout.to_corners(np.array(ids[9:-9])), start=True, end=True).tolist() == ids


def test_the_up_axis_of_a_tokenizer_can_change_and_only_to_another():
    tokenizer = IFlameTokenizer()
    tokenizer.up_axis = "z"
    assert tokenizer.format.up_axis == tokenizer.up_axis == "z"
    with pytest.raises(ValueError, match="up_axis must be one of y, z, got 'x'"):
        tokenizer.up_axis = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        tokenizer.format.up_axis = "y"


def test_tokens_are_counted_by_whole_faces():
    layout = known_format()
    for tokens in range(40):
        assert layout.is_whole(tokens) == (tokens in (0, 9, 18, 27, 36))
        assert layout.whole_faces(tokens) == len(range(9, tokens + 1, 9))
    assert layout.num_tokens(5) == 45 and layout.num_tokens(5, start=True) == 54
    assert layout.num_tokens(5, start=True, end=True) == 63
    assert layout.prompt_faces(54) == layout.prompt_faces(62) == layout.most_faces(63) == layout.most_faces(71) == 5
    counts = torch.tensor([0, 9, 10])
    assert layout.is_whole(counts).tolist() == [True, True, False] and layout.whole_faces(counts).tolist() == [0, 1, 1]


def test_ids_are_told_apart_one_by_one_and_in_arrays():
    layout = known_format(coordinate_resolution=5, special_ids=(9, 7, 8))
    kinds = [(bool(layout.is_coordinate(each)), bool(layout.may_precede_mesh(each))) for each in range(-1, 10)]
    assert [index - 1 for index, (is_coordinate, _) in enumerate(kinds) if is_coordinate] == list(range(6))
    assert [index - 1 for index, (_, precedes) in enumerate(kinds) if precedes] == [7, 9]
    ids = np.arange(-1, 10)
    assert list(zip(layout.is_coordinate(ids).tolist(), layout.may_precede_mesh(ids).tolist(), strict=True)) == kinds
    assert layout.end_face == [8] * 9


def test_faces_of_four_corners_are_reversed_after_the_first():
    layout = MeshFormat("quads", "xyz", vertices_per_face=4, reversed_winding=True)
    corners = np.arange(12).reshape(1, 4, 3)
    assert layout.to_ids(corners).tolist() == [0, 1, 2, 9, 10, 11, 6, 7, 8, 3, 4, 5]
    assert layout.level_strides == (1, 3, 12) and np.array_equal(layout.to_corners(layout.to_ids(corners)), corners)


# In configurations and tokenizers


def test_a_configuration_saves_its_format_and_what_follows_from_it_does_not_vary(tmp_path):
    config = IFlameConfig()
    assert config.tokens_per_face == 9 and config.level_strides == (1, 3, 9)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["mesh_format"] == "zxy-faces" and not {"tokens_per_face", "level_strides"} & saved.keys()
    del saved["mesh_format"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert IFlameConfig.from_pretrained(tmp_path).mesh_format == "zxy-faces"


@pytest.mark.parametrize("kind", [IFlameConfig, IFlameTokenizer])
@pytest.mark.parametrize("name", ["edges", None, ["zxy-faces"]])
def test_an_unknown_format_is_refused(kind, name):
    with pytest.raises(ValueError, match="mesh_format must be one of zxy-faces, got "):
        kind(mesh_format=name)


def test_the_format_needs_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        "spec = spec_from_file_location('format_iflame', 'iflame_hf/format_iflame.py')\n"
        "module = sys.modules['format_iflame'] = module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert module.known_format().tokens_per_face == 9\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])
