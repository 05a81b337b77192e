"""Makes transformers' own tests importable, where the environment variable TRANSFORMERS_TESTS says where they are."""

import os
import re
import sys
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if "TRANSFORMERS_TESTS" not in os.environ:
        return
    root = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
    # Last, so that nothing else in the checkout is found before an installed package.
    sys.path.append(str(root))
    tests = root / "tests"
    for path in [tests / "test_modeling_common.py", *tests.glob("generation/*.py"), *tests.glob("exporters/*.py")]:
        for mark in set(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")
