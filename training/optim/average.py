"""The moving average of a model's weights."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """
    The exponential moving average of a model's weights: at the n-th update the average so far counts
    min(decay, (1 + n) / (10 + n)), so that a short run is not averaged with its random beginning. `module` is a model
    of the same class.

    It is torch's AveragedModel, whose states checkpoints hold, but for its update: torch's sends the count n to the
    device of the weights each time and waits until it is there. Here n stays on the CPU.

    Args:
        device: where the average lies.
    """

    def __init__(self, model: nn.Module, decay: float, device: torch.device | str = "cpu"):
        super().__init__(model)
        self.decay = decay
        self.module.to(device)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights that a model has now, which must lie on the device of the average; waits for nothing."""
        count = int(self.n_averaged)
        averaged, current = list(self.module.parameters()), list(model.parameters())
        if count:
            torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + count) / (10 + count)))
        else:
            torch._foreach_copy_(averaged, current)
        for own, other in zip(self.module.buffers(), model.buffers(), strict=True):
            own.copy_(other)
        self.n_averaged += 1
