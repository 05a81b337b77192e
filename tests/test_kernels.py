"""The kernels of a decoding step, run by Triton's interpreter, against the network and transformers' processors."""

import os
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from served_checks import served

from iflame_hf import kernels_iflame
from iflame_hf.kernels_iflame import compiled_ahead, launch

pytest.importorskip("triton")

# Triton looks at the variable when a kernel is defined: the interpreter has a process of its own.
SCRIPT = Path(__file__).with_name("interpreted_kernels.py")
COMPILER = Path(__file__).with_name("compiled_kernels.py")


CHECKS = [
    "step 1 few",
    "step 2 few",
    "step 5 many",
    "step 2 few int8",
    "step 3 many int8",
    "choice",
    "grammar",
    "order",
    "closing",
]


@pytest.fixture(scope="module")
def interpreter():
    with served(SCRIPT, {**os.environ, "TRITON_INTERPRET": "1"}) as ask:
        yield ask


@pytest.fixture(scope="module")
def compiler(tmp_path_factory):
    with served(COMPILER, {**os.environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}) as ask:
        yield ask


@pytest.mark.parametrize("check", CHECKS)
def test_kernels_compute_what_the_network_and_the_processors_do(interpreter, check):
    assert interpreter(check) == "as it should be"


FEW = ["attend_keys", "attend_linear_project", "choose", "combine_project", "gate_up", "project", "project_heads"]
MANY = ["attend_keys", "attend_linear", "choose", "gate_up", "project", "project_heads"]


@pytest.mark.parametrize(
    ("check", "kernels"),
    [
        ("90 step 1 bfloat16 pdl", FEW),
        ("90 step 2 bfloat16 pdl int8", FEW),
        ("80 step 64 float32 plain", MANY),
        ("90 attention 32 bfloat16", ["attend_segments", "segment_states"]),
        ("80 attention 128 float16", ["attend_segments"]),
        ("90 muon", ["divide_by_norms", "move_momentum", "move_parameters"]),
    ],
)
def test_kernels_are_compiled_ahead_for_a_gpu_that_is_not_there(compiler, check, kernels):
    assert compiler(f"on {check}") == kernels


class Kernel:
    """As Triton's: it is run by a grid, and compiled for arguments by `warmup`."""

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.calls.append(("run", grid, arguments, options))

    def warmup(self, *arguments, grid, **options):
        self.calls.append(("compile", grid, arguments, options))


@pytest.mark.parametrize("together", [True, False], ids=["", "early Triton"])
def test_kernels_that_are_launched_ahead_are_compiled_for_the_same_arguments_and_not_run(monkeypatch, together):
    executors = []

    @contextmanager
    def mode(executor):
        executors.append(executor.submit(lambda: "at work").result())
        yield

    fake = SimpleNamespace(AsyncCompileMode=mode) if together else SimpleNamespace()
    monkeypatch.setattr(kernels_iflame, "triton", fake)
    kernel = Kernel()
    with compiled_ahead():
        launch(kernel, (3,), "a", 1, num_warps=4)
    launch(kernel, (3,), "a", 1, num_warps=4)
    same = ((3,), ("a", 1), {"num_warps": 4})
    assert kernel.calls == [("compile", *same), ("run", *same)]
    assert executors == ["at work"] * together


def test_after_a_kernel_that_cannot_be_compiled_others_run():
    with pytest.raises(ZeroDivisionError), compiled_ahead():
        raise ZeroDivisionError
    kernel = Kernel()
    launch(kernel, (1,))
    assert kernel.calls[0][0] == "run"
