"""A source as a whole: find it, understand it, check it, split it, and say what was understood."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ftlib import storage
from ftlib.checks import nearest_path
from ftlib.data.shards import SPLITS, DataError
from ftlib.preparation.sources.address import fetch, list_address
from ftlib.preparation.sources.archive import ENDINGS, is_archive, list_archive
from ftlib.preparation.sources.builtin import names
from ftlib.preparation.sources.file_names import by_file_name
from ftlib.preparation.sources.folders import Folders, has_flat_split
from ftlib.preparation.sources.foreign import refuse_foreign
from ftlib.preparation.sources.imagenet import ImageNet
from ftlib.preparation.sources.label_table import LabelTable
from ftlib.preparation.sources.layout import Entry, Labelled, LabelledFiles, Layout, Rejected
from ftlib.preparation.sources.naming import (
    counted,
    listed,
    similar,
    text_of,
    unusable,
)
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.parquet import Parquet
from ftlib.preparation.sources.splits import (
    groups_split_off,
    refuse_torn_groups,
    split_off,
    warning_of_torn_groups,
    with_groups,
)
from ftlib.preparation.sources.table import ENDINGS as TABLES
from ftlib.preparation.sources.table import Table, usable_tables
from ftlib.preparation.sources.tree import File, Tree, walk
from ftlib.preparation.sources.webdataset import WebDataset
from ftlib.preparation.sources.wrapping import unwrapped
from ftlib.settings import nearest
from ftlib.text import printable, wrapped

SPECIAL: tuple[Layout, ...] = (ImageNet(), WebDataset(), Parquet())
"""Layouts that are recognized by their own marks, before folders and tables are considered."""
UNREAD_TABLES = ("mat", "xlsx", "xls", "ods", "pkl", "pickle", "sqlite")
"""Extensions of files that often hold labels but are not read."""
BY_NAME: dict[str, Layout] = {layout.name: layout for layout in (*SPECIAL, Folders(), Table())}


@dataclass(frozen=True)
class Listing:
    """All pictures of a source, in the order in which they are stored."""

    root: str
    layout: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    aside: dict[str, int]
    """Files that are not used, counted by the reason."""
    rejected: tuple[Rejected, ...]
    """Files of a class that cannot be read."""
    notes: tuple[str, ...]
    """What was understood, beyond the counts."""
    warnings: tuple[str, ...]
    split_origins: dict[str, str]
    """Split -> what it was read from."""

    @property
    def counts(self) -> dict[str, int]:
        """Pictures of each split that has any."""
        found = Counter(entry.split for entry in self.entries)
        return {split: found[split] for split in SPLITS if found[split]}


def scan(source: str | Path, options: SourceOptions | None = None, adding: bool = False) -> Listing:
    """Find and understand the pictures of `source`: a folder, an archive, a table or an address.

    Raises DataError for everything that makes a set of them useless: no pictures, one class,
    folders that are no classes, names that cannot be told apart, a split without a class of train.
    `adding`: one class is enough, and val and test may have classes without training pictures.
    """
    options = options or SourceOptions()
    tree, options = open_source(str(source), options)
    found = understand(tree, options)
    return _assemble(found, options, adding)


def open_source(source: str, options: SourceOptions) -> tuple[Tree, SourceOptions]:
    """The files of a source. A table as the source stands for its folder and `labels`."""
    from dataclasses import replace

    if source.startswith(("http://", "https://")):
        source = str(fetch(source))
    if storage.is_remote(source):
        source = source.rstrip("/")
        return (list_archive(source) if is_archive(source) else list_address(source)), options
    path = os.path.abspath(Path(source.removeprefix("file://")).expanduser())
    if os.path.isdir(path):
        return walk(path, options.follow_links), options
    if not os.path.exists(path):
        near = nearest_path(path) if os.sep in source else nearest(source, names())
        raise DataError(
            f"--source {path}: there is no such folder or file.{near} Name a folder of classes, an "
            f"archive, a table of labels, or one of {', '.join(names())}"
        )
    if is_archive(path):
        return list_archive(path), options
    ending = path.rpartition(".")[2].lower()
    if ending == "parquet" and not options.labels:
        alone = Tree(os.path.dirname(path))
        info = os.stat(path)
        alone.files.append(File(os.path.basename(path), info.st_size, info.st_mtime_ns))
        if Parquet().detect(alone, options):
            return alone, options
    if ending in TABLES:
        folder = walk(os.path.dirname(path), options.follow_links)
        return folder, replace(options, labels=options.labels or path)
    raise DataError(
        f"--source {path}: neither a folder, an archive ({', '.join(ENDINGS)}) nor a table "
        f"({', '.join(TABLES)}). Unpack other archives and name the folder"
    )


def understand(tree: Tree, options: SourceOptions) -> LabelledFiles:
    """The pictures with their labels, by the layout named in the options or the one that fits."""
    if options.label_pattern:
        return by_file_name(tree, options)
    if options.layout != "auto":
        return BY_NAME[options.layout].read(tree, options)
    special = (tree, unwrapped(tree)[0]) if not storage.is_remote(tree.root) else (tree,)
    for candidate in special:
        for layout in SPECIAL:
            if layout.detect(candidate, options):
                return layout.read(candidate, options)
    if not options.labels:
        refuse_foreign(tree)
    table = Table()
    if options.labels and not has_flat_split(unwrapped(tree)[0]):
        return table.read(tree, options)
    try:
        found = Folders().read(tree, options)
    except DataError as error:
        tables, problems = usable_tables(unwrapped(tree)[0], options)
        if tables:
            return table.read(tree, options)
        if hint := _hint(tree, problems):
            raise DataError(f"{error}{hint}") from None
        raise
    others, problems = usable_tables(found.tree, options)
    if len({row.label for row in found.rows}) < 2:
        if others:
            return table.read(tree, options)
        found.hint = _hint(tree, problems)
    elif others:
        _compare(found, others, options)
    return found


def _hint(tree: Tree, problems: Sequence[str]) -> str:
    """Why labels that lie beside pictures are not read; empty where none do."""
    if problems:
        return f". The labels beside them cannot be used: {problems[0]}"
    if unread := [file.path for file in tree.files if file.extension in UNREAD_TABLES]:
        return (
            f". Labels may be in {listed(unread, 3)}, which is not read: write them to a CSV file "
            "with the columns file and label, and name it with --labels"
        )
    return ""


def _compare(found: LabelledFiles, tables: list[LabelTable], options: SourceOptions) -> None:
    """Note that a table names the pictures of class folders too, and take its splits if they have
    none.

    Raises DataError where it names most of them and sorts them differently: the folders may be
    parts of a set, or the table may be about something else.
    """
    shown = listed([table.name for table in tables])
    try:
        labelled = Table().read(found.tree, options)
    except DataError:
        labelled = None
    folder_of = {row.file.path: row.label for row in found.rows}
    rows = labelled.rows if labelled else []
    splits = {row.file.path: row.split for row in rows}
    pairs = {(folder_of[row.file.path], row.label) for row in rows if row.file.path in folder_of}
    same = len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
    if len(rows) >= len(found.rows) / 2 and not same:
        folders = sorted({one for one, _ in pairs})
        labels = sorted({other for _, other in pairs})
        raise DataError(
            f"{found.tree.root}: the folders ({listed(folders, 5)}) and {shown} "
            f"({listed(labels, 5)}) give the pictures different classes. Say which are meant: "
            "--layout folders or --layout table"
        )
    if same and len(set(splits.values())) > 1 and not found.split_origins:
        named = [row for row in found.rows if row.file.path in splits]
        found.aside["pictures that the table does not name"] += len(found.rows) - len(named)
        found.rows = [row._replace(split=splits[row.file.path]) for row in named]
        found.split_origins = {split: f"as {shown} says" for split in set(splits.values())}
        found.notes.append(f"labels come from the folders, splits from {shown}")
        return
    found.notes.append(
        f"labels come from the folders; {shown} names pictures too (--layout table reads it)"
    )


def _assemble(found: LabelledFiles, options: SourceOptions, adding: bool) -> Listing:
    """Check the labelled files as a whole, split them and put them in order."""
    root = found.tree.root
    labels = _labels(found, adding)
    titles = {**found.titles, **_class_titles(options.class_names, labels)}
    classes = tuple(titles.get(label, label) for label in labels)
    check_names(root, classes, options)
    _check_classes(root, found, labels, adding)
    warnings = list(found.warnings)
    rows = _split(root, found, options, warnings)
    number = {label: i for i, label in enumerate(labels)}
    entries = [
        Entry(
            file=row.file.path,
            split=row.split,
            label=number[row.label],
            bytes=row.file.bytes,
            mtime_ns=row.file.mtime_ns,
            place=row.file.place,
        )
        for row in rows
    ]
    if found.keep_order:
        entries.sort(key=lambda e: SPLITS.index(e.split))
    else:
        entries.sort(key=lambda e: (SPLITS.index(e.split), e.label, e.file))
    _warn_of_missing(classes, entries, warnings)
    if mapped := [e.file for e in entries if text_of(e.file) != e.file]:
        warnings.append(
            f"{counted(len(mapped), 'file name')} not UTF-8 (first: {printable(mapped[0])}): the "
            "bytes that are none are stored as U+FFFD"
        )
    return Listing(
        root=root,
        layout=found.layout,
        classes=classes,
        entries=tuple(entries),
        aside=dict(sorted((found.aside + found.tree.skipped).items())),
        rejected=tuple(found.rejected),
        notes=tuple(found.notes),
        warnings=tuple(warnings),
        split_origins=_origins(found, entries, options),
    )


def _origins(found: LabelledFiles, entries: list[Entry], options: SourceOptions) -> dict[str, str]:
    """Split -> what it was read from, or how it was split off."""
    origins = dict(found.split_origins)
    if options.val_fraction and any(e.split == "val" for e in entries):
        groups = options.group_column or options.group_pattern
        share = f"{100 * options.val_fraction:g} % of each class"
        origins["val"] = f"{'whole groups, about ' if groups else ''}{share}, --seed {options.seed}"
    return origins


def _labels(found: LabelledFiles, adding: bool) -> tuple[str, ...]:
    """The labels in the order of their numbers: those of train, or of all splits if `adding`."""
    if found.classes is not None:
        return found.classes
    there = {row.label for row in found.rows if adding or row.split in ("", "train")}
    empty = {*found.empty.get("", ()), *found.empty.get("train", ())}
    return tuple(sorted(there | empty))


def _class_titles(path: str, labels: tuple[str, ...]) -> dict[str, str]:
    """Label -> name, from a file of names. Raises DataError where it does not fit the labels."""
    if not path:
        return {}
    try:
        text = Path(path).expanduser().read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--class-names {path} cannot be read ({error})") from None
    titles = _named_lines(path, text, labels)
    if missing := [label for label in labels if not titles.get(label)]:
        raise DataError(
            f"--class-names {path} has no name for {counted(len(missing), 'class', 'classes')} of "
            f"{len(labels)} ({listed(missing)}). Give a name a line in the order of the numbers, "
            "or lines of label,name"
        )
    return {label: titles[label] for label in labels}


def _named_lines(path: str, text: str, labels: tuple[str, ...]) -> dict[str, str]:
    if path.lower().endswith(".json"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"--class-names {path} is not JSON ({error})") from None
        if isinstance(value, dict):
            return {str(label): str(name) for label, name in value.items()}
        lines = [str(name) for name in value]
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    rows = [next(csv.reader([line], delimiter="\t" if "\t" in line else ",")) for line in lines]
    if all(len(row) > 1 and row[0].strip() in labels for row in rows):
        return {row[0].strip(): ",".join(row[1:]).strip() for row in rows}
    if all(label.isdigit() for label in labels):
        first = min(0, *map(int, labels)) if "0" in labels else 1
        if max(map(int, labels)) < len(lines):
            first = 0
        return {str(first + i): name for i, name in enumerate(lines)}
    split = [line.split(maxsplit=1) for line in lines]
    if all(len(words) == 2 and words[0] in labels for words in split):
        return {words[0]: words[1] for words in split}
    if len(lines) == len(labels):
        return dict(zip(labels, lines))
    return {}


def check_names(root: str, classes: tuple[str, ...], options: SourceOptions) -> None:
    """Raise DataError for names that cannot be stored, or that cannot be told apart."""
    bad = [(name, why) for name in classes if (why := unusable(name))]
    if bad:
        shown = "; ".join(f"{printable(name)!r}: {why}" for name, why in bad[:5])
        raise DataError(
            f"{root}: {counted(len(bad), 'class', 'classes')} cannot keep the name ({shown}). "
            "Rename them, or give names with --class-names FILE"
        )
    twins = similar(classes)
    if twins and (not options.allow_similar_names or len(set(classes)) < len(classes)):
        shown = "; ".join(" and ".join(map(ascii, group)) for group in twins[:5])
        raise DataError(
            f"{root}: {counted(len(twins), 'class', 'classes')} exist more than once, with names "
            f"that differ only in case, Unicode form or spaces ({shown}). Merge them under one "
            "name; if they are different classes, add --allow-similar-names"
        )


def _check_classes(root: str, found: LabelledFiles, labels: tuple[str, ...], adding: bool) -> None:
    """Raise DataError for classes and splits without pictures."""
    of_split: dict[str, set[str]] = defaultdict(set)
    for row in found.rows:
        of_split[row.split or "train"].add(row.label)
    train = of_split["train"]
    if adding:
        return
    if not train:
        raise DataError(
            f"{root} has no training pictures: all of its labelled pictures are of "
            f"{listed(sorted(of_split))}"
        )
    empty = {*found.empty.get("", ()), *found.empty.get("train", ())} - train
    if empty:
        raise DataError(
            f"{root}: {len(empty)} of {len(labels)} classes {'are' if len(empty) > 1 else 'is'} "
            f"empty ({listed(sorted(empty))}). Add pictures or delete the folder"
        )
    if len(train) < 2:
        raise DataError(
            f"{root} has one class ({printable(next(iter(train)))}). A classifier needs at least "
            f"two, such as two folders of pictures{found.hint}"
        )
    for split in ("val", "test"):
        for name in sorted(of_split[split] - train):
            raise DataError(
                f"{root}: {split} has the class {printable(name)!r}, which train does not have."
                f"{_twin_or_nearest(name, labels)} Rename or delete the folder"
            )
        if split in found.empty and not of_split[split]:
            raise DataError(
                f"{root}: {split} holds no pictures. Fill it, or delete it"
                + (" and use --val-fraction" if split == "val" else "")
            )


def _twin_or_nearest(name: str, labels: tuple[str, ...]) -> str:
    for label in labels:
        if similar((name, label)):
            return f" train's {label!a} differs from {name!a} only in case, Unicode form or spaces."
    return nearest(name, list(labels))


# --- splits ---


def _split(
    root: str, found: LabelledFiles, options: SourceOptions, warnings: list[str]
) -> list[Labelled]:
    """The rows, each with its split."""
    rows = [row if row.split else row._replace(split="train") for row in found.rows]
    grouped = bool(options.group_column or options.group_pattern)
    if grouped:
        rows, alone = with_groups(rows, options)
        refuse_torn_groups(rows)
        found.notes.append(f"{counted(len({row.group for row in rows}), 'group')} of pictures")
        if alone:
            warnings.append(f"{counted(alone, 'picture')} in no group: each is taken for its own")
    held = _with_val(root, found, options, rows)
    if not grouped and (
        torn := warning_of_torn_groups(held, found.group_column, options.val_fraction)
    ):
        warnings.append(torn)
    return held


def _with_val(
    root: str, found: LabelledFiles, options: SourceOptions, rows: list[Labelled]
) -> list[Labelled]:
    """The rows, some of train's moved to val where that was asked for."""
    grouped = bool(options.group_column or options.group_pattern)
    has_val = any(row.split == "val" for row in rows)
    fraction = options.val_fraction
    if has_val and fraction is not None:
        origin = found.split_origins.get("val", "val")
        raise DataError(
            f"--val-fraction would do nothing: {root} has its own val ({origin}). Leave the "
            "option out"
        )
    if has_val or fraction == 0:
        return rows
    if fraction is None:
        raise DataError(_how_to_split(root, found, rows))
    train = [row for row in rows if row.split == "train"]
    if grouped:
        groups = groups_split_off(train, fraction, options.seed)
        return [r._replace(split="val") if r.group in groups else r for r in rows]
    held = _held_out(root, train, fraction, options)
    return [row._replace(split="val") if row.file.path in held else row for row in rows]


