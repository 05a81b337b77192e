"""What a source consists of: items, each a mesh or the place of one, with all that is known before it is read."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from trimesh.exchange.load import mesh_formats

from iflame_hf.mesh_files_iflame import MESH_SUFFIXES
from training.prepare.rejection import NOT_CHOSEN, Rejected
from training.prepare.synsets import SYNSETS, category_name, synset_category

ARCHIVE_SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2")
PICKLE_SUFFIXES = (".pkl", ".pickle")
CONTAINER_SUFFIXES = (*ARCHIVE_SUFFIXES, ".parquet")
# The seven formats of iflame_hf, and what trimesh reads besides with the packages that are installed; .xyz are points.
READ_SUFFIXES = (
    *MESH_SUFFIXES,
    *sorted({f".{name}" for name in mesh_formats()} - {*MESH_SUFFIXES, ".stl_ascii", ".xyz"}),
)
# Formats of meshes that are not read: named in the record, where other files are passed over in silence.
OTHER_SUFFIXES = tuple(
    sorted(
        {*PICKLE_SUFFIXES}
        | {".3dm", ".3ds", ".3mf", ".abc", ".blend", ".c4d", ".fbx", ".lwo", ".ma", ".max", ".mb", ".usd", ".usda"}
        | {".iges", ".igs", ".step", ".stp", ".usdc", ".usdz", ".wrl", ".x3d", ".zae", ".7z", ".rar", ".tar.xz"}
        - {*READ_SUFFIXES}
    )
)


@dataclass(slots=True)
class Item:
    """
    One mesh of a source.

    Args:
        name: what the mesh is called; it need not be unique.
        source: where it came from, without the folders of this machine.
        payload: the path of its file, or a tuple of arrays (vertices, faces). None if there is a rejection.
        pack: the collection that it was published in, where the source says so.
        rejection: why the item is not even read.
        split: "train" or "validation" where the source says so.
        temporary: a file or folder to delete when the item is done with.
        nn_iou_train: how much it overlaps with the most similar training mesh, where the source says so.
    """

    name: str
    source: str
    payload: str | tuple[Any, Any] | None = None
    category: str | None = None
    license: str | None = None
    pack: str | None = None
    author: str | None = None
    split: str | None = None
    rejection: Rejected | None = None
    temporary: str | None = None
    nn_iou_train: float | None = None

    @property
    def key(self) -> str:
        """The same in every run over the same sources."""
        return f"{self.source}\0{self.name}"


@dataclass(frozen=True)
class Selection:
    """
    Which items are wanted.

    Args:
        categories: names of categories as `category_name` gives them; None for all.
        files: names of items or of their files, with or without the suffix; None for all.
        category_level: which folder below a source names the category, the first being 1; 0 for none.
    """

    categories: frozenset[str] | None = None
    files: frozenset[str] | None = None
    category_level: int = 1

    def refusal(self, item: Item) -> Rejected | None:
        """Why an item is not wanted, if so."""
        if self.files is not None and not self.matches(item):
            return Rejected(NOT_CHOSEN, "it is not in the list")
        if self.categories is not None and (item.category or "").lower() not in self.categories:
            return Rejected(NOT_CHOSEN, f"its category is {item.category or 'not known'}")
        return None

    def matches(self, item: Item) -> frozenset[str]:
        """Which of `files` an item is meant by."""
        file_name = PurePosixPath(item.source).name
        return (self.files or frozenset()) & {item.name, file_name, stem(file_name)}

    def category_of(self, path: str) -> str | None:
        """The category of a file by its path below the source: that of a folder or file named after a synset, else
        the name of the folder at `category_level`."""
        *folders, file_name = PurePosixPath(path).parts
        for part in (*folders, file_name):
            if (category := synset_category(part)) is not None:
                return category
        return folders[self.category_level - 1] if 0 < self.category_level <= len(folders) else None


def chosen_categories(names: Iterable[str]) -> frozenset[str]:
    """Categories given by name or by synset id. Raises ValueError for an id of eight digits that is none."""
    for name in names:
        if len(name) == 8 and name.isdigit() and name not in SYNSETS:
            raise ValueError(f"{name} is not the synset id of a ShapeNetCore category")
    return frozenset(category_name(name) for name in names)


def suffix_of(name: str) -> str:
    """The suffix of a file, in lower case, if it is one that matters here, else ""."""
    name = name.lower()
    known = (suffix for suffix in (*CONTAINER_SUFFIXES, *READ_SUFFIXES, *OTHER_SUFFIXES) if name.endswith(suffix))
    return max(known, key=len, default="")


def stem(path: str) -> str:
    """A path without its suffix."""
    return path[: len(path) - len(suffix_of(path))]


def is_hidden(name: str) -> bool:
    """Whether a file or folder belongs to a system, not to its user: ".git", "._chair.obj", "__MACOSX"."""
    return (name.startswith(".") and name not in (".", "..")) or name == "__MACOSX"


def printable(text: str) -> str:
    """Text that can be written as UTF-8: what is none, such as bytes of a file name, is spelt out, as in "\\udce9"."""
    return text.encode("utf-8", "backslashreplace").decode()


def unknown_format(suffix: str) -> Rejected:
    if suffix in PICKLE_SUFFIXES:
        return Rejected(
            "unknown format",
            "a pickle is not read; MeshGPT's becomes parquet with python -m training.recipes.meshgpt_to_parquet",
        )
    return Rejected("unknown format", f"the format {suffix} is not read; convert it, for example to .glb")
