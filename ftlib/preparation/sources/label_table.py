"""Tables of labels as text, from CSV, TSV, JSON or Parquet, and the pictures that they name."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.data.shards import DataError
from ftlib.preparation.sources.naming import split_in, split_of
from ftlib.preparation.sources.tree import File, Tree
from ftlib.preparation.sources.wrapping import is_picture

LARGEST_TABLE = 1 << 30
LARGEST_FIELD = 1 << 20


@dataclass
class LabelTable:
    """A table as text: column names and rows of the same length."""

    name: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    folder: str = ""
    """Where the table lies below the source's root, for names given from there."""
    label: str = ""
    """The column of labels that counts where none is named."""

    @property
    def split(self) -> str:
        """The split that the table's name or folder means, as in train.csv or val/metadata.csv."""
        return split_in(Path(self.name).stem) or split_of(self.folder.rpartition("/")[2])

    def fitted(self, names: FileNames) -> LabelTable:
        """The same table; with a header made up where the first row already names a file."""
        if not any(names.find(cell, self.folder, self.split) for cell in self.columns):
            return self
        header = tuple(f"column {i + 1}" for i in range(len(self.columns)))
        return LabelTable(self.name, header, [self.columns, *self.rows], self.folder)

    def column(self, name: str) -> list[str]:
        at = self.columns.index(name)
        return [row[at] for row in self.rows]


class FileNames:
    """The pictures of a tree, found by what a table calls them."""

    def __init__(self, tree: Tree) -> None:
        self.count = 0
        self._by_name: dict[str, list[File]] = defaultdict(list)
        self._by_stem: dict[str, list[File]] = defaultdict(list)
        self._by_lower: dict[str, list[File]] = defaultdict(list)
        """Names in lower case: tables and cameras differ about `.jpg` and `.JPG`."""
        for file in tree.files:
            if is_picture(file) or "." not in file.name:
                self.count += 1
                name = _composed(file.name)
                self._by_name[name].append(file)
                self._by_lower[name.lower()].append(file)
                if "." in name:
                    self._by_stem[name.rpartition(".")[0]].append(file)

    def find(self, value: str, folder: str = "", split: str = "") -> list[File]:
        """The files that a value names: one, none, or several that it cannot tell apart."""
        value = _composed(value.strip().replace("\\", "/")).removeprefix("./").strip("/")
        name = value.rpartition("/")[2]
        found = (
            self._by_name.get(name) or self._by_stem.get(name) or self._by_lower.get(name.lower())
        )
        if not found:
            return []
        if "/" in value:
            found = [f for f in found if _same_end(_composed(f.path), value)]
        if len(found) > 1:
            exact = f"{folder}/{value}" if folder else value
            same = [f for f in found if f.path in (value, exact)]
            found = same or found
        if len(found) > 1 and split:
            of_split = [f for f in found if split_in(f.path.partition("/")[0]) == split]
            found = of_split or found
        return found


def _composed(name: str) -> str:
    """A name in Unicode's composed form: macOS takes accents apart."""
    return unicodedata.normalize("NFC", name)


def _same_end(path: str, value: str) -> bool:
    """Whether one is the end of the other: a table may name folders of another machine."""
    whole, wanted = f"/{path}".lower(), f"/{value}".lower()
    stem = whole.rpartition(".")[0]
    return any(a.endswith(b) for a, b in ((whole, wanted), (stem, wanted), (wanted, whole))) or (
        wanted.endswith(stem)
    )


def load_table(path: str) -> LabelTable:
    """The table in a file on disk. Raises DataError."""
    where = Path(path).expanduser()
    try:
        if where.stat().st_size > LARGEST_TABLE:
            raise DataError(f"--labels {path}: a file of over {LARGEST_TABLE:,} bytes")
        return parse_table(where.read_bytes(), where.name)
    except OSError as error:
        raise DataError(f"--labels {path} cannot be read ({error.strerror or error})") from None


