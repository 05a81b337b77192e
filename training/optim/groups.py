"""Which parameter is trained by which optimiser."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from iflame_hf.blocks_iflame import IFlameRMSNorm, IFlameUpsample
from training.optim.shards import own_part

OPTIMIZERS = ("muon", "adamw_torch")
# The group of a parameter by the class of its module, or one that is derived from, and its name there. Only the head's
# matrix, which is a Linear's weight too, belongs to the embeddings.
GROUPS = {
    (nn.Embedding, "weight"): "embeddings",
    (nn.Linear, "weight"): "matrices",
    (nn.Linear, "bias"): "others",
    (IFlameRMSNorm, "weight"): "others",
    (IFlameUpsample, "scale"): "others",
}


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """
    Every trainable parameter by name, in exactly one of three groups:

    - `matrices`: the weight matrices inside the blocks;
    - `embeddings`: the token embedding and the head's matrix;
    - `others`: norms, biases and scalars, which are never decayed.

    Raises:
        ValueError: a parameter belongs nowhere, for example a new kind of layer that GROUPS does not name.
    """
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "embeddings": {}, "others": {}}
    head = model.get_output_embeddings()
    grouped = set()  # of a parameter that two modules share the first name counts, as in named_parameters
    for path, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if parameter in grouped or not parameter.requires_grad:
                continue
            grouped.add(parameter)
            name = f"{path}.{own_name}" if path else own_name
            kinds = ((kind, own_name) for kind in type(module).__mro__)
            group = next((GROUPS[kind] for kind in kinds if kind in GROUPS), None)
            if module is head and own_name == "weight":
                group = "embeddings"
            if group is None:
                raise ValueError(
                    f"no optimiser group for the parameter {name} of shape {tuple(parameter.shape)}: GROUPS in "
                    f"training/optim/groups.py has no line for {own_name!r} of {type(module).__name__}"
                )
            groups[group][name] = parameter
    return groups


class AdamW(torch.optim.AdamW):
    """
    torch's AdamW, which steps on what lies on this process of tensors that are sharded (DTensors; so are its states in
    checkpoints), and stays fused or not, as it was made, whatever a checkpoint says that it goes on from.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> bool:
        """Fills the lists with what a step is about: parameters, gradients, and the states of each kind."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(own_part, tensors)
        return has_complex

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_fused(state_dict, self.param_groups))


def _with_fused(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """A state whose groups say `fused` as others do that have the option."""
    saved = [
        {**group, "fused": own["fused"]} if "fused" in own else group
        for group, own in zip(state_dict["param_groups"], groups, strict=False)  # torch says what does not fit
    ]
    return {**state_dict, "param_groups": saved}


class MuonAdamW(torch.optim.Optimizer):
    """
    Muon and AdamW as one optimiser: torch's own classes (Muon's with a faster step), each on its groups, with one
    `step`, one `state_dict` and one list of groups. One object is what a gradient scaler (a step is skipped for all
    parameters or for none), a scheduler and a checkpoint expect.

    Muon's step is scaled so that its size is that of AdamW's ("match_rms_adamw", arXiv 2502.16982): one learning rate
    serves both, as in the paper's code.

    Attributes:
        found_inf: of a fused one, as of `BatchedMuon`.
    """

    found_inf: torch.Tensor | None = None

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float = 0.95,
        fused: bool = False,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"Muon needs torch 2.9 or newer, this is {torch.__version__}; --optim adamw_torch does not"
            )
        from training.optim.muon import BatchedMuon

        self._muon = BatchedMuon(muon_groups, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        self._adamw = AdamW(adamw_groups, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__(self._muon.param_groups + self._adamw.param_groups, {})
        self._share()

    def _share(self) -> None:
        """Let both optimisers work on this one's groups and state."""
        count = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_fused(state_dict, self.param_groups))
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in (self._muon, self._adamw):
            optimizer.found_inf = self.found_inf
            optimizer.step()
        return loss


def create_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fused: bool = False,
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
        return MuonAdamW(matrices, rest, lr, betas, eps, fused=fused)
    return AdamW(matrices + rest, lr=lr, betas=betas, eps=eps, fused=fused)
