"""
A decode engine: a face of every row at a time, on memory that stays where it is.

On a CUDA device the nine steps of a face, with the choice of each token, are a graph that is captured once and
replayed; the host looks at what came of a face while the next one is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from .cache_iflame import StaticIFlameCache
from .choosing_iflame import COLUMNS, Choice, Rows, choose_by_kernel
from .packing_iflame import pack_weights
from .steps_iflame import KernelSteps

# B rows, T tokens, V token ids


class DecodeEngine:
    """
    Decoding of up to `max_faces` faces for each of so many rows.

    Args:
        model: an `IFlameForCausalLM` whose weights can be packed.
        rows: meshes at a time.
        max_faces: faces of the longest sequence, start and end face included.
        dtype: of weights, keys and values.
    """

    def __init__(self, model: Any, rows: int, max_faces: int, dtype: torch.dtype, pdl: bool | None = None, tiles=None):
        self.config, self.rows, self.max_faces, self.dtype = model.config, rows, max_faces, dtype
        self.device = model.lm_head.weight.device
        self.is_gpu = self.device.type == "cuda"
        if pdl is None:
            pdl = self.is_gpu and torch.cuda.get_device_capability(self.device)[0] >= 9
        self.pdl = pdl
        self.face = self.config.tokens_per_face
        self.weights = pack_weights(model, dtype)
        self.cache = StaticIFlameCache(self.config, max_faces, rows, self.device, dtype)
        self.steps = KernelSteps(self.config, self.weights, self.cache, pdl, tiles)
        self.table = Rows(rows, max_faces * self.face, self.config.vocab_size, self.face, self.device)
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def _choose(self, choice: Choice, place: int, advance: bool = True) -> None:
        steps, positions = self.steps, self.cache.positions
        choose_by_kernel(self.table, choice, steps.places, steps.logits, steps.tokens, positions, place, advance, self.pdl)

    def _run(self, choice: Choice, first: int = 0) -> None:
        """The tokens of a face from place `first` on, and the first one of the next face."""
        for place in range(first, self.face):
            self.steps.step(place)
            self._choose(choice, (place + 1) % self.face)

    def prepare(self, choice: Choice) -> None:
        """Compiles and captures, before the cache holds anything."""
        if not self.is_gpu or (choice, 0) in self._graphs:
            return
        self.steps.begin()
        self._run(choice)  # compiles
        torch.cuda.synchronize(self.device)
        self.steps.begin()
        for turn in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run(choice)
            self._graphs[choice, turn] = graph
        self.cache.reset()

    def run_face(self, choice: Choice) -> None:
        """A face of every row."""
        if not self.is_gpu:
            self._run(choice)
            return
        turn = self.steps.turns[0]
        self._graphs[choice, turn].replay()
        self.steps.turns = [1 - each for each in self.steps.turns]
