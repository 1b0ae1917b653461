"""Tables of labels: a column of file names and a column of labels, in CSV, TSV, JSON or Parquet.

Names match with or without extension, below any folder of the source. Columns are guessed where
there is one choice; otherwise the message lists them and the option that names one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ftlib.data.shards import DataError
from ftlib.preparation.sources.label_table import FileNames, LabelTable, load_table, parse_table
from ftlib.preparation.sources.layout import Labelled, LabelledFiles, Rejected
from ftlib.preparation.sources.naming import (
    counted,
    listed,
    natural,
    plain,
    split_of,
)
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.published import published_table
from ftlib.preparation.sources.tree import File, Tree
from ftlib.preparation.sources.wrapping import is_picture, unwrapped
from ftlib.text import printable

ENDINGS = ("csv", "tsv", "json", "jsonl", "ndjson", "parquet")
FILE_COLUMNS = ("file", "filename", "filepath", "path", "image", "imagepath", "imageid", "id")
LABEL_COLUMNS = tuple(
    [
        "label",
        "labels",
        "class",
        "classid",
        "classname",
        "labelid",
        "categoryid",
        "labelname",
        "category",
        "categoryname",
        "target",
        "species",
        "breed",
        "diagnosis",
        "y",
        "dx",
    ]
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "dataset", "fold")
GROUP_COLUMNS = frozenset(
    f"{word}{ending}"
    for word in ("patient", "subject", "lesion", "case", "slide", "video", "burst", "individual")
    for ending in ("", "id", "name")
)
SPLIT_FLAGS = {
    "isvalid": ("val", "train"),
    "isval": ("val", "train"),
    "isvalidation": ("val", "train"),
    "istest": ("test", "train"),
    "istrain": ("train", "test"),
    "istraining": ("train", "test"),
}
"""Column -> the splits that its 1 (or true) and its 0 (or false) mean."""
SAMPLE = 200
"""Rows looked at to guess a column."""
ENOUGH = 0.5
"""Share of a column's values that must name files for it to be the column of file names."""
LARGEST_GUESS = 128 << 20
"""Bytes of a table that is read without being named."""
MOST_TABLES = 20
"""More of them are taken for something else, such as a file for each class."""
NO_LABEL = ("", "nan", "NaN")
"""What tables have where a label is missing."""


class Table:
    """A file of labels beside the pictures, or named with --labels."""

    name = "table"

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        return bool(options.labels) or bool(usable_tables(unwrapped(tree)[0], options)[0])

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        if not options.labels:
            tree = unwrapped(tree)[0]
        names = FileNames(tree)
        if options.labels:
            tables = [load_table(options.labels)]
        else:
            tables, problems = usable_tables(tree, options)
            if not tables:
                raise DataError(
                    f"{tree.root} has no table that names its pictures and their labels. Name it: "
                    "--labels FILE, with --file-column and --label-column where they are not clear"
                    + "".join(f". {problem}" for problem in problems[:3])
                )
        if len(tables) > 1 and len({table.split for table in tables}) < len(tables):
            raise DataError(
                f"{tree.root} has {counted(len(tables), 'table')} that name pictures "
                f"({listed([table.name for table in tables])}). Choose one with --labels FILE"
            )
        found = LabelledFiles(f"table of labels ({listed([t.name for t in tables])})", tree, [])
        for table in tables:
            split = table.split if len(tables) > 1 else ""
            _read_table(table.fitted(names), names, options, found, split)
        _finish(found, {table.name for table in tables})
        return found


