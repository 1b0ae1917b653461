"""Parquet files that hold pictures, as Hugging Face data sets do.

The image column is a struct of `bytes` and `path`, or plain bytes. Class names come from the
schema's metadata (ClassLabel) where they are there. Rows keep the order of the files: another one
would read every file many times over.
"""

from __future__ import annotations

import json
from typing import Any

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.preparation.sources.archive import clean
from ftlib.preparation.sources.layout import Labelled, LabelledFiles
from ftlib.preparation.sources.naming import counted, listed, natural, plain, split_in, split_of
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.places import ParquetCell, opened
from ftlib.preparation.sources.table import LABEL_COLUMNS, SPLIT_COLUMNS
from ftlib.preparation.sources.tree import File, Tree, is_picture_name

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "imagebytes", "bytes")


class Parquet:
    """Pictures as bytes in Parquet files."""

    name = "parquet"

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        files = _files(tree)
        if not files or any(is_picture_name(file.path) for file in tree.files):
            return False
        return bool(_image_columns(_schema(tree, files[0])))

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        files = _files(tree)
        if not files:
            raise DataError(f"{tree.root} holds no .parquet files")
        found = LabelledFiles("Parquet files of pictures", Tree(tree.root), [], keep_order=True)
        numbers: dict[str, str] | None = None
        for file in files:
            schema = _schema(tree, file)
            columns = _Columns.of(storage.join(tree.root, file.path), schema, options)
            names = _class_names(schema, columns.label)
            if numbers is not None and names != numbers:
                raise DataError(
                    f"{tree.root}: {file.path} has other class names than {files[0].path}"
                )
            numbers = names
            _read_file(tree, file, columns, options, found)
        if not found.rows:
            raise DataError(f"{tree.root}: no row of its Parquet files has a picture and a label")
        _name_paths(found)
        found.tree.files = [row.file for row in found.rows]
        used = {row.label for row in found.rows}
        found.titles = numbers or {}
        found.classes = tuple(numbers) if numbers else natural(used)
        found.notes.append(f"{counted(len(files), 'Parquet file')}, columns {columns.image!r}, ")
        found.notes[-1] += f"{columns.label!r}" + (" with class names" if numbers else "")
        return found


class _Columns:
    """Which column of a Parquet file says what."""

    def __init__(self, image: str, label: str, split: str) -> None:
        self.image, self.label, self.split = image, label, split

    @staticmethod
    def of(where: str, schema: Any, options: SourceOptions) -> _Columns:
        for option, name in (
            ("--label-column", options.label_column),
            ("--file-column", options.file_column),
            ("--split-column", options.split_column),
            ("--group-column", options.group_column),
        ):
            if name and name not in schema.names:
                raise DataError(f"{option} {name}: {where} has {listed(schema.names)}")
        images = [options.file_column] if options.file_column else _image_columns(schema)
        if len(images) != 1:
            raise DataError(
                f"{where}: the column of pictures is not clear (columns: {listed(schema.names)}). "
                "Give it: --file-column NAME"
            )
        labels = [options.label_column] if options.label_column else _label_columns(schema)
        if len(labels) != 1:
            raise DataError(
                f"{where}: the column of labels is not clear (columns: {listed(schema.names)}). "
                "Give it: --label-column NAME"
            )
        split = options.split_column or next(
            (name for name in schema.names if plain(name) in SPLIT_COLUMNS[:3]), ""
        )
        return _Columns(images[0], labels[0], split)


def _files(tree: Tree) -> list[File]:
    return [file for file in tree.files if file.extension == "parquet" and file.place is None]


def _schema(tree: Tree, file: File) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    where = storage.join(tree.root, file.path)
    try:
        with opened(where) as source:
            return pq.read_schema(source)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} cannot be read as Parquet ({error})") from None


def _image_columns(schema: Any) -> list[str]:
    import pyarrow as pa

    structs, binary = [], []
    for column in schema:
        if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
            structs.append(column.name)
        elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            binary.append(column.name)
    called = [name for name in structs or binary if plain(name) in IMAGE_COLUMNS]
    return called if len(called) == 1 else structs or binary


def _label_columns(schema: Any) -> list[str]:
    labels = [name for name, kind in _features(schema).items() if kind.get("_type") == "ClassLabel"]
    called = [name for name in schema.names if plain(name) in LABEL_COLUMNS]
    return labels if len(labels) == 1 else called


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The column kinds that Hugging Face's library keeps in the schema's metadata."""
    try:
        about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = about["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def _class_names(schema: Any, label: str) -> dict[str, str]:
    """Number -> name, from the metadata; empty where there are none."""
    names = _features(schema).get(label, {}).get("names")
    return {str(i): str(name) for i, name in enumerate(names)} if isinstance(names, list) else {}


def _read_file(
    tree: Tree, file: File, columns: _Columns, options: SourceOptions, found: LabelledFiles
) -> None:
    import pyarrow.parquet as pq

    where = storage.join(tree.root, file.path)
    of_file = split_in(file.path)
    with opened(where) as source, pq.ParquetFile(source) as parquet:
        of_struct = [c for c in _leaves(parquet) if c == f"{columns.image}.path"]
        extra = [c for c in (columns.split, options.group_column) if c]
        for group in range(parquet.num_row_groups):
            table = parquet.read_row_group(group, columns=[columns.label, *extra, *of_struct])
            labels = table[columns.label].to_pylist()
            splits = table[columns.split].to_pylist() if columns.split else [of_file] * len(labels)
            groups = table[options.group_column].to_pylist() if options.group_column else []
            paths = table[columns.image].to_pylist() if of_struct else [None] * len(labels)
            size = _mean_size(parquet, group, columns.image)
            for row, label in enumerate(labels):
                split = split_of(str(splits[row])) if columns.split else of_file
                if label is None or str(label) in ("-1", ""):
                    found.aside["rows without a label"] += 1
                    continue
                own = (paths[row] or {}).get("path") if of_struct else None
                place = ParquetCell(where, columns.image, group, row)
                name = clean(str(own)) if own else f"{file.path}/{group:04d}-{row:06d}"
                picture = File(name, size, file.mtime_ns, place)
                of_group = str(groups[row]) if groups else ""
                found.rows.append(Labelled(picture, split, str(label), of_group))
                if split:
                    found.split_origins[split] = columns.split or "names of the files"


def _leaves(parquet: Any) -> list[str]:
    return [parquet.schema.column(i).path for i in range(len(parquet.schema))]


def _mean_size(parquet: Any, group: int, image: str) -> int:
    """Bytes of a picture, on average over a row group: the values are not read for it."""
    about = parquet.metadata.row_group(group)
    chunks = [about.column(i) for i in range(about.num_columns)]
    size = sum(
        int(c.total_uncompressed_size)
        for c in chunks
        if c.path_in_schema in (image, f"{image}.bytes")
    )
    return size // max(1, about.num_rows)


def _name_paths(found: LabelledFiles) -> None:
    """Put the Parquet file's name and the row before names that are not unique."""
    own = [row.file.path for row in found.rows]
    if len(set(own)) == len(own):
        return
    for at, row in enumerate(found.rows):
        place = row.file.place
        assert isinstance(place, ParquetCell)
        folder = f"{place.container.rpartition('/')[2]}/{place.group:04d}-{place.row:06d}"
        file = File(f"{folder}-{row.file.name}", row.file.bytes, row.file.mtime_ns, place)
        found.rows[at] = row._replace(file=file)
