"""What a step computes: the gradients of a batch, and the update of the weights."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device

from training.arguments import TrainArguments
from training.optim.shards import clip_sharded
from training.rows.load import Batch
from training.run.captured import CapturedLearner, why_not_captured
from training.run.create import compile_blocks, device_leaves_out_steps
from training.run.sharded import ShardedCapturedLearner
from training.run.weights import are_sharded


class Learner(Protocol):
    """What learns; the device may still have to compute what its methods return."""

    def backward(self, batch: list[Batch], labels: int) -> torch.Tensor:
        """
        Gradients of the sum of the losses of all rows of all processes, divided once by the number of their labels.
        Returns this process's part of that loss.
        """

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        """
        Clip the gradients and step the optimiser; where a gradient, or a process's part `loss` of the loss, is not
        finite the step is left out. Returns (2,) the norm of the gradient and the loss of all processes.
        """


def prepare(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    options: TrainArguments,
    report: Callable[[str], None],
) -> tuple[torch.nn.Module, torch.optim.Optimizer, Learner]:
    """Model and optimiser as Accelerate prepares them, and what learns with them."""
    max_grad_norm = options.max_grad_norm or float("inf")
    reason = why_not_captured(model, options, accelerator) if options.cuda_graphs else "cuda_graphs=False"
    if reason is None and are_sharded(accelerator):
        whole = copy.deepcopy(model).to(accelerator.device)
        if options.torch_compile:  # which copies are not
            compile_blocks(whole, options.torch_compile_mode, memory_budget=options.activation_memory_budget)
        prepared, stepped = accelerator.prepare(model, optimizer)
        learner = ShardedCapturedLearner(whole, prepared, optimizer, max_grad_norm, accelerator.autocast)
        return prepared, stepped, learner
    if reason is None:
        # Of several processes the learner adds up the gradients: Accelerate puts nothing around the model.
        prepared = accelerator.prepare_model(model, evaluation_mode=True)
        own = accelerator.unwrap_model(prepared, keep_fp32_wrapper=True)
        learner = CapturedLearner(own, optimizer, max_grad_norm, accelerator.autocast, accelerator.num_processes)
        return prepared, accelerator.prepare_optimizer(optimizer), learner
    if accelerator.device.type == "cuda" and options.cuda_graphs:
        report(f"steps are no CUDA graphs, because of {reason}")
    prepared, stepped = accelerator.prepare(model, optimizer)
    return prepared, stepped, AcceleratedLearner(accelerator, prepared, stepped, max_grad_norm)


class AcceleratedLearner:
    """
    A learner wherever Accelerate runs.

    Args:
        model, optimizer: as Accelerate has prepared them.
        max_grad_norm: infinite: gradients are not clipped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = list(model.parameters())
        self.device_of_weights = self.parameters[0].device  # the CPU, where FSDP offloads them

    def backward(self, batch: list[Batch], labels: int) -> torch.Tensor:
        accelerator, device = self.accelerator, self.accelerator.device
        total = torch.zeros((), device=device)
        num_items = torch.full((), labels, device=device)
        for index, rows in enumerate(batch):
            rows = send_to_device(rows, device, non_blocking=True)
            last = index == len(batch) - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                with accelerator.autocast():
                    loss = self.model(**rows, use_cache=False, num_items_in_batch=num_items).loss
                # The mean over processes is what gradients are synchronised to; their sum is wanted.
                accelerator.backward(loss * accelerator.num_processes)
            total += loss.detach()
        return total

    def update(self, loss: torch.Tensor) -> torch.Tensor:
        accelerator = self.accelerator
        found = self._clip(loss)
        if device_leaves_out_steps(accelerator):
            is_left_out = (~found.isfinite().all()).float()
            self.optimizer.optimizer.found_inf = is_left_out.to(self.device_of_weights)
            self.optimizer.step()
        elif accelerator.scaler is not None:  # which leaves the step out by itself, and lowers its scale
            self.optimizer.step()
            if accelerator.optimizer_step_was_skipped:
                found = torch.full_like(found, torch.nan)
        elif found.isfinite().all():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return found

    def _clip(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns (2,) the norm of the gradient before, and the loss of all processes."""
        accelerator = self.accelerator
        if accelerator.is_fsdp2:
            accelerator.unscale_gradients()  # of a gradient scaler, if there is one
            return clip_sharded(self.parameters, self.max_grad_norm, loss)
        norm = accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        total = accelerator.reduce(loss, "sum")
        return torch.stack([norm.to(total.device), total])
