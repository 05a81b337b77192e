"""Imports in every order, each in a fork of a process that has imported torch alone, as test_imports.py asks."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch._dynamo
import torch.distributed.tensor  # with _dynamo most of what transformers imports, and most of the time  # noqa: F401
from served_checks import serve


def known_after(first: str) -> list:
    """What transformers knows after a first import."""
    exec(first, {})
    from transformers import AutoConfig

    config = AutoConfig.for_model("iflame")
    from transformers.pipelines import PIPELINE_REGISTRY

    task, _, _ = PIPELINE_REGISTRY.check_task("mesh-generation")
    import iflame_hf
    import iflame_hf.modeling_iflame

    is_one_class = iflame_hf.modeling_iflame.IFlameForCausalLM is iflame_hf.IFlameForCausalLM
    return [type(config).__name__, task, is_one_class]


def in_a_fork(*words: str) -> list:
    assert not {"transformers", "iflame_hf"} & set(sys.modules)
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(known_after, " ".join(words)).result()


if __name__ == "__main__":
    serve({"after": in_a_fork})
