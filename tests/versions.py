"""
Tries the project with several versions of transformers and prints a table; exit status 1 if anything fails.

    python tests/versions.py                               # oldest supported, middle and newest, in fresh environments
    python tests/versions.py --transformers 5.18.0 5.21.1  # these versions
    python tests/versions.py --python .venv/bin/python     # an environment that is there, as it is
    python tests/versions.py --newest --python .venv/bin/python  # the same, but with the newest transformers

It needs nothing but Python and, for fresh environments, pip and about 2 GB of disk for each. The first version saves a
model, and all others must load it and compute the same; so must all of them what the last version saved.
"""

import argparse
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = {
    "load": "the model that the first version saved, by the Auto classes, with the same logits",
    "generate": "the state by both names, the same greedy tokens, samples, beams, a completion, faces one by one",
    "train": "two steps of training/train.py, then a third after a resume",
    "save": "save and load again, with the same logits",
    "load newest": "the model that the last version saved, with the same logits",
    "pipeline": 'pipeline("mesh-generation")',
    "remote code": "all of that in a clean process without this project, through a cache laid out as the Hub's",
}
# Of logits in float32 between versions.
LARGEST_DIFFERENCE = 1e-5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", nargs="+", metavar="VERSION", help="versions to make environments with")
    parser.add_argument("--python", nargs="+", default=[], metavar="PATH", help="interpreters to take as they are")
    parser.add_argument(
        "--newest", action="store_true", help="with each --python, but with the newest release of transformers"
    )
    parser.add_argument("--folder", type=Path, help="keep environments here and use them again (default: thrown away)")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", default=list(CHECKS), choices=list(CHECKS), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside is not None:
        return check_this_interpreter(options.inside, options.only)
    with tempfile.TemporaryDirectory(prefix="iflame-versions-") as scratch:
        if options.newest and not options.python:
            parser.error("--newest is for environments that are there: name one with --python")
        versions = options.transformers or ([] if options.python else supported_versions())
        makers = [lambda path=path: os.path.abspath(path) for path in options.python]
        if options.newest:
            makers = [lambda path=path: with_newest(os.path.abspath(path), Path(scratch)) for path in options.python]
        makers += [lambda v=version: make_environment(v, options.folder or Path(scratch)) for version in versions]
        pythons, results = [], []
        for maker in makers:
            pythons.append(maker())
            print(f"{pythons[-1]} ...", file=sys.stderr, flush=True)
            at_once = [name for name in CHECKS if name != "load newest"]
            results.append(check(pythons[-1], Path(scratch) / "shared", at_once))
        for python, result in zip(pythons, results, strict=True):
            print(f"{python} ...", file=sys.stderr, flush=True)
            result["checks"] |= check(python, Path(scratch) / "shared", ["load newest"])["checks"]
    print(table(results))
    return 0 if results and all(value == "ok" for result in results for value in result["checks"].values()) else 1


def supported_versions() -> list[str]:
    """The oldest version that setup.cfg allows, the newest that pip finds, and the newest of the series between."""
    return choose_versions(released(sys.executable), *supported_range())


