"""A data set while it grows: shards, the record of rejections, and a place to go on from after any interruption.

Everything that must agree stands in one SQLite file, beside the shards: how far the sources are read, which meshes are
waiting for their shard to fill, which geometry was seen, what was counted. Each commit moves all of it at once; what
was written after the last commit, to whatever file, is taken back by the next run.
"""

import hashlib
import json
import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from iflame_hf.files_iflame import write_whole
from training.prepare.items import Item
from training.prepare.mesh_worker import Prepared
from training.prepare.rejection import DUPLICATE, NOT_CHOSEN, Rejected
from training.prepare.sources import chain
from training.rows.balance import bins_of_faces

SPLITS = ("train", "validation")
SCHEMA = pyarrow.schema(
    [
        ("name", pyarrow.string()),
        ("category", pyarrow.string()),
        ("source", pyarrow.string()),
        ("license", pyarrow.string()),
        ("pack", pyarrow.string()),
        ("author", pyarrow.string()),
        ("vertices", pyarrow.list_(pyarrow.list_(pyarrow.float32()))),
        ("faces", pyarrow.list_(pyarrow.list_(pyarrow.int32()))),
        ("num_faces", pyarrow.int32()),
        ("num_faces_q", pyarrow.int32()),
        ("nn_iou_train", pyarrow.float32()),
    ]
)
STATE, SETTINGS, REJECTED, SUMMARY = ".state.sqlite", "settings.json", "rejected.jsonl", "summary.json"
UNPACKED = ".unpacked"
_ROWS_PER_GROUP = 256
# In the settings of a set: by it a folder is known as one that prepare_data may go on with or clear.
_ORIGIN = {"made_by": "training.prepare_data"}
_TABLES = """
    CREATE TABLE IF NOT EXISTS state (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS geometry (digest BLOB PRIMARY KEY, name TEXT) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS waiting (
        number INTEGER PRIMARY KEY, split TEXT, name TEXT, category TEXT, source TEXT, license TEXT,
        pack TEXT, author TEXT, vertices BLOB, faces BLOB, num_faces_q INTEGER, nn_iou_train REAL
    );
"""


