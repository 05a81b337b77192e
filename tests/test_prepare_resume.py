"""Preparing a data set survives kills, full disks and other users, and takes no more memory for more meshes."""

import errno
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bad_files
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from prepared_fixtures import content, prepare, rows, write_boxes, write_rows

from training import prepare_data
from training.prepare import prepared_set
from training.prepare.prepared_set import SPLITS

ROOT = Path(__file__).resolve().parents[1]


class Stop(BaseException):
    """The power goes off."""


@pytest.mark.parametrize(
    "what", ["os.replace", "os.fsync", "commit", "add", "reject", "ParquetWriter.write_table", "json.dumps"]
)
def test_a_run_that_stops_anywhere_goes_on_to_the_same_data_set(what, tmp_path, monkeypatch):
    boxes = write_boxes(tmp_path / "in", 14)
    (boxes / "box 003.obj").write_text("nothing")
    (boxes / "more.zip").write_bytes(
        bad_files.zipped(
            *((f"{number}.obj", bad_files.box(5 + number / 10)) for number in range(6)), ("bad.obj", "no")
        )
    )
    arguments = (boxes, "--shard_size", 4, "--num_workers", 1, "--validation_share", 0.2)
    assert prepare(*arguments, "--out", tmp_path / "whole" / "set") == 0
    monkeypatch.setattr(prepare_data, "_COMMIT_INTERVAL_SECONDS", 0)
    owner, _, name = what.rpartition(".")
    owners = {"os": prepared_set.os, "json": prepared_set.json, "ParquetWriter": pyarrow.parquet.ParquetWriter}
    owner = owners.get(owner, prepared_set.PreparedSet)
    original, stops = getattr(owner, name), 0
    for place in (1, 2, 4, 7, 11, 16):
        calls = 0

        def stopping(*args, place=place, **kwargs):
            nonlocal calls
            calls += 1
            if calls == place:
                raise Stop
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping)
            try:
                assert prepare(*arguments, "--out", tmp_path / "stopped" / "set") == 0
                break
            except Stop:
                stops += 1
    assert stops >= 1, "nothing was stopped"
    assert prepare(*arguments, "--out", tmp_path / "stopped" / "set") == 0
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_a_run_that_wrote_other_columns_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    boxes, out = write_boxes(tmp_path / "in", 6), tmp_path / "out"
    earlier = prepared_set._TABLES.replace("pack TEXT, author TEXT,", "")
    assert earlier != prepared_set._TABLES
    with monkeypatch.context() as patch:
        patch.setattr(prepared_set, "_TABLES", earlier)
        assert prepare(boxes, "--out", out) == 1
    capsys.readouterr()
    assert prepare(boxes, "--out", out) == 1
    assert "begun by an earlier version, which wrote no column pack and no column author" in capsys.readouterr().err
    assert prepare(boxes, "--out", out, "--overwrite") == 0
    assert len(rows(out)) == 6


def command(*arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "training.prepare_data", *map(str, arguments), "--disable_tqdm"]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A source of 300 meshes, and the data set of a run over it that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_rows(folder / "rows.parquet", 300, 40)
    assert prepare(source, "--shard_size", 50, "--num_workers", 1, "--out", folder / "whole" / "set") == 0
    return folder


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_killed_or_interrupted_is_gone_on_with(stop, status, undisturbed, tmp_path):
    arguments = (undisturbed / "rows.parquet", "--shard_size", 50, "--num_workers", 1)
    out = tmp_path / "set"
    process = command(*arguments, "--out", out)
    wait_for(lambda: len(list(out.glob("data/train-*.parquet"))) >= 2, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors and (stop == signal.SIGKILL or "run the same command again" in errors)
    assert not (out / "README.md").exists() and (out / "settings.json").exists()
    assert psutil.wait_procs(children, timeout=20)[1] == [], "a child outlives the run"
    assert prepare(*arguments, "--out", out) == 0
    assert content(tmp_path) == content(undisturbed / "whole")


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch, capsys):
    boxes = write_boxes(tmp_path / "in", 10)
    assert prepare(boxes, "--out", tmp_path / "whole" / "set", "--shard_size", 4) == 0

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.parquet.ParquetWriter, "write_table", full)
        assert prepare(boxes, "--out", tmp_path / "full" / "set", "--shard_size", 4) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert prepare(boxes, "--out", tmp_path / "full" / "set", "--shard_size", 4) == 0
    assert content(tmp_path / "full") == content(tmp_path / "whole")


