"""The kernels of a decoding step, run by Triton's interpreter, against the network and transformers' processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Triton looks at the variable when a kernel is defined: the interpreter has a process of its own.
SCRIPT = Path(__file__).with_name("interpreted_kernels.py")


CHECKS = [
    "step 1 few",
    "step 2 few",
    "step 5 many",
    "step 2 few int8",
    "step 3 many int8",
    "choice",
    "grammar",
]


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_compute_what_the_network_and_the_processors_do(check):
    run = subprocess.run(
        [sys.executable, SCRIPT, *check.split()],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip().endswith("as it should be")