def parse_table(data: bytes, path: str) -> LabelTable:
    """A table's columns and rows as text. Raises DataError where it is none."""
    ending = path.rpartition(".")[2].lower()
    folder = path.rpartition("/")[0]
    try:
        if ending == "parquet":
            columns, rows = _parquet(data)
        elif ending in ("json", "jsonl", "ndjson"):
            columns, rows = _records(_json(data, ending))
        else:
            columns, rows = _separated(data, ending)
    except (ValueError, KeyError, TypeError, csv.Error, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read as a table ({error})") from None
    if not rows or not columns:
        raise DataError(f"{path} holds no rows")
    return LabelTable(path, columns, rows, folder)


def _separated(data: bytes, ending: str) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    text = _decoded(data)
    first = text.partition("\n")[0]
    if ending == "tsv":
        separator = "\t"
    else:
        counts = {mark: first.count(mark) for mark in ",;\t|"}
        separator = max(counts, key=lambda mark: counts[mark]) if any(counts.values()) else " "
    csv.field_size_limit(LARGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = [tuple(cell.strip() for cell in row) for row in reader if any(row)]
    if not rows:
        return (), []
    width = len(rows[0])
    if uneven := [i for i, row in enumerate(rows) if len(row) != width]:
        raise ValueError(
            f"row {uneven[0] + 1} has {len(rows[uneven[0]])} columns, the first row {width}"
        )
    return _distinct(rows[0]), rows[1:]


def _decoded(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8: {error.reason} at byte {error.start:,}; save it as UTF-8, such as with "
            "iconv -f latin1 -t utf-8"
        ) from None


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(found)


def _json(data: bytes, ending: str) -> Any:
    text = _decoded(data)
    if ending != "json":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _records(value: Any) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Rows of a list of objects, of an object of lists (columns, or the files of each class), or of
    an object of file -> label, or of COCO's lists of images and annotations."""
    if isinstance(value, dict) and {"images", "annotations", "categories"} <= set(value):
        value = _coco_records(value)
    elif isinstance(value, dict) and _is_files_of_classes(value):
        value = [{"file": file, "label": label} for label in value for file in value[label]]
    elif isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        if len({len(v) for v in value.values()}) != 1:
            raise ValueError("its columns have different lengths")
        value = [dict(zip(value, row)) for row in zip(*value.values())]
    elif isinstance(value, dict) and all(isinstance(v, str | int) for v in value.values()):
        value = [{"file": name, "label": label} for name, label in value.items()]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise ValueError("it needs a list of objects, or an object of file names and labels")
    columns = tuple(dict.fromkeys(str(key) for row in value for key in row))
    return columns, [tuple(_cell(row.get(name)) for name in columns) for row in value]


def _is_files_of_classes(value: dict[Any, Any]) -> bool:
    """Whether each key has a list of names, and no name is in two of them."""
    lists = list(value.values())
    if len(lists) < 2 or not all(isinstance(one, list) and one for one in lists):
        return False
    files = [name for one in lists for name in one]
    return all(isinstance(n, str) for n in files) and len(set(files)) == len(files) > len(lists)


def _coco_records(value: dict[str, Any]) -> list[dict[str, Any]]:
    """File and label of COCO's lists, where an annotation is a label and no box or outline."""
    annotations = value["annotations"]
    boxed = sum("bbox" in one or "segmentation" in one for one in annotations)
    if boxed:
        raise ValueError(
            f"COCO's object detection: {boxed:,} boxes or outlines, where a picture needs one "
            "label. Cut the objects out, or write a table of file and label"
        )
    files = {image["id"]: image["file_name"] for image in value["images"]}
    names = {category["id"]: category["name"] for category in value["categories"]}
    return [{"file": files[a["image_id"]], "label": names[a["category_id"]]} for a in annotations]


def _parquet(data: bytes) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None
    flat = [f.name for f in table.schema if not pa.types.is_nested(f.type)]
    values = [table[name].to_pylist() for name in flat]
    return tuple(flat), [tuple(_cell(value) for value in row) for row in zip(*values)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | dict):
        raise ValueError("a cell holds several values; a picture needs one label")
    return str(value).strip()