def begin(out: Path, boxes: Path, monkeypatch) -> None:
    """A run that stops in the middle, after a commit."""
    with monkeypatch.context() as patch:
        patch.setattr(prepare_data, "_COMMIT_INTERVAL_SECONDS", 0)
        patch.setattr(prepared_set.PreparedSet, "finish", lambda self: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            prepare(boxes, "--out", out)


def test_a_file_that_no_commit_knows_of_is_removed(tmp_path, monkeypatch):
    boxes = write_boxes(tmp_path / "in", 5)
    begin(tmp_path / "out", boxes, monkeypatch)
    for name in ("train-00001.parquet", ".train-00000.parquet.part"):
        (tmp_path / "out" / "data" / name).write_bytes(b"written after the last commit")
    assert prepare(boxes, "--out", tmp_path / "out") == 0
    assert {path.name for path in (tmp_path / "out" / "data").iterdir()} <= {f"{s}-00000.parquet" for s in SPLITS}


def test_other_settings_and_other_files_are_errors_with_advice(tmp_path, monkeypatch, capsys):
    boxes = write_boxes(tmp_path / "in", 5)
    begin(tmp_path / "out", boxes, monkeypatch)
    assert prepare(boxes, "--out", tmp_path / "out", "--max_faces", 100) == 1
    message = capsys.readouterr().err
    assert "begun with max_faces = 800, not 100" in message and "--overwrite" in message
    (boxes / "a new one.obj").write_text(bad_files.box(9))
    assert prepare(boxes, "--out", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "files were added, removed or renamed" in message and "--overwrite" in message
    assert prepare(boxes, "--out", tmp_path / "out", "--max_faces", 100, "--overwrite") == 0
    assert len(rows(tmp_path / "out")) == 6
    assert prepare(boxes, "--out", tmp_path / "out", "--max_faces", 100) == 0
    message = capsys.readouterr().out
    assert "finished already (6 meshes; sources that changed since were not read); --overwrite" in message


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("data/train-00001.parquet", "1 of its 3 files of meshes are missing, such as data/train-00001.parquet"),
        ("summary.json", "its summary.json cannot be read"),
    ],
)
def test_a_finished_set_that_lost_a_file_is_an_error_with_advice(lost, message, tmp_path, capsys):
    arguments = (write_boxes(tmp_path / "in", 10), "--out", tmp_path / "out", "--shard_size", 4)
    arguments += ("--validation_share", 0)
    assert prepare(*arguments) == 0
    before = content(tmp_path / "out")
    (tmp_path / "out" / lost).unlink()
    assert prepare(*arguments) == 1
    error = capsys.readouterr().err
    assert "finished already" in error and message in error and "--overwrite" in error
    assert prepare(*arguments, "--overwrite") == 0
    assert content(tmp_path / "out") == before


def test_two_runs_do_not_write_to_one_folder(tmp_path, capsys):
    boxes = write_boxes(tmp_path / "in", 3)
    options = prepare_data.parse_options([str(boxes), "--out", str(tmp_path / "out")])
    settings = {
        key: value for key, value in sorted(vars(options).items()) if key not in prepare_data._OPTIONS_WITHOUT_EFFECT
    }
    first = prepared_set.PreparedSet(tmp_path / "out", settings | {"resolution": 128}, 10, 0.1)
    for arguments in ((), ("--overwrite",)):
        assert prepare(boxes, "--out", tmp_path / "out", *arguments) == 1
        assert "another process is writing" in capsys.readouterr().err
    first.close()
    assert prepare(boxes, "--out", tmp_path / "out") == 0


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path, capsys):
    boxes, out = write_boxes(tmp_path / "in", 1), tmp_path / "out"
    (out / "data").mkdir(parents=True)
    for name in ("settings.json", "README.md", "data/train-1.parquet"):
        (out / name).write_text("{}")
    before = content(out)
    for arguments in ((), ("--overwrite",)):
        assert prepare(boxes, "--out", out, *arguments) == 1
        assert "did not write" in capsys.readouterr().err
    assert content(out) == before


def test_files_from_an_archive_are_removed_as_soon_as_they_are_read(tmp_path, monkeypatch):
    names = [f"{number:03d}" for number in range(300)]
    (tmp_path / "all.zip").write_bytes(
        bad_files.zipped(
            *((f"{name}.obj", bad_files.box(0.1 + 0.05 * (int(name) % 16), 1 + int(name) // 16)) for name in names)
        )
    )
    add, seen = prepared_set.PreparedSet.add, []

    def counting(self, *arguments):
        seen.append(len(list(self.temporary.iterdir())))
        return add(self, *arguments)

    monkeypatch.setattr(prepared_set.PreparedSet, "add", counting)
    assert prepare(tmp_path / "all.zip", "--out", tmp_path / "out", "--num_workers", 1) == 0
    assert [row["name"] for row in rows(tmp_path / "out")] and len(seen) == 300
    assert max(seen) <= 100


def peak_memory(*arguments: object) -> tuple[int, int]:
    """The most memory in bytes that a run's main process, and that the largest of the others, took."""
    process, highest = command(*arguments), [0, 0]
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            sizes = [member.memory_info().rss for member in (parent, *parent.children(recursive=True))]
            highest = [max(highest[0], sizes[0]), max(highest[1], *sizes[1:], 0)]
        except psutil.Error:
            pass
        time.sleep(0.02)
    assert process.returncode == 0, process.communicate()
    return highest[0], highest[1]


def test_memory_does_not_grow_with_the_source(tmp_path):
    peaks = []
    for count in (400, 1600):
        source = write_rows(tmp_path / f"{count}.parquet", count, 600)
        peaks.append(peak_memory(source, "--out", tmp_path / f"out {count}", "--num_workers", 1, "--shard_size", 200))
    more = 1200 * 600 * (3 * 12 + 12)  # bytes of vertices and faces that the larger source has more
    growth = [large - small for small, large in zip(*peaks, strict=True)]
    assert max(growth) < more / 3, (peaks, more)
