"""
Publishes a trained model on the Hugging Face Hub.

    python hub_upload.py CHECKPOINT_DIR --repo-id USER/NAME --dry-run
    python hub_upload.py CHECKPOINT_DIR --repo-id USER/NAME
    python hub_upload.py CHECKPOINT_DIR --folder models/NAME --data PREPARED --evaluation EVALUATION.json

The last sends nothing: it builds a folder to keep, which the others take later, card and all. What is published is
built aside from the loaded model and tokenizer, so that nothing else of a training run can get into it; only generated
samples are copied. It must load and compute the same in a process that knows nothing of this project before anything
is sent, and goes up in one commit.
"""

import argparse
import errno
import fnmatch
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open

from iflame_hf import IFlameForCausalLM, IFlameTokenizer
from training.publish.verify import UploadError, verify_folder
from training.run.card import keep_sections, model_card
from training.run.ending import ends_in_words
from training.run.record import read_run

# Files of ours: what may go up, and of an earlier upload what goes away if it is not in the new one.
PUBLISHED = (
    "README.md",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*_iflame.py",
    "samples.png",
    "samples/*.glb",
)
SAMPLE_BEGINNINGS = {".glb": b"glTF", ".png": b"\x89PNG"}
MOST_SAMPLES = 16
DTYPES = ("float32", "bfloat16", "float16")
# Of httpx or httpx2, whichever the Hub's client uses.
HTTPError = HfHubHTTPError.__bases__[0]
SECRETS = {
    "a Hugging Face token": rb"\b(hf|api_org)_[A-Za-z0-9]{30,}",
    "a GitHub or GitLab token": rb"\bgh[pousr]_[A-Za-z0-9]{36}|\bgithub_pat_\w{22}|\bglpat-[\w-]{20}",
    "an API key": rb"\bsk-[A-Za-z0-9_-]{32}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{35}|\bxox[abprs]-[\w-]{10}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": rb"\w://[^/\s:@]+:[^/\s:@]+@",
    "a password or key": rb"(?i:[\"'](api_?key|secret|password|access_token|auth_token)[\"']\s*:\s*[\"'][^\"']{6})",
}
STATUS_IN_WORDS = {
    400: "the Hub takes the request for a wrong one",
    401: "the Hub does not accept the access token: it is wrong or has expired. Make one that may write at "
    "https://huggingface.co/settings/tokens, then run `hf auth login`",
    402: "the Hub asks for a payment: the account's private storage may be used up",
    403: "the access token may not write there: use one with write permission, of an account that may write to this "
    "user or organisation",
    404: "there is no such repository, branch or user on the Hub, or the token may not see it",
    409: "the name is taken, or something else is changing the repository right now",
    412: "the repository was changed by somebody else in the meantime; look at it, then run the same command again",
    413: "the Hub refuses so large a request",
    429: "the Hub has had too many requests from here; wait some minutes, then run the same command again",
}
SERVER_FAULT = (
    "the Hub has a problem of its own (status {status}); run the same command again later, files it already has are "
    "not sent twice"
)


