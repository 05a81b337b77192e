"""Meshes in zip and tar archives, taken out one by one, with limits on what an archive may grow to."""

import bz2
import gzip
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from training.prepare.items import (
    CONTAINER_SUFFIXES,
    OTHER_SUFFIXES,
    Item,
    Selection,
    is_hidden,
    printable,
    stem,
    suffix_of,
    unknown_format,
)
from training.prepare.rejection import Rejected, as_rejected

# Meshes rarely shrink to a tenth in an archive; bombs shrink to a thousandth or much less.
_MAX_GROWTH, _MIN_BUDGET_BYTES = 200, 2**26
_CHUNK_BYTES = 2**20
_MAX_HEADER_BYTES = 2**24  # of tar, which reads a header in one piece
# External buffers and the .gltf files that need them are kept together until the end of the archive.
_MAX_SPOOL_BYTES = 2**32
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)

Build = Callable[[], None]


class Entry(NamedTuple):
    """One file of an archive. `refusal` says why it cannot be read; `size` is what the archive claims, in bytes."""

    name: str
    size: int
    open: Callable[[], BinaryIO]
    refusal: Rejected | None = None


class _Budget:
    """The bytes that an archive may still unpack to."""

    def __init__(self, path: str):
        self.left = _MIN_BUDGET_BYTES + _MAX_GROWTH * os.path.getsize(path)

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise Rejected("archive bomb", f"it grows more than {_MAX_GROWTH}-fold when it is unpacked")


class _Forward:
    """The uncompressed bytes of a tar archive, front to back, counted."""

    def __init__(self, file: BinaryIO, budget: _Budget):
        self._file = file
        self._budget = budget
        self._position = 0

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise Rejected("archive bomb", "one of its headers is larger than 16 MiB")
        data = self._file.read(size)
        self._position += len(data)
        self._budget.spend(len(data))
        return data

    def seek(self, position: int, _whence: int = os.SEEK_SET) -> int:
        while self._position < position and self.read(min(_CHUNK_BYTES, position - self._position)):
            pass
        return self._position


def archive_items(
    path: str, label: str, prefix: str, selection: Selection, folder: str, max_size: int
) -> Iterator[tuple[Item, Build | None] | None]:
    """
    The meshes of an archive: items, and what puts a mesh's file into `folder` and its path into the item. It must be
    called before the next item is asked for, if it is. None now and then as a sign of life.

    A .gltf file comes at the end, from a folder that holds the archive's buffers too.

    Args:
        label: what the sources of the items begin with; `prefix`: what their names begin with.
        max_size: bytes of the largest file that is taken.

    Raises [`Rejected`] and the errors of the readers when the archive itself cannot be read on.
    """
    budget = _Budget(path)
    spool = Path(tempfile.mkdtemp(dir=folder))
    later: list[Item] = []
    spooled = 0
    entries = _zip_entries(path) if path.lower().endswith(".zip") else _tar_entries(path, budget)
    # what a tar unpacks is counted where it is read
    spend = budget.spend if path.lower().endswith(".zip") else lambda count: None
    for entry in entries:
        name = entry.name.replace("\\", "/")
        suffix = suffix_of(name)
        is_part = name.lower().endswith((".bin", ".gltf"))
        if not (suffix or is_part) or any(map(is_hidden, PurePosixPath(name).parts)):
            yield None
            continue
        item = Item(
            name=printable(prefix + stem(name)),
            source=printable(f"{label}/{name}"),
            category=selection.category_of(prefix + name),
            rejection=_unsafe(name) or entry.refusal,
        )
        if suffix in CONTAINER_SUFFIXES:
            item.rejection = Rejected("nested archive", "it is in another archive; unpack that first")
        elif suffix in OTHER_SUFFIXES:
            item.rejection = unknown_format(suffix)
        elif entry.size > max_size:
            item.rejection = Rejected("too large", f"it has {entry.size / 2**20:,.0f} MiB (see --memory_limit)")
        if not is_part:
            yield item, _extraction(entry, item, suffix, folder, max_size, spend)
            continue
        if item.rejection is None:
            try:
                target = spool / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if spooled + entry.size <= _MAX_SPOOL_BYTES:
                    spooled += _copy(entry, target, max_size, spend)
                item.payload = str(target)
            except (Rejected, OSError) as error:
                item.rejection = as_rejected(error)
        if suffix:
            later.append(item)
        yield None
    if not later:
        shutil.rmtree(spool)
    for item in later:
        item.temporary = str(spool) if item is later[-1] else None
        yield item, lambda: None


def _extraction(
    entry: Entry, item: Item, suffix: str, folder: str, max_size: int, spend: Callable[[int], None]
) -> Build:
    def build() -> None:
        handle, target = tempfile.mkstemp(suffix=suffix, dir=folder)
        os.close(handle)
        item.temporary = target
        _copy(entry, Path(target), max_size, spend)
        item.payload = target

    return build


def _copy(entry: Entry, target: Path, max_size: int, spend: Callable[[int], None]) -> int:
    size = 0
    with entry.open() as source, open(target, "wb") as file:
        while chunk := source.read(_CHUNK_BYTES):
            size += len(chunk)
            spend(len(chunk))
            if size > max_size:
                raise Rejected("too large", f"it has more than {max_size / 2**20:,.0f} MiB (see --memory_limit)")
            file.write(chunk)
    return size


def _zip_entries(path: str) -> Iterator[Entry]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            refusal = None
            if info.flag_bits & 1:
                refusal = Rejected("encrypted", "it is encrypted; unpack the archive with its password first")
            elif info.compress_type not in _ZIP_METHODS:
                refusal = Rejected("unknown format", f"it is compressed by the zip method {info.compress_type}")
            yield Entry(info.filename, info.file_size, lambda info=info: archive.open(info), refusal)


def _tar_entries(path: str, budget: _Budget) -> Iterator[Entry]:
    lower = path.lower()
    opener = gzip.open if lower.endswith("gz") else bz2.open if lower.endswith("bz2") else open
    with opener(path, "rb") as file, tarfile.open(fileobj=_Forward(file, budget), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # tarfile would keep them all
            if member.isdir():
                continue
            refusal = None
            if not member.isreg():
                refusal = Rejected("not a file", "it is a link or a device")
            yield Entry(member.name, member.size, lambda member=member: archive.extractfile(member), refusal)


def _unsafe(name: str) -> Rejected | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in name:
        return Rejected("unsafe name", "its name leads out of the archive")
    return None
