"""pipeline("mesh-generation"): here, and where nothing of this project is installed."""

import importlib
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
import trimesh
from mesh_fixtures import solids, write_dae
from small_models import BOS, EOS, PAD, small_model
from transformers import pipeline
from transformers.dynamic_module_utils import get_relative_imports
from transformers.pipelines import PIPELINE_REGISTRY

import iflame_hf
from iflame_hf import (
    IFlameConfig,
    IFlameForCausalLM,
    IFlameTokenizer,
    MeshGenerationPipeline,
    export_mesh,
    many_iflame,
)
from iflame_hf.mesh_errors_iflame import MeshError, OptionError, errors_name
from iflame_hf.mesh_iflame import denormalise, turn
from training.publish.verify import HIDDEN_PACKAGES, lay_out_cache, run_in_clean_process

IMPLEMENTATION = {"impl": "pipeline_iflame.MeshGenerationPipeline", "pt": ["AutoModelForCausalLM"]}


def mesh_model():
    """It never says pad or bos, and ends now and then, as a trained one."""
    model = small_model()
    with torch.no_grad():
        model.lm_head.bias[[PAD, BOS]] -= 20
        model.lm_head.bias[EOS] += 1
    return model


def generator_of(up_axis="y", **options):
    return pipeline(
        "mesh-generation", model=mesh_model(), tokenizer=IFlameTokenizer(up_axis=up_axis), device="cpu", **options
    )


@pytest.fixture(scope="module")
def generator():
    return generator_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a user gets who saves model and tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "my-model.v1"
    mesh_model().save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


def triangles(meshes):
    return [np.asarray(mesh.vertices)[np.asarray(mesh.faces)].tolist() for mesh in meshes]


def part_of(mesh, faces, tokenizer):
    """The first faces of a mesh, in its own units, and its box."""
    part = tokenizer.decode_mesh(tokenizer.encode_mesh(mesh)[: 9 * (1 + faces)])
    return trimesh.Trimesh(denormalise(part.vertices, mesh.bounds), part.faces, process=False)


# Generating


def test_it_gives_as_many_meshes_as_asked_for_within_the_faces_asked_for(generator):
    assert isinstance(generator, MeshGenerationPipeline)
    meshes = generator(num_meshes=5, max_faces=6, seed=0)
    assert len(meshes) == 5 and all(isinstance(mesh, trimesh.Trimesh) for mesh in meshes)
    assert 0 < max(len(mesh.faces) for mesh in meshes) <= 6
    assert {mesh.metadata["ended"] for mesh in generator(num_meshes=24, max_faces=40, seed=0)} == {True, False}
    assert len(generator(max_faces=2)) == 1


def test_a_seed_gives_the_same_meshes_and_leaves_the_random_numbers_of_others_alone(generator):
    first = triangles(generator(num_meshes=3, max_faces=5, seed=7))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert triangles(generator(num_meshes=3, max_faces=5, seed=7)) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert triangles(generator(num_meshes=3, max_faces=5, seed=8)) != first
    assert triangles(generator(num_meshes=3, max_faces=5)) != triangles(generator(num_meshes=3, max_faces=5))


def test_the_meshes_are_those_of_generate(generator):
    options = {"do_sample": True, "top_k": 0, "temperature": 0.8, "top_p": 0.9, "max_faces": 5}
    ids = generator.model.generate(torch.full((4, 9), BOS), seed=3, **options)
    expected = triangles(generator.tokenizer.batch_decode_mesh(ids))
    meshes = generator(num_meshes=4, max_faces=5, seed=3, temperature=0.8, top_p=0.9)
    assert triangles(meshes) == expected
    assert [mesh.metadata["ended"] for mesh in meshes] == [int((row == EOS).int().argmax()) < 9 * 6 for row in ids]


def test_greedy_meshes_need_no_seed(generator):
    first, second = generator(num_meshes=2, max_faces=4, do_sample=False)
    assert triangles([first]) == triangles([second])


