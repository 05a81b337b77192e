"""What decoding steps keep beside the cache: tokens, logits, the residual stream, the open ends of the hourglass."""

from typing import Any

import torch

from .cache_iflame import StaticIFlameCache

# B rows, C channels, V token ids


class StepMemory:
    """
    Memory of steps of all rows, which stays where it is.

    Args:
        config: an `IFlameConfig`.
        cache: the decoding state of the rows.
        device: of all, and `dtype` of activations.
    """

    def __init__(self, config: Any, cache: StaticIFlameCache, device: torch.device, dtype: torch.dtype):
        self.config, self.cache, self.rows = config, cache, cache.batch_size

        def buffer(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        rows, channels = self.rows, config.hidden_size
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)  # that go in
        self.logits = buffer(rows, config.vocab_size)  # of the next ones
        self.x = [buffer(rows, channels) for _ in config.level_strides]  # the residual stream of each level
        self.middle = buffer(rows, channels)  # within a block
        # Of coordinates and of vertices: the members of the open group, and what the level below has handed up.
        self.members = [buffer(group, rows, channels) for group in config.group_sizes]
        self.handed = [buffer(rows, channels) for _ in config.group_sizes]

    def begin(self) -> None:
        """The cache holds what the rows begin with, whole faces or not."""
        for level, group in enumerate(self.cache.open_groups):
            waiting = group.waiting
            for index in range(waiting.shape[1]):
                self.members[level][index].copy_(waiting[:, index])
            # Before a mesh has a whole item of the level below, nothing is handed up.
            has_begun = self.cache.positions >= self.config.level_strides[level + 1]
            self.handed[level].copy_(group.handed_up[:, 0].masked_fill(~has_begun[:, None], 0.0))

    def begin_rows(self, rows: torch.Tensor, handed: list[torch.Tensor]) -> None:
        """`rows` (R,) hold what comes after a prompt of whole faces, which has `handed` (1, C) up to either level."""
        for memory, value in zip(self.handed, handed, strict=True):
            memory[rows] = value.to(memory)
