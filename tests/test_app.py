"""What the page does without a browser, and what it needs on a Space."""

import configparser
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml
from app_fixtures import APP, CONDITIONED, box, sampling, save_endless_model
from packaging.requirements import Requirement

from training.publish.verify import lay_out_cache, run_in_clean_process

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_endless_model(tmp_path_factory.mktemp("model") / "meshes")


@pytest.fixture(scope="module")
def generator(folder):
    return sampling.load(str(folder))


def corners(mesh):
    return mesh.vertices[mesh.faces]


# Without the page


def test_the_meshes_that_grow_are_those_that_the_pipeline_makes_with_that_seed(generator):
    *_, grown = sampling.grow(generator, number=3, max_faces=6, temperature=0.9, top_p=0.95, seed=5)
    made = generator(num_meshes=3, max_faces=6, temperature=0.9, top_p=0.95, seed=5)
    assert [mesh.seed for mesh in grown] == [mesh.metadata["seed"] for mesh in made] == [5, 6, 7]
    for mesh, expected in zip(grown, made, strict=True):
        assert len(mesh.faces) > 3
        np.testing.assert_allclose(corners(mesh), expected.triangles)


def test_a_mesh_comes_again_alone_from_its_own_seed(generator):
    *_, meshes = sampling.grow(generator, number=3, max_faces=6, seed=5)
    *_, (again,) = sampling.grow(generator, max_faces=6, seed=meshes[2].seed)
    assert again.ids.tolist() == meshes[2].ids.tolist() != meshes[1].ids.tolist()


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory):
    return sampling.load(str(save_endless_model(tmp_path_factory.mktemp("model") / "asked", **CONDITIONED)))


def test_the_meshes_that_grow_are_what_was_asked_for(conditioned, tmp_path):
    prompt = sampling.read_part(conditioned, box(tmp_path, ".obj"), share=0.25)
    for given, part in ((None, None), (prompt, prompt.ids)):
        asked = sampling.asked_for(conditioned, "table", 6, 2.0, max_faces=6, given=prompt.faces)
        *_, grown = sampling.grow(conditioned, number=2, max_faces=6, seed=5, prompt=given, asked=asked)
        start = torch.tensor([part or conditioned.tokenizer.format.start_face])
        expected = conditioned.model.generate(
            start.repeat(2, 1),
            **{"category": "table", "num_faces": 6, "guidance_scale": 2.0},
            **{"do_sample": True, "top_k": 0, "max_faces": 6, "seed": 5},
        )
        assert [mesh.ids.tolist() for mesh in grown] == expected.tolist()
        *_, anything = sampling.grow(conditioned, number=2, max_faces=6, seed=5, prompt=given)
        assert [mesh.ids.tolist() for mesh in anything] != expected.tolist()


@pytest.mark.parametrize(
    ("num_faces", "words"),
    [
        (3, "this model makes meshes of 4 to 64 faces, not of 3"),
        (65, "4 to 64 faces, not of 65"),
        (40, "40 faces are asked for, and a mesh may have 30: allow more"),
        (10, "10 faces are asked for, and the part has 12: keep fewer of it"),
    ],
)
def test_a_number_of_faces_that_cannot_be_is_refused(conditioned, num_faces, words):
    with pytest.raises(ValueError, match=words):
        sampling.asked_for(conditioned, "", num_faces, 1.0, max_faces=30, given=12)


def test_of_a_model_without_conditions_nothing_is_asked_for(generator, conditioned):
    assert sampling.known(generator) == sampling.Known()
    assert sampling.known(conditioned) == sampling.Known(("chair", "lamp", "table"), (4, 64))
    for each in (generator, conditioned):
        assert sampling.asked_for(each, "", 0, 3.0, max_faces=9) == {}
        assert sampling.asked_for(each, "", None, 3.0, max_faces=9) == {}


