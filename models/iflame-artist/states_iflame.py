"""
What one part of the network carries from one call to the next, growing or in tensors that stay where they are: keys
and values, the states of linear attention, the open ends of the hourglass.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

# B batch, T new items of a level, H heads, D head size, C channels


def refuse_to_crop():
    raise ValueError(
        "an IFlameCache cannot be cropped: linear attention keeps one running state and no history. "
        "Run the shorter sequence from the start face instead"
    )


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether torch lets a tensor be written in place here: those of `torch.inference_mode()` only within it."""
    return torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference()


def in_place_of(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`new` written into the memory of `old`, unless the number of rows is another."""
    return old.copy_(new) if new.shape == old.shape else new


class LayerState:
    """What transformers may ask the state of any layer (`CacheLayerMixin`, whose shapes fit one level only)."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def get_seq_length(self) -> int:
        """Items of the layer's own level that it holds; 0 for a recurrent state, which has no such dimension."""
        return 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that so many new items see, and the place of the first."""
        return self.get_seq_length() + query_length, 0

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Every tensor becomes `function` of it, which maps rows to rows."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its tensors are mapped")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs) -> None:
        refuse_to_crop()


class Slots(NamedTuple):
    """Where static states keep the items (B, T) of a level."""

    places: torch.Tensor  # (B, T)
    are_read: bool  # False: these are several first items, which see each other only


class KeyValueState(LayerState):
    """
    Keys and values of one full-attention layer, at that layer's own level: (B, H, length, D) each.

    New entries are written into spare room after the old ones; the room doubles when it is used up, so that a step
    costs one write however long the sequence is.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_initialized(self) -> bool:
        return self.keys is not None

    def get_seq_length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, slots: Slots | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, T, D) keys and values and returns all so far. It has no slots."""
        if self.keys is None:
            # Keys may come as a view into what holds the queries too, which need not stay.
            self.keys, self.values = keys.contiguous(), values
        elif keys.requires_grad or self.keys.requires_grad:
            # Autograd still needs the old entries unchanged.
            self.keys = torch.cat([self.keys, keys], dim=2)
            self.values = torch.cat([self.values, values], dim=2)
            self._buffers = None
        else:
            first, last = self.get_seq_length(), self.get_seq_length() + keys.shape[2]
            if self._buffers is None or self._buffers[0].shape[2] < last or not is_writable(self._buffers[0]):
                self._buffers = tuple(self._with_room(old, 2 * last) for old in (self.keys, self.values))
            for buffer, new in zip(self._buffers, (keys, values), strict=True):
                buffer[:, :, first:last] = new
            self.keys, self.values = (buffer[:, :, :last] for buffer in self._buffers)
        return self.keys, self.values

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.keys is not None:
            self.keys, self.values, self._buffers = function(self.keys), function(self.values), None

    @staticmethod
    def _with_room(old: torch.Tensor, room: int) -> torch.Tensor:
        buffer = old.new_zeros(*old.shape[:2], room, old.shape[3])
        buffer[:, :, : old.shape[2]] = old
        return buffer


class StaticKeyValueState(LayerState):
    """
    Keys and values (B, H, room, D) of one full-attention layer that stay where they are: those of an item lie in the
    slot that is its place in its mesh. The slots after the last item of a mesh hold what is left of others.
    """

    is_initialized = True

    def __init__(self, shape: tuple[int, ...], **options):
        self.keys, self.values = torch.zeros(shape, **options), torch.zeros(shape, **options)
        self.reset()

    def reset(self) -> None:
        self._items = 0

    def get_seq_length(self) -> int:
        return self._items

    def get_max_length(self) -> int:
        return self.keys.shape[2]

    get_max_cache_shape = get_max_length

    def update(self, keys: torch.Tensor, values: torch.Tensor, slots: Slots) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes (B, H, T, D) keys and values into their slots, and returns those that attention reads."""
        self._write(slots.places[:, None, :, None], keys, values)
        self._items += keys.shape[2]
        return self._read(keys.dtype) if slots.are_read else (keys, values)

    def _write(self, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.scatter_(2, places.expand(new.shape), new.to(kept.dtype))

    def _read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys.to(dtype), self.values.to(dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it keeps: rows first, then heads, then slots."""
        return self.keys, self.values

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.keys, self.values = (in_place_of(each, function(each)) for each in (self.keys, self.values))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Whole numbers of eight bits that stand for x (..., D), and what they are to be multiplied by: the largest of the D
    becomes 127.

    Returns:
        int8 (..., D), and float16 (...).
    """
    x = x.float()
    scales = (x.abs().amax(dim=-1) / 127).to(torch.float16)
    wide = scales.float()[..., None]
    return (x / wide.where(wide > 0, 1.0) + 0.5).floor().clamp(-127, 127).to(torch.int8), scales


def dequantize(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What int8 x (..., D) and `scales` (...) of `quantize` stand for."""
    return (x.float() * scales.float()[..., None]).to(dtype)


class QuantizedKeyValueState(StaticKeyValueState):
    """The same in int8, half the memory of bfloat16: each item has a scale for each head's key, and for its value."""

    def __init__(self, shape: tuple[int, ...], device):
        super().__init__(shape, device=device, dtype=torch.int8)
        self.scales = torch.zeros(*shape[:3], 2, device=device, dtype=torch.float16)

    def _write(self, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
        super()._write(places, keys, values)
        scales = torch.stack([key_scales, value_scales], dim=-1)
        self.scales.scatter_(2, places.expand(scales.shape), scales)

    def _read(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        key_scales, value_scales = self.scales.unbind(dim=-1)
        return dequantize(self.keys, key_scales, dtype), dequantize(self.values, value_scales, dtype)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.scales

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().map_rows(function)
        self.scales = in_place_of(self.scales, function(self.scales))


class RecurrentState(LayerState):
    """The state of one linear-attention layer: a (B, H, D, D) matrix in float32, or None before the first item."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.state: torch.Tensor | None = None

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    def write(self, state: torch.Tensor) -> None:
        """Takes the place of the state so far."""
        self.state = state

    def clear_rows(self, kept: torch.Tensor) -> None:
        """The state of rows becomes zero where `kept` (B,) is False."""
        if self.state is not None:
            self.write(self.state * kept[:, None, None, None])

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = function(self.state)


class StaticRecurrentState(RecurrentState):
    """The same in a tensor that stays where it is, zero before the first item."""

    def __init__(self, shape: tuple[int, ...], device):
        self.state = torch.zeros(shape, dtype=torch.float32, device=device)

    def reset(self) -> None:
        self.state.zero_()

    def write(self, state: torch.Tensor) -> None:
        self.state.copy_(state)

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.state = in_place_of(self.state, function(self.state))


class OpenGroup:
    """
    What a level of the hourglass carries from one call to the next: the outputs of its encoder that wait for their
    group to fill, and the last output that the level below handed up. Without a cache it lasts for one call.

    Args:
        size: items of a group.
    """

    def __init__(self, size: int):
        self.size = size
        self.reset()

    def reset(self) -> None:
        self.waiting: torch.Tensor | None = None  # (B, 0..size - 1, C)
        self.handed_up: torch.Tensor | None = None  # (B, 1, C)

    def push(self, items: torch.Tensor) -> tuple[torch.Tensor, int]:
        """
        Adds the outputs (B, T, C) of the encoder.

        Returns:
            The items (B, size x G, C) of the groups that are complete now, and how many waited before.
        """
        members = items if self.waiting is None else torch.cat([self.waiting, items], dim=1)
        whole = members.shape[1] // self.size * self.size
        self.waiting = members[:, whole:]
        return members[:, :whole], members.shape[1] - items.shape[1]

    def hand_up(self, groups: torch.Tensor | None, items: torch.Tensor) -> torch.Tensor:
        """
        The outputs that are handed up to `items` (B, T, C): the last one before, zero at first, and those (B, G, C)
        of the groups that are complete now, together (B, 1 + G, C).
        """
        last = items.new_zeros(items.shape[0], 1, items.shape[2]) if self.handed_up is None else self.handed_up
        coarse = last if groups is None else torch.cat([last.to(groups), groups], dim=1)
        self.handed_up = coarse[:, -1:]
        return coarse

    @property
    def batch_size(self) -> int | None:
        return None if self.waiting is None else self.waiting.shape[0]

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.waiting is not None:
            self.waiting = function(self.waiting)
        if self.handed_up is not None:
            self.handed_up = function(self.handed_up)


class StaticOpenGroup(OpenGroup):
    """The same in tensors that stay where they are."""

    def __init__(self, size: int, batch_size: int, channels: int, **options):
        self.size = size
        self._members = torch.zeros(batch_size, size - 1, channels, **options)
        self.handed_up = torch.zeros(batch_size, 1, channels, **options)
        self._count = 0

    def reset(self) -> None:
        self._count = 0
        self.handed_up.zero_()

    @property
    def waiting(self) -> torch.Tensor:
        return self._members[:, : self._count]

    @property
    def batch_size(self) -> int:
        return len(self._members)

    def push(self, items: torch.Tensor) -> tuple[torch.Tensor, int]:
        before = self._count
        members = torch.cat([self.waiting.to(items), items], dim=1) if before else items
        whole = members.shape[1] // self.size * self.size
        kept = members[:, whole:]
        self._count = kept.shape[1]
        if self._count:
            self._members[:, : self._count].copy_(kept)
        return members[:, :whole], before

    def hand_up(self, groups: torch.Tensor | None, items: torch.Tensor) -> torch.Tensor:
        if groups is None:
            return self.handed_up.to(items)
        coarse = torch.cat([self.handed_up.to(groups), groups], dim=1)
        self.handed_up.copy_(groups[:, -1:])
        return coarse

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._members, self.handed_up = (
            in_place_of(self._members, function(self._members)),
            in_place_of(self.handed_up, function(self.handed_up)),
        )
