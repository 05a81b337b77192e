"""Finds meshes in what the user names: folders, files, archives, parquet, data sets of the Hub."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from training.prepare.containers import HUB, Batch, Opening, make_reader
from training.prepare.isolation import LimitedProcess, Limits
from training.prepare.items import (
    ARCHIVE_SUFFIXES,
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
from training.prepare.rejection import SOURCE_LOST, Rejected, as_rejected

# A container may take this many times as long as one mesh: an archive may begin with much that is no mesh.
_CONTAINER_TIME_FACTOR = 10
_LINKED_FOLDER = Rejected(
    "link to a folder", "it is a link to a folder, which is not followed; name the folder itself as a source"
)


class SourceLostError(Exception):
    """A source cannot be read on for a reason that may pass, such as the network."""


class Sources:
    """
    The items of several sources, always in the same order.

    Args:
        names: paths of folders and files, or "hub:user/name".
        folder: where files from archives are unpacked to.
        hidden: a folder that is passed over where it lies in a source.
        limits: what reading one mesh may take.

    Raises:
        ValueError: one of `names` is no folder, no file and no data set's name, or of a kind that is not read.
    """

    def __init__(self, names: list[str], selection: Selection, folder: str, hidden: str, limits: Limits):
        self._names = names
        self._selection = selection
        self._hidden = os.path.realpath(hidden)
        self._make_reader = partial(make_reader, selection, folder, limits.memory)
        self._limits = Limits(_CONTAINER_TIME_FACTOR * limits.seconds, limits.memory)
        self._reader: LimitedProcess | None = None
        self._missing = set(selection.files or ())
        for name in names:
            check_source(name)
            if os.path.isdir(name) and os.path.realpath(name) == self._hidden:
                raise ValueError(f"{name} is the folder to write to, so it cannot be a source")

    def __enter__(self) -> "Sources":
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.kill()
            self._reader = None

    def count_files(self) -> int:
        """How many items there are, apart from those in containers."""
        return sum(isinstance(found, Item) for found, _, _ in self._find())

    def items(self, skip: int, digest: str, lengthen: Callable[[int], None]) -> Iterator[Item]:
        """
        All items but the first `skip`. `lengthen` is told of numbers of items as they become known.

        Raises:
            ValueError: the first `skip` items are not those of which `digest` was made.
            SourceLostError: a source cannot be reached any more.
        """
        number, so_far = 0, ""
        for item in self._all(skip, lengthen):
            number += 1
            if self._missing:
                self._missing -= self._selection.matches(item)
            if number > skip:
                yield item
                continue
            so_far = chain(so_far, item)
            if number == skip and so_far != digest:
                break
        if number < skip or (number == skip and so_far != digest):
            raise ValueError(
                "the sources are not those of the run that is to go on: files were added, removed or renamed. "
                "Start anew with --overwrite, or into another folder"
            )

    def _all(self, skip: int, lengthen: Callable[[int], None]) -> Iterator[Item]:
        seen = 0
        for found, label, prefix in self._find():
            if isinstance(found, Item):
                seen += 1
                yield found
                continue
            for item in self._contained(Opening(found, label, prefix, max(0, skip - seen)), lengthen):
                seen += 1
                yield item
        for name in sorted(self._missing):
            yield Item(name, "list", rejection=Rejected("missing file", "it is in the list, but not in the sources"))

    def _find(self) -> Iterator[tuple[Item | str, str, str]]:
        """Items, and containers as (path, label, prefix)."""
        for name in self._names:
            if name.startswith(HUB):
                yield name, name, f"{name.removeprefix(HUB)}/"
            elif os.path.isdir(name):
                yield from self._walk(name)
            else:
                base = printable(os.path.basename(name))
                if suffix_of(name) in CONTAINER_SUFFIXES:
                    is_archive = suffix_of(name) in ARCHIVE_SUFFIXES
                    yield name, base, "" if is_archive else f"{stem(base)}/"
                else:
                    yield self._file(name, base, base), "", ""

    def _walk(self, top: str) -> Iterator[tuple[Item | str, str, str]]:
        """Files of a folder and the folders in it, by name. Links to folders, which may form a loop, are rejected."""
        root = printable(os.path.basename(os.path.abspath(top)))
        stack = [("", None)]
        while stack:
            path, entry = stack.pop()
            full = os.path.join(top, path) if path else top
            if entry is None or entry.is_dir(follow_symlinks=False):
                if os.path.realpath(full) == self._hidden:
                    continue
                try:
                    with os.scandir(full) as entries:
                        found = sorted(
                            (e for e in entries if not is_hidden(e.name)), key=lambda e: e.name, reverse=True
                        )
                except OSError as error:
                    name = printable(path)
                    yield Item(name, f"{root}/{name}", rejection=as_rejected(error, full)), "", ""
                    continue
                stack += [(os.path.join(path, e.name), e) for e in found]
            elif entry.is_symlink() and os.path.isdir(full):
                name = printable(path).replace(os.sep, "/")
                if os.path.realpath(full) != self._hidden:
                    yield Item(name, f"{root}/{name}", rejection=_LINKED_FOLDER), "", ""
            elif suffix_of(path):
                name = printable(path).replace(os.sep, "/")
                if suffix_of(path) in CONTAINER_SUFFIXES and os.path.isfile(full):
                    yield full, f"{root}/{name}", f"{stem(name)}/"
                else:
                    yield self._file(full, name, f"{root}/{name}"), "", ""

    def _file(self, full: str, name: str, source: str) -> Item:
        item = Item(stem(name), source, full, category=self._selection.category_of(name))
        item.rejection = _file_problem(full) or self._selection.refusal(item)
        if not _is_utf8(full):
            item.rejection = Rejected("bad name", "its path is not valid UTF-8, which trimesh asks for; rename it")
        return item

    def _contained(self, opening: Opening, lengthen: Callable[[int], None]) -> Iterator[Item]:
        problem = None if opening.path.startswith(HUB) else _file_problem(opening.path)
        request: Opening | None = opening
        is_last = False
        while not is_last:
            answer: Batch | Rejected = problem or self._ask(request)
            if isinstance(answer, Rejected):
                if answer.kind == SOURCE_LOST:
                    raise SourceLostError(answer.reason)
                yield Item(opening.prefix.rstrip("/") or opening.label, opening.label, rejection=answer)
                return
            if answer.length is not None:
                lengthen(answer.length)
            request, is_last = None, answer.is_last
            yield from answer.items

    def _ask(self, request: Opening | None) -> Batch | Rejected:
        """The reader's answer. A reader that fails is gone, and what was left of its container with it."""
        if self._reader is None:
            self._reader = LimitedProcess(self._make_reader, self._limits)
        try:
            answer = self._reader.call(request)
        except Rejected as rejection:
            self._reader = None
            return rejection
        if isinstance(answer, Rejected):
            self._reader.kill()
            self._reader = None
        return answer


