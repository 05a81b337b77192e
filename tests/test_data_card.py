"""The card of a prepared data set, as the Hub and `datasets` read it."""

from collections import Counter

import datasets
import pytest
from huggingface_hub import DatasetCard
from prepared_fixtures import prepare, write_boxes

from training.prepare.card import data_card, summary_of

SETTINGS = {
    "sources": ["meshes"],
    "min_faces": 4,
    "max_faces": 800,
    "resolution": 128,
    "up_axis": "y",
    "decimate": False,
    "deduplicate": True,
    "validation_share": 0.05,
    "splits": "hash",
    "categories": None,
}


def metadata(licenses, name="mine", meshes=30):
    counts = {"split": Counter(train=meshes), "license": Counter(licenses)}
    text = data_card(name, SETTINGS, summary_of(counts, Counter(train=1), meshes), counts)
    return DatasetCard(text).data.to_dict()


def test_the_license_of_the_command_line_is_that_of_the_card(tmp_path):
    write_boxes(tmp_path / "in", 3)
    assert prepare(tmp_path / "in", "--out", tmp_path / "out", "--license", "cc-by-4.0", "--num_workers", 1) == 0
    assert DatasetCard.load(tmp_path / "out" / "README.md").data.license == "cc-by-4.0"
    assert len(datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]) == 3


@pytest.mark.parametrize(
    ("licenses", "expected"),
    [
        (["CC-BY-4.0"], "cc-by-4.0"),
        (["cc-by-4.0", "CC-BY-4.0"], "cc-by-4.0"),
        (["MIT", "CC0-1.0"], ["cc0-1.0", "mit"]),
        (["my own"], "other"),
        (["my own", "CC0-1.0"], ["cc0-1.0", "other"]),
        (["CC0-1.0", ""], None),  # some meshes have none that is known
        ([""], None),
        ([], None),
    ],
)
def test_licenses_are_the_hubs_own_words_in_any_case_and_other_where_it_has_none(licenses, expected):
    assert metadata(licenses).get("license") == expected


@pytest.mark.parametrize("name", ["mine", 'a "set": of #1', "- stühle", "no", "1.0"])
def test_any_name_of_a_folder_is_the_name_of_the_set(name):
    assert metadata(["MIT"], name)["pretty_name"] == name


def test_the_card_says_how_large_the_set_is_and_where_its_splits_are():
    found = metadata(["MIT"], meshes=30)
    assert found["size_categories"] == "n<1K" and metadata(["MIT"], meshes=1000)["size_categories"] == "1K<n<10K"
    assert found["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}
    ]
    assert {"3d", "mesh", "iflame"} == set(found["tags"])
