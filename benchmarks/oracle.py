"""
What is right, so that only what is right is timed: attention spelled out and the recurrence, in float32 on the CPU.

How far a right result may lie from it is measured: twice as far as the same plain computation in the shorter type.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import nn

from benchmarks.models import build_model, mesh_labels, mesh_tokens
from iflame_hf import IFlameConfig

# B batch, T tokens, V vocabulary

# Faces and rows that are compared: several chunks of 64 items on two levels, a part of one on the third.
TEST_FACES, TEST_ROWS = 30, 2
# Relative error allowed where nothing is rounded to a type shorter than float32.
FLOAT32_ERROR = 1e-4


class WrongResult(Exception):
    """A variant does not compute what it should, so it has no speed."""


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Size of the difference over the size of what was expected; not a number if either holds one that is not."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    if value.shape != expected.shape:
        raise ValueError(f"expected the shape {tuple(expected.shape)}, got {tuple(value.shape)}")
    return float((value - expected).norm() / expected.norm())


def require_close(what: str, value: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    """Raises WrongResult if the relative error is larger than allowed, or not a number."""
    error = relative_error(value, expected)
    if not error <= allowed:
        raise WrongResult(f"{what}: relative error {error:.1e}, allowed {allowed:.1e}")


def require_likely(what: str, tokens: torch.Tensor, logits: torch.Tensor, allowed: float, likeliest: int = 1) -> None:
    """
    Raises WrongResult unless the tokens (B, T) are among so many `likeliest` ones of logits (B, T, V), or nearly: two
    logits that are off by four times the relative error `allowed` explain the choice.
    """
    least = logits.topk(likeliest).values[..., -1]
    worst = float((least - logits.gather(-1, tokens[..., None]).squeeze(-1)).max())
    explained = float(8 * allowed * logits.square().mean().sqrt())
    if not worst <= explained:
        those = "the likeliest" if likeliest == 1 else f"the {likeliest} likeliest"
        raise WrongResult(f"{what}: one is {worst:.2f} below {those}, allowed {explained:.2f}")


def flat_gradients(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All gradients in the order of their names, as one vector on the CPU."""
    return torch.cat([gradients[name].detach().float().cpu().flatten() for name in sorted(gradients)])


def gradients_of(
    network: nn.Module, loss_of: Callable[[], torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Gradients, by name, of what `loss_of` computes, under autocast if `dtype` is shorter than float32."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    with torch.autocast(parameters[0].device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of()
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


class Oracle:
    """
    Right results for one set of weights.

    Args:
        weights: by our names, on the CPU.
    """

    def __init__(self, config: IFlameConfig, weights: Mapping[str, torch.Tensor], seed: int):
        self.config, self.weights = config, weights
        self.model = build_model(config, weights)
        self.input_ids = mesh_tokens(config, TEST_ROWS, TEST_FACES, seed)
        self.logits = self.logits_of(self.input_ids)

    @torch.no_grad()
    def logits_of(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, V)."""
        return self.model(input_ids, use_cache=False).logits

    @functools.cached_property
    def gradients(self) -> torch.Tensor:
        return flat_gradients(gradients_of(self.model, self._loss))

    @functools.cache  # noqa: B019 (an oracle lives as long as its program)
    def logits_error(self, dtype: torch.dtype) -> float:
        """Relative error allowed to logits of a model whose weights are of that type."""
        if dtype == torch.float32:
            return FLOAT32_ERROR
        with torch.no_grad():
            rounded = build_model(self.config, self.weights, dtype=dtype)(self.input_ids, use_cache=False).logits
        return 2 * relative_error(rounded, self.logits)

    @functools.cache  # noqa: B019
    def gradients_error(self, dtype: torch.dtype) -> float:
        """Relative error allowed to gradients that are computed under autocast to that type."""
        if dtype == torch.float32:
            return 10 * FLOAT32_ERROR
        return 2 * relative_error(flat_gradients(gradients_of(self.model, self._loss, dtype)), self.gradients)

    def _loss(self) -> torch.Tensor:
        return self.model(self.input_ids, labels=mesh_labels(self.input_ids), use_cache=False).loss

    def require_greedy(self, tokens: torch.Tensor, prompt: int, allowed: float) -> None:
        """
        Raises WrongResult unless the tokens (B, T) after the prompt are the likeliest, or nearly: two logits that are
        off by four times the relative error `allowed` explain the choice.
        """
        tokens = tokens.cpu()
        require_likely("greedy tokens", tokens[:, prompt:], self.logits_of(tokens[:, :-1])[:, prompt - 1 :], allowed)


def computes_in(dtype: torch.dtype, device: torch.device, linear_attn_implementation: str = "auto") -> torch.dtype:
    """The type that decides on the error: packages multiply float32 as tf32, which is as short as float16."""
    package = device.type == "cuda" and linear_attn_implementation not in ("eager", "chunked", "triton")
    return torch.float16 if package and dtype == torch.float32 else dtype