def chain(digest: str, item: Item) -> str:
    """The digest of a sequence of items, from that of all but the last, and the last."""
    return hashlib.sha256(f"{digest}\0{item.key}".encode()).hexdigest()


def check_source(name: str) -> None:
    """Raises ValueError if a source is nothing that can be read."""
    if name.startswith(HUB):
        if not name.removeprefix(HUB):
            raise ValueError("give the name of the data set: hub:user/name")
        return
    path = Path(name)
    if not path.exists():
        advice = f"; for a data set of the Hub write {HUB}{name}" if name.count("/") == 1 else ""
        raise ValueError(f"there is no folder or file {name}{advice}")
    if path.is_dir():
        return
    if not path.is_file():
        raise ValueError(f"{name} is neither a folder nor a file")
    if not suffix_of(name):
        raise ValueError(f"{name} is of no format that is read here")
    if suffix_of(name) in OTHER_SUFFIXES:
        raise ValueError(f"{name}: {unknown_format(suffix_of(name))}")


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _file_problem(path: str) -> Rejected | None:
    """What can be seen to be wrong with a file before it is opened: only regular files are, others may block."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Rejected("missing file", "it is a link to a file that is not there")
    except OSError as error:
        return as_rejected(error, path)
    if not stat.S_ISREG(status.st_mode):
        return Rejected("not a file", "it is not a regular file")
    if status.st_size == 0:
        return Rejected("empty file", "the file is empty")
    if suffix_of(path) in OTHER_SUFFIXES:
        return unknown_format(suffix_of(path))
    if suffix_of(path) in CONTAINER_SUFFIXES:
        try:
            with open(path, "rb") as file:
                is_pointer = file.read(24).startswith(b"version https://git-lfs")
        except OSError as error:
            return as_rejected(error, path)
        if is_pointer:
            return Rejected("lfs pointer", "a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    return None
