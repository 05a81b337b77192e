"""
All decoding state of iFlame: keys and values, recurrent states, and the open ends of the hourglass.

`IFlameCache` grows with the sequence; `StaticIFlameCache` keeps its tensors, of fixed shapes, for steps that are
captured once and replayed. To the network they are the same.
"""

from collections.abc import Callable

import torch
from transformers.cache_utils import Cache

from .states_iflame import (
    KeyValueState,
    LayerState,
    OpenGroup,
    QuantizedKeyValueState,
    RecurrentState,
    Slots,
    StaticKeyValueState,
    StaticOpenGroup,
    StaticRecurrentState,
    in_place_of,
    is_writable,
    refuse_to_crop,
)


def check_kv_cache_dtype(name: str | None) -> None:
    """Raises ValueError for what keys and values cannot be kept in."""
    if name not in (None, "int8"):
        raise ValueError(f'kv_cache_dtype must be "int8", or None for the type of the model, got {name!r}')


class IFlameCache(Cache):
    """
    The decoding state of [`IFlameForCausalLM`], for any number of tokens at a time.

    Besides one state a layer it holds what the hourglass carries from one call to the next, and where in its mesh each
    row is. It counts tokens, not vertices or faces, and all rows together: their meshes begin at whole faces, so that
    they complete coordinates, vertices and faces at the same time.

    Args:
        config (`IFlameConfig`): the model's configuration.
    """

    # Three kinds of step, chosen by position: generate() must not compile the model for this cache by itself.
    is_compileable = False
    is_croppable = False
    is_static = False

    def __init__(self, config):
        self._strides = config.level_strides
        super().__init__(layers=[self._layer(config, index) for index in range(config.num_hidden_layers)])
        # Of coordinates and of vertices.
        self.open_groups = [self._open_group(config, size) for size in config.group_sizes]
        self._forget_rows()

    def _layer(self, config, index: int) -> LayerState:
        return KeyValueState() if config.layer_types[index] == "full_attention" else RecurrentState()

    def _open_group(self, config, size: int) -> OpenGroup:
        return OpenGroup(size)

    def _forget_rows(self) -> None:
        self.tokens_seen = 0
        # (B,) place in its mesh of the next token of each row.
        self.positions: torch.Tensor | None = None
        # Whether the mesh of some row begins after the start of the row (after padding or other meshes).
        self.has_apart_rows = False
        # (B,) masked tokens that each row begins with; None: none.
        self.padding: torch.Tensor | None = None
        # Whether some row is padding as far as it was seen: its mesh is still to begin.
        self.is_padding_so_far = False
        # Whether padding on the right of some row went through the states, which then cannot be continued.
        self.ends_in_padding = False

    # What the network tells and asks, in this order in each call.

    def check_room(self, batch_size: int, tokens: int) -> None:
        """Raises ValueError if so many tokens of so many rows have no room: here there always is some."""

    def begin_rows(
        self,
        batch_size: int,
        device: torch.device,
        starts: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
        ends_in_padding: bool = False,
        is_padding_so_far: bool = False,
    ) -> None:
        """
        Rows are about to begin.

        Args:
            starts: (B,) token at which the mesh begins that ends each row; None: each row is one mesh.
            padding: (B,) masked tokens that each row begins with; None: none.
        """
        self._place(torch.zeros(batch_size, dtype=torch.long, device=device) if starts is None else -starts)
        self.has_apart_rows = starts is not None
        self.padding, self.ends_in_padding, self.is_padding_so_far = padding, ends_in_padding, is_padding_so_far

    def continue_padding(self, starts: torch.Tensor, padding: torch.Tensor, is_padding_so_far: bool) -> None:
        """Of rows that were padding so far some have more of it, and others begin their mesh; as in `begin_rows`."""
        self._place(self.tokens_seen - starts)
        self.padding, self.is_padding_so_far = padding, is_padding_so_far

    def advance(self, tokens: int) -> None:
        """So many tokens of each row have gone through the network."""
        self.tokens_seen += tokens
        if not is_writable(self.positions):
            self.positions = self.positions.clone()
        self.positions.add_(tokens)

    def _place(self, positions: torch.Tensor) -> None:
        self.positions = positions

    def begin_mesh(self, rows: torch.Tensor | list[int]) -> None:
        """
        Another mesh begins in some rows, with the next token, which is the first of its start face: what the cache
        holds of the mesh before counts no more. The other rows go on.

        Args:
            rows: their indices, or (B,) booleans.

        Raises:
            ValueError: the last face is not complete, no row has begun, or some rows are padding so far.
        """
        if self.positions is None or self.tokens_seen % self._strides[-1]:
            raise ValueError(
                f"a mesh begins after whole faces, of {self._strides[-1]} tokens, and the cache has seen "
                f"{self.tokens_seen} tokens"
            )
        if self.is_padding_so_far or self.ends_in_padding:
            raise ValueError("some rows of the cache end in padding: there no other mesh can begin")
        begins = torch.zeros(len(self.positions), dtype=torch.bool, device=self.positions.device)
        begins[torch.as_tensor(rows, device=begins.device)] = True
        self._place(self.positions.masked_fill(begins, 0))
        self.has_apart_rows = True
        for layer in self.layers:
            if isinstance(layer, RecurrentState):
                layer.clear_rows(~begins)

    # What others ask.

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
        return self.open_groups[0].batch_size

    def reset(self) -> None:
        for part in (*self.layers, *self.open_groups):
            part.reset()
        self._forget_rows()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Rows become those of `beam_idx` (B,), for beam search."""
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row stands `repeats` times, next to each other."""
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, *args, **kwargs) -> None:
        refuse_to_crop()

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for part in (*self.layers, *self.open_groups):
            part.map_rows(function)
        if self.padding is not None:
            self.padding = function(self.padding)
        if self.positions is not None:
            self._place(function(self.positions))