def load_checkpoint(folder: Path) -> tuple[IFlameForCausalLM, IFlameTokenizer]:
    """
    The model, on the CPU in the precision it was saved in, and the tokenizer of a folder that training wrote.

    Raises:
        UploadError: it is no folder of a whole iFlame model with its tokenizer, with the reason.
    """
    if not folder.is_dir():
        raise UploadError(f"there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise UploadError(f"{folder} holds no model: there is no config.json in it")
    # transformers passes over a generation_config.json that it cannot read.
    settings = {name: _read_settings(folder / name) for name in ("config.json", "generation_config.json")}
    model_type = settings["config.json"].get("model_type")
    if model_type != "iflame":
        raise UploadError(f"{folder} is no iFlame model: the model_type in its config.json is {model_type!r}")
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise UploadError(f"{folder} holds no weights: there is no model.safetensors in it")
    if not (folder / "tokenizer_config.json").is_file():
        raise UploadError(
            f"{folder} holds no tokenizer: there is no tokenizer_config.json in it. Give the folder of the finished "
            "model, or save one into it with IFlameTokenizer().save_pretrained"
        )
    try:
        model, loading = IFlameForCausalLM.from_pretrained(
            folder, output_loading_info=True, local_files_only=True, ignore_mismatched_sizes=True
        )
        tokenizer = IFlameTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UploadError(f"{folder} cannot be loaded: {error}") from error
    for problem, what in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "do not belong to the model:"),
        ("mismatched_keys", "are not of the sizes in config.json:"),
    ):
        names = sorted(key if isinstance(key, str) else key[0] for key in loading[problem])
        if names:
            raise UploadError(f"the weights in {folder} {what} {', '.join(names[:3])}")
    for name in ("coordinate_resolution", "pad_token_id", "bos_token_id", "eos_token_id"):
        ours, theirs = getattr(model.config, name), getattr(tokenizer, name)
        if ours != theirs:
            raise UploadError(f"model and tokenizer in {folder} do not fit: {name} is {ours} and {theirs}")
    return model.eval(), tokenizer


