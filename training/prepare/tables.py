"""Meshes in rows: parquet files and data sets of the Hub."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from iflame_hf.mesh_iflame import triangulate
from training.prepare.items import READ_SUFFIXES, Item, printable, suffix_of
from training.prepare.rejection import Rejected
from training.prepare.synsets import synset_category

Build = Callable[[], None]
_ROWS_PER_READ = 32
_OVERLAP_COLUMN = "nn_iou_train"
_TEXT_COLUMNS = {
    **{name: name for name in ("name", "source", "license", "pack", "author", "category")},
    "label": "category",
}
# Splits that are not for training.
_VALIDATION_SPLITS = ("validation", "valid", "val", "test", "dev", "eval")


class Columns(NamedTuple):
    """What the columns of a table are for."""

    arrays: bool  # vertices and faces, else one column of mesh files
    files: str | None
    text: dict[str, str]
    overlap: bool


def parquet_items(path: str, label: str, prefix: str, folder: str) -> Iterator[tuple[Item, Build]]:
    """The meshes of a parquet file with the columns vertices and faces, or one of mesh files; rows are read as they
    are asked for. Raises [`Rejected`] and pyarrow's errors when the file cannot be read on."""
    # buffered ahead, pyarrow would keep every row group it has read
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
        columns = _columns(file.schema_arrow)
        wanted = [*columns.text, *(("vertices", "faces") if columns.arrays else (columns.files,))]
        wanted += [_OVERLAP_COLUMN] * columns.overlap
        first = 0
        for batch in file.iter_batches(
            batch_size=_ROWS_PER_READ if columns.arrays else 1, columns=wanted, use_threads=False
        ):
            yield from _table_items(batch, columns, first, label, prefix, _split_of(label), folder)
            first += len(batch)


def parquet_length(path: str) -> int:
    with pyarrow.parquet.ParquetFile(path) as file:
        return file.metadata.num_rows


def hub_items(name: str, label: str, prefix: str, folder: str) -> Iterator[tuple[Item, Build]]:
    """The meshes of a data set of the Hub, `user/name` or `user/name:configuration`, streamed by `datasets`."""
    import datasets  # slow to import, and only this needs it
    from datasets.utils.file_utils import xopen

    repository, _, configuration = name.partition(":")

    def fetch(path: str) -> bytes:
        # a row must not name files of this machine, but those of a data set that lies on it
        if "://" not in path and not os.path.realpath(path).startswith(os.path.realpath(repository) + os.sep):
            raise Rejected("unsafe name", "its file is not one of the data set's")
        with xopen(path, "rb") as file:
            return file.read()

    splits = datasets.load_dataset(repository, configuration or None, streaming=True)
    for split, data in splits.items():
        features = data.features or {}
        classes = {key: feature.names for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)}
        first, columns = 0, None
        for table in data.with_format("arrow").iter(batch_size=_ROWS_PER_READ):
            columns = columns or _columns(table.schema)
            held_out = "validation" if split in _VALIDATION_SPLITS else "train"
            for batch in table.to_batches():
                where = f"{label}/{split}"
                rows_prefix = f"{prefix}{split}/"
                yield from _table_items(batch, columns, first, where, rows_prefix, held_out, folder, classes, fetch)
                first += len(batch)


def _columns(schema: pyarrow.Schema) -> Columns:
    text = {}
    for column, field in _TEXT_COLUMNS.items():
        if column in schema.names and field not in text.values():
            text[column] = field
    overlap = _OVERLAP_COLUMN in schema.names and pyarrow.types.is_floating(schema.field(_OVERLAP_COLUMN).type)
    if {"vertices", "faces"} <= set(schema.names):
        return Columns(True, None, text, overlap)
    for field in schema:
        is_file = pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        is_bytes = pyarrow.types.is_binary(field.type) or pyarrow.types.is_large_binary(field.type)
        if is_file or (is_bytes and f".{field.name}" in READ_SUFFIXES):
            return Columns(False, field.name, text, overlap)
    raise Rejected(
        "no meshes", f"it has no columns vertices and faces, nor one of mesh files; it has {', '.join(schema.names)}"
    )