def test_it_samples_from_all_tokens_unless_the_model_says_otherwise(generator):
    assert generator._generate_options([{"input_ids": [BOS] * 9}])["top_k"] == 0
    other = generator_of()
    other.model.generation_config.top_k = 7
    other.model.generation_config.do_sample = False
    options = other._generate_options([{"input_ids": [BOS] * 9}], max_faces=3)
    assert options == {"do_sample": False, "max_faces": 3, "max_new_tokens": 36}
    assert other._generate_options([{"input_ids": [BOS] * 9}], do_sample=True)["top_k"] == 7


def test_large_numbers_are_made_some_at_a_time(generator, monkeypatch):
    rows = []
    real = many_iflame.take_engine
    monkeypatch.setattr(many_iflame, "take_engine", lambda *a: rows.append(a[1]) or real(*a))
    meshes = generator(num_meshes=7, max_faces=3, batch_size=3, seed=2)
    assert len(meshes) == 7 and rows == [3]
    assert [mesh.metadata["seed"] for mesh in meshes] == list(range(2, 9))
    assert triangles(meshes[3:6]) == triangles(generator(num_meshes=3, max_faces=3, seed=5))
    assert rows == [3, 3]
    generator(num_meshes=7, max_faces=1)
    generator(num_meshes=9, max_faces=1)
    assert rows[2:] == [7, 8]


