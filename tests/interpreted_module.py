"""Copies of modules whose kernels Triton's interpreter runs."""

import importlib.util
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def interpreted(module):
    """A copy of a module whose kernels are interpreted: Triton looks at the variable when a kernel is defined."""
    name = f"iflame_hf.interpreted_{module.__name__.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, Path(module.__file__))
    copy = sys.modules[name] = importlib.util.module_from_spec(spec)
    from quick_interpreter import make_quick

    make_quick()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(copy)
    yield copy
    del sys.modules[name]
