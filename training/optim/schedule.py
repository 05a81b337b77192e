"""Learning rates over a run."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import get_scheduler

SCHEDULES = ("constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay")
# Share of a run in which "warmup_stable_decay" decays, where lr_scheduler_kwargs do not say otherwise.
DECAY_SHARE = 0.2


def learning_rate_curve(
    name: str, warmup_steps: float, max_steps: int, lr_scheduler_kwargs: dict[str, Any] | None = None
) -> Callable[[int], float]:
    """
    The factor of the learning rate at every step, from transformers' `get_scheduler`. `warmup_steps` below 1 is a
    share of `max_steps`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, got {name!r}")
    kwargs = dict(lr_scheduler_kwargs or {})
    warmup = warmup_count(warmup_steps, max_steps)
    if name == "warmup_stable_decay":
        kwargs.setdefault("num_decay_steps", min(max_steps - warmup, round(DECAY_SHARE * max_steps)))
    # get_scheduler wants an optimiser, and changes its learning rate; it gets one that nobody uses.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return get_scheduler(name, stand_in, warmup, max_steps, scheduler_specific_kwargs=kwargs).lr_lambdas[0]


def warmup_count(warmup_steps: float, max_steps: int) -> int:
    """Steps of the warm-up: `warmup_steps`, or that share of `max_steps` if it is below 1."""
    return round(warmup_steps * max_steps) if warmup_steps < 1 else min(round(warmup_steps), max_steps)
