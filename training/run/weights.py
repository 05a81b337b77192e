"""The weights that a run trains: one whole copy, one on every process, or shared out among them (FSDP)."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file

from iflame_hf import IFlameForCausalLM
from training.optim.average import MovingAverage

WEIGHTS = "model.safetensors"
AVERAGE = "average.safetensors"


def are_sharded(accelerator: Accelerator) -> bool:
    """Whether every process has a part of the weights only."""
    return accelerator.distributed_type == DistributedType.FSDP


def why_never_whole(accelerator: Accelerator) -> str | None:
    """Why weights that are sharded cannot be whole on each process during a step, or None."""
    if not accelerator.is_fsdp2:
        return "weights that FSDP shards in its first version"
    from torch.distributed.fsdp import CPUOffloadPolicy  # which torch 2.5 has not

    plugin = accelerator.state.fsdp_plugin
    if plugin.auto_wrap_policy is not None:
        return "blocks that are gathered one by one (fsdp_auto_wrap_policy)"
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "weights that lie in the memory of the host (fsdp_offload_params)"
    if plugin.activation_checkpointing:
        return "fsdp_activation_checkpointing, for which --gradient_checkpointing is there"
    return None


class Weights:
    """
    The model of a run and the moving average of its weights, if there is one.

    Checkpoints hold the weights as `save_pretrained` writes them; Accelerate, which would write and read its own copy,
    is told so here. Where they are sharded it still has its own.

    Args:
        model: as Accelerate has prepared it.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, average: MovingAverage | None):
        self.accelerator = accelerator
        self.model = model
        self.average = average
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def unwrapped(self) -> IFlameForCausalLM:
        """The model without what Accelerate has put around it."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def published(self) -> torch.nn.Module:
        """What is evaluated, and left at the end: the moving average, if there is one."""
        return self.model if self.average is None else self.average.module

    def state_dict(self, published: bool = False) -> dict[str, torch.Tensor]:
        """Whole weights. Called on all processes together; where they are sharded, only the main one gets them."""
        return self.accelerator.get_state_dict(self.published if published else self.model)

    def model_to_sample(self) -> IFlameForCausalLM | None:
        """A model that can generate, on the main process; None on the others. Called on all of them together."""
        weights = self.state_dict() if are_sharded(self.accelerator) else None
        if not self.accelerator.is_main_process:
            return None
        if self.average is not None:
            return self.average.module
        if weights is None:
            return self.unwrapped
        model = IFlameForCausalLM(self.unwrapped.config)
        model.load_state_dict(weights)
        return model.to(self.accelerator.device)

    def model_to_save(self) -> IFlameForCausalLM:
        """The model to call `save_pretrained(state_dict=...)` of."""
        model = self.unwrapped
        if are_sharded(self.accelerator):  # its class is one that torch has made, which nobody could load
            generation_config = model.generation_config
            with torch.device("meta"):
                model = IFlameForCausalLM(model.config)
            model.generation_config = generation_config
        return model

    def save_average(self, folder: Path) -> None:
        if self.average is not None:
            save_file(self.average.state_dict(), folder / AVERAGE)

    def _load(self, models: list[torch.nn.Module], folder: str) -> None:
        """Called by Accelerate, which still loads the weights itself where they are sharded."""
        if models:
            self.unwrapped.load_state_dict(load_file(Path(folder) / WEIGHTS))
            models.clear()
        if self.average is not None:
            self.average.load_state_dict(load_file(Path(folder) / AVERAGE))
