"""Asking for a category and a number of faces: in the pipeline, on the command line, in training/generate.py."""

import json

import numpy as np
import pytest
import torch
from mesh_fixtures import solids
from small_models import BOS, EOS, ending_model
from transformers import pipeline

from iflame_cli.command_line import main
from iflame_cli.making import load_generator
from iflame_hf import IFlameTokenizer, generate_meshes
from iflame_hf.mesh_files_iflame import read_gltf_tree
from iflame_hf.ranking_iflame import best, log_probabilities
from training import generate

CATEGORIES = ["chair", "lamp", "table"]
CONDITIONED = {"categories": CATEGORIES, "num_faces_range": [4, 64]}


@pytest.fixture(scope="module")
def model():
    """Its meshes end after a few faces; in float64, so that no token hangs on how a sum is ordered."""
    return ending_model(5.0, **CONDITIONED)


@pytest.fixture(scope="module")
def generator(model):
    return pipeline("mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu")


@pytest.fixture(scope="module")
def part():
    """The first three faces of a generated mesh, which keep their place, and their ids."""
    tokenizer = IFlameTokenizer()
    ids = tokenizer.encode_mesh(solids()["torus"])[: 9 * 4]
    mesh = tokenizer.decode_mesh(ids)
    return (np.asarray(mesh.vertices), np.asarray(mesh.faces)), ids


def triangles(meshes):
    return [np.asarray(mesh.vertices)[np.asarray(mesh.faces)].tolist() for mesh in meshes]


def alone(generator, prompt=None, **options):
    """A mesh as generate() makes it by itself."""
    ids = generator.model.generate(torch.tensor([prompt or [BOS] * 9]), **{"do_sample": True, "top_k": 0, **options})
    return triangles([generator.tokenizer.decode_mesh(ids[0])])[0]


# Pipeline


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_p": 0.9, "guidance_scale": 2.5},
        {"do_sample": False},
        {"do_sample": False, "guidance_scale": 2.5},
    ],
    ids=str,
)
def test_the_meshes_are_those_that_generate_makes_of_what_is_asked_for(generator, options):
    categories, faces = ["chair", None, "table"], [None, 12, 40]
    options = {"max_faces": 40, **options}
    made = generator(num_meshes=3, category=categories, num_faces=faces, seed=3, batch_size=2, **options)
    for number, (mesh, category, num_faces) in enumerate(zip(made, categories, faces, strict=True)):
        each = {"seed": 3 + number} if "top_p" in options else {"top_k": None}
        assert triangles([mesh])[0] == alone(generator, category=category, num_faces=num_faces, **each, **options)
        asked = {"category": category, "num_faces": num_faces, "guidance_scale": options.get("guidance_scale")}
        assert mesh.metadata["asked_for"] == {name: value for name, value in asked.items() if value is not None}
    options.pop("guidance_scale", None)
    assert triangles(made) != triangles(generator(num_meshes=3, seed=3, **options))


def test_a_value_for_all_meshes_may_be_the_default_of_all_calls(model, generator):
    own = pipeline(
        "mesh-generation", model=model, tokenizer=IFlameTokenizer(), device="cpu", category="lamp", guidance_scale=2.0
    )
    options = {"num_meshes": 2, "max_faces": 6, "seed": 1}
    made = own(**options)
    assert triangles(made) == triangles(generator(category="lamp", guidance_scale=2.0, **options))
    assert made[1].metadata["asked_for"] == {"category": "lamp", "guidance_scale": 2.0}
    other = own(category="chair", guidance_scale=1, **options)
    assert triangles(other) == triangles(generator(category="chair", **options))
    assert other[0].metadata["asked_for"] == {"category": "chair"}
    assert "asked_for" not in generator(**options)[0].metadata


def test_parts_are_completed_to_what_is_asked_for_one_value_for_each_mesh(generator, part):
    mesh, ids = part
    options = {"seed": 5, "max_faces": 12, "guidance_scale": 2.0}
    categories = ["chair", "lamp", "table", None]
    completed = generator([mesh, mesh], num_meshes=2, category=categories, num_faces=10, **options)
    for number, made in enumerate(completed[0] + completed[1]):
        each = {**options, "seed": 5 + number}
        assert triangles([made])[0] == alone(generator, ids, category=categories[number], num_faces=10, **each)
        assert made.metadata["asked_for"]["num_faces"] == 10
    longer = generator.tokenizer.decode_mesh(generator.tokenizer.encode_mesh(solids()["torus"])[: 9 * 6])
    for call in (generator.as_finished, generator.stream):
        with pytest.raises(ValueError, match="the prompt has 5 faces already: num_faces must be more, not 4"):
            call(longer, num_faces=4)


