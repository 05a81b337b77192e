"""The moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def create_average(model: nn.Module, decay: float, device: torch.device | str = "cpu") -> AveragedModel:
    """
    The exponential moving average of a model's weights: at the n-th update the average so far counts
    min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its random beginning. `average.module` is
    a model of the same class, on `device`. The count n stays on the CPU, so that no update waits for the device.
    """

    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count_on_device: torch.Tensor) -> None:
        count = int(average.n_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count) / (10 + count)))

    average = AveragedModel(model, multi_avg_fn=update)
    average.module.to(device)
    average.requires_grad_(False)
    return average.eval()
