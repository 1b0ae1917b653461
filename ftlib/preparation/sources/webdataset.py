"""WebDataset: tars whose members belong together by name, such as 0001.jpg and 0001.cls."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.preparation.sources.archive import list_archive
from ftlib.preparation.sources.layout import Labelled, LabelledFiles
from ftlib.preparation.sources.naming import counted, listed, natural, split_in
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.table import LABEL_COLUMNS
from ftlib.preparation.sources.tree import PICTURES, File, Tree
from ftlib.text import printable

TARS = (".tar", ".tgz", ".tar.gz")
LABELS = ("cls", "json", "txt")
"""Endings of members that hold a label; the first that a sample has counts."""
LARGEST_LABEL = 1 << 20


class WebDataset:
    """Tars of `<key>.jpg` and `<key>.cls`, `.json` or `.txt`."""

    name = "webdataset"

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        if storage.is_remote(tree.root) and not tree.root.lower().endswith(".tar"):
            tars = _tars(tree)
            return bool(tars) and len(tars) == len(_relevant(tree))
        if _is_samples(tree.files):
            return True
        tars = _tars(tree)
        if not tars or len(tars) != len(_relevant(tree)):
            return False
        return _is_samples(list_archive(storage.join(tree.root, tars[0].path)).files)

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        found = LabelledFiles("WebDataset", Tree(tree.root), [])
        tars = [] if _is_samples(tree.files) else _tars(tree)
        parts = [(t.path, list_archive(storage.join(tree.root, t.path))) for t in tars]
        if not tars:
            parts = [(tree.root.rpartition("/")[2], tree)]
        for name, part in parts:
            _read_part(name, part, found)
        if not found.rows:
            raise DataError(
                f"{tree.root} holds no samples of a picture and a label (.{', .'.join(LABELS)})"
            )
        found.rows = [
            row._replace(file=replace(row.file, path=path))
            for row, path in zip(found.rows, _paths(found))
        ]
        found.tree.files = [row.file for row in found.rows]
        found.classes = natural(row.label for row in found.rows)
        found.notes.append(f"{counted(len(parts), 'tar')} of samples")
        return found


def _tars(tree: Tree) -> list[File]:
    return [file for file in tree.files if file.name.lower().endswith(TARS)]


def _relevant(tree: Tree) -> list[File]:
    """The files that are no notes about the set."""
    return [f for f in tree.files if f.extension not in ("json", "txt", "md", "idx", "yaml")]


def _is_samples(files: list[File]) -> bool:
    """Whether files are pictures with a label of the same name beside each."""
    endings: dict[str, set[str]] = defaultdict(set)
    for file in files[:200]:
        key, ending = _key(file.path)
        endings[key].add(ending)
    with_picture = [found for found in endings.values() if found & PICTURES]
    labelled = sum(bool(found & set(LABELS)) for found in with_picture)
    return bool(with_picture) and labelled >= 0.9 * len(with_picture)


def _key(path: str) -> tuple[str, str]:
    """(what the files of a sample share, ending): the name is cut at its first dot."""
    folder, slash, name = path.rpartition("/")
    key, _, ending = name.partition(".")
    return folder + slash + key, ending.lower()


def _read_part(name: str, part: Tree, found: LabelledFiles) -> None:
    samples: dict[str, dict[str, File]] = defaultdict(dict)
    for file in part.files:
        key, ending = _key(file.path)
        samples[key][ending] = file
    split = split_in(name)
    for key, files in samples.items():
        picture = next((files[ending] for ending in files if ending in PICTURES), None)
        label = next((files[ending] for ending in LABELS if ending in files), None)
        if picture is None:
            found.aside["samples without a picture"] += 1
        elif label is None:
            found.aside["samples without a label"] += 1
        else:
            found.rows.append(Labelled(picture, split, _label(part, label, key)))
    if split:
        found.split_origins[split] = "names of the tars"


def _label(part: Tree, file: File, key: str) -> str:
    if file.bytes > LARGEST_LABEL:
        raise DataError(f"{part.root}: {printable(file.path)} is no label ({file.bytes:,} bytes)")
    text = part.read(file, LARGEST_LABEL).decode("utf-8", "replace").strip()
    if _key(file.path)[1] != "json":
        return text
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{part.root}: {printable(file.path)} is not JSON ({error})") from None
    if isinstance(value, str | int):
        return str(value)
    names = [n for n in value if re.sub(r"[-_ ]", "", n.lower()) in ("cls", *LABEL_COLUMNS)]
    if len(names) != 1:
        raise DataError(
            f"{part.root}: the label of {printable(key)} is not clear (its JSON has "
            f"{listed(list(value))}). It needs one of cls, label, class"
        )
    return str(value[names[0]])


def _paths(found: LabelledFiles) -> list[str]:
    """A name for every picture: its own where that is unique, else with its tar's before it."""
    own = [row.file.path for row in found.rows]
    if len(set(own)) == len(own):
        return own
    return [
        f"{getattr(row.file.place, 'container', '').rpartition('/')[2]}/{row.file.path}"
        for row in found.rows
    ]
