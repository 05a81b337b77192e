"""Compiles kernels for a GPU that is not there, as test_kernels.py asks."""

import torch
import triton
from served_checks import serve
from small_models import small_model
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from iflame_hf import StaticIFlameCache, attention_kernels_iflame, kernels_iflame, linear_kernels_iflame
from iflame_hf.choosing_iflame import Choice, KernelChooser, Places, choose
from iflame_hf.kernels_iflame import compiled_ahead
from iflame_hf.ops_iflame import alibi_slopes
from iflame_hf.packing_iflame import pack_weights
from iflame_hf.steps_iflame import KernelSteps
from training.optim import muon_kernels

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class AbsentGPU:
    def __init__(self, architecture: str):
        self.target = GPUTarget("cuda", int(architecture), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def step(rows: str, dtype: str, pdl: str, kv_cache_dtype: str | None = None) -> list[str]:
    """Every kernel of the nine steps of a face, and the choice of a token."""
    rows, pdl = int(rows), pdl == "pdl"
    model = small_model(hidden_size=128, heads=4)
    cache = StaticIFlameCache(model.config, 5, rows, dtype=DTYPES[dtype], kv_cache_dtype=kv_cache_dtype)
    steps = KernelSteps(model.config, pack_weights(model, DTYPES[dtype]), cache, pdl)
    places = Places(rows, [9, 3, 1], torch.rand(9, 4), torch.rand(9, 4))
    chooser = KernelChooser(rows, 90, 132, 9, places, torch.zeros(rows, dtype=torch.long), pdl)
    steps.begin()
    with compiled_ahead():
        for place in range(9):
            steps.step(place)
            how = Choice(True, True, False, True, 129, 131, closing=True)
            chooser.choose(how, steps.logits, torch.zeros(rows, dtype=torch.long), place, True)
    return compiled(kernels_iflame, attention_kernels_iflame, choose=choose)


def attention(size: str, dtype: str) -> list[str]:
    """Linear attention with mesh bounds and states, forwards and backwards."""
    q, k, v = (torch.zeros(2, 200, 4, int(size), dtype=DTYPES[dtype], requires_grad=True) for _ in range(3))
    state = torch.zeros(2, 4, int(size), int(size), requires_grad=True)
    meshes = torch.zeros(2, 200, dtype=torch.long)
    with compiled_ahead():
        output, last, _ = linear_kernels_iflame._attention(q, k, v, alibi_slopes(4), state, meshes, True)
        (output.float().sum() + last.sum()).backward()
    return compiled(linear_kernels_iflame)


def muon() -> list[str]:
    """A step of tall and of wide matrices, whose rows begin where four elements are read at once or anywhere."""
    places = muon_kernels.Tables()
    with compiled_ahead():
        for shape in ((1365, 512), (512, 1365), (512, 512)):
            matrices = [[torch.zeros(shape)] * 2 for _ in range(3)]
            table = places.of(*matrices)
            x = muon_kernels.move_momenta(table, 0.95, True, 1e-7, torch.zeros(()))
            muon_kernels.step_parameters(table, x, torch.zeros(()), 0.1, 1.0, torch.zeros(()))
    return compiled(muon_kernels)


def compiled(*modules: object, **others: object) -> list[str]:
    """Names of the kernels that were compiled."""
    names = []
    for name, kernel in [*(item for module in modules for item in vars(module).items()), *others.items()]:
        if isinstance(kernel, triton.JITFunction) and kernel.device_caches:
            variants = kernel.device_caches[0][0]
            if variants:
                assert all(each.asm["cubin"] for each in variants.values())
                names.append(name)
            kernel.device_caches.clear()
    return sorted(names)


CHECKS = {"step": step, "attention": attention, "muon": muon}


def check_on(architecture: str, check: str, *arguments: str) -> list[str]:
    driver.set_active(AbsentGPU(architecture))
    return CHECKS[check](*arguments)


if __name__ == "__main__":
    serve({"on": check_on})
