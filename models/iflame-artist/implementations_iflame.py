"""
The implementations of linear attention: those of packages, which of all can compute a call, and the choice among them.
"""

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch

from .kernels_iflame import why_no_kernels
from .layout_iflame import MeshBounds
from .linear_kernels_iflame import LARGEST_HEAD_SIZE, triton_linear_attention
from .ops_iflame import (
    LinearAttentionOutput,
    chunked_linear_attention,
    recurrent_linear_attention,
    recurrent_linear_attention_step,
)

# B batch, T items of a level, H heads, D head size

# Smaller sizes are refused by a check of the package, others by its kernel.
LIGHTNING_HEAD_SIZES = (32, 64, 128)


def fla_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
) -> LinearAttentionOutput:
    """Linear attention by flash-linear-attention's `chunk_simple_gla`; as `recurrent_linear_attention`, on a GPU."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(_how_to_install("fla")) from error
    batch, length, heads, size = q.shape
    options = {"g_gamma": -slopes, "scale": 1.0, "output_final_state": need_state}
    if bounds is None:
        return chunk_simple_gla(q, k, v, initial_state=state, **options)
    assert state is None, "the kernel wants a state for every mesh"
    # It takes sequences of different lengths laid end to end, and returns one state for each.
    output, states = chunk_simple_gla(
        *(x.reshape(1, batch * length, heads, size) for x in (q, k, v)),
        cu_seqlens=bounds.offsets,
        cu_seqlens_cpu=bounds.offsets_on_host,
        **options,
    )
    return output.view_as(q), states[bounds.meshes[:, -1]] if need_state else None


def lightning_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
) -> LinearAttentionOutput:
    """
    Linear attention by the lightning-attn package; as `recurrent_linear_attention`, on a GPU, from the start of one
    mesh a row: the package knows neither an initial state nor several meshes.
    """
    try:
        from lightning_attn.ops import lightning_attn_func
    except ImportError as error:
        raise ImportError(_how_to_install("lightning_attn")) from error
    assert state is None and bounds is None, "the package computes one mesh a row, from its start"
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    output = lightning_attn_func(*heads_first, slopes.view(-1, 1, 1)).transpose(1, 2)
    if not need_state:
        return output, None
    age = torch.arange(q.shape[1] - 1, -1, -1, device=q.device, dtype=torch.float32)
    weighted = k.float() * torch.exp(-age[:, None] * slopes)[..., None]  # (B, T, H, D)
    return output, torch.einsum("bthd,bthe->bhde", weighted, v.float())


class LinearAttentionCall(NamedTuple):
    """What decides which implementations can compute a call of `linear_attention`."""

    device_type: str
    head_dim: int
    length: int  # items T
    has_state: bool = False
    bounds: MeshBounds | None = None
    need_state: bool = True


def _always(call: LinearAttentionCall) -> None:
    return None


def _gpu_only(name: str, call: LinearAttentionCall) -> str | None:
    if call.device_type == "cpu":
        return f"linear_attn_implementation={name!r} runs on a GPU only, and the model is on the CPU: use 'auto'"
    return None


def _triton_requires(call: LinearAttentionCall) -> str | None:
    if call.head_dim > LARGEST_HEAD_SIZE:
        return (
            f"triton computes heads of up to {LARGEST_HEAD_SIZE} channels, and hidden_size / num_attention_heads is "
            f"{call.head_dim}: use 'auto' or 'chunked'"
        )
    if call.device_type not in ("cpu", "cuda"):
        return f"linear_attn_implementation='triton' does not run on a {call.device_type} device: use 'auto'"
    if call.device_type == "cuda" and (reason := why_no_kernels()):
        return f"linear_attn_implementation='triton' cannot run, because of {reason}: use 'auto' or 'chunked'"
    return _gpu_only("triton", call)


def _lightning_requires(call: LinearAttentionCall) -> str | None:
    if call.device_type != "cpu" and call.head_dim not in LIGHTNING_HEAD_SIZES:
        return (
            f"lightning_attn computes heads of the sizes {LIGHTNING_HEAD_SIZES}, and hidden_size / "
            f"num_attention_heads is {call.head_dim}: use 'auto', 'fla' or 'chunked'"
        )
    return _gpu_only("lightning_attn", call)


def _lightning_supports(call: LinearAttentionCall) -> str | None:
    if call.bounds is not None:
        return (
            "lightning_attn computes one mesh a row: rows that are packed or padded on the left are computed by the "
            "slower 'chunked' implementation. linear_attn_implementation='fla' does them on the GPU"
        )
    if call.has_state:
        return (
            "lightning_attn begins without a state: several tokens after a filled cache are computed by the slower "
            "'chunked' implementation. linear_attn_implementation='fla' does them on the GPU"
        )
    return None


def _fla_supports(call: LinearAttentionCall) -> str | None:
    if call.bounds is not None and call.has_state:
        return (
            "fla wants a state for every mesh of every row: the first tokens after padding that came in an earlier "
            "call are computed by the slower 'chunked' implementation"
        )
    if call.bounds is not None and call.bounds.offsets is None:
        return (
            "fla must know where meshes begin, which neither a graph that is compiled as a whole knows nor a call "
            "that goes on from padding: rows are computed by the slower 'chunked' implementation"
        )
    return None


class Implementation(NamedTuple):
    """
    A way to compute linear attention.

    Args:
        function: as `recurrent_linear_attention`.
        step: as `recurrent_linear_attention_step`.
        requires: why a model on its device can never be computed so, or None.
        supports: why this call cannot, or None.
        package: module to import and what to install, if any.
    """

    function: Callable[..., LinearAttentionOutput]
    step: Callable[..., torch.Tensor] = recurrent_linear_attention_step
    requires: Callable[[LinearAttentionCall], str | None] = _always
    supports: Callable[[LinearAttentionCall], str | None] = _always
    package: tuple[str, str] | None = None


IMPLEMENTATIONS = {
    "eager": Implementation(recurrent_linear_attention),
    "chunked": Implementation(chunked_linear_attention),
    "triton": Implementation(triton_linear_attention, requires=_triton_requires, package=("triton", "triton")),
    "fla": Implementation(
        fla_linear_attention,
        requires=functools.partial(_gpu_only, "fla"),
        supports=_fla_supports,
        package=("fla", "flash-linear-attention"),
    ),
    "lightning_attn": Implementation(
        lightning_linear_attention,
        requires=_lightning_requires,
        supports=_lightning_supports,
        package=("lightning_attn", "lightning-attn"),
    ),
}
# What "auto" takes on a CUDA GPU: the first that is installed and can compute the call.
PREFERENCE = ("triton", "lightning_attn", "fla", "chunked")


@functools.cache
def _finds(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@torch.compiler.assume_constant_result
def _is_installed(name: str) -> bool:
    package = IMPLEMENTATIONS[name].package
    return package is None or _finds(package[0])


def _how_to_install(name: str) -> str:
    package = IMPLEMENTATIONS[name].package[1]
    return (
        f"linear_attn_implementation={name!r} needs the package {package}: pip install {package}, or choose "
        "'chunked', which needs nothing"
    )


def check_linear_attention_implementation(name: str) -> None:
    """Raises ImportError, with what to install, if the implementation `name` needs a package that is missing."""
    if name != "auto" and not _is_installed(name):
        raise ImportError(_how_to_install(name))


def _can_compute(call: LinearAttentionCall) -> Callable[[str], bool]:
    def can(name: str) -> bool:
        chosen = IMPLEMENTATIONS[name]
        return _is_installed(name) and chosen.requires(call) is None and chosen.supports(call) is None

    return can


def choose_linear_attention(name: str, call: LinearAttentionCall) -> str:
    """
    The implementation that computes a call where `name` is asked for: for `"auto"` the best that can, and `"chunked"`,
    with a warning that says why, where `name` cannot. A single item takes the implementation's step.

    Raises:
        ValueError: `name` can never compute this model on this device.
    """
    if name == "auto":
        name = "chunked" if call.device_type != "cuda" else next(filter(_can_compute(call), PREFERENCE))
    if reason := IMPLEMENTATIONS[name].requires(call):
        raise ValueError(reason)
    if call.length == 1:
        is_step = call.has_state and call.bounds is None
        return name if is_step else "eager"
    if reason := IMPLEMENTATIONS[name].supports(call):
        warnings.warn(reason, stacklevel=2)
        return "chunked"
    return name


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
    implementation: str = "auto",
) -> LinearAttentionOutput:
    """
    Linear attention by the implementation of that name, or by what `choose_linear_attention` takes in its place;
    arguments and results are those of `recurrent_linear_attention`.

    Raises:
        ImportError: the package of the implementation is missing.
        ValueError: a GPU package is asked to work on a CPU, or lightning_attn on heads of a size that it rejects.
    """
    call = LinearAttentionCall(q.device.type, q.shape[-1], q.shape[1], state is not None, bounds, need_state)
    name = choose_linear_attention(implementation, call)
    function = IMPLEMENTATIONS["eager" if call.length == 1 else name].function
    # Decays and states are float32 also where the caller's context would cast matrix products down.
    with torch.autocast(q.device.type, enabled=False):
        return function(q, k, v, slopes, state, bounds, need_state)


def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor,
    implementation: str = "eager",
) -> torch.Tensor:
    """A single item by the implementation of that name, as `recurrent_linear_attention_step`, in place."""
    with torch.autocast(q.device.type, enabled=False):
        return IMPLEMENTATIONS[implementation].step(q, k, v, slopes, state)
