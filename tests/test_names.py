"""Whether the name of a model means a folder or a repository on the Hub."""

import pytest

from iflame_hf.names import model_folder


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A folder `runs` with a model, and a run that has none yet."""
    (tmp_path / "runs" / "chairs").mkdir(parents=True)
    (tmp_path / "runs" / "chairs" / "config.json").write_text("{}")
    (tmp_path / "runs" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_with_a_model_is_one_however_it_is_called(place):
    for name in ("runs/chairs", "./runs/chairs", str(place / "runs" / "chairs"), place / "runs" / "chairs"):
        assert model_folder(name).samefile(place / "runs" / "chairs")


@pytest.mark.parametrize("name", ["user/name", "studio/chairs-v1.2", "user/runs"])
def test_a_name_of_the_hub_stays_one(name):
    assert model_folder(name) is None


@pytest.mark.parametrize(
    "name", ["runs/nope", "outputs/demo", "nope", "./user/name", "/user/name", "~/name", "a/b/c", "../x", "user\\name"]
)
def test_a_name_that_can_only_be_a_folder_says_that_there_is_none(name):
    with pytest.raises(FileNotFoundError) as refused:
        model_folder(name)
    assert str(refused.value).startswith(f"there is no folder {name}") and "user/name" in str(refused.value)


def test_a_folder_of_nearly_that_name_is_proposed(place):
    with pytest.raises(FileNotFoundError, match=r"no folder runs/chair \(did you mean runs/chairs\?\)"):
        model_folder("runs/chair")
    with pytest.raises(FileNotFoundError) as refused:
        model_folder("runs/tables")
    assert "did you mean" not in str(refused.value)


def test_a_folder_without_a_model_and_a_file_are_refused():
    with pytest.raises(FileNotFoundError, match="runs/empty holds no model: there is no config.json in it"):
        model_folder("runs/empty")
    with pytest.raises(NotADirectoryError, match="runs/chairs/config.json is a file"):
        model_folder("runs/chairs/config.json")
