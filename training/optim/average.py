"""The moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def create_average(model: nn.Module, decay: float) -> AveragedModel:
    """
    The exponential moving average of a model's weights: at the n-th update the average so far counts
    min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its random beginning. `average.module` is
    a model of the same class.
    """

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor | int) -> None:
        count = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    average = AveragedModel(model, multi_avg_fn=update)
    average.requires_grad_(False)
    return average.eval()
