"""Which parameter is trained by which optimiser, learning rates over a run, and the moving average of the weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import get_scheduler

OPTIMIZERS = ("muon", "adamw_torch")
SCHEDULES = ("constant_with_warmup", "linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay")
# Share of a run in which "warmup_stable_decay" decays, where lr_scheduler_kwargs do not say otherwise.
DECAY_SHARE = 0.2


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """
    Every trainable parameter by name, in exactly one of three groups:

    - `matrices`: the weight matrices inside the blocks;
    - `embeddings`: the token embedding and the head's matrix;
    - `others`: norms, biases and scalars, which are never decayed.

    Raises:
        ValueError: a parameter belongs nowhere, for example a new kind of layer that was not thought of here.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "embeddings": {}, "others": {}}
    blocks = {parameter for name, parameter in model.named_parameters() if ".layers." in f".{name}"}
    embeddings = {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter in embeddings:
            group = "embeddings"
        elif parameter.ndim < 2:
            group = "others"
        elif parameter in blocks and parameter.ndim == 2:
            group = "matrices"
        else:
            raise ValueError(f"no optimiser group for the parameter {name} of shape {tuple(parameter.shape)}")
        groups[group][name] = parameter
    return groups


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon and AdamW as one optimiser: torch's own classes (Muon's with a faster step), each on its groups, behind one
    `step`, one `state_dict` and one list of groups. One object is what a gradient scaler (a step is skipped for all
    parameters or for none), a scheduler and a checkpoint expect.

    Muon's step is scaled so that its size is that of AdamW's ("match_rms_adamw", arXiv 2502.16982): one learning rate
    serves both, as in the paper's code.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"Muon needs torch 2.9 or newer, this is {torch.__version__}; --optim adamw_torch does not"
            )
        from training.optim.muon import BatchedMuon

        self._muon = BatchedMuon(muon_groups, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = torch.optim.AdamW(adamw_groups, lr=lr, betas=betas, eps=eps)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Let both optimisers work on this one's groups and state."""
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon.step()
        self._adamw.step()
        return loss


def create_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """
    "muon": Muon for the matrices in the blocks, AdamW for everything else; "adamw_torch": AdamW for everything. Only
    the matrices in the blocks are decayed.

    Raises:
        ImportError: Muon is asked for and torch is older than 2.9.
        ValueError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    groups = {key: list(parameters.values()) for key, parameters in parameter_groups(model).items()}
    matrices = [{"params": groups["matrices"], "weight_decay": weight_decay}]
    rest = [{"params": groups[key], "weight_decay": 0.0} for key in ("embeddings", "others") if groups[key]]
    if name == "muon" and groups["matrices"]:
        return MuonAdamW(matrices, rest, lr, betas, eps)
    return torch.optim.AdamW(matrices + rest, lr=lr, betas=betas, eps=eps)


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