class PreparedSet:
    """
    The data set in `folder`, new or to be gone on with.

    Args:
        settings: all that the result depends on, as JSON values.
        shard_size: meshes in a shard.
        validation_share: how much goes to validation, by a hash of the name.
        keep_splits: leave meshes in the split that their source puts them in.
        deduplicate: whether a mesh that equals an earlier one after quantisation is left out.
        license: of meshes whose source does not tell theirs.
        only_licenses: take meshes of these alone, in upper or lower case.

    Raises:
        ValueError: `folder` holds something else, or a run with other settings, or another process writes to it.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, Any],
        shard_size: int,
        validation_share: float,
        keep_splits: bool = False,
        deduplicate: bool = True,
        license: str | None = None,
        only_licenses: Collection[str] | None = None,
    ):
        self.folder = folder
        self.temporary = folder / UNPACKED
        self._shard_size = shard_size
        self._validation_share = validation_share
        self._keep_splits = keep_splits
        self._deduplicate = deduplicate
        self._license = license
        self._only_licenses = only_licenses and {name.lower() for name in only_licenses}
        folder.mkdir(parents=True, exist_ok=True)
        is_new = not _is_ours(folder)
        if is_new and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise ValueError(f"{folder} holds something that prepare_data did not write; choose a folder that is new")
        settings = {**_ORIGIN, **settings}
        self.is_finished = not is_new and not (folder / STATE).exists()
        if not is_new:
            _check_settings(folder, settings)
        if self.is_finished:
            return
        self._database = _open(folder)
        try:
            if is_new:
                write_whole(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
            _check_columns(self._database, folder)
            self._restore()
        except BaseException:
            self._database.close()
            raise

    def finished_summary(self) -> dict[str, Any]:
        """The figures of a finished set. Raises ValueError if they or files of meshes are not in the folder."""
        try:
            summary = json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
            names = [shard_name(split, index) for split in SPLITS for index in range(summary["shards"][split])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.folder} is finished already, but its {SUMMARY} cannot be read ({error}); --overwrite makes it "
                "anew"
            ) from error
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{self.folder} is finished already, but {len(missing)} of its {len(names)} files of meshes are "
                f"missing, such as {missing[0]}; --overwrite makes it anew"
            )
        return summary

    def add(self, item: Item, prepared: Prepared) -> bool:
        """Take a mesh, or reject it for its licence or as a duplicate: False."""
        license = item.license or prepared.license or self._license
        if self._only_licenses and (license or "").lower() not in self._only_licenses:
            self.reject(item, Rejected(NOT_CHOSEN, f"its licence is {license or 'not known'}"))
            return False
        if self._deduplicate:
            first = self._database.execute("SELECT name FROM geometry WHERE digest = ?", (prepared.digest,)).fetchone()
            if first is not None:
                self.reject(item, Rejected(DUPLICATE, f"after quantisation it equals {first[0]}"))
                return False
        split = self._split(item)
        name = self._unique(item.name)
        if self._deduplicate:
            self._database.execute("INSERT INTO geometry VALUES (?, ?)", (prepared.digest, name))
        blobs = prepared.vertices.astype("<f4").tobytes(), prepared.faces.astype("<i4").tobytes()
        self._database.execute(
            "INSERT INTO waiting VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(split, name, item.category, item.source, license, item.pack, item.author),
                *(*blobs, prepared.num_faces_q, item.nn_iou_train),
            ),
        )
        self._waiting[split] += 1
        self._count("split", split)
        self._count("category", item.category or "")
        self._count("license", license or "")
        self._count("pack", item.pack or "")
        self._count("author", item.author or "")
        self._count("faces", str(int(bins_of_faces(prepared.num_faces_q))))
        self._count("total faces", "after quantisation", prepared.num_faces_q)
        self._done(item)
        if self._waiting[split] == self._shard_size:
            self._write_shard(split)
        return True

    def reject(self, item: Item, rejection: Rejected) -> None:
        """Record why an item is left out; those that were not asked for are only counted."""
        self._count("rejected", rejection.kind)
        if rejection.kind != NOT_CHOSEN:
            line = {"name": item.name, "source": item.source, "kind": rejection.kind, "reason": rejection.reason}
            self._rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._done(item)

    def commit(self) -> None:
        """Make everything so far survive whatever happens."""
        self._rejected.flush()
        os.fsync(self._rejected.fileno())
        rejected_bytes = os.fstat(self._rejected.fileno()).st_size
        state = {
            "items_done": self.items_done,
            "digest": self.digest,
            "shards": self.shards,
            "counts": self.counts,
            "rejected_bytes": rejected_bytes,
        }
        self._database.execute("INSERT OR REPLACE INTO state VALUES ('state', ?)", (json.dumps(state),))
        self._database.execute("COMMIT")
        self._database.execute("BEGIN IMMEDIATE")

    def finish(self) -> None:
        """Write the last shards. Then what describes the set is written, and `close(remove_state=True)` called."""
        for split in SPLITS:
            if self._waiting[split]:
                self._write_shard(split)
        self.commit()

    def close(self, remove_state: bool = False) -> None:
        """Leave the folder, without a commit."""
        if self.is_finished:
            return
        self._rejected.close()
        self._database.close()
        shutil.rmtree(self.temporary, ignore_errors=True)
        if remove_state:
            (self.folder / STATE).unlink()

    def _restore(self) -> None:
        """Go back to the last commit, and remove what was written after it."""
        state = json.loads(dict(self._database.execute("SELECT key, value FROM state")).get("state", "{}"))
        self.items_done: int = state.get("items_done", 0)
        self.digest: str = state.get("digest", "")
        self.shards: Counter[str] = Counter(state.get("shards", {}))
        self.counts: dict[str, Counter[str]] = {k: Counter(v) for k, v in state.get("counts", {}).items()}
        self._waiting = Counter(dict(self._database.execute("SELECT split, count(*) FROM waiting GROUP BY split")))
        rejected_bytes = state.get("rejected_bytes", 0)
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        with open(self.folder / REJECTED, "ab") as file:
            if file.tell() < rejected_bytes:
                raise ValueError(f"{self.folder / REJECTED} was changed or removed; start anew with --overwrite")
            file.truncate(rejected_bytes)
        known = {self.folder / shard_name(split, index) for split in SPLITS for index in range(self.shards[split])}
        (self.folder / "data").mkdir(exist_ok=True)
        for path in set(_shards(self.folder)) - known:
            path.unlink()
        self._rejected = open(self.folder / REJECTED, "a", encoding="utf-8", errors="backslashreplace")

    def _write_shard(self, split: str) -> None:
        path = self.folder / shard_name(split, self.shards[split])
        aside = path.with_name(f".{path.name}.part")
        with pyarrow.parquet.ParquetWriter(aside, SCHEMA, compression="zstd") as writer:
            for rows in self._waiting_rows(split):
                writer.write_table(_table(rows))
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
        self._database.execute("DELETE FROM waiting WHERE split = ?", (split,))
        self._waiting[split] = 0
        self.shards[split] += 1
        self.commit()

    def _waiting_rows(self, split: str) -> Iterator[list[tuple]]:
        cursor = self._database.execute(
            "SELECT name, category, source, license, pack, author, vertices, faces, num_faces_q, nn_iou_train"
            " FROM waiting WHERE split = ? ORDER BY number",
            (split,),
        )
        while rows := cursor.fetchmany(_ROWS_PER_GROUP):
            yield rows

    def _split(self, item: Item) -> str:
        if self._keep_splits and item.split is not None:
            return item.split
        return "validation" if hashed_share(item.name) < self._validation_share else "train"

    def _unique(self, name: str) -> str:
        candidate, number = name, 1
        while self._database.execute("INSERT OR IGNORE INTO names VALUES (?)", (candidate,)).rowcount == 0:
            number += 1
            candidate = f"{name} ({number})"
        return candidate

    def _count(self, what: str, key: str, number: int = 1) -> None:
        self.counts.setdefault(what, Counter())[key] += number

    def _done(self, item: Item) -> None:
        self.items_done += 1
        self.digest = chain(self.digest, item)


def hashed_share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the first eight bytes of its SHA-1, over 2 ** 64."""
    return int.from_bytes(hashlib.sha1(name.encode(), usedforsecurity=False).digest()[:8], "big") / 2**64


