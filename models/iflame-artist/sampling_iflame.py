"""Sampling with a seed for each mesh."""

import operator
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

NOT_FINITE = (
    "the scores of the next token are not finite: load the model in float32 or bfloat16, and check its weights"
)
NUMBERS_AT_ONCE = 1024  # for so many tokens random numbers are drawn, and moved to the device, in one go


def row_seeds(seed: Any, rows: int) -> list[int]:
    """A seed for each of `rows` meshes: of a number it and those that follow it, of a list its own.

    Raises ValueError for what is no seed, and for a list of another length.
    """
    is_list = isinstance(seed, (list, tuple, range, np.ndarray))
    try:
        seeds = [operator.index(each) for each in (seed if is_list else [seed])]
    except TypeError:
        seeds = [-1]
    if min(seeds, default=0) < 0 or isinstance(seed, bool):
        raise ValueError(f"seed must be a whole number from 0 on, or a list of one for each mesh, got {seed!r}")
    if not is_list:
        return [seeds[0] + row for row in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"{rows} meshes need as many seeds, got {len(seeds)}: give one for each, or the first alone")
    return seeds


def row_numbers(seeds: list[int], numbers: int) -> np.ndarray:
    """The first numbers of each seed's mesh, (B, numbers) float64 within [0, 1)."""
    return _within_one(np.stack([np.random.Philox(seed).random_raw(numbers) for seed in seeds]))


def _within_one(raw: np.ndarray) -> np.ndarray:
    """uint64 -> float64 within [0, 1)."""
    return (raw >> 11) * 2.0**-53


class SeededSampling(LogitsProcessor):
    """Chooses a token for each row by random numbers of the row's own, and leaves only that one, all others at -inf.

    The number that chooses depends on the seed of the row and on how many tokens were generated before, and on nothing
    else: not on the other rows, on padding, on the device, nor on what else draws random numbers. A token is chosen as
    often as the softmax of its scores says. It has to be the last processor.

    Args:
        seeds: one for each row, whole numbers from 0 on.
        prompt_length: tokens of a row, padding included, before the first that is generated.
        keep_scores: gather the scores (B, V) of each step in `scores`, as they were before the choice.
    """

    def __init__(self, seeds: Any, prompt_length: int, keep_scores: bool = False):
        # Philox's raw numbers stay the same in all versions of numpy; any whole number is a seed.
        self._numbers = [np.random.Philox(seed) for seed in seeds]
        self._prompt_length = prompt_length
        self.scores: list[torch.Tensor] | None = [] if keep_scores else None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (B, V) of which one a row is left, for ids (B, T); raises ValueError where scores are not finite."""
        column = (input_ids.shape[1] - self._prompt_length) % NUMBERS_AT_ONCE
        if column == 0:
            self._uniforms = self._draw(scores.device)
        if self.scores is not None:
            self.scores.append(scores)
        cumulative = scores.to(self._uniforms.dtype).softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        _check_finite(total)
        # Less than the total, as each number is less than 1, and so there is a first token that exceeds it.
        target = self._uniforms[:, column, None] * total
        token = (cumulative <= target).sum(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _draw(self, device: torch.device) -> torch.Tensor:
        """Numbers (B, NUMBERS_AT_ONCE) within [0, 1), float64 where the device has it."""
        raw = np.stack([numbers.random_raw(NUMBERS_AT_ONCE) for numbers in self._numbers])
        uniforms = torch.from_numpy(_within_one(raw))
        if device.type == "mps":
            uniforms = uniforms.float().clamp(max=1 - 2.0**-24)
        return uniforms.to(device)


def _check_finite(total: torch.Tensor) -> None:
    finite = total.isfinite().all()
    if total.device.type == "cuda":
        torch._assert_async(finite)  # does not wait for the device
    elif not finite:
        raise ValueError(NOT_FINITE)
