"""What attention computes, as plain functions, and the one place that chooses an implementation.

Linear ("lightning") attention of one head with decay rate s (arXiv 2307.14995; iFlame, arXiv 2503.16653):

    S_t = exp(-s) S_(t-1) + k_t v_t^T        o_t = q_t S_t

without scale or feature map. Every implementation has the signature of `recurrent_linear_attention`.
"""

import functools
import importlib.util
import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# B batch, T items of a level, H heads, D head size, N chunks, I items of a chunk

CHUNK_SIZE = 64
# Smaller sizes are refused by a check of the package, others by its kernel.
LIGHTNING_HEAD_SIZES = (32, 64, 128)

LinearAttentionOutput = tuple[torch.Tensor, torch.Tensor]


def alibi_slopes(num_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """
    Decay rates (H,) of the heads in float32: the slopes of ALiBi (arXiv 2108.12409, section 3), 2 ** (-8 h / H) for h
    = 1..H; for a number of heads that is no power of two those of the power of two below, then every other one of
    twice as many.

    They are computed on the device from nothing, so that neither a checkpoint, nor a cast of the model, nor
    initialisation on the meta device can touch them.
    """
    whole = 2 ** (num_heads.bit_length() - 1)
    exponents = torch.arange(1, whole + 1, dtype=torch.float32, device=device) * (8 / whole)
    if num_heads > whole:
        between = torch.arange(num_heads - whole, dtype=torch.float32, device=device) * 2 + 1
        exponents = torch.cat([exponents, between * (4 / whole)])
    return torch.exp2(-exponents)


def rotary_tables(positions: torch.Tensor, head_dim: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Cosines and sines for `apply_rotary`.

    Half of the D/2 frequencies are zero ("half-truncated" rotary embedding): (1 / base) ** linspace(0, 1, D / 4), then
    zeros.

    Args:
        positions: (B or 1, T) whole numbers, in items of the level.

    Returns:
        cos, sin: (B or 1, T, 1, D / 2), float32.
    """
    rotating = head_dim // 4
    steps = torch.linspace(0, 1, rotating, dtype=torch.float32, device=positions.device)
    frequencies = F.pad((1 / base) ** steps, (0, head_dim // 2 - rotating))
    angles = positions.to(torch.float32)[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the halves of each head of x (B, T, H, D) by the angles of `rotary_tables`, in float32; keeps dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


def attention_backends_for_any_length(device: torch.device) -> AbstractContextManager:
    """
    Within it torch's scaled_dot_product_attention leaves out cuDNN, which builds a plan for every new length of the
    keys: a cache grows with every step, and a plan takes longer than a step. Torch prefers cuDNN on Hopper and
    Blackwell GPUs.
    """
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def recurrent_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> LinearAttentionOutput:
    """
    The recurrence itself, item by item, in float32: the oracle for the other implementations.

    Args:
        q, k, v: (B, T, H, D), rotary embedding applied.
        slopes: (H,) decay rates, float32.
        state: (B, H, D, D) float32 state that an earlier call returned, or None to begin from zero.
        segments: (B, T) numbers of the meshes that share a row, never falling along it; the state is zero at the
            start of each. None: one mesh a row. `state` belongs to the first.

    Returns:
        o: (B, T, H, D), in float32 or in q's dtype.
        state: (B, H, D, D) float32, after the last item.
    """
    batch, length, heads, size = q.shape
    q, k, v = q.float(), k.float(), v.float()
    decay = torch.exp(-slopes.float())[:, None, None]
    if state is None:
        state = q.new_zeros(batch, heads, size, size)
    outputs = []
    for t in range(length):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(q)), state


def chunked_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> LinearAttentionOutput:
    """
    Linear attention in plain torch and linear time: attention within chunks of 64 items, one state handed from chunk
    to chunk (arXiv 2312.06635, section 4). Arguments and results are those of `recurrent_linear_attention`; o is
    float32.
    """
    batch, length, heads, size = q.shape
    if length <= 1:
        return recurrent_linear_attention(q, k, v, slopes, state, segments)
    chunk = min(CHUNK_SIZE, length)
    spare = -length % chunk
    chunks = (length + spare) // chunk
    # (B, H, N, I, D); the spare items at the end have keys of zero.
    q, k, v = (
        F.pad(x.float(), (0, 0, 0, 0, 0, spare)).view(batch, chunks, chunk, heads, size).permute(0, 3, 1, 2, 4)
        for x in (q, k, v)
    )
    rate = slopes.float()[:, None, None]
    item = torch.arange(chunk, device=q.device)
    distance = item[:, None] - item
    within = torch.exp(-rate * distance.clamp(min=0)).masked_fill(distance < 0, 0.0)  # (H, I, I)
    # Age of each item when its chunk ends; the last chunk ends with the last real item.
    ends = (torch.arange(1, chunks + 1, device=q.device) * chunk).clamp(max=length)
    age = (ends[:, None] - 1 - torch.arange(chunks * chunk, device=q.device).view(chunks, chunk)).clamp(min=0)
    remaining = torch.exp(-rate * age)  # (H, N, I)
    entering = torch.exp(-rate[..., 0] * (item + 1))[:, None, :]  # (H, 1, I)

    scores = (q @ k.transpose(-1, -2)) * within[:, None]
    weighted = k * remaining[..., None]
    chunk_segments = None
    if segments is not None:
        segments = torch.cat([segments, segments[:, -1:].expand(-1, spare)], dim=1).view(batch, 1, chunks, chunk)
        scores = scores * (segments[..., :, None] == segments[..., None, :])
        last = segments[..., -1:]
        weighted = weighted * (segments == last)[..., None]
        # The segment that each state belongs to: the one the first chunk begins with, then that of each chunk's end.
        chunk_segments = torch.cat([segments[:, :, 0, :1], last[..., 0]], dim=-1).squeeze(1)  # (B, N + 1)
        entering = entering * (segments == chunk_segments[:, None, :-1, None])  # (B, H, N, I)
    states = _states_between_chunks(
        weighted.transpose(-1, -2) @ v, slopes.float(), F.pad(ends, (1, 0)), state, chunk_segments
    )
    output = scores @ v + (q * entering[..., None]) @ states[:, :, :-1]
    output = output.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, size)
    return output[:, :length], states[:, :, -1]


def _states_between_chunks(updates, slopes, bounds, state, segments):
    """
    States before the first and after each chunk: X_n = exp(-s (b_n - b_(n-1))) X_(n-1) + U_n, where X_0 is `state`.

    Up to 64 chunks are one product with a triangular matrix; more are taken in groups of 64, so that time stays
    linear.

    Args:
        updates: (B, H, N, D, D). slopes: (H,). bounds: (N + 1,) items before each chunk and after the last.
        state: (B, H, D, D) or None.
        segments: (B, N + 1) segments of the states, or None. A state of an earlier segment counts for nothing.

    Returns:
        (B, H, N + 1, D, D)
    """
    batch, heads, chunks, size, _ = updates.shape
    if state is None:
        state = updates.new_zeros(batch, heads, size, size)
    if chunks > CHUNK_SIZE:
        pieces = [state[:, :, None]]
        for first in range(0, chunks, CHUNK_SIZE):
            part, part_bounds = slice(first, first + CHUNK_SIZE), slice(first, first + CHUNK_SIZE + 1)
            part_segments = None if segments is None else segments[:, part_bounds]
            states = _states_between_chunks(
                updates[:, :, part], slopes, bounds[part_bounds], pieces[-1][:, :, -1], part_segments
            )
            pieces.append(states[:, :, 1:])
        return torch.cat(pieces, dim=2)
    age = bounds[:, None] - bounds  # (N + 1, N + 1)
    weights = torch.exp(-slopes[:, None, None] * age.clamp(min=0)).masked_fill(age < 0, 0.0)[None]
    if segments is not None:
        weights = weights * (segments[:, None, :, None] == segments[:, None, None, :])
    inputs = torch.cat([state[:, :, None], updates], dim=2).flatten(-2)  # (B, H, N + 1, D * D)
    return (weights @ inputs).view(batch, heads, chunks + 1, size, size)


def fla_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> LinearAttentionOutput:
    """Linear attention by flash-linear-attention's `chunk_simple_gla`; as `recurrent_linear_attention`, on a GPU."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as error:
        raise ImportError(_how_to_install("fla")) from error
    batch, length, heads, size = q.shape
    options = {"g_gamma": -slopes, "scale": 1.0, "output_final_state": True}
    if segments is None:
        return chunk_simple_gla(q, k, v, initial_state=state, **options)
    if state is not None:  # the kernel wants one for every mesh of every row
        return chunked_linear_attention(q, k, v, slopes, state, segments)
    # The kernel takes sequences of different lengths laid end to end, and returns one state for each.
    starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=batch * length).to(torch.int32)
    output, states = chunk_simple_gla(
        *(x.reshape(1, batch * length, heads, size) for x in (q, k, v)), cu_seqlens=bounds, **options
    )
    return output.view_as(q), states[starts.sum(dim=1).cumsum(0) - 1]


def lightning_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> LinearAttentionOutput:
    """
    Linear attention by the lightning-attn package; as `recurrent_linear_attention`, on a GPU.

    The package knows neither an initial state nor several meshes in a row: those calls are computed by
    `chunked_linear_attention`, the second with a warning.
    """
    try:
        from lightning_attn.ops import lightning_attn_func
    except ImportError as error:
        raise ImportError(_how_to_install("lightning_attn")) from error
    if q.shape[-1] not in LIGHTNING_HEAD_SIZES:
        raise ValueError(
            f"lightning_attn computes heads of the sizes {LIGHTNING_HEAD_SIZES}, and hidden_size / "
            f"num_attention_heads is {q.shape[-1]}: use 'auto', 'fla' or 'chunked'"
        )
    if segments is not None:
        warnings.warn(
            "lightning_attn computes one mesh a row: rows that are packed or padded on the left are computed by the "
            "slower 'chunked' implementation. linear_attn_implementation='fla' does them on the GPU",
            stacklevel=2,
        )
    if segments is not None or state is not None:
        return chunked_linear_attention(q, k, v, slopes, state, segments)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    output = lightning_attn_func(*heads_first, slopes.view(-1, 1, 1)).transpose(1, 2)
    age = torch.arange(q.shape[1] - 1, -1, -1, device=q.device, dtype=torch.float32)
    weighted = k.float() * torch.exp(-age[:, None] * slopes)[..., None]  # (B, T, H, D)
    return output, torch.einsum("bthd,bthe->bhde", weighted, v.float())


_IMPLEMENTATIONS = {
    "eager": recurrent_linear_attention,
    "chunked": chunked_linear_attention,
    "fla": fla_linear_attention,
    "lightning_attn": lightning_linear_attention,
}
# name: (module to import, what to install)
_PACKAGES = {"fla": ("fla", "flash-linear-attention"), "lightning_attn": ("lightning_attn", "lightning-attn")}


@functools.cache
def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(_PACKAGES[name][0]) is not None


def _how_to_install(name: str) -> str:
    return (
        f"linear_attn_implementation={name!r} needs the package {_PACKAGES[name][1]}: pip install "
        f"{_PACKAGES[name][1]}, or choose 'chunked', which needs nothing"
    )


def check_linear_attention_implementation(name: str) -> None:
    """Raises ImportError, with what to install, if the implementation `name` needs a package that is missing."""
    if name in _PACKAGES and not _is_installed(name):
        raise ImportError(_how_to_install(name))


def _best_implementation(q, state, segments) -> str:
    if q.device.type != "cuda":
        return "chunked"
    whole = state is None and segments is None
    if whole and q.shape[-1] in LIGHTNING_HEAD_SIZES and _is_installed("lightning_attn"):
        return "lightning_attn"
    return "fla" if _is_installed("fla") else "chunked"


def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    implementation: str = "auto",
) -> LinearAttentionOutput:
    """
    Linear attention by the implementation of that name; arguments and results are those of
    `recurrent_linear_attention`.

    `"auto"` is `"chunked"` on a CPU; on a CUDA GPU it is what is installed of `"lightning_attn"`, for whole meshes
    from their start, and `"fla"`, and `"chunked"` otherwise. A single item is the recurrence itself, whatever the
    name: there is nothing to save.

    Raises:
        ImportError: the package of the implementation is missing.
        ValueError: a GPU package is asked to work on a CPU, or lightning_attn on heads of a size that it rejects.
    """
    if implementation == "auto":
        implementation = _best_implementation(q, state, segments)
    if implementation in _PACKAGES and q.device.type == "cpu":
        raise ValueError(
            f"linear_attn_implementation={implementation!r} runs on a GPU only, and the model is on the CPU: use "
            "'auto'"
        )
    if q.shape[1] == 1:
        implementation = "eager"
    # Decays and states are float32 also where the caller's context would cast matrix products down.
    with torch.autocast(q.device.type, enabled=False):
        return _IMPLEMENTATIONS[implementation](q, k, v, slopes, state, segments)