def supported_range() -> tuple[str, int]:
    """The oldest version of transformers that setup.cfg allows, and the major version below which all are allowed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    low, high = re.search(r"transformers>=([\d.]+),<(\d+)", setup["options"]["install_requires"]).groups()
    return low, int(high)


def released(python: str) -> list[str]:
    """Every version of transformers that pip offers this interpreter."""
    command = [python, "-m", "pip", "index", "versions", "transformers"]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"\b\d+\.\d+\.\d+\b", listing.partition("Available versions:")[2].splitlines()[0])


def with_newest(python: str, folder: Path) -> str:
    """An interpreter with all that this one has, but the newest transformers that setup.cfg allows; maybe this one."""
    newest = choose_versions(released(python), *supported_range())[-1]
    ask = "import sysconfig, transformers; print(transformers.__version__, sysconfig.get_path('purelib'))"
    answer = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout
    installed, packages = answer.strip().splitlines()[-1].split(maxsplit=1)
    if installed == newest:
        return python
    home = folder / f"newest-{newest}"
    print(f"making {home} with transformers {newest} in the place of {installed}", file=sys.stderr, flush=True)
    subprocess.run([python, "-m", "venv", "--clear", str(home)], check=True)
    over = interpreter(home)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([over, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(own) / "environment_below.pth").write_text(packages + "\n", encoding="utf-8")
    pip = [over, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, f"transformers=={newest}"], check=True)
    return over


def interpreter(home: Path) -> str:
    """That of a virtual environment."""
    return str(home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python"))


def choose_versions(found: list[str], low: str, below: int) -> list[str]:
    """Of released `found`: the first from `low` on, the last of the middle series, the last with a major < `below`."""
    numbers = sorted({tuple(map(int, version.split("."))) for version in found})
    least = tuple(map(int, low.split(".")))
    numbers = [number for number in numbers if least <= number and number[0] < below]
    series = sorted({number[:2] for number in numbers})
    middle = [number for number in numbers if number[:2] == series[len(series) // 2]][-1]
    return [".".join(map(str, number)) for number in sorted({numbers[0], middle, numbers[-1]})]


def make_environment(version: str, folder: Path) -> str:
    """A virtual environment with this version of transformers, and what train.py needs; its interpreter's path."""
    home = folder / f"transformers-{version}"
    python = interpreter(home)
    if (home / "ready").exists():
        return python
    print(f"making {home}: some minutes", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[0]
    subprocess.run([*pip, torch], check=True)  # by itself, so that a CPU build already chosen stays
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["train"]
    subprocess.run([*pip, torch, f"transformers=={version}", *wanted.split("\n")[1:]], check=True)
    (home / "ready").touch()
    return python


def check(python: str, shared: Path, names: list[str]) -> dict:
    """What an interpreter finds: its versions, and for each of these checks "ok" or the reason."""
    command = [python, str(Path(__file__).resolve()), "--inside", str(shared), "--only", *names]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    try:
        return json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {"versions": {"transformers": python}, "checks": dict.fromkeys(names, "the process died")}


def table(results: list[dict]) -> str:
    """Markdown: a row an interpreter, a column a check; below it the reasons of what failed."""
    lines = ["| transformers | torch | huggingface-hub | Python | " + " | ".join(CHECKS) + " |"]
    lines.append("|---" * (4 + len(CHECKS)) + "|")
    failures = []
    for result in results:
        versions, checks = result["versions"], result["checks"]
        cells = [versions.get(name, "") for name in ("transformers", "torch", "huggingface_hub", "python")]
        cells += ["ok" if checks[name] == "ok" else "**fails**" for name in CHECKS]
        lines.append("| " + " | ".join(cells) + " |")
        failures += [f"- {cells[0]}, {name}: {why}" for name, why in checks.items() if why != "ok"]
    return "\n".join([*lines, *([""] if failures else []), *failures])


def check_this_interpreter(shared: Path, names: list[str]) -> int:
    """Runs these checks here, and prints what came of them as one line of JSON."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sys.path.insert(0, str(ROOT))
    import huggingface_hub
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    versions = {module.__name__: module.__version__ for module in (transformers, torch, huggingface_hub)}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    checks = {}
    with tempfile.TemporaryDirectory(prefix="iflame-version-") as scratch:
        tries = _Tries(shared, Path(scratch))
        for name in names:
            began = time.monotonic()
            checks[name] = _reason(getattr(tries, name.replace(" ", "_")))
            print(f"  {name}: {checks[name]} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
    print(json.dumps({"versions": versions, "checks": checks}))
    return 0


def _reason(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[-1][:300]}"
    return "ok"


class _Tries:
    """The checks, in their order; each raises for what is wrong."""

    def __init__(self, shared: Path, scratch: Path):
        from small_models import mesh_rows, small_model

        self.shared, self.scratch = shared, scratch
        self.ids, self.fresh = mesh_rows(2, 5), small_model()

    def load(self) -> None:
        import torch

        from iflame_hf import IFlameTokenizer

        if not self.shared.exists():
            self.fresh.save_pretrained(self.shared)
            IFlameTokenizer().save_pretrained(self.shared)
            torch.save(self.answers(self.fresh), self.shared / "expected.pt")
        self.expected = torch.load(self.shared / "expected.pt", weights_only=True)
        self.tokenizer, self.model = self.loaded(self.shared)

    def loaded(self, folder: Path) -> tuple:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

        from iflame_hf import IFlameForCausalLM, IFlameTokenizer

        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
        assert isinstance(tokenizer, IFlameTokenizer) and isinstance(model, IFlameForCausalLM)
        for each in (model, AutoModelForCausalLM.from_pretrained(folder)):
            self.compare(self.answers(each)["logits"])
        return tokenizer, model

    def load_newest(self) -> None:
        import torch

        self.expected = torch.load(self.shared / "expected.pt", weights_only=True)
        self.loaded(self.shared / "of-the-last-version")

    def answers(self, model) -> dict:
        import torch

        with torch.no_grad():
            logits = model(self.ids).logits
        # The ids are those of no mesh.
        options = {"do_sample": False, "max_new_tokens": 45, "eos_token_id": None, "mesh_grammar": False}
        greedy = model.generate(self.ids[:, :27], **options)
        return {"logits": logits, "greedy": greedy}

    def compare(self, logits) -> None:
        difference = (logits - self.expected["logits"]).abs().max().item()
        assert difference <= LARGEST_DIFFERENCE, f"logits differ by {difference:.2g}"

    def generate(self) -> None:
        import torch

        from iflame_hf import IFlameCache, stream_faces

        for name in ("cache", "past_key_values"):
            state = IFlameCache(self.model.config)
            output = self.model(self.ids, **{name: state}, use_cache=True)
            assert output.cache is output.past_key_values is state, f"the state is lost as {name}"
        assert torch.equal(self.answers(self.model)["greedy"], self.expected["greedy"]), "greedy tokens differ"
        ids = self.model.generate(do_sample=True, num_return_sequences=4, max_new_tokens=45, eos_token_id=None)
        assert ids.shape == (4, 54) and len(self.tokenizer.batch_decode_mesh(ids)) == 4
        options = {"max_new_tokens": 18, "mesh_grammar": False}
        beams = self.model.generate(self.ids[:1, :27], num_beams=3, do_sample=False, **options)
        assert torch.equal(beams[:, :27], self.ids[:1, :27])
        streamed = stream_faces(self.model, self.tokenizer, self.ids[0], do_sample=True, **options)
        assert len(list(streamed)) > 0, "no face was streamed"

    def train(self) -> None:
        sizes = "--hidden_size 16 --num_attention_heads 2 --stage_layers 1 1 1 1 1 --full_attention_interval 2"
        data = "--num_procedural_meshes 8 --num_procedural_validation_meshes 2 --procedural_max_faces 48"
        rest = "--row_length 450 --save_steps 2 --num_samples 1 --sample_max_faces 2 --use_cpu --disable_tqdm"
        out = self.scratch / "run"
        for steps in (2, 3):
            resume = [] if steps == 2 else ["--resume_from_checkpoint", "latest"]
            command = [sys.executable, "training/train.py", f"--max_steps={steps}", f"--output_dir={out}", *resume]
            process = subprocess.run(
                [*command, *sizes.split(), *data.split(), *rest.split()], cwd=ROOT, capture_output=True, text=True
            )
            assert process.returncode == 0, process.stderr
        steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert max(steps) == 3 and (out / "model.safetensors").is_file()

    def save(self) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = self.scratch / "saved"
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        shutil.copytree(folder, self.shared / "of-the-last-version", dirs_exist_ok=True)
        self.compare(self.answers(AutoModel.from_pretrained(folder))["logits"])
        mesh = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
        assert AutoTokenizer.from_pretrained(folder).encode_mesh(mesh) == self.tokenizer.encode_mesh(mesh)

    def pipeline(self) -> None:
        from transformers import pipeline

        generator = pipeline("mesh-generation", model=str(self.shared), device="cpu")
        meshes = generator(num_meshes=3, max_faces=4, seed=0, batch_size=2)
        assert len(meshes) == 3 and all(type(mesh).__name__ == "Trimesh" for mesh in meshes)

    def remote_code(self) -> None:
        from training.publish.verify import verify_folder

        for folder in (self.shared, self.scratch / "saved"):
            verify_folder(folder, "some-user/some-model", self.model)


if __name__ == "__main__":
    sys.exit(main())
