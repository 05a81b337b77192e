"""What refuses a mesh says why in a word, which programs count by and messages do not change."""

import copy
import json
import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import trimesh
from mesh_fixtures import gltf_square, solids, write_gltf_binary

from iflame_hf import IFlameTokenizer, MeshError
from iflame_hf.mesh_errors_iflame import MESH_ERROR_KINDS
from iflame_hf.mesh_files_iflame import load_mesh
from iflame_hf.mesh_iflame import normalise
from training.prepare.rejection import Rejected, as_rejected

SQUARE = np.array([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
HALVES = np.array([[0, 1, 2], [0, 2, 3]])


def encode(mesh, **options):
    return IFlameTokenizer().encode_mesh(mesh, **options)


FILES = {
    "chair.xyz": ("0 0 0", "unknown_format"),
    "empty.obj": ("", "empty_file"),
    "pointer.obj": ("version https://git-lfs.github.com/spec/v1\n", "lfs_pointer"),
    "text.glb": ("a chair", "wrong_format"),
    "text.off": ("a chair", "wrong_format"),
    "text.ply": ("a chair", "unreadable"),
    "cut.off": ("OFF\n3 1 0\n0 0 0\n", "unreadable"),
    "prose.obj": ("a chair\n", "empty"),
    "nan.obj": ("v nan 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "not_finite"),
    "range.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "bad_indices"),
    "range.obj": ("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "bad_indices"),
    "point.obj": ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "flat"),
    "needle.obj": ("v 0 0 0\nv 1000 0 0\nv 1000 1 0\nf 1 2 3\n", "no_face_left"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_its_name_and_the_kind_of_its_fault(name, tmp_path):
    content, kind = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(MeshError, match=name) as caught:
        encode(tmp_path / name)
    assert caught.value.kind == kind


def test_a_gltf_is_refused_for_what_it_needs(tmp_path):
    square = gltf_square(extensionsRequired=["KHR_draco_mesh_compression"])
    with pytest.raises(MeshError) as caught:
        load_mesh(write_gltf_binary(tmp_path / "a.glb", *square))
    assert caught.value.kind == "compressed_geometry"
    tree, _ = gltf_square()
    tree["buffers"][0]["uri"] = "nowhere.bin"
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    with pytest.raises(MeshError, match="nowhere.bin") as caught:
        load_mesh(tmp_path / "a.gltf")
    assert caught.value.kind == "missing_file"
    (tmp_path / "folder.obj").mkdir()
    with pytest.raises(MeshError) as caught:
        load_mesh(tmp_path / "folder.obj")
    assert caught.value.kind == "not_a_file"


ARRAYS = {
    "bad_shape": [(SQUARE[:, :2], HALVES), (SQUARE, HALVES[:, :2]), (SQUARE, HALVES * 1.0), ([["a"] * 3], HALVES), 7],
    "empty": [(np.zeros((0, 3)), HALVES), (SQUARE, np.zeros((0, 3), int)), trimesh.Scene()],
    "not_finite": [(SQUARE * np.nan, HALVES), (SQUARE * 1.7e308 * [[1], [-1], [1], [1]], HALVES)],
    "bad_indices": [(SQUARE, HALVES + 1), (SQUARE, HALVES - 1)],
    "flat": [(SQUARE * 0, HALVES)],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_bad_arrays_are_refused_with_the_kind_of_their_fault(kind):
    for mesh in ARRAYS[kind]:
        with pytest.raises(MeshError) as caught:
            encode(mesh)
        assert caught.value.kind == kind


def test_a_mesh_of_too_many_faces_is_named_with_their_number(tmp_path):
    trimesh.creation.box().export(tmp_path / "box.obj")
    with pytest.raises(MeshError, match="box.obj: the mesh has 12 faces.*more than 11") as caught:
        encode(tmp_path / "box.obj", max_faces=11)
    assert caught.value.kind == "too_many_faces"


def test_a_mesh_outside_its_box_is_of_that_kind_and_a_box_that_is_none_is_no_fault_of_the_mesh():
    for options in ({"normalise": False}, {"bounds": [[0, 0, 0], [1, 1, 1]]}):
        with pytest.raises(MeshError) as caught:
            encode(solids()["torus"], **options)
        assert caught.value.kind == "out_of_bounds"
    with pytest.raises(ValueError, match="bounds are") as caught:
        normalise(SQUARE, 7)
    assert not isinstance(caught.value, MeshError)


def test_every_kind_that_is_raised_is_documented():
    source = "".join(path.read_text() for path in (Path(__file__).parent.parent / "iflame_hf").glob("*.py"))
    raised = {kind for kind in MESH_ERROR_KINDS if source.count(f'"{kind}"') > 1}
    assert raised == MESH_ERROR_KINDS.keys()
    assert {kind for _, kind in FILES.values()} | ARRAYS.keys() <= raised


@pytest.mark.parametrize("copier", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_a_copy_of_an_error_is_the_same_error(copier):
    same = copier(MeshError("chair.obj: the mesh has no faces", "empty"))
    assert type(same) is MeshError and same.kind == "empty" and str(same) == "chair.obj: the mesh has no faces"


def test_an_error_comes_back_from_another_process_with_its_kind(tmp_path):
    (tmp_path / "empty.obj").touch()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        error = pool.submit(load_mesh, str(tmp_path / "empty.obj")).exception()
    assert type(error) is MeshError and error.kind == "empty_file" and "empty.obj: " in str(error)


# What a rejection is counted by


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MeshError("the word does not matter: NaN or infinite", "bad_indices"), "bad indices"),
        (FileNotFoundError(2, "Datei nicht gefunden", "a.obj"), "missing file"),
        (PermissionError(13, "Keine Berechtigung", "a.obj"), "no permission"),
        (ImportError("no module"), "missing package"),
        (ValueError("has no faces, NaN or infinite, all vertices lie in one point"), "unreadable"),
        (KeyError("a"), "unreadable"),
        (Rejected("duplicate", "it is one"), "duplicate"),
    ],
)
def test_a_rejection_is_counted_by_the_kind_of_its_error_whatever_its_words(error, kind):
    rejected = as_rejected(error)
    assert rejected.kind == kind and rejected.reason


def test_a_mesh_error_goes_from_process_to_process_with_its_kind():
    source = (
        "import pickle, sys\n"
        "from training.prepare.rejection import MeshError\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "error = pickle.loads(pickle.dumps(MeshError('no faces', 'empty')))\n"
        "import iflame_hf\n"
        "assert type(error) is MeshError is iflame_hf.MeshError and error.kind == 'empty'\n"
    )
    subprocess.run([sys.executable, "-c", source], check=True, cwd=Path(__file__).parent.parent)
