"""Publishing: what goes up is whole, works by itself, and holds no secret."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from hub_fixtures import (  # noqa: F401
    EVALUATION,
    OTHER_TOKEN,
    REPO_ID,
    ROOT,
    TOKEN,
    built_folder,
    checkpoint_folder,
    copy_of,
    files_of,
    loaded_checkpoint,
    loopback_hub,
)
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from small_models import small_model

import hub_upload
from hub_upload import (
    UploadError,
    build_folder,
    load_checkpoint,
    main,
    publish,
    published_files,
    verify_folder,
)
from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.run import card as model_card
from training.run import checkpoint as checkpointing
from training.run import log as reporting
from training.run import record

# The client sends files in a way that its own HTTP library calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# What is published


def test_a_dry_run_verifies_and_shows_all_that_would_go_up_without_a_network(checkpoint, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_TOKEN", None)
    out = tmp_path / "new" / "folder"
    command = [sys.executable, ROOT / "hub_upload.py", checkpoint, "--repo-id", REPO_ID, "--dry-run"]
    command += ["--dtype", "bfloat16"]
    run = subprocess.run(
        [*command, "--folder", out], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    kept = files_of(out)
    code = {path.name for path in (ROOT / "iflame_hf").glob("*_iflame.py")}
    assert set(kept) == code | {
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors",
        "samples.png",
        "samples/sample-00.glb",
        "samples/sample-01.glb",
    }
    listed = dict(re.findall(r"^ *([\d,]+)  (\S+)$", run.stdout, re.MULTILINE)[i][::-1] for i in range(len(kept)))
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {k: len(v) for k, v in kept.items()}
    assert "dry run: nothing was sent" in run.stdout
    assert "computes what the checkpoint does" in run.stdout
    assert [path.name for path in out.parent.iterdir()] == ["folder"], "nothing is left beside it"
    assert not {"is_local", "local_files_only", "name_or_path"} & json.loads(kept["tokenizer_config.json"]).keys()
    for name, content in kept.items():
        assert str(checkpoint).encode() not in content, f"{name} names a path of this machine"
        assert b"secret of this machine" not in content


def test_the_code_that_is_published_is_that_of_the_project(built):
    code = {path.name: path.read_bytes() for path in (ROOT / "iflame_hf").glob("*_iflame.py")}
    assert len(code) >= 7
    assert {name: content for name, content in files_of(built).items() if name.endswith(".py")} == code


def test_code_references_to_another_repository_do_not_survive(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {name: f"other/model--{where}" for name, where in config["auto_map"].items()}
    config["custom_pipelines"]["mesh-generation"]["impl"] = "other/model--pipeline_iflame.MeshGenerationPipeline"
    (folder / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    build_folder(*load_checkpoint(folder), folder, out, REPO_ID)
    config = json.loads((out / "config.json").read_text())
    assert len(config["auto_map"]) == 3 and len(config["custom_pipelines"]) == 1
    assert "other/model" not in json.dumps(config)


def test_large_weights_are_split_and_keep_their_precision(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    half = IFlameForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    half.save_pretrained(folder)
    out = tmp_path / "out"
    out.mkdir()
    build_folder(*load_checkpoint(folder), folder, out, REPO_ID, max_shard_size="50KB")
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1 and (out / "model.safetensors.index.json").is_file()
    weights = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert weights.keys() == half.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in half.state_dict().items())
    assert published_files(out).keys() >= {shard.name for shard in shards}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'), "no iFlame model.*'llama'"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"version https://git-lfs"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "holds no tokenizer"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "generation_config.json").write_text("[]"), "generation_config.json cannot be read"),
        (lambda folder: edit_weights(folder, lambda w: w.pop("lm_head.bias")), "lack lm_head.bias"),
        (lambda folder: edit_weights(folder, lambda w: w.update(x=torch.ones(1))), "do not belong to the model: x"),
        (
            lambda folder: edit_weights(folder, lambda w: w.update({"lm_head.bias": torch.ones(3)})),
            "sizes.*: lm_head.bias",
        ),
        (
            lambda folder: IFlameTokenizer(64).save_pretrained(folder),
            "do not fit: coordinate_resolution is 128 and 64",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_in_plain_words(checkpoint, tmp_path, capsys, damage, reason):
    folder = copy_of(checkpoint, tmp_path)
    damage(folder)
    assert main([str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(f"hub_upload: .*{reason}", error), error
    assert "copy" in error, "the folder is named"


def edit_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_log_that_cannot_be_read_is_named(checkpoint, loaded, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    (folder / "log.jsonl").write_text('{"step": 1, "eval_lo')
    (tmp_path / "out").mkdir()
    with pytest.raises(UploadError, match=r"log\.jsonl cannot be read"):
        build_folder(*loaded, folder, tmp_path / "out", REPO_ID)


def test_a_folder_with_files_in_it_is_not_built_into(checkpoint, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    command = [str(checkpoint), "--repo-id", REPO_ID, "--dry-run", "--folder", str(tmp_path)]
    assert main(command) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_full_disk_is_called_that(checkpoint, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr(hub_upload, "build_folder", fail)
    assert main([str(checkpoint), "--repo-id", REPO_ID, "--dry-run"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hub_upload: the disk is full: ")


@pytest.mark.parametrize("repo_id", ["no-user", "a/b/c", "user/with space", "/x"])
def test_a_name_that_the_hub_has_no_place_for_is_refused_at_once(repo_id, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["nowhere", "--repo-id", repo_id])
    assert exit.value.code == 2
    assert "USER/NAME" in capsys.readouterr().err


# Secrets


@pytest.mark.parametrize(
    ("file", "secret", "kind"),
    [
        ("config.json", f'{{"note": "{OTHER_TOKEN}"}}', "a Hugging Face token"),
        ("README.md", "clone https://me:pass@host/x", "a password in an address"),
        ("tokenizer_config.json", '{"api_key": "0123456789"}', "a password or key"),
        ("samples/mesh.glb", "glTF -----BEGIN RSA PRIVATE" + " KEY-----", "a private key"),
        ("ops_iflame.py", "key = 'ghp_" + "0" * 36 + "'", "a GitHub or GitLab token"),
        ("samples.png", "AKIA" + "ABCDEFGH12345678", "an API key"),
        ("generation_config.json", "what I log in with", "your access token"),
    ],
)
def test_a_file_with_a_secret_is_not_published(built, tmp_path, hub, file, secret, kind):
    folder = copy_of(built, tmp_path)
    (folder / file).write_text(secret)
    with pytest.raises(UploadError, match=f"^{file} holds what looks like {kind}") as refused:
        publish(folder, REPO_ID, "what I log in with")
    assert secret not in str(refused.value)
    assert hub.requests == []


def test_a_secret_in_the_configuration_of_a_checkpoint_stops_the_run(checkpoint, tmp_path, capsys):
    folder = copy_of(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "uploaded_with": OTHER_TOKEN}))
    assert main([str(folder), "--repo-id", REPO_ID, "--dry-run"]) == 1
    error = capsys.readouterr().err
    assert "config.json holds what looks like a Hugging Face token" in error and OTHER_TOKEN not in error


@pytest.mark.parametrize(
    "name", ["optimizer.bin", "random_states_0.pkl", "trainer_state.json", "x/config.json", ".env", "samples/x.txt"]
)
def test_files_that_are_no_part_of_a_model_are_not_published(built, tmp_path, hub, name):
    folder = copy_of(built, tmp_path)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("x")
    with pytest.raises(UploadError, match=f"^{name} is no part"):
        publish(folder, REPO_ID, TOKEN)
    assert hub.requests == []


def test_the_published_files_of_the_project_pass_the_search_for_secrets(built):
    assert published_files(built, TOKEN).keys() == files_of(built).keys()


# The model card


def test_the_card_tells_the_hub_what_the_run_recorded(built):
    card = ModelCard.load(built / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-to-3d", "mit")
    assert "mesh-generation" in data.tags
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        name.removeprefix("eval_"): value for name, value in EVALUATION.items()
    }
    assert data.model_name == "small-meshes"
    assert "| all | 1.25 | 3.49 | 0.61 | 0.4 | 0.2 |" in card.text
    assert "| chair | 1 |  |  |  | 0.25 |" in card.text
    assert "20 steps, 12,345 tokens learnt from, 2.0 minutes" in card.text
    assert "![Meshes that the model generated](samples.png)" in card.text
    assert "procedural meshes" in card.text


def test_the_card_of_a_checkpoint_has_the_figures_of_its_own_step(checkpoint):
    assert record.read_run(checkpoint / "checkpoint-20").evaluation["step"] == 20
    (checkpoint / "checkpoint-10").mkdir(exist_ok=True)
    assert record.read_run(checkpoint / "checkpoint-10").evaluation["eval_loss"] == 1.5


def test_the_best_checkpoint_is_described_where_it_is_what_the_run_left(checkpoint, tmp_path):
    folder = copy_of(checkpoint, tmp_path)
    with (folder / "log.jsonl").open("a") as file:
        for step, loss in ((25, 0.01), (30, 9.0)):  # neither has a checkpoint
            file.write(json.dumps({"step": step, "eval_loss": loss}) + "\n")
    assert record.read_run(folder).evaluation["step"] == 30
    state = folder / "checkpoint-20" / "trainer_state.json"
    progress = json.loads(state.read_text())
    progress["arguments"]["load_best_model_at_end"], progress["eval_loss"] = True, 1.0
    state.write_text(json.dumps(progress))
    assert record.read_run(folder).evaluation["step"] == 20


def test_a_model_of_unknown_origin_is_not_given_a_licence(loaded):
    card = model_card.model_card(loaded[0], record.RunRecord(), REPO_ID)
    assert card.data.license is None and "has not been stated" in card.text
    assert card.data.eval_results is None and "## Evaluation" not in card.text


def test_licence_data_sets_and_base_model_reach_the_metadata(loaded, tmp_path):
    run = record.RunRecord(progress={"arguments": {"train_file": ["x"], "model_name_or_path": "someone/base"}})
    card = model_card.model_card(loaded[0], run, REPO_ID, license="cc-by-4.0", datasets=["a/b", "c/d"])
    assert (card.data.license, card.data.datasets, card.data.base_model) == (
        "cc-by-4.0",
        ["a/b", "c/d"],
        "someone/base",
    )
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\ndatasets:\n- e/f\n---\n")
    again = model_card.model_card(loaded[0], record.read_run(tmp_path), REPO_ID)
    assert (again.data.license, again.data.datasets) == ("cc0-1.0", ["e/f"])


def test_the_card_reads_the_files_that_training_writes():
    assert (record.STATE, record.LOG) == (checkpointing.STATE, reporting.LOG)


def test_the_citation_names_the_papers_authors(built):
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    card = (built / "README.md").read_text()
    assert f"author  = {{{authors}}}" in card and f"title   = {{{paper['title']}}}" in card


# Verification


def test_a_folder_without_a_module_that_the_model_imports_is_not_verified(built, loaded, tmp_path):
    folder = copy_of(built, tmp_path)
    (folder / "levels_iflame.py").unlink()
    with pytest.raises(UploadError, match="does not work where .*imports levels_iflame.py, which is missing"):
        verify_folder(folder, REPO_ID, loaded[0])


def test_a_folder_whose_code_fails_is_not_verified_and_the_error_is_shown(built, loaded, tmp_path):
    folder = copy_of(built, tmp_path)
    with (folder / "mesh_iflame.py").open("a") as file:
        file.write("\nimport iflame_hf\n")
    with pytest.raises(UploadError, match="does not work where .*iflame_hf"):
        verify_folder(folder, REPO_ID, loaded[0])


def test_a_folder_with_altered_weights_is_not_verified(built, loaded, tmp_path):
    folder = copy_of(built, tmp_path)
    edit_weights(folder, lambda weights: weights["model.layers.2.mlp.up_proj.weight"].mul_(1.01))
    with pytest.raises(UploadError, match="computes something else: logits differ by"):
        verify_folder(folder, REPO_ID, loaded[0])


def test_a_model_of_broken_weights_is_not_verified(built):
    model = small_model()
    model.lm_head.bias.data[5] = float("nan")
    with pytest.raises(UploadError, match="not finite"):
        verify_folder(built, REPO_ID, model)
