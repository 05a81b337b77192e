"""
Kernels of a decoding step, in Triton: the products of a block, with what stands before and after them;
attention_kernels_iflame.py has what lies between. They know no configuration and no policy: steps_iflame.py says which
runs when.

Each kernel is one phase of a block: what it does begins when the phase before has ended. So that the wait costs
little, a kernel is launched while the one before it works (programmatic dependent launch), reads what neither that one
nor an earlier one of this token writes, its weights above all, and only then waits.

Few rows (`WIDE` false) are multiplied row by row, which is bound by reading the weights; many in tiles, on the matrix
units. Activations that go from phase to phase are float32; products take them in the weights' type.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # optional
    triton = tl = None


_is_compiling_ahead = ContextVar("_is_compiling_ahead", default=False)


@functools.cache
def _fault_of_triton() -> str | None:
    if triton is None:
        return "a missing package: pip install triton"
    try:
        # Triton compiles what calls the driver, in C, when it is first asked for it.
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = f"{reason} (it needs a C compiler and Python's headers)"
        warnings.warn(f"triton does not run, so training and generate() are slower: {reason}", stacklevel=2)
        return f"a GPU on which triton does not run: {reason}"
    if target.backend != "cuda":
        return "a GPU that is not NVIDIA's"
    return "a GPU of a compute capability below 8.0" if target.arch < 80 else None


@torch.compiler.assume_constant_result
def why_no_kernels() -> str | None:
    """Why Triton's kernels cannot run on this machine's GPU, or None. It is found out once."""
    return _fault_of_triton()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel of Triton's; within `compiled_ahead`, compiles what this call would run."""
    if _is_compiling_ahead.get():
        kernel.warmup(*arguments, grid=grid, **options)
    else:
        kernel[grid](*arguments, **options)


@contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within it kernels that are launched are compiled, side by side, and not run; at its end they are ready."""
    together = getattr(triton, "AsyncCompileMode", None)  # which early versions of Triton have not
    token = _is_compiling_ahead.set(True)
    try:
        with (
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as executor,
            nullcontext() if together is None else together(executor),
        ):
            yield
    finally:
        _is_compiling_ahead.reset(token)


def jit(*unspecialised: str) -> Callable[[Callable[..., None]], Any]:
    """Makes kernels of functions, where there is Triton; what arguments of these names are makes no other kernel."""

    def made(function: Callable[..., None]) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(unspecialised))

    return made


# The place of a token in its face: one kernel for all nine.
_jit = jit("place")


# Of a word of four whole numbers of eight bits, the floats: each, made positive, becomes the last bits of 2 ** 23.
_FLOATS_OF_WORD = (
    "{ .reg .b32 x, y; xor.b32 x, $4, 0x80808080;"
    + "".join(f" prmt.b32 y, x, 0x4B000000, 0x744{byte}; add.f32 ${byte}, y, 0fCB000080;" for byte in range(4))
    + " }"
)
if triton is not None:
    FLOATS_OF_WORD = tl.constexpr(_FLOATS_OF_WORD)
    IS_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# B rows, C channels, H heads, D head size, N outputs, K inputs, I hidden units, S splits of the keys, G head groups

# What the input of a block is: the output of the one before, or at the start of a stage what is made of tokens, of a
# group that is complete, or of the level's own items and what the level below handed up.
PLAIN, EMBED, POOL, UPSAMPLE = "plain", "embed", "pool", "upsample"


@_jit
def _wait(PDL: tl.constexpr):
    """Waits until the phase before has ended, and lets the one after be launched."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Not before: a kernel that is launched while two are at work costs more than what it reads early is worth.
        tl.extra.cuda.gdc_launch_dependents()


@_jit
def _words(pointer):
    """A pointer to whole numbers of eight bits, as one to words of four. Single ones are unpacked one by one."""
    return pointer.to(tl.pointer_type(tl.int32))


@_jit
def _floats(words):
    """The whole numbers of eight bits in words (..., N), as float32 (..., 4N)."""
    if IS_INTERPRETED:
        a, b = ((words << 24) >> 24).to(tl.float32), ((words << 16) >> 24).to(tl.float32)
        c, d = ((words << 8) >> 24).to(tl.float32), (words >> 24).to(tl.float32)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            FLOATS_OF_WORD, "=f,=f,=f,=f,r", [words], (tl.float32, tl.float32, tl.float32, tl.float32), True, 1
        )
    joined = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(joined, words.shape[:-1] + [4 * words.shape[-1]])