@pytest.mark.parametrize("guidance", [{}, {"guidance_scale": 2.0}], ids=str)
def test_faces_come_of_the_mesh_that_was_asked_for(generator, guidance):
    options = {"category": "table", "num_faces": 20, "max_faces": 20, "seed": 6, **guidance}
    (mesh,) = generator(**options)
    faces = list(generator.stream(**options))
    assert len(faces) > 1 and np.array_equal(faces, np.array(triangles([mesh])[0]))


def test_the_best_is_chosen_by_how_likely_it_is_as_what_it_was_asked_to_be(model, generator):
    options = {"max_faces": 8, "num_faces": 8}
    chosen = generator(num_meshes=3, best_of=6, seed=4, category=["chair", None, "lamp"], **options)
    otherwise = 0
    for mesh, first, number in zip(chosen, (24, 30, 36), (0, -1, 1), strict=True):
        category = mesh.metadata["asked_for"].get("category")
        assert category == (None if number < 0 else CATEGORIES[number])
        candidates = sorted(generate_meshes(model, range(first, first + 6), category=category, top_k=0, **options))
        expected = best(model, candidates, 9, {"category": number, "num_faces": 8})
        assert mesh.metadata["seed"] == expected.seed
        assert triangles([mesh]) == triangles([generator.tokenizer.decode_mesh(expected.ids)])
        otherwise += best(model, candidates, 9).seed != expected.seed
    assert otherwise
    ids = [mesh.ids for mesh in generate_meshes(model, range(3), max_faces=8)]
    numbers = {"category": torch.tensor([2, -1, 0]), "num_faces": torch.tensor([5, 60, -1])}
    found = log_probabilities(model, ids, 100, conditions=numbers)
    for place, each in enumerate(ids):
        told = {name: values[[place]] for name, values in numbers.items()}
        length = int((each == EOS).int().argmax()) + 1
        with torch.no_grad():
            nats = model(each[None], **told).logits[0].double().log_softmax(-1)
        assert found[place] == pytest.approx(float(nats[8 : length - 1].gather(1, each[9:length, None]).mean()))
    assert np.abs(found - log_probabilities(model, ids)).max() > 0.01


def test_what_is_asked_for_has_room(generator):
    default = generator.default_max_faces
    assert generator.most_faces() == generator.most_faces(num_faces=default // 2) == default == 800
    assert generator.most_faces(num_faces=600) == 1200
    assert generator.most_faces(num_faces=9000) == generator.model.config.max_position_embeddings // 9 - 2
    assert generator.most_faces(50, 50) == 50
    with pytest.raises(ValueError, match="num_faces=10001 is more than the 9998 faces that this model's longest"):
        generator.most_faces(num_faces=10001)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"category": "sofa"}, "does not know the category 'sofa': it was trained with chair, lamp, table"),
        ({"num_faces": 3}, "num_faces must be a whole number from 4 to 64, as of training; got 3"),
        ({"num_faces": "5%"}, "got '5%'"),
        (
            {"num_faces": 30, "max_faces": 20},
            "num_faces=30 is more than max_faces=20: raise max_faces, or leave it out",
        ),
        ({"category": ["lamp", "chair"], "num_meshes": 3}, "3 meshes need as many values of category, got 2"),
        ({"guidance_scale": 2.0}, "guidance_scale is of a condition: give category or num_faces too"),
        ({"guidance_scale": -1, "category": "lamp"}, "guidance_scale must be a number from 0 on, got -1"),
        ({"guidance_scale": 2.0, "category": "lamp", "num_beams": 2}, "leave out num_beams or guidance_scale"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_for_is_refused_at_once(generator, options, words):
    with pytest.raises(ValueError, match=words):
        generator.as_finished(**options)
    if "num_meshes" not in options and "num_beams" not in options:
        with pytest.raises(ValueError, match=words):
            generator.stream(**options)


# Command line and script


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked") / "model"
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return str(folder)


ASKED = {"category": "table", "num_faces": 20, "guidance_scale": 2.0}


def iflame(command, *arguments):
    return main([command, *map(str, arguments), "--device", "cpu"])


def test_the_command_asks_and_records_what_for(folder, generator, tmp_path, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in ASKED.items()]
    assert iflame("generate", folder, "--num=2", "--seed=1", f"--out={tmp_path / 'a'}", "--json", *options) == 0
    record = json.loads((tmp_path / "a" / "meshes.json").read_text())
    assert {name: record[name] for name in ASKED} == ASKED
    expected = generator(num_meshes=2, seed=1, **ASKED)
    assert [entry["faces"] for entry in record["meshes"]] == [len(mesh.faces) for mesh in expected]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["asked_for"] for line in lines] == [ASKED] * 2 == [mesh.metadata["asked_for"] for mesh in expected]
    file = next(entry["file"] for entry in record["meshes"] if entry["file"])
    extras = read_gltf_tree(str(tmp_path / "a" / file))["asset"]["extras"]
    assert {name: extras[name] for name in ASKED} == ASKED


