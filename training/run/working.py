"""
What steps of training work on: gradients in one piece of memory, and copies of the weights as the products want them,
joined and in their type, which are made once for all products of a step.

Gradients of matrices are added up in float32 in the products themselves; those of a matrix whose columns were filled
up are products in the shorter type first.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from iflame_hf.blocks_iflame import IFlameFullAttention, IFlameLinearAttention, IFlameMLP, IFlameRMSNorm
from iflame_hf.fused_products_iflame import Weights
from iflame_hf.products_iflame import filled, is_plain

# Bytes at which each gradient begins.
ALIGNMENT = 256


class Stack(NamedTuple):
    """Parameters one below the other, each with room for so many rows."""

    parameters: tuple[nn.Parameter, ...]
    rows: int

    @classmethod
    def of(cls, *parameters: nn.Parameter, rows: int | None = None) -> "Stack":
        return cls(parameters, parameters[0].shape[:1].numel() if rows is None else rows)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows * len(self.parameters), *self.parameters[0].shape[1:]

    def parts(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """Of a tensor of this shape, or with more columns, what belongs to each parameter."""
        pairs = zip(whole.split(self.rows), self.parameters, strict=True)
        return [part[tuple(map(slice, each.shape))].view_as(each) for part, each in pairs]


class GradientBuffer:
    """
    Gradients in one piece of memory, in float32, and one number at its end.

    Args:
        stacks: of all parameters, which are on one device; their `grad` is a part of the buffer from now on.

    Attributes:
        sums: (N + 1,) all of it.
        of_stacks: what belongs to each stack, of its shape.
    """

    def __init__(self, stacks: list[Stack]):
        starts, end = [], 0
        for stack in stacks:
            starts.append(end)
            end += -(-torch.Size(stack.shape).numel() * 4 // ALIGNMENT) * (ALIGNMENT // 4)
        self.sums = torch.zeros(end + 1, device=stacks[0].parameters[0].device)
        self.of_stacks: list[torch.Tensor] = []
        self._owned: list[tuple[nn.Parameter, torch.Tensor]] = []
        for start, stack in zip(starts, stacks, strict=True):
            whole = self.sums[start : start + torch.Size(stack.shape).numel()].view(stack.shape)
            self.of_stacks.append(whole)
            for parameter, part in zip(stack.parameters, stack.parts(whole), strict=True):
                parameter.grad = part
                self._owned.append((parameter, part))

    def was_taken_away(self) -> bool:
        return any(parameter.grad is not own for parameter, own in self._owned)


class Place(NamedTuple):
    """An attribute of a module for the weights of one product."""

    module: nn.Module
    name: str
    matrix: Stack
    bias: Stack | None = None
    columns: int | None = None  # of the matrix, filled up with zeros


def places_of(model: nn.Module) -> list[Place]:
    """The products of a model whose weights may be kept: of blocks that are as they were made."""
    places = []
    for module in model.modules():
        if type(module) in (IFlameFullAttention, IFlameLinearAttention):
            layers = module.q_proj, module.k_proj, module.v_proj
            if all(is_plain(layer, nn.Linear) for layer in (*layers, module.o_proj)):
                places.append(Place(module, "inward", Stack.of(*(layer.weight for layer in layers))))
                places.append(Place(module, "outward", Stack.of(module.o_proj.weight)))
        elif type(module) is IFlameMLP:
            gate, up, down = module.gate_proj, module.up_proj, module.down_proj
            if all(is_plain(layer, nn.Linear) for layer in (gate, up, down)):
                units = filled(down.in_features)
                matrix, bias = (
                    Stack.of(*pair, rows=units) for pair in ((gate.weight, up.weight), (gate.bias, up.bias))
                )
                places.append(Place(module, "inward", matrix, bias))
                places.append(Place(module, "outward", Stack.of(down.weight), Stack.of(down.bias), units))
    return places


class WorkingWeights:
    """
    Copies of a model's weights in the type of its products, and a buffer for all gradients. Within `attached`, blocks
    multiply with the copies and add the gradients up in the buffer, where their products allow it; wherever they do
    not, autograd adds to the same buffer.

    Args:
        dtype: of the products; None: nothing is copied.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        all_trained = all(each.requires_grad and each.dtype == torch.float32 for each in model.parameters())
        # Below a block without a gradient there may be none that asks for those of its weights.
        places = places_of(model) if dtype is not None and all_trained else []
        stacks: list[Stack] = []
        stacked: set[nn.Parameter] = set()
        places = [place for place in places if _adds(place, stacks, stacked)]
        stacks += [Stack.of(parameter) for parameter in parameters if parameter not in stacked]
        self.gradients = GradientBuffer(stacks)
        of_stack = dict(zip(stacks, self.gradients.of_stacks, strict=True))
        self._memory = [(each, each.data_ptr()) for each in parameters]
        self._attributes: list[tuple[nn.Module, str, Weights | torch.Tensor]] = []
        # Torch takes tensors of other strides one by one, but all others in one call.
        self._copies: dict[tuple[torch.dtype, bool], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for module, name, matrix, bias, columns in places:
            rows, own_columns = matrix.shape
            copy = torch.zeros(rows, columns or own_columns, dtype=dtype, device=parameters[0].device)
            self._copy(matrix, copy)
            vector = to_bias = None
            if bias is not None:
                to_bias = of_stack[bias]
                vector = bias.parameters[0].detach()
                if len(bias.parameters) > 1:
                    vector = torch.zeros_like(to_bias)
                    self._copy(bias, vector)
            self._attributes.append((module, name, Weights(copy, vector, of_stack[matrix], to_bias)))
        if places:
            norms = (module for module in model.modules() if type(module) is IFlameRMSNorm)
            self._attributes += [(norm, "to_weight", norm.weight.grad) for norm in norms]

    def _copy(self, stack: Stack, whole: torch.Tensor) -> None:
        for part, parameter in zip(stack.parts(whole), stack.parameters, strict=True):
            kind = whole.dtype, part.is_contiguous()
            targets, sources = self._copies.setdefault(kind, ([], []))
            targets.append(part)
            sources.append(parameter.detach())

    def were_moved(self) -> bool:
        """Whether a parameter lies elsewhere than those that are copied."""
        return any(parameter.data_ptr() != place for parameter, place in self._memory)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the weights of now."""
        for targets, sources in self._copies.values():
            torch._foreach_copy_(targets, sources)

    @contextmanager
    def attached(self) -> Iterator[None]:
        try:
            for module, name, value in self._attributes:
                setattr(module, name, value)
            yield
        finally:
            for module, name, _ in self._attributes:
                module.__dict__.pop(name, None)


def _adds(place: Place, stacks: list[Stack], stacked: set[nn.Parameter]) -> bool:
    """Adds the stacks of a place, unless modules share one of its parameters and another place has it."""
    own = [stack for stack in (place.matrix, place.bias) if stack is not None]
    parameters = {parameter for stack in own for parameter in stack.parameters}
    if parameters & stacked or len(parameters) < sum(len(stack.parameters) for stack in own):
        return False
    stacks += own
    stacked |= parameters
    return True