@_jit
def _product(x, w, WIDE: tl.constexpr):
    """(BM, BK) rows times (BN, BK) weights: (BM, BN) float32."""
    if WIDE:
        y = tl.dot(x.to(w.dtype), tl.trans(w), input_precision="ieee")
    else:
        y = tl.sum(w.to(tl.float32) * x.to(tl.float32), axis=1)[None, :]
    return y


@_jit
def _source(
    x_ptr,
    handed_ptr,
    scale_ptr,
    token_ptr,
    batch,
    inner,
    mask,
    rows,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCE: tl.constexpr,
):
    """A tile (BM, BK) of a block's input."""
    at = batch[:, None] * C + inner[None, :]
    if SOURCE == "embed":
        token = tl.load(token_ptr + batch, mask=batch < rows, other=0)
        x = tl.load(x_ptr + token[:, None] * C + inner[None, :], mask=mask, other=0.0)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if SOURCE == "pool":
        for member in tl.static_range(1, GROUP):
            x += tl.load(x_ptr + member * rows * C + at, mask=mask, other=0.0)
        x = x / GROUP
    if SOURCE == "upsample":
        x += tl.load(scale_ptr).to(tl.float32) * tl.load(handed_ptr + at, mask=mask, other=0.0)
    return x


@_jit
def project_heads(
    x_ptr,  # (B, C) float32; of "embed" (V, C), what each token begins as; of "pool" (GROUP, B, C), a group's members
    handed_ptr,  # (B, C) float32: what the level below handed up, of "upsample"
    scale_ptr,  # its scale
    token_ptr,  # (B,) int64, of "embed"
    made_ptr,  # (B, C) float32: receives the input, unless it is "plain"
    norm_ptr,  # (C,)
    w_ptr,  # (2, 3C / 2, C): the first halves of all heads of query, key and value, then the second ones
    rotary_ptr,  # (B, D) float32: cosines, then sines
    out_ptr,  # (B, 3C) float32: query, key, value
    rows,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    SOURCE: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Norm, query, key and value, rotary embedding."""
    half: tl.constexpr = D // 2
    apart: tl.constexpr = 3 * C // 2 * C
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    owned = outs < 3 * C // 2
    batch = tl.program_id(1) * BM + tl.arange(0, BM)
    live = batch < rows
    section = outs // (C // 2)
    angle = batch[:, None] * D + (outs % half)[None, :]
    turned = live[:, None] & (section < 2)[None, :]
    if BK < C:
        _wait(PDL)
        a = tl.zeros((BM, BN), tl.float32)
        b = tl.zeros((BM, BN), tl.float32)
        square = tl.zeros((BM,), tl.float32)
        for start in range(0, C, BK):
            k = start + inner
            mask = owned[:, None] & (k < C)[None, :]
            there = live[:, None] & (k < C)[None, :]
            first = tl.load(w_ptr + outs[:, None] * C + k[None, :], mask=mask, other=0.0)
            second = tl.load(w_ptr + apart + outs[:, None] * C + k[None, :], mask=mask, other=0.0)
            norm = tl.load(norm_ptr + k, mask=k < C, other=0.0).to(tl.float32)[None, :]
            x = _source(x_ptr, handed_ptr, scale_ptr, token_ptr, batch, k, there, rows, C, GROUP, SOURCE)
            if SOURCE != "plain":
                if tl.program_id(0) == 0:
                    tl.store(made_ptr + batch[:, None] * C + k[None, :], x, mask=there)
            square += tl.sum(x * x, axis=1)
            x = x * norm
            a += _product(x, first, WIDE)
            b += _product(x, second, WIDE)
    else:
        mask = owned[:, None] & (inner < C)[None, :]
        there = live[:, None] & (inner < C)[None, :]
        first = tl.load(w_ptr + outs[:, None] * C + inner[None, :], mask=mask, other=0.0)
        second = tl.load(w_ptr + apart + outs[:, None] * C + inner[None, :], mask=mask, other=0.0)
        norm = tl.load(norm_ptr + inner, mask=inner < C, other=0.0).to(tl.float32)[None, :]
        _wait(PDL)
        x = _source(x_ptr, handed_ptr, scale_ptr, token_ptr, batch, inner, there, rows, C, GROUP, SOURCE)
        if SOURCE != "plain":
            if tl.program_id(0) == 0:
                tl.store(made_ptr + batch[:, None] * C + inner[None, :], x, mask=there)
        square = tl.sum(x * x, axis=1)
        x = x * norm
        a, b = _product(x, first, WIDE), _product(x, second, WIDE)
    cos = tl.load(rotary_ptr + angle, mask=turned, other=1.0)
    sin = tl.load(rotary_ptr + half + angle, mask=turned, other=0.0)
    factor = tl.rsqrt(square / C + eps)[:, None]
    a, b = a * factor, b * factor
    low, high = a * cos + b * sin, b * cos - a * sin
    within = outs % (C // 2)
    head, dim = within // half, within % half
    kept = live[:, None] & owned[None, :]
    to = batch[:, None] * (3 * C) + (section * C + head * D + dim)[None, :]
    tl.store(out_ptr + to, low, mask=kept)
    tl.store(out_ptr + to + half, high, mask=kept)


@_jit
def _share(
    square_ptr, batch, live, eps, C: tl.constexpr, BM: tl.constexpr, PARTS: tl.constexpr, NORMALISED: tl.constexpr
):
    """What the parts of each row (BM,) are multiplied by: the factor of their norm."""
    share = tl.full((BM,), 1.0, tl.float32)
    if NORMALISED and PARTS > 0:
        square = tl.zeros((BM,), tl.float32)
        for part in tl.static_range(PARTS):
            square += tl.load(square_ptr + batch * PARTS + part, mask=live, other=0.0)
        share = tl.rsqrt(square / C + eps)
    return share


@_jit
def _with_parts(x_ptr, partial_ptr, middle_ptr, share, batch, inner, mask, C: tl.constexpr, PARTS: tl.constexpr):
    """A tile (BM, BK) of the residual stream after attention; the first program keeps it."""
    at = batch[:, None] * C + inner[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if PARTS > 0:
        offset = batch[:, None] * (PARTS * C) + inner[None, :]
        added = tl.load(partial_ptr + offset, mask=mask, other=0.0)
        for part in tl.static_range(1, PARTS):
            added += tl.load(partial_ptr + offset + part * C, mask=mask, other=0.0)
        x += added * share[:, None]
        if tl.program_id(0) == 0:
            tl.store(middle_ptr + at, x, mask=mask)
    return x


@_jit
def gate_up(
    x_ptr,  # (B, C) float32
    partial_ptr,  # (B, G, C) float32, what is added to x, if PARTS
    square_ptr,  # (B, G) float32, if it is still to be normalised
    middle_ptr,  # (B, C) float32: receives the sum, if PARTS
    norm_ptr,  # (C,)
    w_ptr,  # (2, I, C): gate and up
    bias_ptr,  # (2, I)
    out_ptr,  # (B, I) in the weights' type
    rows,
    eps,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    PARTS: tl.constexpr,  # G, or 0
    NORMALISED: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention's residual sum, norm, and the hidden units of SwiGLU."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    owned = outs < I
    batch = tl.program_id(1) * BM + tl.arange(0, BM)
    live = batch < rows
    gate_bias = tl.load(bias_ptr + outs, mask=owned, other=0.0).to(tl.float32)
    up_bias = tl.load(bias_ptr + I + outs, mask=owned, other=0.0).to(tl.float32)
    if BK < C:
        _wait(PDL)
        share = _share(square_ptr, batch, live, eps, C, BM, PARTS, NORMALISED)
        gate = tl.zeros((BM, BN), tl.float32)
        up = tl.zeros((BM, BN), tl.float32)
        square = tl.zeros((BM,), tl.float32)
        for start in range(0, C, BK):
            k = start + inner
            mask = owned[:, None] & (k < C)[None, :]
            there = live[:, None] & (k < C)[None, :]
            gate_w = tl.load(w_ptr + outs[:, None] * C + k[None, :], mask=mask, other=0.0)
            up_w = tl.load(w_ptr + I * C + outs[:, None] * C + k[None, :], mask=mask, other=0.0)
            norm = tl.load(norm_ptr + k, mask=k < C, other=0.0).to(tl.float32)[None, :]
            x = _with_parts(x_ptr, partial_ptr, middle_ptr, share, batch, k, there, C, PARTS)
            square += tl.sum(x * x, axis=1)
            x = x * norm
            gate += _product(x, gate_w, WIDE)
            up += _product(x, up_w, WIDE)
    else:
        mask = owned[:, None] & (inner < C)[None, :]
        there = live[:, None] & (inner < C)[None, :]
        gate_w = tl.load(w_ptr + outs[:, None] * C + inner[None, :], mask=mask, other=0.0)
        up_w = tl.load(w_ptr + I * C + outs[:, None] * C + inner[None, :], mask=mask, other=0.0)
        norm = tl.load(norm_ptr + inner, mask=inner < C, other=0.0).to(tl.float32)[None, :]
        _wait(PDL)
        share = _share(square_ptr, batch, live, eps, C, BM, PARTS, NORMALISED)
        x = _with_parts(x_ptr, partial_ptr, middle_ptr, share, batch, inner, there, C, PARTS)
        square = tl.sum(x * x, axis=1)
        x = x * norm
        gate, up = _product(x, gate_w, WIDE), _product(x, up_w, WIDE)
    factor = tl.rsqrt(square / C + eps)[:, None]
    gate = gate * factor + gate_bias[None, :]
    up = up * factor + up_bias[None, :]
    hidden = gate * tl.sigmoid(gate) * up
    to = batch[:, None] * I + outs[None, :]
    tl.store(out_ptr + to, hidden.to(out_ptr.dtype.element_ty), mask=live[:, None] & owned[None, :])


@_jit
def project(
    x_ptr,  # (B, K)
    norm_ptr,  # (K,), of a norm before, if NORM
    w_ptr,  # (N, K)
    bias_ptr,  # (N,), if BIAS
    residual_ptr,  # (B, N) float32, if RESIDUAL
    out_ptr,  # (B, N) float32
    rows,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A linear layer, with what stands before and after it."""
    outs = tl.program_id(0) * BN + tl.arange(0, BN)
    owned = outs < N
    inner = tl.arange(0, BK)
    batch = tl.program_id(1) * BM + tl.arange(0, BM)
    live = batch < rows
    kept = live[:, None] & owned[None, :]
    to = batch[:, None] * N + outs[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + outs, mask=owned, other=0.0).to(tl.float32)[None, :]
    square = tl.zeros((BM,), tl.float32)
    if BK < K:
        _wait(PDL)
        y = tl.zeros((BM, BN), tl.float32)
        for start in range(0, K, BK):
            k = start + inner
            w = tl.load(w_ptr + outs[:, None] * K + k[None, :], mask=owned[:, None] & (k < K)[None, :], other=0.0)
            x = tl.load(x_ptr + batch[:, None] * K + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0.0)
            if NORM:
                x = x.to(tl.float32)
                square += tl.sum(x * x, axis=1)
                x = x * tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            y += _product(x, w, WIDE)
    else:
        w = tl.load(w_ptr + outs[:, None] * K + inner[None, :], mask=owned[:, None] & (inner < K)[None, :], other=0.0)
        _wait(PDL)
        x = tl.load(x_ptr + batch[:, None] * K + inner[None, :], mask=live[:, None] & (inner < K)[None, :], other=0.0)
        if NORM:
            x = x.to(tl.float32)
            square = tl.sum(x * x, axis=1)
            x = x * tl.load(norm_ptr + inner, mask=inner < K, other=0.0).to(tl.float32)[None, :]
        y = _product(x, w, WIDE)
    if NORM:
        y *= tl.rsqrt(square / K + eps)[:, None]
    if BIAS:
        y += bias
    if RESIDUAL:
        y += tl.load(residual_ptr + to, mask=kept, other=0.0)
    tl.store(out_ptr + to, y, mask=kept)
