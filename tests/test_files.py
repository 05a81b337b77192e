"""Files are written whole or not at all."""

import os

import pytest

from iflame_hf.files_iflame import write_whole


@pytest.mark.parametrize(("content", "expected"), [(b"\0\xff\n", b"\0\xff\n"), ("Stühle\n", b"St\xc3\xbchle\n")])
def test_a_file_is_written_over_one_of_its_name_and_nothing_is_left_beside_it(tmp_path, content, expected):
    path = tmp_path / "index.json"
    path.write_text("of before")
    write_whole(str(path), content)
    assert path.read_bytes() == expected and os.listdir(tmp_path) == ["index.json"]


@pytest.mark.parametrize("call", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_file_that_cannot_be_written_leaves_the_earlier_one_and_nothing_beside_it(tmp_path, monkeypatch, call):
    path = tmp_path / "index.json"
    path.write_text("of before")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, fail)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "of before" and os.listdir(tmp_path) == ["index.json"]
