"""The process that opens files which hold many meshes, and hands their items over in small batches."""

import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from training.prepare.archives import archive_items
from training.prepare.items import Item, Selection, suffix_of
from training.prepare.rejection import SOURCE_LOST, Rejected, as_rejected, ran_out_of_memory
from training.prepare.tables import hub_items, parquet_items, parquet_length

HUB = "hub:"
_MAX_BATCH_ITEMS, _MAX_BATCH_BYTES, _MAX_BATCH_SECONDS = 32, 2**22, 0.5


class Opening(NamedTuple):
    """The request to open a container.

    Args:
        path: its path, or "hub:" and the name of a data set.
        label: what the sources of its items begin with; `prefix`: what their names begin with, where they have none.
        skip: items at the beginning that are wanted without their meshes.
    """

    path: str
    label: str
    prefix: str
    skip: int


class Batch(NamedTuple):
    """Some items of a container. `length` is how many it has, in its first batch and if that is known."""

    items: list[Item]
    is_last: bool
    length: int | None = None


class Reader:
    """
    Answers an [`Opening`], or None for more of the same container, with a [`Batch`].

    Args:
        folder: where files are unpacked to.
        max_size: bytes of the largest file that is unpacked.
    """

    def __init__(self, selection: Selection, folder: str, max_size: int):
        self._selection = selection
        self._folder = folder
        self._max_size = max_size
        self._items: Iterator[Item | None] = iter(())

    def __call__(self, request: Opening | None) -> Batch:
        length = None
        if request is not None:
            self._items = self._read(request)
            if suffix_of(request.path) == ".parquet":
                try:
                    length = parquet_length(request.path)
                except Exception:  # reading it says why
                    length = None
        items, size, start = [], 0, time.monotonic()
        while (
            len(items) < _MAX_BATCH_ITEMS and size < _MAX_BATCH_BYTES and time.monotonic() - start < _MAX_BATCH_SECONDS
        ):
            try:
                item = next(self._items)
            except StopIteration:
                return Batch(items, True, length)
            if item is not None:
                items.append(item)
                size += _size(item)
        return Batch(items, False, length)

    def _read(self, request: Opening) -> Iterator[Item | None]:
        """The items of a container, and a last one with a rejection where it cannot be read on."""
        number = 0
        try:
            for found in self._open(request):
                if found is None:
                    yield None
                    continue
                item, build = found
                item.rejection = item.rejection or self._selection.refusal(item)
                if item.rejection is None and number >= request.skip:
                    _fill(item, build)
                number += 1
                yield item
        except MemoryError:
            raise
        except Exception as error:
            if ran_out_of_memory(error):
                raise MemoryError from error
            rejection = as_rejected(error, request.path)
            if request.path.startswith(HUB):
                raise Rejected(SOURCE_LOST, f"{request.path} cannot be read: {rejection}") from error
            yield _lost(request, rejection)

    def _open(self, request: Opening) -> Iterator[tuple[Item, Callable[[], None]] | None]:
        path, label, prefix, folder = request.path, request.label, request.prefix, self._folder
        if path.startswith(HUB):
            return hub_items(path.removeprefix(HUB), label, prefix, folder)
        if suffix_of(path) == ".parquet":
            return parquet_items(path, label, prefix, folder)
        return archive_items(path, label, prefix, self._selection, folder, self._max_size)


def make_reader(selection: Selection, folder: str, max_size: int) -> Reader:
    return Reader(selection, folder, max_size)


def _size(item: Item) -> int:
    """Bytes of memory or of disk that an item takes until it is done with."""
    if isinstance(item.payload, tuple):
        return sum(array.nbytes for array in item.payload)
    return os.path.getsize(item.payload) if item.payload and os.path.exists(item.payload) else 0


def _fill(item: Item, build: Callable[[], None]) -> None:
    try:
        build()
    except Exception as error:
        if ran_out_of_memory(error):
            raise MemoryError from error
        item.rejection, item.payload = as_rejected(error), None


def _lost(request: Opening, rejection: Rejected) -> Item:
    return Item(request.prefix.rstrip("/") or request.label, request.label, rejection=rejection)