def _how_to_split(root: str, found: LabelledFiles, rows: list[Labelled]) -> str:
    classes = len({row.label for row in rows})
    parts = sorted(f"{split} ({origin})" for split, origin in found.split_origins.items())
    has = f"{' and '.join(parts)}" if parts else f"{counted(classes, 'class', 'classes')}"
    kept = "; test is kept for the end" if any(row.split == "test" for row in rows) else ""
    return (
        f"{root} has {has} but no val. Add --val-fraction 0.1 to hold out a tenth of each class "
        f"of train (0 for no val at all){kept}"
    )


def _held_out(
    root: str, train: list[Labelled], fraction: float, options: SourceOptions
) -> set[str]:
    of_class: dict[str, list[str]] = defaultdict(list)
    for row in train:
        of_class[row.label].append(row.file.path)
    single = sorted(label for label, files in of_class.items() if len(files) == 1)
    if single and options.singles == "refuse":
        raise DataError(
            f"{root}: {counted(len(single), 'class', 'classes')} of {len(of_class)} have one "
            f"picture ({listed(single, 20)}), and --val-fraction needs two of each, one to train "
            "and one to score. Add pictures, delete the classes, or keep these pictures in train: "
            "--singles train"
        )
    held: set[str] = set()
    for files in of_class.values():
        held |= split_off(files, fraction, options.seed)
    return held