class StaticIFlameCache(IFlameCache):
    """
    The decoding state of [`IFlameForCausalLM`] in tensors that neither grow nor move, for meshes of at most
    `max_faces` faces: a step of the same kind works on the same memory each time. As [`IFlameCache`] otherwise; full
    attention looks at all slots, through scaled_dot_product_attention where the model asks for flash or flex.

    Args:
        config (`IFlameConfig`): the model's configuration.
        max_faces (`int`): faces of the longest sequence, start face included.
        batch_size (`int`): rows.
        device, dtype: of the model.
        kv_cache_dtype (`str`, *optional*): "int8" keeps keys and values in half the memory of bfloat16, each head of
            an item with a scale of its own; otherwise they are of `dtype`.

    Raises:
        ValueError: for sizes below 1 and other types of keys and values. The model raises it for a mesh that has no
            room.
    """

    is_static = True

    def __init__(
        self,
        config,
        max_faces: int,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        kv_cache_dtype: str | None = None,
    ):
        for name, value in (("max_faces", max_faces), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        check_kv_cache_dtype(kv_cache_dtype)
        self.max_faces, self.kv_cache_dtype = max_faces, kv_cache_dtype
        self._batch_size = batch_size
        self._options = {"device": device, "dtype": dtype}
        self._positions = torch.zeros(batch_size, dtype=torch.long, device=device)
        super().__init__(config)

    def _layer(self, config, index: int) -> LayerState:
        heads, size = config.num_attention_heads, config.head_dim
        if config.layer_types[index] == "linear_attention":
            return StaticRecurrentState((self._batch_size, heads, size, size), self._options["device"])
        room = self.room(config.layer_levels()[index])
        shape = (self._batch_size, heads, room, size)
        if self.kv_cache_dtype is not None:
            return QuantizedKeyValueState(shape, self._options["device"])
        return StaticKeyValueState(shape, **self._options)

    def _open_group(self, config, size: int) -> OpenGroup:
        return StaticOpenGroup(size, self._batch_size, config.hidden_size, **self._options)

    def _forget_rows(self) -> None:
        super()._forget_rows()
        self._positions.zero_()
        self.positions = self._positions
        # Tokens of the mesh of each row, on the host; padding counts as if it were of the mesh.
        self._mesh_tokens = [0] * self._batch_size

    def _place(self, positions: torch.Tensor) -> None:
        self.positions = self._positions = in_place_of(self._positions, positions)

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._map_rows(function)
        self._batch_size = len(self.positions)
        self._mesh_tokens = [max(self._mesh_tokens)] * self._batch_size

    def check_room(self, batch_size: int, tokens: int) -> None:
        if batch_size != self.batch_size:
            raise ValueError(f"the cache is of {self.batch_size} rows, got {batch_size}")
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            raise ValueError("a StaticIFlameCache takes no gradients: call the model within torch.no_grad()")
        if max(self._mesh_tokens) + tokens > self.max_faces * self._strides[-1]:
            raise ValueError(
                f"the cache holds meshes of {self.max_faces} faces, and one would have {max(self._mesh_tokens)} and "
                f"{tokens} more tokens: give it a larger max_faces"
            )

    def advance(self, tokens: int) -> None:
        super().advance(tokens)
        self._mesh_tokens = [count + tokens for count in self._mesh_tokens]

    def begin_mesh(self, rows: torch.Tensor | list[int]) -> None:
        super().begin_mesh(rows)
        chosen = torch.as_tensor(rows)
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
        for row in chosen.tolist():
            self._mesh_tokens[row] = 0

    def room(self, level: int) -> int:
        """
        Slots of a level. The last one is of no mesh: there goes what is not kept. Their number is a multiple of eight,
        which the kernels of attention like.
        """
        items = self.max_faces * self._strides[-1] // self._strides[level]
        return -(-(items + 1) // 8) * 8

    def slots(self, level: int, index: torch.Tensor, positions: torch.Tensor | None, bounds, before: int) -> Slots:
        """
        Where the T new items of a level are kept: those of the mesh that ends a row, which is the one that goes on.

        Args:
            index: (T,) their places in the row.
            positions: (B, T) their places in their meshes; None: each row is one mesh.
            bounds: the meshes of the rows; None: the items of a row are of one mesh.
            before: items of the level before them.
        """
        places = index.expand(self.batch_size, -1) if positions is None else positions
        if bounds is not None:
            kept = bounds.meshes == bounds.meshes[:, -1:]
            places = torch.where(kept, places, self.room(level) - 1)
        return Slots(places, are_read=before > 0 or len(index) == 1)
