"""What attention computes, as plain functions of torch's operations.

Linear ("lightning") attention of one head with decay rate s (arXiv 2307.14995; iFlame, arXiv 2503.16653):

    S_t = exp(-s) S_(t-1) + k_t v_t^T        o_t = q_t S_t

without scale or feature map. Every implementation has the signature of `recurrent_linear_attention`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .layout_iflame import MeshBounds

# B batch, T items of a level, H heads, D head size, N chunks, I items of a chunk

CHUNK_SIZE = 64

LinearAttentionOutput = tuple[torch.Tensor, torch.Tensor | None]


def count_flops(namespace: str, **formulas: Callable[..., int]) -> None:
    """Tells torch, by name, how many operations operators of a namespace take, from the shapes of their arguments: for
    its FlopCounterMode, and for torch.compile where it chooses what to compute again."""
    for name, formula in formulas.items():
        operator = getattr(getattr(torch.ops, namespace), name)
        flop_registry.pop(operator, None)  # where code from the Hub is loaded a second time
        register_flop_formula(operator)(formula)


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


def in_autocasts_dtype(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype of autocast, where that is on, as its products have it; float64 stays."""
    device = x.device.type
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def attention_backends_for_any_length(device: torch.device) -> AbstractContextManager:
    """
    Within it torch's scaled_dot_product_attention leaves out cuDNN, which builds a plan for every new length of the
    keys: a cache grows with every step, and a plan takes longer than a step. Torch prefers cuDNN on Hopper and
    Blackwell GPUs. Where the caller has chosen among torch's backends already, that choice holds.
    """
    cuda = torch.backends.cuda
    if device.type != "cuda" or not (
        cuda.flash_sdp_enabled()
        and cuda.mem_efficient_sdp_enabled()
        and cuda.math_sdp_enabled()
        and cuda.cudnn_sdp_enabled()
    ):
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def recurrent_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
) -> LinearAttentionOutput:
    """
    The recurrence itself, item by item, in float32: the oracle for the other implementations.

    Args:
        q, k, v: (B, T, H, D), rotary embedding applied.
        slopes: (H,) decay rates, float32.
        state: (B, H, D, D) float32 state that an earlier call returned, or None to begin from zero.
        bounds: the meshes that share rows; the state is zero at the start of each. None: one mesh a row. `state`
            belongs to the first of a row.
        need_state: whether the state after the last item is wanted.

    Returns:
        o: (B, T, H, D), in float32 or in q's dtype.
        state: (B, H, D, D) float32, after the last item; None if it is not wanted.
    """
    batch, length, heads, size = q.shape
    q, k, v = q.float(), k.float(), v.float()
    decay = torch.exp(-slopes.float())[:, None, None]
    if state is None:
        state = q.new_zeros(batch, heads, size, size)
    meshes = None if bounds is None else bounds.meshes
    outputs = []
    for t in range(length):
        if meshes is not None and t > 0:
            state = state * (meshes[:, t] == meshes[:, t - 1])[:, None, None, None]
        state = decay * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return (torch.stack(outputs, dim=1) if outputs else torch.zeros_like(q)), state if need_state else None


def recurrent_linear_attention_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, state: torch.Tensor
) -> torch.Tensor:
    """
    The recurrence for a single item, in place: o (B, 1, H, D) float32 for q, k, v (B, 1, H, D); `state` (B, H, D, D)
    float32 becomes that after the item. It takes no gradients.
    """
    decay = torch.exp(-slopes.float())[:, None, None]
    state.mul_(decay).add_(k[:, 0, :, :, None].float() * v[:, 0, :, None, :].float())
    return (q[:, 0, :, None, :].float() @ state).transpose(1, 2)


def chunked_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    state: torch.Tensor | None = None,
    bounds: MeshBounds | None = None,
    need_state: bool = True,
) -> LinearAttentionOutput:
    """
    Linear attention in plain torch and linear time: attention within chunks of 64 items, one state handed from chunk
    to chunk (arXiv 2312.06635, section 4). Arguments and results are those of `recurrent_linear_attention`; o is
    float32.
    """
    batch, length, heads, size = q.shape
    if length <= 1:
        return recurrent_linear_attention(q, k, v, slopes, state, bounds, need_state)
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
    owners = None
    if bounds is not None:
        meshes = bounds.meshes
        meshes = torch.cat([meshes, meshes[:, -1:].expand(-1, spare)], dim=1).view(batch, 1, chunks, chunk)
        scores = scores * (meshes[..., :, None] == meshes[..., None, :])
        last = meshes[..., -1:]
        weighted = weighted * (meshes == last)[..., None]
        # The mesh that each state belongs to: the one the first chunk begins with, then that of each chunk's end.
        owners = torch.cat([meshes[:, :, 0, :1], last[..., 0]], dim=-1).squeeze(1)  # (B, N + 1)
        entering = entering * (meshes == owners[:, None, :-1, None])  # (B, H, N, I)
    # The last chunk's items are in no state that another chunk begins with.
    wanted = chunks if need_state else chunks - 1
    states = _states_between_chunks(
        weighted[:, :, :wanted].transpose(-1, -2) @ v[:, :, :wanted],
        slopes.float(),
        F.pad(ends, (1, 0))[: wanted + 1],
        state,
        None if owners is None else owners[:, : wanted + 1],
    )
    output = scores @ v + (q * entering[..., None]) @ states[:, :, :chunks]
    output = output.permute(0, 2, 3, 1, 4).reshape(batch, chunks * chunk, heads, size)
    return output[:, :length], states[:, :, -1] if need_state else None


def _states_between_chunks(updates, slopes, ends, state, owners):
    """
    States before the first and after each chunk: X_n = exp(-s (e_n - e_(n-1))) X_(n-1) + U_n, where X_0 is `state`.

    Up to 64 chunks are one product with a triangular matrix; more are taken in groups of 64, so that time stays
    linear.

    Args:
        updates: (B, H, N, D, D). slopes: (H,). ends: (N + 1,) items before each chunk and after the last.
        state: (B, H, D, D) or None.
        owners: (B, N + 1) the mesh that each state belongs to, or None. A state of an earlier mesh counts for nothing.

    Returns:
        (B, H, N + 1, D, D)
    """
    batch, heads, chunks, size, _ = updates.shape
    if state is None:
        state = updates.new_zeros(batch, heads, size, size)
    if chunks > CHUNK_SIZE:
        pieces = [state[:, :, None]]
        for first in range(0, chunks, CHUNK_SIZE):
            part, part_ends = slice(first, first + CHUNK_SIZE), slice(first, first + CHUNK_SIZE + 1)
            part_owners = None if owners is None else owners[:, part_ends]
            states = _states_between_chunks(
                updates[:, :, part], slopes, ends[part_ends], pieces[-1][:, :, -1], part_owners
            )
            pieces.append(states[:, :, 1:])
        return torch.cat(pieces, dim=2)
    age = ends[:, None] - ends  # (N + 1, N + 1)
    weights = torch.exp(-slopes[:, None, None] * age.clamp(min=0)).masked_fill(age < 0, 0.0)[None]
    if owners is not None:
        weights = weights * (owners[:, None, :, None] == owners[:, None, None, :])
    inputs = torch.cat([state[:, :, None], updates], dim=2).flatten(-2)  # (B, H, N + 1, D * D)
    return (weights @ inputs).view(batch, heads, chunks + 1, size, size)
