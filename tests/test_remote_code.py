"""What save_pretrained writes loads anywhere: by the Auto classes, without this project, from a folder or the Hub."""

import inspect
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import mesh_rows, small_model
from transformers.dynamic_module_utils import get_relative_imports

from iflame_hf import IFlameTokenizer
from training.publish import verify
from training.publish.verify import HIDDEN_PACKAGES, lay_out_cache, run_in_clean_process

TETRAHEDRON = ([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
AUTO_MAP = {
    "AutoConfig": "configuration_iflame.IFlameConfig",
    "AutoModel": "modeling_iflame.IFlameForCausalLM",
    "AutoModelForCausalLM": "modeling_iflame.IFlameForCausalLM",
}


def look_from_outside(folder: str, repo_id: str, needy_folder: str, needy_id: str, work: str, mesh) -> None:
    """Runs in the clean process, from its source alone; writes what it finds to report.json and logits.safetensors."""
    import importlib
    import json
    import sys
    from pathlib import Path

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    work = Path(work)
    input_ids = load_file(work / "input.safetensors")["input_ids"]
    report, logits, trust = {}, {}, {"trust_remote_code": True}

    def can_import(name):
        try:
            importlib.import_module(name)
        except ImportError:
            return False
        return True

    def look(name, source, save_as):
        model = AutoModel.from_pretrained(source, **trust)
        causal = AutoModelForCausalLM.from_pretrained(source, **trust)
        tokenizer = AutoTokenizer.from_pretrained(source, **trust)
        config = AutoConfig.from_pretrained(source, **trust)
        with torch.no_grad():
            logits[f"{name}/AutoModel"] = model(input_ids).logits
            logits[f"{name}/AutoModelForCausalLM"] = causal(input_ids).logits
        ids = model.generate(do_sample=True, num_return_sequences=3, max_new_tokens=36, eos_token_id=None)
        greedy = model.generate(do_sample=False, max_new_tokens=18, eos_token_id=None)
        save_to = work / save_as
        model.save_pretrained(save_to)
        tokenizer.save_pretrained(save_to)
        sys.modules.pop("trimesh", None)
        report[name] = {
            "classes": [type(each).__name__ for each in (config, tokenizer, model, causal)],
            "modules": sorted({type(each).__module__.split(".")[0] for each in (config, tokenizer, model, causal)}),
            "generated": ids.tolist(),
            "greedy": greedy.tolist(),
            "kinds": [type(decoded).__name__ for decoded in tokenizer.batch_decode_mesh(ids)],
            "faces": [
                len(decoded.faces) for decoded in [tokenizer.decode_mesh(ids[0]), *tokenizer.batch_decode_mesh(ids)]
            ],
            "encoded": tokenizer.encode_mesh(mesh),
            "auto_map": json.loads((save_to / "config.json").read_text())["auto_map"],
        }
        return str(save_to)

    report["importable"] = [name for name in (*HIDDEN, "trimesh") if can_import(name)]  # noqa: F821
    second = look("folder", folder, "second")
    look("cache", repo_id, "second_from_cache")
    third = look("second", second, "third")
    look("second_from_cache", str(work / "second_from_cache"), "third_from_cache")
    look("third", third, "fourth")
    for name, source in (("needy_folder", needy_folder), ("needy_cache", needy_id)):
        try:
            AutoModel.from_pretrained(source, **trust)
            report[name] = "loaded"
        except ImportError as error:
            report[name] = str(error)
    (work / "report.json").write_text(json.dumps(report))
    save_file(logits, work / "logits.safetensors")


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """What a user gets who saves model and tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "my-model.v1"
    model.save_pretrained(folder)
    IFlameTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def outside(folder, tmp_path_factory):
    """What a process finds that has nothing of this project: (report, logits)."""
    work = tmp_path_factory.mktemp("outside")
    home = work / "home"
    save_file({"input_ids": mesh_rows(2, 5)}, work / "input.safetensors")
    lay_out_cache(folder, home, "some-user/a.model-1")
    needy = work / "needy"
    needy.mkdir()
    for source in folder.iterdir():
        (needy / source.name).write_bytes(source.read_bytes())
    with (needy / "ops_iflame.py").open("a") as file:
        file.write("\n\ndef unguarded():\n    import triton\n\n    return triton\n")
    lay_out_cache(needy, home, "some-user/needy")
    arguments = (str(folder), "some-user/a.model-1", str(needy), "some-user/needy", str(work), TETRAHEDRON)
    # The first loads must do without trimesh too, which only meshes need.
    source = f"sys.modules['trimesh'] = None\nHIDDEN = {HIDDEN_PACKAGES}\n{inspect.getsource(look_from_outside)}\n"
    process = run_in_clean_process(f"{source}look_from_outside{arguments}", home)
    assert process.returncode == 0, process.stderr
    return json.loads((work / "report.json").read_text()), load_file(work / "logits.safetensors")


SOURCES = ["folder", "cache", "second", "second_from_cache", "third"]


def test_a_saved_folder_holds_the_files_of_model_and_tokenizer_and_all_they_import(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= names
    code = sorted(folder.glob("*.py"))
    assert {"configuration_iflame.py", "modeling_iflame.py", "tokenization_iflame.py"} <= {path.name for path in code}
    for path in code:
        assert {f"{module}.py" for module in get_relative_imports(path)} <= names
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["auto_map"] == {"AutoTokenizer": ["tokenization_iflame.IFlameTokenizer", None]}


def test_a_clean_process_lacks_hidden_packages_even_if_they_are_installed_and_the_settings_of_this_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(verify, "HIDDEN_PACKAGES", ("yaml",))
    monkeypatch.setenv("HF_TOKEN", "mine")
    (tmp_path / "only_here.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = (
        "import importlib.util as find, json, os\n"
        "found = [name for name in ('yaml', 'only_here', 'trimesh') if find.find_spec(name)]\n"
        "print(json.dumps([found, os.environ.get('HF_TOKEN'), os.environ['HF_HOME'], os.getcwd()]))"
    )
    home = tmp_path / "home"
    process = run_in_clean_process(source, home)
    assert json.loads(process.stdout) == [["trimesh"], None, str(home), str(home)]


def test_the_outside_process_cannot_import_this_project_or_optional_packages(outside):
    report, _ = outside
    assert {"iflame_hf", "triton", "flash_attn", "lightning_attn", "fla"} <= set(HIDDEN_PACKAGES)
    assert report["importable"] == []
    assert "iflame_hf" in sys.modules, "while it can be imported here"


@pytest.mark.parametrize("source", SOURCES)
def test_the_four_auto_classes_give_the_classes_of_the_remote_code(outside, source):
    found = outside[0][source]
    assert found["classes"] == ["IFlameConfig", "IFlameTokenizer", "IFlameForCausalLM", "IFlameForCausalLM"]
    assert found["modules"] == ["transformers_modules"]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM"])
def test_logits_outside_are_those_of_the_saved_model(outside, model, source, auto_class):
    with torch.no_grad():
        expected = model(mesh_rows(2, 5)).logits
    torch.testing.assert_close(outside[1][f"{source}/{auto_class}"], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_an_auto_model_generates_ids_that_its_tokenizer_makes_meshes_of(outside, model, source):
    found = outside[0][source]
    generated = torch.tensor(found["generated"])
    assert generated.shape == (3, 9 + 36)
    assert (generated[:, :9] == model.config.bos_token_id).all()
    tokenizer = IFlameTokenizer()
    assert found["kinds"] == ["Trimesh"] * 3
    assert found["faces"] == [len(tokenizer.decode_mesh(row).faces) for row in generated[[0, 0, 1, 2]]]
    assert max(found["faces"]) > 0
    expected = model.generate(do_sample=False, max_new_tokens=18, eos_token_id=None)
    assert found["greedy"] == expected.tolist()


@pytest.mark.parametrize("source", SOURCES)
def test_an_auto_tokenizer_writes_the_ids_of_the_tokenizer_here(outside, source):
    assert outside[0][source]["encoded"] == IFlameTokenizer().encode_mesh(TETRAHEDRON)


@pytest.mark.parametrize("source", SOURCES)
def test_what_remote_code_saves_brings_its_own_code(outside, source):
    assert outside[0][source]["auto_map"] == AUTO_MAP


def test_only_a_load_through_the_hubs_cache_shows_that_an_imported_file_needs_too_much(outside):
    report, _ = outside
    assert report["needy_folder"] == "loaded"
    assert "triton" in report["needy_cache"]