def test_parameters_of_the_pipeline_are_defaults_of_its_calls():
    generator = generator_of(num_meshes=3, max_faces=2, batch_size=2, seed=5)
    assert triangles(generator()) == triangles(generator())
    assert len(generator()) == 3 and len(generator(num_meshes=1)) == 1
    assert max(len(mesh.faces) for mesh in generator()) <= 2 < max(len(m.faces) for m in generator(max_faces=9))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_meshes": 0}, "num_meshes must be a whole number from 1 on, got 0"),
        ({"max_faces": 2.5}, "max_faces must be a whole number"),
        ({"batch_size": -1}, "batch_size must be a whole number"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1"),
        ({"top_k": -1}, "top_k must not be negative"),
        ({"max_new_tokens": 90}, "faces by max_faces"),
        ({"num_return_sequences": 2}, "counted by num_meshes"),
        ({"temprature": 1.0}, "temprature"),
        ({"room_above": 1.0}, "there is none"),
        ({"prompt": "a chair"}, "a prompt is the path of a mesh file"),
        ({"prompt": trimesh.creation.box(), "prompt_up_axis": "x"}, "prompt_up_axis must be one of y, z"),
        ({"prompt": trimesh.creation.box(), "room_above": -1}, "room_above must not be negative"),
        ({"prompt": trimesh.creation.box(), "room_above": 1, "bounds": [[0] * 3, [1] * 3]}, "either room_above or"),
        ({"prompt": trimesh.creation.box(), "max_faces": 12}, "has 12 faces already: max_faces must be more"),
        ({"prompt": trimesh.creation.box((2, 2, 2))}, "room_above or bounds"),
        ({"keep": 0.5}, "there is none"),
        (
            {"prompt": trimesh.creation.box(), "keep": 1.0},
            "keep must be a share between 0.0 and 1.0, or a whole number",
        ),
        ({"prompt": trimesh.creation.box(), "keep": 0}, "of faces from 1 on, got 0"),
        ({"prompt": trimesh.creation.box(), "keep": True}, "got True"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_parameters_that_cannot_be_are_refused_in_plain_words(generator, options, reason):
    with pytest.raises(ValueError, match=reason):
        generator(**options)


# Completing


@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_part_is_completed_where_it_stands_and_in_its_units(up_axis):
    generator = generator_of(up_axis)
    tokenizer = generator.tokenizer
    whole = solids()["torus"]
    part = part_of(whole, 20, tokenizer)
    for options in ({"bounds": whole.bounds}, {"room_above": 3.0}):
        meshes = generator(part, num_meshes=3, max_faces=30, seed=0, **options)
        for mesh in meshes:
            kept = np.asarray(mesh.vertices)[mesh.faces[:20]]
            step = np.ptp(whole.bounds, axis=0).max() * 4 / 128
            assert np.abs(kept - np.asarray(part.vertices)[part.faces]).max() < step
        assert max(len(mesh.faces) for mesh in meshes) > 20
    exact = generator(part, max_faces=30, seed=0, bounds=whole.bounds)[0]
    assert np.allclose(np.asarray(exact.vertices)[exact.faces[:20]], np.asarray(part.vertices)[part.faces], atol=1e-9)


def test_room_above_is_above(generator):
    """A part normalised by itself touches the roof; with room as much as its height it fills the lower half."""
    box = trimesh.creation.box(extents=(1, 4, 2))
    ids = generator.preprocess(box, room_above=1.0)["input_ids"]
    heights = np.array(ids[9:]).reshape(-1, 3)[:, 1:]  # z, x, y: y is last
    assert heights[:, 1].min() == 0 and heights[:, 1].max() == 64
    with pytest.raises(ValueError, match="bounds"):
        generator.preprocess(box)


def test_a_part_of_a_generated_mesh_keeps_its_place(generator):
    tokenizer = generator.tokenizer
    ids = tokenizer.encode_mesh(solids()["torus"])[: 9 * 21]
    assert generator.preprocess(tokenizer.decode_mesh(ids)) == {"input_ids": ids, "bounds": None}


@pytest.mark.parametrize(("keep", "faces"), [(0.25, 120), (40, 40), (10_000, 480), (1e-9, 1)])
def test_of_a_prompt_only_the_lowest_faces_can_be_kept(generator, keep, faces):
    torus = solids()["torus"]
    assert len(torus.faces) == 480
    every = generator.tokenizer.encode_mesh(torus, add_end=False)
    row = generator.preprocess(torus, keep=keep)
    assert row["input_ids"] == every[: 9 * (1 + faces)]
    assert np.allclose(row["bounds"], torus.bounds), "of the whole mesh, in its units"
    generated = generator.tokenizer.decode_mesh(every)
    assert generator.preprocess(generated, keep=keep)["bounds"] is None, "it keeps its place"
    raised = generator.preprocess(torus, keep=keep, room_above=1.0)
    assert raised["bounds"][1][1] == pytest.approx(torus.bounds[1][1] + torus.extents[1])


def test_an_error_names_options_as_its_reader_knows_them(generator):
    with pytest.raises(OptionError, match="^room_above must not be negative") as caught:
        generator.preprocess(trimesh.creation.box(), room_above=-1)
    assert caught.value.worded(str.upper) == "ROOM_ABOVE must not be negative, got -1"
    with pytest.raises(MeshError, match="say with room_above or bounds how large") as caught:
        generator.preprocess(trimesh.creation.box((2, 2, 2)))
    assert "say with --room_above or --bounds how large" in caught.value.worded(lambda name: f"--{name}")
    with pytest.raises(MeshError) as named, errors_name("100%s {box}.glb"), errors_name("part 1"):
        raise caught.value
    assert named.value.kind == "out_of_bounds"
    assert str(named.value) == f"100%s {{box}}.glb: part 1: {caught.value}"
    assert named.value.worded(str.upper) == f"100%s {{box}}.glb: part 1: {caught.value.worded(str.upper)}"
    assert str(pickle.loads(pickle.dumps(named.value))) == str(named.value)


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
@pytest.mark.parametrize("up_axis", ["y", "z"])
def test_a_file_is_read_with_the_vertical_axis_of_its_format(up_axis, suffix, tmp_path):
    generator = generator_of(up_axis)
    ids = generator.tokenizer.encode_mesh(solids()["annulus"])[: 9 * 21]
    part = generator.tokenizer.decode_mesh(ids)
    path = generator.export(part, tmp_path / f"part{suffix}", winding="kept")
    assert generator.preprocess(path)["input_ids"] == ids == generator.preprocess(str(path))["input_ids"]
    other = export_mesh(part, tmp_path / f"other{suffix}", up_axis="yz"[up_axis == "y"], winding="kept")
    assert generator.preprocess(other)["input_ids"] != ids
    turned = "yz"[(suffix in (".glb", ".obj"))]
    box = [[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]]
    assert generator.preprocess(path, prompt_up_axis=turned)["input_ids"] != ids
    assert generator.preprocess(path, bounds=box)["input_ids"] == ids


def test_a_part_with_as_many_faces_as_a_mesh_may_have_is_named_with_their_number(generator, tmp_path):
    path, other = tmp_path / "part.obj", tmp_path / "other.obj"
    trimesh.creation.box().export(path)
    other.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    for call in (
        lambda: generator([other, path], room_above=1.0, max_faces=12),
        lambda: generator.stream(path, room_above=1.0, max_faces=12),
    ):
        with pytest.raises(
            MeshError, match="part.obj: the prompt has 12 faces already: max_faces.* more, not 12"
        ) as caught:
            call()
        assert caught.value.kind == "too_many_faces"


def test_a_dae_is_read_with_the_vertical_axis_that_it_declares(generator, tmp_path):
    ids = generator.tokenizer.encode_mesh(solids()["annulus"])[: 9 * 21]
    part = generator.tokenizer.decode_mesh(ids)
    for up_axis in ("y", "z"):
        path = write_dae(
            tmp_path / f"{up_axis}.dae", turn(np.asarray(part.vertices), "y", up_axis), part.faces, up_axis
        )
        assert generator.preprocess(path)["input_ids"] == ids
    assert generator.preprocess(path, prompt_up_axis="y")["input_ids"] != ids


def test_a_list_of_prompts_gives_a_list_of_lists_each_as_by_itself(generator):
    tokenizer = generator.tokenizer
    parts = [tokenizer.decode_mesh(tokenizer.encode_mesh(mesh)[: 9 * 11]) for mesh in solids().values()]
    parts[1] = tokenizer.decode_mesh(tokenizer.encode_mesh(solids()["torus"])[: 9 * 4])  # rows of different lengths
    found = generator(parts, num_meshes=2, max_faces=14, do_sample=False, batch_size=3)
    assert [len(meshes) for meshes in found] == [2] * len(parts)
    alone = [generator(part, num_meshes=2, max_faces=14, do_sample=False) for part in parts]
    assert [triangles(meshes) for meshes in found] == [triangles(meshes) for meshes in alone]
    assert any(len(meshes[0].faces) > 11 for meshes in found)
    assert all(len(mesh.faces) <= 14 for meshes in found for mesh in meshes)
    assert generator([]) == []


# Faces as they come


def test_faces_that_come_are_those_of_the_mesh_of_the_same_seed(generator):
    whole = solids()["torus"]
    part = part_of(whole, 8, generator.tokenizer)
    for prompt, options in ((None, {}), (part, {"bounds": whole.bounds})):
        options |= {"max_faces": 14, "seed": 2, "temperature": 0.9, "suppress_tokens": [EOS]}
        faces = np.array(list(generator.stream(prompt, timeout=60, **options)))
        assert len(faces) >= 12 and [faces.tolist()] == triangles(generator(prompt, **options))
    rest = np.array(list(generator.stream(part, skip_prompt=True, **options)))
    assert np.array_equal(rest, faces[8:])
    for wrong in ({"num_meshes": 2}, {"prompt": [part]}):
        with pytest.raises(ValueError, match="one mesh at a time"):
            generator.stream(**wrong)


# Saving and loading


def test_the_task_is_registered_once_however_often_the_package_is_imported(caplog):
    assert PIPELINE_REGISTRY.check_task("mesh-generation")[1]["impl"] is MeshGenerationPipeline
    importlib.reload(iflame_hf)
    assert PIPELINE_REGISTRY.check_task("mesh-generation")[1]["impl"] is MeshGenerationPipeline
    assert "already registered" not in caplog.text


def test_a_saved_folder_names_the_task_and_holds_its_code(folder):
    assert json.loads((folder / "config.json").read_text())["custom_pipelines"] == {"mesh-generation": IMPLEMENTATION}
    names = {path.name for path in folder.iterdir()}
    assert {"pipeline_iflame.py", "faces_iflame.py", "export_iflame.py"} <= names
    for path in folder.glob("*.py"):
        assert {f"{module}.py" for module in get_relative_imports(path)} <= names


def test_where_the_package_is_installed_no_remote_code_needs_to_be_trusted(folder):
    for options in ({}, {"trust_remote_code": True}):
        generator = pipeline("mesh-generation", model=str(folder), device="cpu", **options)
        assert type(generator) is MeshGenerationPipeline and type(generator.model) is IFlameForCausalLM
        assert len(generator(num_meshes=2, max_faces=2)) == 2


def test_a_pipeline_saves_itself(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    again = pipeline("mesh-generation", model=str(tmp_path), device="cpu")
    expected = triangles(generator(max_faces=5, seed=1))
    assert triangles(again(max_faces=5, seed=1)) == expected
    assert json.loads((tmp_path / "config.json").read_text())["custom_pipelines"] == {
        "mesh-generation": IMPLEMENTATION
    }
    assert IFlameConfig.from_pretrained(tmp_path).to_json_string()


def look_from_outside(folder: str, repo_id: str, work: str, part) -> None:
    """Runs in the clean process, from its source alone; writes what it finds to report.json."""
    import importlib
    import json
    from pathlib import Path

    import numpy as np
    from transformers import pipeline

    work, report = Path(work), {"importable": []}
    for name in HIDDEN:  # noqa: F821
        try:
            importlib.import_module(name)
            report["importable"].append(name)
        except ImportError:
            pass

    def look(name, source, task="mesh-generation"):
        generator = pipeline(task, model=source, trust_remote_code=True)
        part_mesh = (np.array(part[0]), np.array(part[1]))
        as_json = generator.model.config.to_json_string()
        meshes = generator(num_meshes=3, max_faces=6, seed=4)
        completed = generator(part_mesh, max_faces=9, seed=4, room_above=1.0)
        path = generator.export(generator(max_faces=9, seed=4, suppress_tokens=[131])[0], work / f"{name}.glb")
        generator.save_pretrained(work / name)
        report[name] = {
            "class": f"{type(generator).__module__.split('.')[0]}.{type(generator).__name__}",
            "meshes": [mesh.vertices[mesh.faces].tolist() for mesh in meshes],
            "completed": [mesh.vertices[mesh.faces].tolist() for mesh in completed],
            "faces": [face.tolist() for face in generator.stream(max_faces=6, seed=4)],
            "glb": path.read_bytes()[:4].decode(),
            "custom_pipelines": json.loads((work / name / "config.json").read_text())["custom_pipelines"],
            "config": json.loads(as_json)["custom_pipelines"],
        }
        return str(work / name)

    second = look("folder", folder)
    second_from_cache = look("cache", repo_id)
    look("without_a_task", repo_id, None)
    look("second", second)
    look("second_from_cache", second_from_cache)
    (work / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def outside(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("outside")
    home = work / "home"
    lay_out_cache(folder, home, "some-user/a.model-1")
    tetrahedron = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    source = f"HIDDEN = {HIDDEN_PACKAGES}\n{inspect.getsource(look_from_outside)}\n"
    arguments = (str(folder), "some-user/a.model-1", str(work), tetrahedron)
    process = run_in_clean_process(f"{source}look_from_outside{arguments}", home)
    assert process.returncode == 0, process.stderr
    return json.loads((work / "report.json").read_text())


@pytest.mark.parametrize("source", ["folder", "cache", "without_a_task", "second", "second_from_cache"])
def test_without_this_project_the_pipeline_comes_from_the_folder_and_gives_the_same_meshes(outside, generator, source):
    found = outside[source]
    assert outside["importable"] == []
    assert found["class"] == "transformers_modules.MeshGenerationPipeline"
    assert found["custom_pipelines"] == found["config"] == {"mesh-generation": IMPLEMENTATION}
    tetrahedron = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    assert found["meshes"] == triangles(generator(num_meshes=3, max_faces=6, seed=4))
    completed = generator(tuple(map(np.array, tetrahedron)), max_faces=9, seed=4, room_above=1.0)
    assert found["completed"] == triangles(completed)
    assert [found["faces"]] == triangles(generator(max_faces=6, seed=4))
    assert found["glb"] == "glTF"