def usable_tables(tree: Tree, options: SourceOptions) -> tuple[list[LabelTable], list[str]]:
    """(the tables of a source that name its pictures and their labels, why others do not).

    Looks at the source's folder and those in it. Samples of a competition's answers are no labels.
    """
    found: list[LabelTable] = []
    problems: list[str] = []
    candidates = [
        file
        for file in tree.files
        if ((file.extension in ENDINGS and file.path.count("/") <= 1) or _is_list(file))
        and "submission" not in file.name.lower()
    ]
    names = FileNames(tree)
    if not names.count:
        return found, problems
    try:
        if table := published_table(tree):
            Columns.of(table, names, options)
            return [table], problems
    except DataError as error:
        problems.append(str(error))
    if len(candidates) > MOST_TABLES:
        return found, problems
    for file in candidates:
        try:
            if file.bytes > LARGEST_GUESS:
                raise DataError(f"{file.path} has {file.bytes:,} bytes; name it with --labels")
            table = parse_table(tree.read(file), file.path).fitted(names)
            columns = Columns.of(table, names, options)
        except (DataError, OSError) as error:
            problems += [] if _is_list(file) else [str(error)]
            continue
        if columns.label or columns.one_hot:
            found.append(table)
    return found, problems


def _is_list(file: File) -> bool:
    """Whether a file is called like a list of a split's pictures: train.txt, val.txt."""
    return file.extension == "txt" and bool(split_of(file.path.removesuffix(".txt")))


def labels_by_name(tree: Tree, options: SourceOptions) -> dict[str, str]:
    """File name, without folders -> label, of the table named with --labels. Raises DataError."""
    names = FileNames(tree)
    return _by_file_name(load_table(options.labels).fitted(names), names, options)


def labels_of_split(
    tree: Tree, split: str, classes: set[str], options: SourceOptions
) -> tuple[dict[str, str], str]:
    """(file name, without folders -> label, the table) for a split's own table, such as Test.csv,
    that has labels of `classes` alone; empty where there is none."""
    names = FileNames(tree)
    for table in usable_tables(tree, options)[0]:
        if table.split == split:
            labels = _by_file_name(table, names, options)
            if set(labels.values()) <= classes:
                return labels, table.name
    return {}, ""


def _by_file_name(table: LabelTable, names: FileNames, options: SourceOptions) -> dict[str, str]:
    columns = Columns.of(table, names, options)
    files = [value.replace("\\", "/").rpartition("/")[2] for value in table.column(columns.file)]
    return dict(zip(files, _labels(table, columns)))


# --- columns ---


@dataclass(frozen=True)
class Columns:
    """Which column says what. `label` is empty where labels are `one_hot` columns."""

    file: str
    label: str
    split: str
    one_hot: tuple[str, ...] = ()

    @staticmethod
    def of(table: LabelTable, names: FileNames, options: SourceOptions) -> Columns:
        file = _named(table, options.file_column, "--file-column") or _file_column(table, names)
        split = _named(table, options.split_column, "--split-column") or _split_column(table, file)
        _named(table, options.group_column, "--group-column")
        label = _named(table, options.label_column, "--label-column")
        rest = [n for n in table.columns if n not in (file, split, options.group_column)]
        one_hot: tuple[str, ...] = ()
        if not label:
            label, one_hot = (table.label, ()) if table.label else _label_column(table, rest)
        return Columns(file, label, split, one_hot)


def _named(table: LabelTable, name: str, option: str) -> str:
    if name and name not in table.columns:
        raise DataError(f"{option} {name}: {table.name} has the columns {listed(table.columns)}")
    return name


def _file_column(table: LabelTable, names: FileNames) -> str:
    shares = {}
    for at, column in enumerate(table.columns):
        values = [row[at] for row in table.rows[:SAMPLE]]
        fitting = [value for value in values if names.find(value, table.folder, table.split)]
        shares[column] = len(fitting) / len(values)
    best = max(shares.values())
    if best < ENOUGH:
        raise DataError(
            f"{table.name}: no column names pictures of the source (columns: "
            f"{listed(table.columns)}). Give the one that does: --file-column NAME"
        )
    likely = [column for column in table.columns if shares[column] == best]
    called = [column for column in likely if plain(column) in FILE_COLUMNS]
    return (called or likely)[0]


def _split_column(table: LabelTable, file: str) -> str:
    for column in table.columns:
        if column != file and plain(column) in (*SPLIT_COLUMNS, *SPLIT_FLAGS):
            values = sorted(set(table.column(column)))
            other = [value for value in values if not _split_meant(column, value)]
            if not other:
                return column
            if len(other) < len(values):
                raise DataError(
                    f"{table.name}: {listed(other, 3)} in column {column!r} is no split. It needs "
                    "train, val or test"
                )
    return ""


