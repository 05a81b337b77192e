"""A folder of a model that is built to be kept: its card, its weights, and that publishing it loses neither."""

import json

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hub_fixtures import REPO_ID, checkpoint_folder, files_of  # noqa: F401
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import hub_upload
from training.publish.data import data_sections
from training.run.card import keep_sections, sections_of

SETTINGS = {"min_faces": 4, "max_faces": 800, "decimate": False, "deduplicate": True, "validation_share": 0.05}
SETTINGS |= {"splits": "source", "categories": None, "only_licenses": ["CC0-1.0", "CC-BY-4.0"]}
CHESTS = ("Ann", "CC0-1.0", "github:game/kit@0123abcdef/chests/a.glb", "ann/chests")
CARS = ("Bob", "CC-BY-4.0", "github:bob/cars@fedcba9876/car.glb", "bob/cars")
BOATS = (None, None, "boats/sloop.obj", None)


@pytest.fixture(name="prepared")
def prepared_set(tmp_path):
    """What a finished data set tells of its meshes."""
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    splits = {"train": [CHESTS, CHESTS, CARS, BOATS], "validation": [CHESTS]}
    for split, rows in splits.items():
        columns = dict(zip(("author", "license", "source", "pack"), map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data" / f"{split}-00000.parquet")
    summary = {"meshes": {"train": 4, "validation": 1}, "faces": 1234, "shards": {"train": 1, "validation": 1}}
    (folder / "summary.json").write_text(json.dumps({**summary, "rejected": {"duplicate": 2}}))
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.fixture(name="no_process")
def without_a_process(monkeypatch):
    """The look from a clean process is left out: that of a dry run is tested elsewhere."""
    monkeypatch.setattr(hub_upload, "verify_folder", lambda *arguments: None)
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)


def test_a_card_names_every_origin_and_gives_the_credit_that_licences_ask_for(prepared):
    sections = data_sections(prepared)
    assert "5 triangle meshes of 4 to 800 faces, 1,234 faces in all: 4 to learn from and 1 held" in sections["Data"]
    assert "Only meshes under CC0-1.0, CC-BY-4.0." in sections["Data"] and "duplicate: 2" in sections["Data"]
    text = sections["Licences and credits of the data"]
    kit = "[game/kit](https://github.com/game/kit/tree/0123abcdef)"
    assert f"| Ann | CC0-1.0 | {kit} | ann/chests (3) | 3 |" in text
    assert "| not known | not known | boats | not known | 1 |" in text
    assert "**Licence not known**: 1 mesh." in text
    by = "[CC-BY-4.0](https://creativecommons.org/licenses/by/4.0/)"
    assert f"- {by}: 1 mesh. It asks for credit." in text
    credits = text.partition("Credits that")[2].partition("<details>")[0]
    assert f'- "bob/cars" by Bob, {by}, [bob/cars](https://github.com/bob/cars/tree/fedcba9876)' in credits
    assert "Ann" not in credits and "by Ann (3)," in text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "no data set that .*prepare_data has finished"),
        (lambda folder: (folder / "settings.json").write_text("{}"), "no data set that .*min_faces"),
        (lambda folder: (folder / "data/train-00000.parquet").unlink(), "train-00000.parquet cannot be read"),
        (lambda folder: (folder / "data/train-00000.parquet").write_text("x"), "train-00000.parquet cannot be read"),
    ],
)
def test_what_is_no_whole_data_set_is_refused_by_name(prepared, damage, reason):
    damage(prepared)
    with pytest.raises(ValueError, match=f"set.*{reason}|{reason}"):
        data_sections(prepared)


def test_a_built_folder_is_published_as_it_is_but_for_its_name(checkpoint, prepared, tmp_path, no_process, capsys):
    limits = tmp_path / "limits.md"
    limits.write_text("It knows *chests* alone.\n\n## Hardware\n\nOne laptop.\n")
    built, again = tmp_path / "models" / "chests", tmp_path / "again"
    arguments = ["--dtype", "bfloat16", "--license", "cc-by-4.0", "--limits", limits, "--data", prepared]
    assert hub_upload.main([str(each) for each in (checkpoint, "--folder", built, *arguments)]) == 0
    assert "nothing was sent" in capsys.readouterr().out
    card = ModelCard.load(built / "README.md")
    assert 'name = "chests"' in card.text and "\n# chests\n" in card.text
    assert list(sections_of(card.text))[1:] == [
        *("Use", "Limits", "Hardware", "Data", "Licences and credits of the data"),
        *("Evaluation", "Training", "Licence", "Citation"),
    ]
    assert str(tmp_path) not in card.content

    own = "\nA line of my own.\n"
    (built / "README.md").write_text(card.content.replace("One laptop.", f"One laptop.{own}"))
    options = [str(built), "--repo-id", REPO_ID, "--dry-run", "--folder"]
    assert hub_upload.main([*options, str(again)]) == 0
    before, after = files_of(built), files_of(again)
    assert before.pop("README.md").decode().replace('"chests"', f'"{REPO_ID}"') == after.pop("README.md").decode()
    assert before == after, "weights and samples too"

    options += [str(tmp_path / "free"), "--license", "cc0-1.0", "--revision", "v2"]
    assert hub_upload.main(options) == 0
    free = ModelCard.load(tmp_path / "free" / "README.md")
    assert free.text.count('revision="v2", trust_remote_code=True') == 3
    assert free.data.license == "cc0-1.0" and "The weights: cc0-1.0." in free.text and own in free.text
    assert free.data.eval_results == card.data.eval_results


def test_weights_are_rounded_in_the_files_and_the_model_computes_in_the_precision_it_did(
    checkpoint, tmp_path, no_process
):
    assert hub_upload.main([str(checkpoint), "--folder", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    given, found = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "half"))
    assert given.keys() == found.keys()
    for name, value in given.items():
        assert value.dtype == torch.float32 and torch.equal(found[name], value.bfloat16())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float32"
    assert hub_upload.saved_dtype(tmp_path / "half") == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give --repo-id USER/NAME to publish, or --folder DIR"),
        (["--folder", "x", "--private"], "--private is about the Hub"),
        (["--folder", "x", "--revision", "v2"], "--revision is about the Hub"),
    ],
)
def test_what_to_do_with_the_folder_must_be_said(arguments, reason, capsys):
    with pytest.raises(SystemExit):
        hub_upload.main(["nowhere", *arguments])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--limits", "--evaluation", "--data"])
def test_what_the_card_is_to_tell_of_must_be_there(option, tmp_path, no_process, capsys):
    (tmp_path / "empty").touch()
    assert hub_upload.main(["nowhere", "--folder", str(tmp_path / "x"), option, str(tmp_path / "empty")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hub_upload: ") and "empty" in error and "nowhere" not in error


def test_headings_in_code_are_no_sections_and_taking_apart_loses_nothing():
    text = "head\n\n## One\n\n```bash\n## no heading\n```\n### part\n\n## Two\nlast"
    assert list(sections_of(text)) == ["", "One", "Two"]
    kept = ModelCard(f"---\nlicense: mit\ntags:\n- mine\n---\n{text}")
    new = ModelCard("---\ntags:\n- other\n---\n# new\n\n## One\n\nanew\n\n## Three\n\nnot asked for\n")
    assert keep_sections(new, kept, [], "a/b").text == text
    again = keep_sections(new, kept, ["One"], "a/b")
    assert again.text == "head\n\n## One\n\nanew\n\n## Two\nlast"
    assert again.data.tags == ["mine"] and again.data.license == "mit"