def _read_settings(path: Path) -> dict:
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UploadError(f"{path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UploadError(f"{path} cannot be read: it holds no names and values")
    return settings


def saved_dtype(folder: Path) -> torch.dtype | None:
    """The precision of the weights in a folder's files, which may be lower than the one the model computes in; None
    where they are of several."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}
    return (
        {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}.get(found.pop())
        if len(found) == 1
        else None
    )


def round_weights(model: IFlameForCausalLM, dtype: torch.dtype) -> None:
    """Gives the parameters values that `dtype` has, in the precision that they are in."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)


def build_folder(
    model: IFlameForCausalLM,
    tokenizer: IFlameTokenizer,
    checkpoint: Path,
    folder: Path,
    repo_id: str,
    revision: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    max_shard_size: str = "5GB",
    dtype: torch.dtype | None = None,
    sections: Mapping[str, str] | None = None,
    results: Mapping[str, float] | None = None,
    name: str | None = None,
) -> None:
    """
    Writes into the empty `folder` all that goes up: weights, configurations, remote code, samples, model card.

    Args:
        dtype: of the weights in the files; by default that of the model, which is what it computes in either way.
        sections: of the card, markdown by title.
        results: metrics of the likelihood of held-out meshes, in the place of the run's own.
        name: title of the card.
    """
    # What loading adds to a tokenizer's settings tells of this machine, not of the tokenizer.
    for setting in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(setting, None)
    # The code goes with the model, whatever repository the checkpoint's own came from.
    model.config.auto_map = type(model.config)().auto_map
    weights = {key: value.to(dtype or value.dtype) for key, value in model.state_dict().items()}
    model.save_pretrained(folder, max_shard_size=max_shard_size, state_dict=weights)
    tokenizer.save_pretrained(folder)
    samples = _copy_samples(checkpoint, folder)
    try:
        run = read_run(checkpoint)
    except ValueError as error:
        raise UploadError(str(error)) from error
    kept = run.card if run.is_empty and run.card and run.card.text.strip() else None
    if results:
        run.evaluation = {f"eval_{metric}": value for metric, value in results.items()}
    card = model_card(model, run, repo_id, revision, license, datasets, samples, sections, name)
    if kept is not None:
        anew = [*(sections or {}), *(["Licence"] if license else [])]
        card = keep_sections(card, kept, anew, repo_id, revision)
    card.save(folder / "README.md")


def read_sections(
    data: Path | None, evaluation: Path | None, limits: Path | None
) -> tuple[dict[str, str], dict[str, float]]:
    """
    Sections of a card, and the metrics of the likelihood, from a prepared data set, an evaluation.json, and a file of
    markdown.

    Raises:
        UploadError: one of them cannot be read or is something else, naming it.
    """
    sections, results = {}, {}
    try:
        if limits is not None:
            sections["Limits"] = limits.read_text(encoding="utf-8").strip()
            if not sections["Limits"]:
                raise ValueError(f"{limits} is empty")
        # These two need what training needs, not only what publishing does.
        if evaluation is not None:
            from training.evaluation.report import read_for_card

            sections["Evaluation"], results = read_for_card(evaluation)
        if data is not None:
            from training.publish.data import data_sections

            sections |= data_sections(data)
    except (OSError, ValueError) as error:
        raise UploadError(str(error)) from error
    return sections, results


def _copy_samples(checkpoint: Path, folder: Path) -> list[str]:
    """Copies the picture and the meshes that training generated; returns their paths in the folder."""
    copied = []
    meshes = sorted(checkpoint.glob("sample*.glb")) or sorted(checkpoint.glob("samples/*.glb"))
    for source in [checkpoint / "samples.png", *meshes[:MOST_SAMPLES]]:
        if source.is_file() and source.read_bytes().startswith(SAMPLE_BEGINNINGS[source.suffix]):
            name = source.name if source.suffix == ".png" else f"samples/{source.name}"
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
            copied.append(name)
    return copied


def published_files(folder: Path, token: str | None = None) -> dict[str, int]:
    """
    The files of a folder that are to go up, with their sizes in bytes.

    Raises:
        UploadError: one of them is no part of a published model, or holds what looks like a secret, or `token` itself.
    """
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if not _is_ours(name):
            raise UploadError(f"{name} is no part of a published model; nothing was uploaded")
        sizes[name] = path.stat().st_size
        if path.suffix == ".safetensors":
            continue
        content = path.read_bytes()
        found = [kind for kind, pattern in SECRETS.items() if re.search(pattern, content)]
        if token and token.encode() in content:
            found.append("your access token")
        if found:
            raise UploadError(f"{name} holds what looks like {found[-1]}; take it out of the checkpoint's files")
    return sizes


def _is_ours(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLISHED)


def publish(
    folder: Path,
    repo_id: str,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload iFlame",
) -> str:
    """
    Creates the repository if need be and uploads the folder in one commit; returns the address of what came of it.

    Files of an earlier upload that the folder does not have are deleted in the same commit: transformers would prefer
    a stale model.safetensors to new shards.

    Raises:
        UploadError: why the Hub, or the way to it, does not let it be; the repository is then as it was, or empty.
    """
    names = list(published_files(folder, token))
    try:
        api = HfApi(token=token, library_name="iflame-hf")
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        if private and not info.private:
            raise UploadError(
                f"{repo_id} exists and is public: make it private in its settings, or leave out --private"
            )
        model_type = (info.config or {}).get("model_type", "iflame")
        if model_type != "iflame":
            raise UploadError(
                f"{repo_id} exists and holds another model, of the type {model_type}: choose another name"
            )
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = [name for name in there if _is_ours(name) and name not in names]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, folder / name) for name in names]
            + [CommitOperationDelete(name) for name in stale],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = in_plain_words(error)
        raise UploadError(reason.replace(token, "***") if token else reason) from None
    return commit.pr_url or (f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else ""))