def test_a_part_is_completed_to_what_is_asked_for(folder, generator, part, tmp_path, capsys):
    path = generator.export(generator.tokenizer.decode_mesh(part[1]), tmp_path / "part.glb", winding="kept")
    arguments = ["complete", folder, path, "--seed=2", "--max-faces=30"]
    assert iflame(*arguments, f"--out={tmp_path / 'a'}", "--category=lamp", "--num-faces=12") == 0
    (entry,) = json.loads((tmp_path / "a" / "meshes.json").read_text())["meshes"]
    (expected,) = generator(part[0], seed=2, max_faces=30, category="lamp", num_faces=12)
    assert entry["asked_for"] == {"category": "lamp", "num_faces": 12} and entry["faces"] == len(expected.faces)
    capsys.readouterr()
    # All of the completed mesh, which has more faces than it is to have then.
    whole = next((tmp_path / "a").glob("*.glb"))
    assert iflame("complete", folder, whole, f"--out={tmp_path / 'b'}", "--num-faces=4") == 1
    assert f"{whole}: it has" in (said := capsys.readouterr().err) and "raise --num-faces" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--category=sofa"], "does not know the category 'sofa': it was trained with chair, lamp, table"),
        (["--num-faces=65"], "--num-faces must be a whole number from 4 to 64, as of training; got 65"),
        (["--num-faces=40", "--max-faces=30"], "--num-faces 40 is more than --max-faces 30: raise --max-faces"),
        (["--guidance-scale=2"], "--guidance-scale is of a condition: give --category or --num-faces too"),
    ],
    ids=str,
)
def test_the_command_refuses_in_its_own_words_before_it_writes(folder, tmp_path, capsys, options, words):
    assert iflame("generate", folder, f"--out={tmp_path / 'none'}", *options) == 1
    assert words in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_the_command_lists_what_a_model_can_be_asked_for(folder, tmp_path, capsys):
    assert iflame("generate", folder, "--categories") == 0
    assert capsys.readouterr().out.splitlines() == [*CATEGORIES, "from 4 to 64 faces (--num-faces)"]
    assert iflame("generate", folder, "--categories", "--json") == 0
    assert json.loads(capsys.readouterr().out) == CONDITIONED
    (tmp_path / "config.json").write_text('{"model_type": "iflame"}')
    assert iflame("generate", tmp_path, "--categories") == 0
    assert "was trained without conditions" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert iflame("generate", tmp_path, "--categories") == 1
    assert "is no iFlame model" in capsys.readouterr().err


def test_the_script_asks_too_and_goes_on_with_the_same_alone(folder, tmp_path, capsys):
    arguments = ["--use_cpu", f"--model={folder}", f"--out={tmp_path / 'out'}", "--num=2", "--dtype=float32"]
    assert generate.main([*arguments, "--category=sofa"]) == 1
    assert "does not know the category 'sofa'" in capsys.readouterr().err and not list((tmp_path / "out").glob("*"))
    assert generate.main([*arguments, *(f"--{name}={value}" for name, value in ASKED.items())]) == 0
    settings = json.loads((tmp_path / "out" / "generate.json").read_text())
    assert {name: settings[name] for name in ASKED} == ASKED and settings["max_faces"] == 800
    lines = (tmp_path / "out" / "meshes.jsonl").read_text().splitlines()
    expected = load_generator(folder, device="cpu", dtype="float32")(num_meshes=2, seed=0, **ASKED)
    assert [json.loads(line)["faces"] for line in lines] == [len(mesh.faces) for mesh in expected]
    capsys.readouterr()
    assert generate.main([*arguments, "--category=lamp", "--num_faces=20"]) == 1
    assert "--category table (now lamp), --guidance_scale 2.0 (now None)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main([*arguments, "--guidance_scale=2"])
    assert "give --category or --num_faces too" in capsys.readouterr().err
