"""Makes transformers' own tests importable, where the environment variable TRANSFORMERS_TESTS says where they are."""

import os
import re
import sys
import types
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if "TRANSFORMERS_TESTS" not in os.environ:
        return
    root = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
    if not (root / "tests" / "generation").is_dir():
        _stand_in_for_what_a_source_package_lacks()
    # Last, so that nothing else in the checkout is found before an installed package.
    sys.path.append(str(root))
    tests = root / "tests"
    for path in [tests / "test_modeling_common.py", *tests.glob("generation/*.py"), *tests.glob("exporters/*.py")]:
        for mark in set(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")


def _stand_in_for_what_a_source_package_lacks() -> None:
    """Tests of models import those of generate(), of export and of settings, which only a checkout has: empty here."""
    lacking = {
        "tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        "tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        "tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
    }
    for name, contents in lacking.items():
        package, module = types.ModuleType(name.rpartition(".")[0]), types.ModuleType(name)
        package.__path__ = []
        vars(module).update(contents)
        sys.modules |= {package.__name__: package, name: module}
