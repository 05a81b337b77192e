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


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
TRIANGLE = "v 0 0 0\nv 1 0 0\nv 1 1 0\n"
# What is in a file, the kind of its fault, and what the message says.
FILES = {
    "chair.xyz": ("0 0 0\n", "unknown_format", "unknown mesh format '.xyz'"),
    "chair": ("0 0 0\n", "unknown_format", "unknown mesh format ''"),
    "empty.obj": ("", "empty_file", "the file is empty"),
    "empty.glb": ("", "empty_file", "the file is empty"),
    "pointer.obj": (LFS, "lfs_pointer", "Git LFS pointer"),
    "pointer.glb": (LFS, "lfs_pointer", "Git LFS pointer"),
    "text.glb": ("This is a note about a chair.", "wrong_format", "does not begin with glTF"),
    "text.off": ("no header", "wrong_format", "does not begin with OFF"),
    "text.gltf": ("no json", "unreadable", "cannot be read as gltf"),
    "text.stl": ("no triangles", "empty", "no vertices"),
    "text.ply": ("no header", "unreadable", "cannot be read as ply"),
    "text.dae": ("no xml", "unreadable", "cannot be read as dae"),
    "cut.glb": ("glTF\2\0\0\0", "unreadable", "cannot be read as glb"),
    "cut.off": ("OFF\n3 1 0\n0 0 0\n", "unreadable", "ends early"),
    "cut.ply": (
        "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 2\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n",
        "unreadable",
        "cut off: 4 lines of data where its header promises 5",
    ),
    "letters.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 a 0\n3 0 1 2\n", "unreadable", "cannot be read as off"),
    "prose.obj": ("a chair\n", "empty", "no vertices"),
    "points.obj": (TRIANGLE, "empty", "no "),
    "nan.obj": (TRIANGLE + "v nan 0 0\nf 1 2 4\n", "not_finite", "NaN or infinite"),
    "range.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "bad_indices", "from 0 to 3"),
    "range.obj": (TRIANGLE + "f 1 2 9\n", "bad_indices", "cannot be read as obj"),
    "point.obj": ("v 1 1 1\nv 1 1 1\nv 1 1 1\nf 1 2 3\n", "flat", "one point"),
    "needle.obj": ("v 0 0 0\nv 1000 0 0\nv 1000 1 0\nf 1 2 3\n", "no_face_left", "no face is left"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_with_its_name_the_kind_of_its_fault_and_a_reason(name, tmp_path):
    content, kind, reason = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(MeshError, match=reason) as caught:
        encode(tmp_path / name)
    assert caught.value.kind == kind
    assert str(caught.value).startswith(f"{tmp_path / name}: ") and str(caught.value).count(name) == 1


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


NOTHING = np.zeros((0, 3))
# What is no mesh, the kind of its fault, and what the message says.
ARRAYS = {
    "NaN": ((SQUARE * [np.nan, 1, 1], HALVES), "not_finite", "NaN or infinite"),
    "infinite": ((SQUARE + [np.inf, 0, 0], HALVES), "not_finite", "NaN or infinite"),
    "endless": ((SQUARE * 1.7e308 * [[1], [-1], [1], [1]], HALVES), "not_finite", "extent"),
    "no vertices": ((NOTHING, HALVES), "empty", "no vertices"),
    "no faces": ((SQUARE, NOTHING.astype(int)), "empty", "no faces"),
    "an empty scene": (trimesh.Scene(), "empty", "no vertices"),
    "index too large": ((SQUARE, HALVES + 1), "bad_indices", "from 1 to 4"),
    "negative index": ((SQUARE, HALVES - 1), "bad_indices", "from -1 to 2"),
    "one point": ((SQUARE * 0, HALVES), "flat", "one point"),
    "flat vertices": ((SQUARE[:, :2], HALVES), "bad_shape", r"shape \(V, 3\)"),
    "faces of two": ((SQUARE, HALVES[:, :2]), "bad_shape", r"shape \(F, 3\)"),
    "faces of floats": ((SQUARE, HALVES * 1.0), "bad_shape", "whole numbers"),
    "ragged faces": ((SQUARE, [[0, 1, 2], [0, 1]]), "bad_shape", "array of numbers"),
    "words": (([["a", "b", "c"]], HALVES), "bad_shape", "array of numbers"),
    "points": (trimesh.PointCloud(SQUARE), "bad_shape", "not PointCloud"),
    "a list": ([SQUARE, HALVES], "bad_shape", "not list"),
    "a number": (7, "bad_shape", "not int"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_what_is_no_mesh_is_refused_with_the_kind_of_its_fault_and_a_reason_and_names_no_file(name):
    mesh, kind, reason = ARRAYS[name]
    with pytest.raises(MeshError, match=reason) as caught:
        encode(mesh)
    assert caught.value.kind == kind and "None" not in str(caught.value)


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
    tried = {kind for _, kind, _ in (*FILES.values(), *ARRAYS.values())}
    assert tried <= raised and len(tried) > 10


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
