"""Makes transformers' own tests importable, where the environment variable TRANSFORMERS_TESTS says where they are."""

import os
import re
import sys
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    root = os.environ.get("TRANSFORMERS_TESTS")
    if root is None:
        return
    # Last, so that nothing else in the checkout is found before an installed package.
    sys.path.append(root)
    tests = Path(root) / "tests"
    for path in [tests / "test_modeling_common.py", *tests.glob("generation/*.py"), *tests.glob("exporters/*.py")]:
        for mark in set(re.findall(r"\bmark\.(\w+)", path.read_text(encoding="utf-8"))):
            config.addinivalue_line("markers", f"{mark}: a mark of transformers' tests")
