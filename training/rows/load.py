"""Rows made by worker processes, on their way into a training step.

Many rows travel at a time, as token ids in the smallest type that holds them: their layout and labels follow from
these. Arrays go through a pipe; shared memory, torch's way, costs more for messages of this size and is scarce in
containers.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

import fsspec.asyn
import torch
from torch.utils.data import DataLoader, Dataset

from iflame_hf.tokenization_iflame import IFlameTokenizer
from training.rows.pack import PackedRows, row_inputs

# What `forward` takes: tensors by name, and the layout of their rows.
Batch = dict[str, Any]
# Where a process goes on in the data: two numbers whose meaning is the source's own.
Place = list[int]
Task = TypeVar("Task")


class TrainingRows(Protocol):
    """
    Where training rows come from: for every process an endless sequence of batches, epoch after epoch.

    Attributes:
        rows_in_epoch: about how many rows an epoch has, all processes together; None if that is not known before.
        knows_categories: whether any mesh may have a category that the model knows.
    """

    rows_in_epoch: int | None
    knows_categories: bool

    def batches(
        self,
        places: list[Place],
        size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> Iterator[tuple[Batch, Place]]:
        """
        The batches of process `rank`, `size` rows each, with the place after each of them.

        Args:
            places: where every process, in the order of ranks, stopped; empty at the beginning.
        """

    def epochs(self, place: Place) -> float:
        """Passes through the data at a place."""

    def describe(self) -> str:
        """Such as: 4,000 meshes in 1,310 rows."""

    def digest(self) -> str:
        """Changes with everything that the meaning of a place depends on."""


def in_workers(
    function: Callable[[Task], PackedRows], tasks: Iterable[Task], num_workers: int
) -> Iterator[PackedRows]:
    """The function's result for every task, in their order, computed by worker processes if there are any."""
    return iter(
        DataLoader(
            _Results(function),
            batch_size=None,
            sampler=tasks,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator(),  # the loader's own numbers must not come from the state a resume restores
        )
    )


class _Results(Dataset, Generic[Task]):
    def __init__(self, function: Callable[[Task], PackedRows]):
        self.function = function

    def __getitem__(self, task: Task) -> PackedRows:
        return self.function(task)


def _as_it_is(result: PackedRows) -> PackedRows:
    return result


def _prepare_worker(worker: int) -> None:
    # The parent decides what Ctrl-C and SIGTERM mean, which are often sent to a whole group of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    fsspec.asyn.reset_lock()  # which the parent may have held when it forked


def _die_with_the_parent() -> None:
    """A worker whose parent was killed would wait forever for somebody to read its rows."""
    multiprocessing.parent_process().join()
    os._exit(1)


def batch_inputs(rows: PackedRows, tokenizer: IFlameTokenizer, pin_memory: bool = False) -> Batch:
    """The model's inputs for packed rows, see `row_inputs`, in page-locked memory if asked for."""
    batch = row_inputs(rows, tokenizer)
    return {name: value.pin_memory() for name, value in batch.items()} if pin_memory else batch