def test_faces_that_were_shown_stay_and_new_ones_come_after_them(generator):
    looks = list(sampling.grow(generator, number=2, max_faces=40, interval=0.01))
    sizes = [[len(mesh.faces) for mesh in look] for look in looks]
    assert len({tuple(size) for size in sizes}) > 3
    for before, after in zip(looks[:-1], looks[1:], strict=True):
        for old, new in zip(before, after, strict=True):
            np.testing.assert_array_equal(corners(old), corners(new)[: len(old.faces)])


def test_a_mesh_has_ended_when_the_model_has_closed_it(generator):
    eos = generator.tokenizer.eos_token_id
    handle = generator.model.lm_head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor([eos]), 1e4))
    try:
        *_, (mesh,) = sampling.grow(generator, max_faces=9)
    finally:
        handle.remove()
    assert mesh.ended and len(mesh.faces) == 0
    *_, (mesh,) = sampling.grow(generator, max_faces=2)
    assert not mesh.ended


def generating():
    return [thread for thread in threading.enumerate() if thread.name == "grow"]


def test_stop_ends_the_generation_and_keeps_what_there_is(generator):
    stop, looks = threading.Event(), []
    for look in sampling.grow(generator, max_faces=2000, stop=stop, interval=0.01):
        looks.append(look)
        if len(look[0].faces) > 1:
            stop.set()
    assert 1 < len(looks[-1][0].faces) < 200
    assert not generating()


def test_the_generation_ends_when_nobody_watches_any_longer(generator):
    looks = sampling.grow(generator, max_faces=2000, interval=0.01)
    next(looks)
    assert len(generating()) == 1
    looks.close()
    assert not generating()


def test_a_program_ends_in_peace_while_a_mesh_grows(folder, tmp_path):
    source = f"""
sys.path.insert(0, {str(APP)!r})
import sampling
looks = sampling.grow(sampling.load({str(folder)!r}), max_faces=2000, interval=0.01)
while not len(next(looks)[0].faces):
    pass
sys.modules["kept"] = looks  # nobody closes it
print("leaving")
"""
    process = run_in_clean_process(source, tmp_path)
    assert (process.returncode, process.stdout) == (0, "leaving\n"), process.stderr


def test_what_generate_raises_reaches_the_page(generator):
    with pytest.raises(ValueError, match="temperature"):
        list(sampling.grow(generator, temperature=-1.0))


def test_a_part_within_the_box_keeps_its_place_and_any_other_fills_it(generator, tmp_path):
    kept = sampling.read_part(generator, box(tmp_path, ".obj"))
    assert kept.faces == 12 and kept.bounds is None
    vertices, _ = generator.tokenizer.decode_arrays(kept.ids)
    np.testing.assert_array_equal(
        [vertices.min(axis=0), vertices.max(axis=0)], [[-0.25, -0.5, -0.25], [0.25, 0, 0.25]]
    )
    fitted = sampling.read_part(generator, box(tmp_path, ".obj", scale=40))
    vertices, _ = generator.tokenizer.decode_arrays(fitted.ids)
    np.testing.assert_array_equal([vertices.min(axis=0), vertices.max(axis=0)], [[-0.5] * 3, [0.5] * 3])


def test_of_a_part_the_lowest_faces_can_be_kept(generator, tmp_path):
    path = box(tmp_path, ".glb")
    whole, half = (sampling.read_part(generator, path, share=share) for share in (1.0, 0.5))
    assert half.faces == 6 and half.ids == whole.ids[: len(half.ids)]
    assert sampling.read_part(generator, path, share=0.01).faces == 1


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".stl"])
def test_a_completed_part_comes_back_where_it_was(generator, tmp_path, suffix):
    path = box(tmp_path, suffix, scale=30, shift=(100, 20, -7))
    prompt = sampling.read_part(generator, path, room_above=1.0)
    *_, (mesh,) = sampling.grow(generator, max_faces=20, prompt=prompt)
    assert 12 < len(mesh.faces) <= 20
    written = sampling.write(generator, mesh, prompt, tmp_path, "completed")
    assert set(written) == {"glb", "obj"}
    given = trimesh.load(path, force="mesh").vertices
    if suffix == ".stl":  # where z is up; in glb and obj it is y
        given = np.stack([given[:, 0], given[:, 2], -given[:, 1]], axis=1)
    for file in written.values():
        made = trimesh.load(file, force="mesh").vertices
        distances = np.linalg.norm(given[:, None] - made[None], axis=-1).min(axis=1)
        assert distances.max() < 30 / 128, "the corners given, up to the rounding of coordinates"