def _table_items(
    batch: pyarrow.RecordBatch,
    columns: Columns,
    first: int,
    label: str,
    prefix: str,
    split: str | None,
    folder: str,
    classes: dict[str, list[str]] | None = None,
    fetch: Callable[[str], bytes] | None = None,
) -> Iterator[tuple[Item, Build]]:
    text = {field: _texts(batch.column(column), (classes or {}).get(column)) for column, field in columns.text.items()}
    for row in range(len(batch)):
        values = {field: column[row] for field, column in text.items()}
        name = values.pop("name", None) or f"{prefix}{first + row:08d}"
        source = values.pop("source", None) or f"{label}#{first + row}"
        item = Item(name, source, split=split, **values)
        item.category = item.category or synset_category(name)
        if columns.overlap:
            item.nn_iou_train = batch.column(_OVERLAP_COLUMN)[row].as_py()
        yield item, _row_build(item, batch, columns, row, folder, fetch)


def _row_build(
    item: Item,
    batch: pyarrow.RecordBatch,
    columns: Columns,
    row: int,
    folder: str,
    fetch: Callable[[str], bytes] | None,
) -> Build:
    def build() -> None:
        if columns.arrays:
            vertices, lengths = _lists(batch.column("vertices"), row)
            if len(set(lengths.tolist())) > 1:
                raise Rejected("bad shape", "its vertices have different numbers of coordinates")
            flat, sides = _lists(batch.column("faces"), row)
            item.payload = (vertices.reshape(len(lengths), -1), triangulate(flat, sides))
            return
        value = batch.column(columns.files)[row].as_py()
        value = value if isinstance(value, dict) else {"bytes": value, "path": f"mesh.{columns.files}"}
        path, data = value.get("path") or "", value.get("bytes")
        suffix = suffix_of(path)
        if suffix in READ_SUFFIXES and data is None and fetch is not None:
            data = fetch(path)
        if suffix not in READ_SUFFIXES or data is None:
            raise Rejected("unknown format", f"no bytes of a mesh file whose format is known ({path!r})")
        with tempfile.NamedTemporaryFile(suffix=suffix, dir=folder, delete=False) as file:
            item.temporary = file.name
            file.write(data)
        item.payload = file.name

    return build


def _lists(column: pyarrow.Array, row: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of one list of lists, flat, and the lengths of the inner lists."""
    column = column.storage if isinstance(column, pyarrow.ExtensionArray) else column
    value = column[row]
    if not hasattr(value.type, "value_type") or not hasattr(value.type.value_type, "value_type"):
        raise Rejected("bad shape", f"vertices and faces must be lists of lists of numbers, not {value.type}")
    inner = value.values
    if inner is None or len(inner) == 0:
        raise Rejected("empty", "the mesh has no vertices or no faces")
    flat = inner.flatten()
    if inner.null_count or flat.null_count or pyarrow.types.is_nested(flat.type):
        raise Rejected("bad shape", "a value is missing, or the lists are nested too deep")
    lengths = pyarrow.compute.list_value_length(inner)
    return flat.to_numpy(zero_copy_only=False), lengths.to_numpy(zero_copy_only=False)


def _texts(column: pyarrow.Array, names: list[str] | None) -> list[str | None]:
    values = column.to_pylist()
    if names is not None:
        return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
    return [None if value is None or value == "" else printable(str(value)) for value in values]


def _split_of(label: str) -> str | None:
    """The split that a parquet file's own name tells, as in "test-00000-of-00001.parquet"."""
    word = label.rpartition("/")[2].lower().replace("_", "-").replace(".", "-").partition("-")[0]
    return "validation" if word in _VALIDATION_SPLITS else "train" if word == "train" else None
