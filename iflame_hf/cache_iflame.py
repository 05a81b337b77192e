"""All decoding state of iFlame: keys and values, recurrent states, and the open ends of the hourglass."""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

# B batch, H heads, D head size, C channels


class KeyValueState:
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
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, n, D) keys and values and returns all so far."""
        if self.keys is None:
            self.keys, self.values = keys, values
        elif keys.requires_grad or self.keys.requires_grad:
            # Autograd still needs the old entries unchanged.
            self.keys = torch.cat([self.keys, keys], dim=2)
            self.values = torch.cat([self.values, values], dim=2)
            self._buffers = None
        else:
            first, last = self.length, self.length + keys.shape[2]
            if self._buffers is None or self._buffers[0].shape[2] < last:
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
        buffer = old.new_empty(*old.shape[:2], room, old.shape[3])
        buffer[:, :, : old.shape[2]] = old
        return buffer


class RecurrentState:
    """The state of one linear-attention layer: a (B, H, D, D) matrix in float32, or None before the first item."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self.state: torch.Tensor | None = None

    def map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.state is not None:
            self.state = function(self.state)


class IFlameCache(Cache):
    """
    The decoding state of [`IFlameForCausalLM`], for any number of tokens at a time.

    Besides one state a layer it holds what the hourglass carries from one call to the next: for the two upper levels
    the outputs of the encoder that wait for their group of three to fill (`open_groups`), and the last output that the
    level below handed up (`handed_up`). It counts tokens, not vertices or faces.

    Args:
        config (`IFlameConfig`): the model's configuration.
    """

    # Three kinds of step, chosen by position: generate() must not compile the model for this cache by itself.
    is_compileable = False
    is_croppable = False

    def __init__(self, config):
        super().__init__(
            layers=[KeyValueState() if kind == "full_attention" else RecurrentState() for kind in config.layer_types]
        )
        self._reset_hourglass()

    def _reset_hourglass(self) -> None:
        self.tokens_seen = 0
        # (B,) where in its row the mesh that is being decoded begins (after padding or earlier meshes); None: at 0.
        self.mesh_starts: torch.Tensor | None = None
        # (B,) masked tokens that each row begins with; None: none.
        self.padding: torch.Tensor | None = None
        # Whether some row is padding as far as it was seen: its mesh is still to begin.
        self.is_padding_so_far = False
        # Whether padding on the right of some row went through the states, which then cannot be continued.
        self.ends_in_padding = False
        # For coordinates and for vertices: (B, 0..2, C) and (B, 1, C).
        self.open_groups: list[torch.Tensor | None] = [None, None]
        self.handed_up: list[torch.Tensor | None] = [None, None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, whatever the layer."""
        return self.tokens_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether a linear layer (any of them without an index) holds a state."""
        layers = self.layers if layer_idx is None else [self.layers[layer_idx]]
        return any(isinstance(layer, RecurrentState) and layer.state is not None for layer in layers)

    @property
    def is_initialized(self) -> bool:
        return self.tokens_seen > 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.layers)

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(layer, RecurrentState) for layer in self.layers]

    @property
    def batch_size(self) -> int | None:
        for group in self.open_groups:
            if group is not None:
                return group.shape[0]
        return None

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self._reset_hourglass()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows become those of `beam_idx` (B,), for beam search."""
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row stands `repeats` times, next to each other."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs) -> None:
        raise ValueError(
            "an IFlameCache cannot be cropped: linear attention keeps one running state and no history. "
            "Run the shorter sequence from the start face instead"
        )

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for layer in self.layers:
            layer.map_rows(function)
        for name in ("open_groups", "handed_up"):
            tensors = getattr(self, name)
            setattr(self, name, [None if tensor is None else function(tensor) for tensor in tensors])
        for name in ("mesh_starts", "padding"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))