BAD_UPLOADS = {
    "broken.glb": (b"glTF but no more", "cannot be read as glb"),
    "notes.obj": (b"shopping list", "no vertices|cannot be read"),
    "empty.obj": (b"", "is empty"),
    "nan.obj": (b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
    "picture.png": (b"\x89PNG", "unknown mesh format"),
}


@pytest.mark.parametrize("name", BAD_UPLOADS)
def test_a_bad_upload_is_refused_by_its_name_without_the_servers_folders(generator, tmp_path, name):
    content, reason = BAD_UPLOADS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        sampling.read_part(generator, tmp_path / name)
    assert name in str(error.value) and str(tmp_path) not in str(error.value)


def test_a_part_that_leaves_no_room_is_refused(generator, tmp_path):
    prompt = sampling.read_part(generator, box(tmp_path, ".obj"))
    with pytest.raises(ValueError, match="12 faces already.*may have 12"):
        list(sampling.grow(generator, max_faces=12, prompt=prompt))


def test_all_meshes_are_in_the_zip_but_those_without_faces(generator, tmp_path):
    *_, meshes = sampling.grow(generator, number=2, max_faces=5)
    none = sampling.Growing(meshes[0].ids[:9], np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64), True)
    archive = sampling.write_all(generator, [meshes[0], none, meshes[1]], None, tmp_path, "all")
    names = ["all-1.glb", "all-1.obj", "all-3.glb", "all-3.obj"]
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir()) == names
    for name in names:
        assert len(trimesh.load(tmp_path / "unpacked" / name, force="mesh").faces) > 0
    assert sampling.write_all(generator, [none], None, tmp_path, "none") is None


def test_where_there_is_no_model_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="there is no folder outputs/nothing"):
        sampling.load("outputs/nothing")
    with pytest.raises(ValueError, match="no config.json"):
        sampling.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="does not know the task mesh-generation|cannot be loaded"):
        sampling.load(str(tmp_path))
    with pytest.raises(ValueError, match="someone/nothing cannot be loaded"):
        sampling.load("someone/nothing")


# On a Space


def test_the_requirements_of_a_space_are_those_of_the_package():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    text = parser["options"]["install_requires"] + parser["options.extras_require"]["app"]
    declared = {line for line in text.splitlines() if line}
    wanted = set((APP / "requirements.txt").read_text().splitlines())
    assert {Requirement(line).name for line in wanted} >= {"gradio", "torch", "transformers", "trimesh"}
    assert wanted <= declared


def test_the_card_of_a_space_names_a_file_that_is_there_and_the_tested_gradio():
    _, front, text = (APP / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and (APP / card["app_file"]).is_file() and "IFLAME_MODEL" in text
    assert f"gradio=={card['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_without_the_page_a_model_of_the_hub_and_its_own_files_are_enough(folder, tmp_path):
    home, space = tmp_path / "home", tmp_path / "space"
    lay_out_cache(folder, home, "someone/meshes")
    shutil.copytree(APP, space)
    source = f"""
sys.path.insert(0, {str(space)!r})
from pathlib import Path
import sampling
generator = sampling.load("someone/meshes")
prompt = sampling.read_part(generator, {str(box(tmp_path, ".obj"))!r})
*_, meshes = sampling.grow(generator, number=2, max_faces=16, prompt=prompt)
files = [sampling.write(generator, mesh, prompt, Path(), f"mesh-{{n}}") for n, mesh in enumerate(meshes)]
assert all(12 < len(mesh.faces) for mesh in meshes) and all(Path(f["glb"]).stat().st_size for f in files)
print("made", len(files), sys.modules["iflame_hf"])
"""
    process = run_in_clean_process(source, home)
    assert process.returncode == 0, process.stderr
    assert "made 2 None" in process.stdout