def _group_column(table: LabelTable, columns: Columns, options: SourceOptions) -> str:
    """The column that looks like groups by its name; empty where a pattern gives them."""
    used = {columns.file, columns.label, columns.split, *columns.one_hot}
    called = [c for c in table.columns if plain(c) in GROUP_COLUMNS and c not in used]
    return called[0] if called and not options.group_pattern else ""


def _split_meant(column: str, value: str) -> str:
    """The split that a cell means; nothing where it means none."""
    if plain(column) not in SPLIT_FLAGS:
        return split_of(value)
    yes, no = SPLIT_FLAGS[plain(column)]
    return {"1": yes, "true": yes, "0": no, "false": no}.get(value.lower(), "")


def _label_column(table: LabelTable, rest: list[str]) -> tuple[str, tuple[str, ...]]:
    """(column of labels, or columns that hold 1 for the label and 0 for all others)."""
    called = [column for column in rest if plain(column) in LABEL_COLUMNS]
    if len(called) > 1:
        called = _texts_of_one_label(table, called)
    if len(called) == 1:
        return called[0], ()
    if not called and len(rest) == 1:
        return rest[0], ()
    if not called and len(rest) > 1 and _is_one_hot(table, rest):
        return "", tuple(rest)
    if not rest:
        raise DataError(f"{table.name} has no column of labels")
    if several := _with_several_labels(table, rest):
        raise DataError(
            f"{table.name}: {counted(several, 'row')} of {len(table.rows):,} with more than one 1 "
            f"in the columns {listed(rest, 5)}. A picture needs one label: name the column that "
            "decides with --label-column NAME, or write a table of file and label"
        )
    raise DataError(
        f"{table.name}: the column of labels is not clear (columns: {listed(rest)}). Give it: "
        "--label-column NAME"
    )


def _texts_of_one_label(table: LabelTable, columns: list[str]) -> list[str]:
    """Of columns that say the same in numbers and in words, the one in words."""
    distinct = {column: len(set(table.column(column))) for column in columns}
    together = len(set(zip(*(table.column(column) for column in columns))))
    if set(distinct.values()) != {together}:
        return columns
    words = [c for c in columns if not all(v.isdigit() for v in table.column(c)[:SAMPLE])]
    return words if len(words) == 1 else columns


def _with_several_labels(table: LabelTable, columns: list[str]) -> int:
    """Rows with more than one 1, of columns of zeros and ones; 0 for other columns."""
    cells = [[row[table.columns.index(column)] for column in columns] for row in table.rows]
    if any(cell not in ("0", "1", "0.0", "1.0") for row in cells for cell in row):
        return 0
    return sum(sum(cell in ("1", "1.0") for cell in row) > 1 for row in cells)


def _is_one_hot(table: LabelTable, columns: list[str]) -> bool:
    at = [table.columns.index(column) for column in columns]
    for row in table.rows:
        values = [row[i] for i in at]
        if any(v not in ("0", "1", "0.0", "1.0") for v in values):
            return False
        if sum(v in ("1", "1.0") for v in values) != 1:
            return False
    return True


# --- rows ---


def _labels(table: LabelTable, columns: Columns) -> Iterator[str]:
    if columns.label:
        whole = [re.sub(r"^(-?[0-9]+)\.0+$", r"\1", v) for v in table.column(columns.label)]
        yield from whole
        return
    at = [table.columns.index(column) for column in columns.one_hot]
    for row in table.rows:
        yield next(table.columns[i] for i in at if row[i] in ("1", "1.0"))