def _warn_of_missing(classes: tuple[str, ...], entries: list[Entry], warnings: list[str]) -> None:
    for split, words in (("val", "validation"), ("test", "test")):
        there = {e.label for e in entries if e.split == split}
        missing = [name for i, name in enumerate(classes) if i not in there]
        if there and missing:
            warnings.append(
                f"no {words} pictures of {len(missing)} of {len(classes)} classes "
                f"({listed(missing, 5)}): they are trained but never scored"
            )
    if not any(e.split == "val" for e in entries):
        warnings.append(
            "no validation pictures: a training run needs data.tuning_fraction above 0, or a set "
            "prepared with --val-fraction above 0"
        )


# --- words ---


def describe(listing: Listing) -> str:
    """What was understood, for the user to see before anything is written."""
    lines = []
    for split, n in listing.counts.items():
        origin = listing.split_origins.get(split, "")
        lines.append(f"  {split:5} {counted(n, 'picture')}" + (f" ({origin})" if origin else ""))
    lines.append(
        f"  {counted(len(listing.classes), 'class', 'classes')}: {listed(listing.classes)}"
    )
    if listing.rejected:
        first = listing.rejected[0]
        lines.append(
            f"  cannot be read: {counted(len(listing.rejected), 'file')} (first: "
            f"{printable(first.file)}: {printable(first.why)})"
        )
    if listing.aside:
        lines.append(f"  left aside: {_reasons(listing.aside.items())}")
    lines += [f"  note: {printable(note)}" for note in listing.notes]
    lines += [f"  warning: {printable(warning)}" for warning in listing.warnings]
    source = f"Source: {listing.root} ({listing.layout})"
    return "\n".join([source, *(wrapped(line, "    ") for line in lines)])


def _reasons(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{n:,} {printable(reason)}" for reason, n in counts)