def shard_name(split: str, index: int) -> str:
    return f"data/{split}-{index:05d}.parquet"


def remove_earlier(folder: Path) -> None:
    """Remove what an earlier run wrote to `folder`, and nothing else.

    Raises ValueError if the folder holds something and no run wrote to it, or one is just doing so.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not _is_ours(folder):
        raise ValueError(f"{folder} holds something that prepare_data did not write; remove it yourself")
    if (folder / STATE).exists():
        _open(folder, repair=True).close()
    for path in _shards(folder):
        path.unlink()
    if (folder / "data").is_dir() and not any((folder / "data").iterdir()):
        (folder / "data").rmdir()
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)
    # the settings last: they tell whose folder it is
    for name in (REJECTED, SUMMARY, "README.md", STATE, f"{STATE}-journal", SETTINGS):
        (folder / name).unlink(missing_ok=True)


def _shards(folder: Path) -> list[Path]:
    data = folder / "data"
    return [
        path for split in SPLITS for form in ("{}-*.parquet", ".{}-*.part") for path in data.glob(form.format(split))
    ]


def _open(folder: Path, repair: bool = False) -> sqlite3.Connection:
    """The state of a run, locked. Raises ValueError if another process has it, or if it is damaged, unless that is to
    be repaired, by beginning anew."""
    path = folder / STATE
    database = sqlite3.connect(path, timeout=0, isolation_level=None)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.executescript(_TABLES)
        database.execute("BEGIN IMMEDIATE")
    except sqlite3.DatabaseError as error:
        database.close()
        if "locked" in str(error):
            raise ValueError(f"another process is writing to {folder}") from error
        if isinstance(error, sqlite3.OperationalError):
            raise
        if repair:
            path.unlink()
            return _open(folder)
        raise ValueError(f"{path} is damaged ({error}); start anew with --overwrite") from error
    return database


def _check_columns(database: sqlite3.Connection, folder: Path) -> None:
    """Raises ValueError for the state of a run that wrote other columns: all files of a set have the same."""
    columns = {row[1] for row in database.execute("PRAGMA table_info(waiting)")}
    missing = [name for name in SCHEMA.names if name not in columns | {"num_faces"}]
    if missing:
        raise ValueError(
            f"{folder} was begun by an earlier version, which wrote no column {' and no column '.join(missing)}; "
            "start anew with --overwrite, or write to another folder"
        )


def _is_ours(folder: Path) -> bool:
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.items() >= _ORIGIN.items()


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    earlier = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    changed = [key for key in settings if earlier.get(key) != settings[key]]
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} was begun with {key} = {json.dumps(earlier.get(key))}, not {json.dumps(settings[key])}; go on "
            "with the same settings, write to another folder, or start anew with --overwrite"
        )


def _table(rows: list[tuple]) -> pyarrow.Table:
    *texts, vertices, faces, sizes, overlaps = zip(*rows, strict=True)
    faces = [np.frombuffer(blob, "<i4") for blob in faces]
    columns = [
        *(pyarrow.array(values, pyarrow.string()) for values in texts),
        _triples([np.frombuffer(blob, "<f4") for blob in vertices], pyarrow.float32()),
        _triples(faces, pyarrow.int32()),
        pyarrow.array([len(flat) // 3 for flat in faces], pyarrow.int32()),
        pyarrow.array(sizes, pyarrow.int32()),
        pyarrow.array(overlaps, pyarrow.float32()),
    ]
    return pyarrow.Table.from_arrays(columns, schema=SCHEMA)


def _triples(rows: list[np.ndarray], kind: pyarrow.DataType) -> pyarrow.ListArray:
    """Flat arrays of 3 N numbers as lists of N lists of three."""
    flat = np.concatenate(rows)
    inner = pyarrow.ListArray.from_arrays(np.arange(0, len(flat) + 1, 3, dtype=np.int32), pyarrow.array(flat, kind))
    ends = np.cumsum([0] + [len(row) // 3 for row in rows]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(ends, inner)
