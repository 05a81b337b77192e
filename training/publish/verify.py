"""Whether a folder works where this project is not installed: it is loaded and compared in a process of its own."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_relative_imports

from iflame_hf import IFlameForCausalLM
from training.run.ending import CommandError

# What a process that loads the model from the Hub may lack.
HIDDEN_PACKAGES = ("iflame_hf", "training", "hub_upload", "triton", "flash_attn", "lightning_attn", "fla")
# Of logits in float32, between the loaded checkpoint and the folder that is published.
LARGEST_DIFFERENCE = 1e-4


class UploadError(CommandError):
    """Why a model is not published, in words for its user."""


def verify_folder(folder: Path, repo_id: str, model: IFlameForCausalLM) -> None:
    """
    Loads the folder as a stranger would, through a cache like the Hub's own, in a process in which neither this
    project nor an optional package can be imported; generates meshes, and compares logits with those of `model`.

    `model` is left in float32.

    Raises:
        UploadError: it does not load, or computes something else, with the reason.
    """
    random = torch.Generator().manual_seed(0)
    levels = torch.randint(
        0, model.config.coordinate_resolution + 1, (1, 7 * model.config.tokens_per_face), generator=random
    )
    start = torch.full((1, model.config.tokens_per_face), model.config.bos_token_id)
    input_ids = torch.cat([start, levels], dim=1)
    with torch.no_grad():
        expected = model.float()(input_ids).logits
    if not expected.isfinite().all():
        raise UploadError("the model computes values that are not finite: its training went wrong")
    with tempfile.TemporaryDirectory(prefix="iflame-verify-", ignore_cleanup_errors=True) as scratch:
        home = Path(scratch) / "home"
        lay_out_cache(folder, home, repo_id)
        given, found = Path(scratch) / "given.safetensors", Path(scratch) / "found.safetensors"
        save_file({"input_ids": input_ids}, given)
        source = f"{inspect.getsource(_load_as_a_stranger)}\n_load_as_a_stranger{(repo_id, str(given), str(found))}"
        process = run_in_clean_process(source, home)
        if process.returncode != 0:
            reason = _missing_module(folder) or _last_error(process.stderr)
            raise UploadError(f"the folder does not work where this project is not installed: {reason}")
        difference = (load_file(found)["logits"] - expected).abs().max().item()
    if not difference <= LARGEST_DIFFERENCE:
        raise UploadError(
            f"loaded from the folder, the model computes something else: logits differ by {difference:.2g}"
        )


def _load_as_a_stranger(repo_id: str, given: str, found: str) -> None:
    """Runs in the clean process, from its source alone."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(repo_id, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(repo_id, trust_remote_code=True)
    model = AutoModel.from_pretrained(repo_id, trust_remote_code=True)
    config = AutoConfig.from_pretrained(repo_id, trust_remote_code=True)
    ids = model.generate(do_sample=True, num_return_sequences=2, max_new_tokens=27)
    assert ids[:, :9].eq(config.bos_token_id).all(), "generate() does not begin with the start face"
    assert len(tokenizer.batch_decode_mesh(ids)) == 2, "generated ids do not become meshes"
    generator = pipeline("mesh-generation", model=repo_id, trust_remote_code=True)
    assert len(generator(num_meshes=2, max_faces=3)) == 2, "the pipeline does not generate two meshes"
    with torch.no_grad():
        logits = model.float()(load_file(given)["input_ids"]).logits
    save_file({"logits": logits}, found)


def _missing_module(folder: Path) -> str | None:
    """Which file of remote code the folder lacks: transformers' own message does not name it."""
    for path in sorted(folder.glob("*.py")):
        for module in sorted(get_relative_imports(path)):
            if not (folder / f"{module}.py").is_file():
                return f"{path.name} imports {module}.py, which is missing"
    return None


def _last_error(stderr: str) -> str:
    """The message of the exception that ended a process, in one line."""
    lines = stderr.strip().splitlines() or ["it ended without a message"]
    begin = [number for number, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return " ".join(lines[begin[-1] if begin else -1 :])


def lay_out_cache(folder: Path, home: Path, repo_id: str) -> None:
    """Lays a folder out below `home` (a value for HF_HOME) as if its files had been downloaded from `repo_id`."""
    repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    blobs = repository / "blobs"
    for directory in (repository / "refs", snapshot, blobs):
        directory.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for number, source in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / source.relative_to(folder)
        link.parent.mkdir(exist_ok=True)
        blob = blobs / f"{number:040x}"
        try:
            blob.symlink_to(source.resolve())
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # Windows, where links need a privilege
            shutil.copyfile(source, link)


def run_in_clean_process(
    source: str, home: Path, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """
    Runs Python source in a process that sees of Hugging Face's files only `home`, no GPU, no network, no access token,
    and none of this project's modules or the optional packages, installed or not.

    Args:
        settings: environment variables that differ.
    """
    foreign = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    home.mkdir(parents=True, exist_ok=True)
    # None in sys.modules: Python takes the package for one that is not installed.
    hide = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN_PACKAGES}))"
    return subprocess.run(
        [sys.executable, "-I", "-c", f"{hide}\n{source}"],
        cwd=home,
        env=kept | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **(settings or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
