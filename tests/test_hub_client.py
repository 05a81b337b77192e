"""Publishing: a folder gets to the Hub, whole or not at all, through the real client."""

import re

import pytest
from hub_fixtures import (  # noqa: F401
    OTHER_TOKEN,
    REPO_ID,
    TOKEN,
    built_folder,
    checkpoint_folder,
    files_of,
    loaded_checkpoint,
    loopback_hub,
    on_main,
)
from hub_server import Commit, Repository
from huggingface_hub import HfApi, constants

import hub_upload
from hub_upload import UploadError, main, publish
from training.publish.verify import lay_out_cache, run_in_clean_process
from training.run import card as model_card
from training.run.record import RunRecord

# The client sends files in a way that its own HTTP library calls outdated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# The upload, through the real client


def test_what_is_uploaded_loads_from_the_hub_by_its_name_and_the_cards_snippet_runs(
    checkpoint, loaded, hub, tmp_path, capsys
):
    assert main([str(checkpoint), "--repo-id", REPO_ID, "--token", TOKEN]) == 0
    output = capsys.readouterr()
    assert f"published: {hub.url}/{REPO_ID}" in output.out
    assert TOKEN not in output.out + output.err

    assert len(on_main(hub)) == 2, "one commit on top of the new repository's own"
    uploaded = on_main(hub)[-1].files
    assert sorted(on_main(hub)[-1].changed) == sorted(set(uploaded) - {".gitattributes"})
    assert not any(TOKEN.encode() in content for content in uploaded.values())

    snippet, second = re.findall(r"```python\n(.*?)```", uploaded["README.md"].decode(), re.DOTALL)
    assert f'"{REPO_ID}"' in snippet and "top_p=0.9" in snippet and "9 * 5" in snippet
    home = tmp_path / "home"
    greedy = (
        f"model.generate(do_sample=False, max_new_tokens=27, eos_token_id=None).tolist() == {self_generated(loaded)}"
    )
    process = run_in_clean_process(f"{snippet}\nassert {greedy}", home, hub.settings)
    assert process.returncode == 0, process.stderr
    assert sorted(path.name for path in home.glob("*.glb")) == [f"mesh_{number}.glb" for number in range(4)]
    assert f'pipeline("mesh-generation", model="{REPO_ID}", trust_remote_code=True)' in second
    assert "max_faces=4, seed=0, top_p=0.9)" in second
    process = run_in_clean_process(second, home, hub.settings)
    assert process.returncode == 0, process.stderr
    assert list(home.glob("mesh_*.obj"))

    # The client's own cache has the form of the one that verification lays out.
    folder = tmp_path / "folder"
    for name in ("config.json", "model.safetensors", "modeling_iflame.py"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(uploaded[name])
    lay_out_cache(folder, tmp_path / "ours", REPO_ID)
    (repository,) = (home / "hub").glob("models--*")
    ours = tmp_path / "ours" / "hub" / repository.name
    assert (repository / "refs" / "main").read_text() == on_main(hub)[-1].oid
    assert len((ours / "refs" / "main").read_text()) == len(on_main(hub)[-1].oid)
    for path in (repository, ours):
        (snapshot,) = (path / "snapshots").iterdir()
        assert snapshot.name == (path / "refs" / "main").read_text()
        assert (snapshot / "model.safetensors").resolve().read_bytes() == uploaded["model.safetensors"]


def self_generated(loaded):
    return loaded[0].generate(do_sample=False, max_new_tokens=27, eos_token_id=None).tolist()


def test_the_same_folder_again_makes_no_second_commit(built, hub):
    publish(built, REPO_ID, TOKEN)
    publish(built, REPO_ID, TOKEN)
    assert len(on_main(hub)) == 2
    uploaded = {name: content for name, content in on_main(hub)[-1].files.items() if name != ".gitattributes"}
    assert uploaded == files_of(built)


def test_files_of_an_earlier_upload_go_in_the_same_commit_and_others_stay(built, hub, tmp_path):
    earlier = {"model-00001-of-00002.safetensors": b"old", "old_iflame.py": b"old", "my-notes.md": b"mine"}
    hub.repositories[REPO_ID] = Repository()
    on_main(hub)[-1].files.update(earlier)
    publish(built, REPO_ID, TOKEN)
    assert len(on_main(hub)) == 2
    assert set(on_main(hub)[-1].files) == set(files_of(built)) | {".gitattributes", "my-notes.md"}


def test_an_upload_can_go_to_a_branch_or_become_a_pull_request(built, hub):
    assert publish(built, REPO_ID, TOKEN, revision="v2") == f"{hub.url}/{REPO_ID}/tree/v2"
    branches = hub.repositories[REPO_ID].branches
    assert len(branches["main"]) == 1 and len(branches["v2"]) == 2
    assert publish(built, REPO_ID, TOKEN, create_pr=True, commit_message="Try this").endswith("/discussions/1")
    assert len(branches["main"]) == 1 and branches["refs/pr/1"][-1].message == "Try this"


def test_the_snippet_of_another_branch_loads_that_branch(loaded):
    run, loads = RunRecord(), 'revision="v2", trust_remote_code=True'
    assert model_card.usage_snippet(loaded[0], run, REPO_ID, "v2").count(loads) == 2
    assert model_card.pipeline_snippet(loaded[0], run, REPO_ID, "v2").count(loads) == 1


def test_a_private_upload_stays_private(built, hub):
    publish(built, REPO_ID, TOKEN, private=True)
    assert hub.repositories[REPO_ID].private
    hub.repositories["someone/public"] = Repository()
    with pytest.raises(UploadError, match="exists and is public"):
        publish(built, "someone/public", TOKEN, private=True)
    assert len(hub.repositories["someone/public"].branches["main"]) == 1


def test_a_repository_of_another_model_is_not_overwritten(built, hub):
    hub.repositories[REPO_ID] = Repository()
    on_main(hub)[-1].files["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(UploadError, match="holds another model, of the type llama"):
        publish(built, REPO_ID, TOKEN)
    assert len(on_main(hub)) == 1


@pytest.mark.parametrize(
    ("token", "repo_id", "failure", "reason"),
    [
        ("wrong-token-0123", REPO_ID, None, "does not accept the access token"),
        (OTHER_TOKEN, REPO_ID, None, "may not write there"),
        (TOKEN, "stranger/model", None, "may not write there"),
        (TOKEN, REPO_ID, ("POST", "/commit/", 500), "problem of its own .status 500.*run the same command again"),
        (TOKEN, REPO_ID, ("POST", "/create", 429), "too many requests"),
        (TOKEN, REPO_ID, ("PUT", "/lfs-objects/", 403), "may not write there"),
        (TOKEN, REPO_ID, ("POST", "/create", 0), "cannot be reached"),
        (TOKEN, REPO_ID, ("POST", "/commit/", 0), "cannot be reached"),
    ],
)
def test_what_the_hub_refuses_is_told_in_plain_words_and_leaves_nothing_half_published(
    built, hub, token, repo_id, failure, reason
):
    if failure:
        hub.fail(*failure, message=f"refused, {token}", times=20)
    with pytest.raises(UploadError, match=reason) as refused:
        publish(built, repo_id, token)
    assert token not in str(refused.value)
    assert all(len(branch) == 1 for each in hub.repositories.values() for branch in each.branches.values())


def test_a_commit_of_somebody_else_in_the_meantime_is_not_overwritten(built, hub, monkeypatch):
    create_commit = HfApi.create_commit

    def after_another(api, *arguments, **options):
        on_main(hub).append(Commit({"README.md": b"theirs"}))
        return create_commit(api, *arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", after_another)
    with pytest.raises(UploadError, match="changed by somebody else"):
        publish(built, REPO_ID, TOKEN)
    assert on_main(hub)[-1].files == {"README.md": b"theirs"}


def test_without_a_network_the_error_says_so_and_main_ends_with_status_1(checkpoint, built, monkeypatch, hub, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_upload, "verify_folder", lambda *arguments: None)
    assert main([str(checkpoint), "--repo-id", REPO_ID, "--token", TOKEN]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("hub_upload: the Hub cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE is set"):
        publish(built, REPO_ID, TOKEN)


def test_without_a_token_nothing_is_even_loaded(monkeypatch, capsys):
    monkeypatch.setattr(hub_upload, "get_token", lambda: None)
    assert main(["nowhere", "--repo-id", REPO_ID]) == 1
    assert "no access token" in capsys.readouterr().err


def test_passing_faults_of_the_server_are_tried_again(built, hub):
    hub.fail("PUT", "/lfs-objects/", 503)
    hub.fail("POST", "/preupload/", 502)
    publish(built, REPO_ID, TOKEN)
    assert len(on_main(hub)) == 2
    assert on_main(hub)[-1].files["model.safetensors"] == (built / "model.safetensors").read_bytes()


def test_an_interrupted_upload_goes_on_with_what_the_hub_already_has(built, hub):
    hub.fail("POST", "/commit/", 500)
    with pytest.raises(UploadError):
        publish(built, REPO_ID, TOKEN)
    sent = hub.sent("PUT", "/lfs-objects/")
    assert sent == len([name for name in files_of(built) if name.endswith((".safetensors", ".glb", ".png"))])
    publish(built, REPO_ID, TOKEN)
    assert hub.sent("PUT", "/lfs-objects/") == sent
    assert len(on_main(hub)) == 2
