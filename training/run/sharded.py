"""Steps as CUDA graphs where the weights are sharded (FSDP2)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from iflame_hf import IFlameForCausalLM
from training.optim.exchange import Exchange
from training.optim.shards import clip_sharded
from training.rows.load import Batch
from training.run.captured import CapturedLearner


class ShardedCapturedLearner(CapturedLearner):
    """
    A learner on a GPU that computes gradients, as CUDA graphs, with a whole model of its own: before each step its
    weights are gathered from the parts that the processes train, and after it each process gets its part of the
    gradients. Clipping and optimiser are run as they are, on the parts. They take the host less time than the graphs
    take the device.

    Args:
        whole: a model like the sharded one, which nobody else uses, on the device.
        sharded: as Accelerate has prepared it (FSDP2), whose blocks are no units of their own; its weights may be
            changed between steps, such as by a checkpoint.
        optimizer: of the sharded model's parameters; its `found_inf` leaves out steps.
        max_grad_norm, autocast, captures: as of `CapturedLearner`.

    Raises:
        ValueError: the weights are not sharded by rows over all processes.
    """

    def __init__(
        self,
        whole: IFlameForCausalLM,
        sharded: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
        autocast: Callable[[], AbstractContextManager],
        captures: bool = True,
    ):
        from torch.distributed.fsdp import FSDPModule  # which torch 2.5 has not

        super().__init__(whole.train(), optimizer, max_grad_norm, autocast, captures=captures)
        self.units = [module for module in sharded.modules() if isinstance(module, FSDPModule)]
        parameters = dict(sharded.named_parameters())
        self.parameters = [parameters[name] for name, _ in whole.named_parameters()]
        self.exchange = Exchange(self.parameters, list(whole.parameters()))

    def backward(self, batch: list[Batch], labels: int) -> torch.Tensor:
        for unit in self.units:
            unit.reshard()  # what an evaluation has left whole would stay as it is
        self.exchange.gather()
        return super().backward(batch, labels)

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        self.exchange.reduce()
        self.sums.zero_()
        # Only within a step: a checkpoint is loaded into an optimiser that has none.
        for parameter, gradient in zip(self.parameters, self.exchange.gradients, strict=True):
            parameter.grad = gradient
        found = clip_sharded(self.parameters, self.max_grad_norm, loss)
        self.optimizer.found_inf = (~found.isfinite().all()).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return found
