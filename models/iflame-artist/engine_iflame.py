"""
A decode engine: a face of every row at a time, on memory that stays where it is.

On a CUDA device the nine steps of a face, with the choice of each token, are a graph that is captured once and
replayed; the host looks at what came of a face while the next one is made. On a CPU the same in few calls of torch.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch

from .cache_iflame import StaticIFlameCache
from .choosing_iflame import Choice, KernelChooser, RowsBegin, Settings
from .host_choosing_iflame import HostChooser
from .host_steps_iflame import HostSteps
from .kernels_iflame import compiled_ahead, why_no_kernels
from .packing_iflame import copy_weights, pack_weights
from .sampling_iflame import NOT_FINITE
from .steps_iflame import KernelSteps
from .threads_iflame import spare_a_core

# B rows, T tokens, V token ids


class Tokens(NamedTuple):
    """Some places of all rows, on their way to the host."""

    places: list[int]
    table: torch.Tensor | np.ndarray
    ready: Any  # an event, or None


class Types(NamedTuple):
    """What an engine keeps things in."""

    dtype: torch.dtype  # of all but what follows
    kv_cache_dtype: str | None = None  # "int8": keys and values, as of `StaticIFlameCache`


class Prompt(NamedTuple):
    """What meshes begin with: the decoding state after it, and the logits of what follows."""

    length: int  # tokens
    memories: list[tuple[torch.Tensor, ...]]  # of each block: state (1, H, D, D), or keys and values (1, H, items, D)
    handed: list[torch.Tensor]  # (1, C) handed up to coordinates and to vertices
    logits: np.ndarray  # (1, V) float32


def read_prompt(model: Any, ids: torch.Tensor, types: Types, conditions: dict[str, torch.Tensor]) -> Prompt:
    """Of ids (1, T) of whole faces, and what the mesh is to be, (1,) each."""
    config = model.config
    faces = ids.shape[1] // config.tokens_per_face + 1
    cache = StaticIFlameCache(config, faces, 1, ids.device, types.dtype, types.kv_cache_dtype)
    output = model(ids, cache=cache, use_cache=True, logits_to_keep=1, return_dict=True, **conditions)
    memories = []
    for layer, level in zip(cache.layers, config.layer_levels(), strict=True):
        items = ids.shape[1] // config.level_strides[level]
        if hasattr(layer, "keys"):
            memories.append(tuple(each[:, :, :items] for each in layer.tensors()))
        else:
            memories.append((layer.state,))
    handed = [group.handed_up[:, 0] for group in cache.open_groups]
    return Prompt(ids.shape[1], memories, handed, output.logits[:, -1].float().cpu().numpy())


class DecodeEngine:
    """
    Decoding of up to `max_faces` faces for each of so many rows.

    Args:
        model: an `IFlameForCausalLM` whose weights can be packed.
        rows: meshes at a time.
        max_faces: faces of the longest sequence, start and end face included.
        types: of weights, keys and values.
        tiles: how the kernels' work is cut, for measurements.
    """

    # Tensors that are made within inference_mode() could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, rows: int, max_faces: int, types: Types, tiles: Any = None):
        self.config, self.rows, self.max_faces, self.types = model.config, rows, max_faces, types
        self.device = model.lm_head.weight.device
        self.is_gpu = self.device.type == "cuda"
        self.face = self.config.tokens_per_face
        weights = pack_weights(model, types.dtype)
        self.cache = StaticIFlameCache(self.config, max_faces, rows, self.device, types.dtype, types.kv_cache_dtype)
        sizes = (rows, max_faces * self.face, self.config.vocab_size, self.face)
        if self.is_gpu:
            pdl = torch.cuda.get_device_capability(self.device)[0] >= 9
            self.steps = KernelSteps(self.config, weights, self.cache, pdl, tiles)
            self.chooser = KernelChooser(*sizes, self.steps.places, self.cache.positions, pdl)
        else:
            self.steps = HostSteps(self.config, weights, self.cache)
            self.chooser = HostChooser(*sizes, self.cache.positions)
        self._graphs: dict[tuple[Choice, int], torch.cuda.CUDAGraph] = {}
        self._copies: deque[torch.Tensor] = deque()
        self._all_rows = torch.arange(rows, device=self.device)

    def load(self, model: Any) -> None:
        """Takes the model's weights as they are now."""
        weights = pack_weights(model, self.types.dtype)
        if self.is_gpu:  # graphs read them where they are
            copy_weights(self.steps.weights, weights)
        else:
            self.steps.load(weights)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it the engine may be asked for something: kernels run on the device that is the current one, and a
        CPU's threads leave a core to others."""
        with torch.inference_mode(), torch.cuda.device(self.device) if self.is_gpu else spare_a_core(self.device):
            yield

    def prepare(self, choice: Choice) -> None:
        """Compiles and captures what a face of such choices takes; what the cache holds is lost."""
        if not self.is_gpu or (choice, 0) in self._graphs:
            return
        for compiles in (compiled_ahead(), nullcontext()):
            self.cache.reset()
            self.steps.begin()
            with compiles:
                self._run(choice)
        torch.cuda.synchronize(self.device)
        # Of its own: torch's stream for captures is of the device that was captured on first.
        stream = torch.cuda.Stream(self.device)
        # Few rows have two sets of states, which take turns.
        self.steps.phases = 0
        for turn in range(2):
            graph = torch.cuda.CUDAGraph()
            self.steps.turns = [turn] * len(self.steps.turns)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._run(choice)
            self._graphs[choice, turn] = graph

    @property
    def phases(self) -> float:
        """Kernels a token, on average, of what was captured last."""
        return self.steps.phases / (2 * self.face) + 1

    def begin(self, logits: torch.Tensor, settings: Settings, begin: RowsBegin) -> None:
        """The cache holds the rows' prompts, and these are the `logits` (B, V) of their next tokens."""
        self.steps.begin()
        self.steps.logits.copy_(logits)
        self.chooser.set(settings)
        self.chooser.begin(self._all_rows, begin)

    def begin_rows(self, rows: list[int], prompt: Prompt, begin: RowsBegin, tokens: np.ndarray) -> None:
        """
        Other meshes begin in some rows, between faces.

        Args:
            prompt: what they begin with.
            begin: of each, after `tokens` (R,) were chosen as the first ones.
        """
        index, chosen = torch.tensor(rows), torch.from_numpy(tokens)
        if self.is_gpu:
            index, chosen = (each.pin_memory().to(self.device, non_blocking=True) for each in (index, chosen))
        self.steps.begin_rows(index, prompt)
        self.chooser.begin(index, begin, chosen=1)
        self.cache.positions[index] = prompt.length
        self.steps.tokens[index] = chosen
        if self.is_gpu:
            self.steps.places.put(self.cache.positions, self.config.level_strides)

    def first(self, choice: Choice, place: int) -> Tokens:
        """The tokens from `place` of the open face on, and the first one of the next face."""
        self._choose(choice, place, advance=False)
        if place == 0:
            return self._tokens([0])
        self._run(choice, place)
        self.steps.settle()
        return self._tokens([*range(place, self.face), 0])

    def next_face(self, choice: Choice) -> Tokens:
        """The tokens after the first one of a face, and the first one of the next."""
        if self.is_gpu:
            self._graphs[choice, self.steps.turns[0]].replay()
            self.steps.turns = [1 - each for each in self.steps.turns]
        else:
            self._run(choice)
        return self._tokens([*range(1, self.face), 0])

    def read(self, tokens: Tokens) -> np.ndarray:
        """(places, B) tokens. Raises ValueError where logits were no numbers."""
        if tokens.ready is not None:
            tokens.ready.synchronize()
        table = np.asarray(tokens.table)
        if table[:, -1].any():
            raise ValueError(NOT_FINITE)
        columns = table[:, tokens.places].T.astype(np.int64)
        if tokens.ready is not None:
            self._copies.append(tokens.table)
        return columns

    def _choose(self, choice: Choice, place: int, advance: bool = True) -> None:
        self.chooser.choose(choice, self.steps.logits, self.steps.tokens, place, advance)

    def _run(self, choice: Choice, first: int = 0) -> None:
        for place in range(first, self.face):
            self.steps.step(place)
            self._choose(choice, (place + 1) % self.face)

    def _tokens(self, places: list[int]) -> Tokens:
        if not self.is_gpu:
            return Tokens(places, self.chooser.face.copy(), None)
        face = self.chooser.face
        copy = self._copies.popleft() if self._copies else torch.empty(face.shape, dtype=face.dtype, pin_memory=True)
        copy.copy_(face, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Tokens(places, copy, ready)


# Engines that no generation is using, the last used first.
_idle: weakref.WeakKeyDictionary[Any, list[DecodeEngine]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
IDLE_ENGINES = 2  # of a model


def take_engine(model: Any, rows: int, max_faces: int, types: Types) -> DecodeEngine:
    """An engine for the model with its weights of now: one that is idle, or a new one."""
    device = model.lm_head.weight.device
    with _lock:
        engines = _idle.get(model, [])
        for engine in engines:
            fits = max_faces <= engine.max_faces <= 4 * max(max_faces, 256)
            if (engine.rows, engine.types, engine.device) == (rows, types, device) and fits:
                engines.remove(engine)
                break
        else:
            engine = None
            if len(engines) >= IDLE_ENGINES:
                engines.pop()
    if engine is not None:
        engine.load(model)
        return engine
    return DecodeEngine(model, rows, -(-max_faces // 64) * 64, types)


def give_engine(model: Any, engine: DecodeEngine) -> None:
    """The engine is idle again, once what it was asked for last is done: who takes it may ask from another stream."""
    with engine.at_work():
        engine.cache.reset()
        if engine.is_gpu:
            torch.cuda.current_stream().synchronize()
    with _lock:
        engines = _idle.setdefault(model, [])
        engines.insert(0, engine)
        del engines[IDLE_ENGINES:]


def why_no_engine(model: Any) -> str | None:
    """Why no engine can serve the model on its device, or None."""
    device = model.lm_head.weight.device
    if device.type not in ("cuda", "cpu"):
        return f"the device {device.type}"
    if device.type == "cuda":
        if model.lm_head.weight.dtype == torch.float64:
            return "float64 on a GPU"
        if reason := why_no_kernels():
            return reason
        if torch.cuda.get_device_capability(device)[0] < 8:  # where there are GPUs of several kinds
            return "a GPU of a compute capability below 8.0"
        if model.config.head_dim & (model.config.head_dim - 1) or model.config.head_dim < 16:
            return f"heads of {model.config.head_dim} channels"
        if 2 * (model.config.coordinate_resolution + 1) ** 3 >= 2**31:  # ranks of vertices are int32
            return f"a grid of {model.config.coordinate_resolution} steps"
    return None