def _read_table(
    table: LabelTable, names: FileNames, options: SourceOptions, found: LabelledFiles, split: str
) -> None:
    columns = Columns.of(table, names, options)
    said = columns.label or f"the column that holds 1, of {len(columns.one_hot)}"
    found.notes.append(
        f"{table.name}: files from {columns.file!r}, labels from {said!r}"
        + (f", splits from {columns.split!r}" if columns.split else "")
    )
    links = {link.path.rpartition("/")[2]: link for link in found.tree.links}
    groups = [""] * len(table.rows)
    if group := options.group_column or _group_column(table, columns, options):
        groups = table.column(group)
        found.group_column = "" if options.group_column else group
    splits = table.column(columns.split) if columns.split else [split] * len(table.rows)
    missing: list[str] = []
    unclear: list[tuple[str, list[File]]] = []
    rows = zip(table.column(columns.file), _labels(table, columns), splits, groups)
    for value, label, of_split, group in rows:
        files = names.find(value, table.folder, table.split)
        meant = _split_meant(columns.split, of_split)
        if of_split and not meant:
            raise DataError(
                f"{table.name}: {of_split!r} in column {columns.split!r} is no split. It needs "
                "train, val or test"
            )
        if label in NO_LABEL:
            found.aside["rows without a label"] += 1
        elif len(files) > 1:
            unclear.append((value, files))
        elif files:
            found.rows.append(Labelled(files[0], meant, label, group))
        elif (link := links.get(value.rpartition("/")[2])) is not None:
            found.rejected.append(Rejected(link.path, meant or "train", label, link.why))
        else:
            missing.append(value)
    _refuse_unclear(table, unclear)
    _refuse_missing(table, missing, found)
    if columns.split or split:
        for name in {row.split for row in found.rows}:
            found.split_origins.setdefault(name, table.name)


def _refuse_unclear(table: LabelTable, unclear: list[tuple[str, list[File]]]) -> None:
    if unclear:
        value, files = unclear[0]
        raise DataError(
            f"{table.name}: {counted(len(unclear), 'name')} fit several files (first: "
            f"{printable(value)} fits {listed([f.path for f in files], 3)}). Write folders and "
            "extensions into the column, or point --source at the folder that is meant"
        )


def _refuse_missing(table: LabelTable, missing: list[str], found: LabelledFiles) -> None:
    if not missing:
        return
    text = (
        f"{table.name} names {counted(len(missing), 'file')} that the source does not have "
        f"(first: {listed(missing, 3)})"
    )
    if len(missing) > len(found.rows) * ENOUGH:
        raise DataError(f"{text}. Point --source at the folder that holds the pictures")
    found.warnings.append(text)


def _joins(label: str, labels: Sequence[str]) -> bool:
    """Whether a label consists of others between separators, as in 'scab|rust'."""
    split = [[part.strip() for part in label.split(mark)] for mark in ("|", ";", ",", " ")]
    return any(len(parts) > 1 and set(parts) <= set(labels) for parts in split)


def _said(row: Labelled) -> str:
    return printable(f"{row.label} in {row.split}" if row.split else row.label)


def _finish(found: LabelledFiles, tables: set[str]) -> None:
    """Merge rows that name one file, and count the files that no row names."""
    seen: dict[str, Labelled] = {}
    for row in found.rows:
        before = seen.setdefault(row.file.path, row)
        if (before.label, before.split) != (row.label, row.split):
            raise DataError(
                f"{found.layout} gives {printable(row.file.path)} two labels or splits: "
                f"{_said(before)} and {_said(row)}. Keep one row of each file"
            )
    if repeated := len(found.rows) - len(seen):
        found.aside["rows that repeat another one"] += repeated
    found.rows = list(seen.values())
    if not found.rows:
        raise DataError(f"{found.layout} labels no picture of {found.tree.root}")
    unnamed = sum(1 for f in found.tree.files if is_picture(f) and f.path not in seen)
    if unnamed:
        found.aside["pictures that the table does not name"] += unnamed
    named = {*seen, *tables, *(row.file for row in found.rejected)}
    others = sum(not is_picture(f) and f.path not in named for f in found.tree.files)
    if others:
        found.aside["files that are no pictures"] += others
    found.classes = natural(row.label for row in found.rows)
    if joined := [label for label in found.classes if _joins(label, found.classes)]:
        found.warnings.append(
            f"{counted(len(joined), 'label')} made of others (such as {joined[0]!r}): each "
            "combination becomes a class of its own, since a picture has one class"
        )
