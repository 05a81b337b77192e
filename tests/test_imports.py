"""What an import of the package brings with it, in processes that have imported nothing yet."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from served_checks import served

import iflame_hf

ROOT = Path(__file__).resolve().parents[1]
HEAVY = "print([name for name in ('torch', 'transformers', 'trimesh') if name in sys.modules])"


def output_of(code):
    process = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split("\n")[:-1]


def test_geometry_is_imported_without_torch_transformers_or_trimesh():
    code = """
import iflame_hf
from iflame_hf.mesh_iflame import canonicalise, normalise, quantise
from iflame_hf.export_iflame import GENERATOR
"""
    assert output_of(code + HEAVY) == ["[]"]


@pytest.fixture(scope="module")
def fresh():
    with served(ROOT / "tests" / "first_imports.py", {**os.environ, "PYTHONPATH": str(ROOT)}) as ask:
        yield ask


@pytest.mark.parametrize(
    "first",
    [
        "import iflame_hf",
        "import transformers, iflame_hf",
        "from iflame_hf import IFlameConfig",
        "import iflame_hf.modeling_iflame",
        "from iflame_hf.configuration_iflame import IFlameConfig",
        "from iflame_hf.mesh_iflame import normalise",
        "from iflame_hf.tokenization_iflame import IFlameTokenizer",
        "import importlib, iflame_hf; importlib.reload(iflame_hf)",
    ],
)
def test_transformers_knows_the_classes_whatever_is_imported_first(fresh, first):
    assert fresh(f"after {first}") == ["IFlameConfig", "mesh-generation", True]


def test_a_model_is_made_and_saved_without_a_module_of_meshes(tmp_path):
    code = f"""
from iflame_hf.modeling_iflame import IFlameForCausalLM
from iflame_hf.configuration_iflame import IFlameConfig
import iflame_hf._registration
for name in [name for name in sys.modules if name.startswith("iflame_hf.") and name.split(".")[1].split("_")[0] in
             ("mesh", "pipeline", "export", "tokenization", "streaming", "faces")]:
    sys.modules[name] = None  # an import of it raises
model = IFlameForCausalLM(IFlameConfig(hidden_size=32, num_attention_heads=4, stage_layers=[1, 0, 1, 0, 0]))
before = set(vars(model.config))
model.save_pretrained({str(tmp_path)!r})
print(set(vars(model.config)) - before, "trimesh" in sys.modules)
"""
    assert output_of(code) == ["set() False"]
    assert {"modeling_iflame.py", "pipeline_iflame.py", "mesh_iflame.py"} <= {path.name for path in tmp_path.iterdir()}


def test_the_network_names_no_module_of_meshes_but_for_what_travels_with_it():
    meshes = ("mesh", "pipeline", "export", "tokenization", "streaming", "faces")
    for name in ("modeling", "generation", "levels", "layout", "ops", "cache", "states", "configuration"):
        tree = ast.parse((ROOT / "iflame_hf" / f"{name}_iflame.py").read_text(encoding="utf-8"))
        for node in tree.body:  # not what stands under TYPE_CHECKING
            for imported in ast.walk(node) if not isinstance(node, ast.If) else ():
                if isinstance(imported, ast.ImportFrom):
                    assert not (imported.module or "").startswith(meshes), (
                        f"{name}_iflame.py imports {imported.module}"
                    )


def test_every_public_name_is_there_and_no_other():
    assert set(iflame_hf.__all__) <= set(dir(iflame_hf))
    for name in iflame_hf.__all__:
        assert getattr(iflame_hf, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        iflame_hf.nothing  # noqa: B018