def in_plain_words(error: BaseException) -> str:
    """What went wrong on the way to the Hub, for somebody who does not know its client."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        words = STATUS_IN_WORDS.get(
            status, SERVER_FAULT.format(status=status) if status >= 500 else f"the Hub answers {status}"
        )
        return f"{words}. It says: {error.server_message}" if error.server_message else words
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the Hub may not be asked: unset it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full: {error}"
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return f"the Hub cannot be reached: {error or type(error).__name__}. Is there a network? Nothing was published"
    return str(error) or type(error).__name__


@ends_in_words("hub_upload")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="hub_upload.py", description=__doc__.strip().splitlines()[0])
    parser.add_argument("checkpoint_dir", type=Path, help="folder of a finished model, or a checkpoint of a run")
    parser.add_argument("--repo-id", help="USER/NAME or ORGANISATION/NAME on the Hub; made if not there")
    parser.add_argument("--dry-run", action="store_true", help="build and verify, show what would go up, and stop")
    parser.add_argument(
        "--folder",
        type=Path,
        help="build the folder here and keep it; must be empty or not exist. Without --repo-id nothing is sent",
    )
    parser.add_argument("--name", help="title of the card (default: that of the repository or the folder)")
    parser.add_argument(
        "--data", type=Path, help="prepared data set it was trained on: for the card, with all credits"
    )
    parser.add_argument("--evaluation", type=Path, help="evaluation.json of training/evaluate.py, for the card")
    parser.add_argument("--limits", type=Path, help="markdown file on what the model cannot do, for the card")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="precision of the weights in the files (default: that of the checkpoint's)"
    )
    parser.add_argument("--license", help="licence of the weights, an identifier of the Hub's list such as mit")
    parser.add_argument(
        "--dataset", action="append", default=[], help="data set on the Hub it was trained on; repeatable"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="weights above this size are split (default 5GB)")
    parser.add_argument("--private", action="store_true", help="make a new repository a private one")
    parser.add_argument("--revision", help="branch to commit to, made if not there (default main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit-message", default="Upload iFlame")
    parser.add_argument("--token", help="access token; better: `hf auth login`, or the variable HF_TOKEN")
    options = parser.parse_args(argv)
    _check(parser, options)
    token = options.token or get_token()
    if token is None and options.repo_id is not None and not options.dry_run:
        raise UploadError(
            "there is no access token: run `hf auth login`, set HF_TOKEN, or give --token. One that may write is made "
            "at https://huggingface.co/settings/tokens"
        )
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        raise UploadError(f"{options.folder} is not empty")
    sections, results = read_sections(options.data, options.evaluation, options.limits)
    model, tokenizer = load_checkpoint(options.checkpoint_dir)
    dtype = getattr(torch, options.dtype) if options.dtype else saved_dtype(options.checkpoint_dir)
    if dtype is not None:
        round_weights(model, dtype)
    parent = None if options.folder is None else options.folder.absolute().parent
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".iflame-hub-", dir=parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        build_folder(
            model,
            tokenizer,
            options.checkpoint_dir,
            folder,
            options.repo_id or _as_written(options.folder),
            options.revision,
            options.license,
            options.dataset,
            options.max_shard_size,
            dtype,
            sections,
            results,
            options.name,
        )
        sizes = published_files(folder, token)
        print("loading it in a process without this project ...", flush=True)
        verify_folder(folder, options.repo_id or f"nobody/{options.folder.absolute().name}", model)
        print("it loads, generates, and computes what the checkpoint does:")
        for name, size in sizes.items():
            print(f"{size:>14,}  {name}")
        print(f"{sum(sizes.values()):>14,}  bytes in {len(sizes)} files, {sum(sizes.values()) / 2**20:.1f} MiB")
        if options.folder is not None:
            if options.folder.exists():
                options.folder.rmdir()
            folder = folder.rename(options.folder)
        if options.repo_id is None:
            print(f"{options.folder} is built, nothing was sent; --repo-id USER/NAME would publish it")
            return
        if options.dry_run:
            print(f"dry run: nothing was sent; without --dry-run it would go to {options.repo_id}")
            return
        address = publish(
            folder,
            options.repo_id,
            token,
            options.private,
            options.revision,
            options.create_pr,
            options.commit_message,
        )
        print(f"published: {address}")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.repo_id is None:
        if options.folder is None:
            parser.error("give --repo-id USER/NAME to publish, or --folder DIR to build a folder")
        for name in ("private", "revision", "create_pr"):
            if getattr(options, name):
                parser.error(f"--{name.replace('_', '-')} is about the Hub: give --repo-id USER/NAME too")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", options.repo_id):
        parser.error(f"--repo-id must be USER/NAME, got {options.repo_id}")
    if options.create_pr and options.revision:
        parser.error("--create-pr is for the main branch: leave out --revision")


def _as_written(folder: Path) -> str:
    """How the card's code names a folder: as it was given, but without the folders of this machine."""
    return folder.name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()


if __name__ == "__main__":
    sys.exit(main())
