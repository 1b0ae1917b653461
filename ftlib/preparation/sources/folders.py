"""Folders of classes, alone or within folders called train, val and test."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from ftlib.data.shards import SPLITS, DataError
from ftlib.preparation.sources.file_names import named_by_files
from ftlib.preparation.sources.layout import Labelled, LabelledFiles, Rejected
from ftlib.preparation.sources.naming import (
    counted,
    goes_with_pictures,
    is_like_a_split,
    listed,
    split_of,
    splits_in,
)
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.table import labels_by_name, labels_of_split
from ftlib.preparation.sources.tree import NOT_PICTURES, File, Link, Tree
from ftlib.preparation.sources.wrapping import is_picture, unwrapped
from ftlib.text import printable

IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "pictures", "photos", "jpegimages"})
"""Names of folders between a class and its pictures."""
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar")


class Folders:
    """`<class>/*`, or `train/<class>/*` with val/ and test/ beside it."""

    name = "folders"

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        return self.problem(tree, options) == ""

    def problem(self, tree: Tree, options: SourceOptions) -> str:
        """Why these are no folders of classes; empty where they are."""
        try:
            self.read(tree, options)
        except DataError as error:
            return str(error)
        return ""

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        tree, wrapper = unwrapped(tree)
        split_folders = _split_folders(tree)
        found = LabelledFiles("folders of classes", tree, [])
        if wrapper:
            found.notes.append(f"classes are looked for in {printable(wrapper)}/")
        if split_folders:
            found.layout = "folders of splits and classes"
            _read_splits(tree, split_folders, found, options)
        else:
            _read_classes(tree, found, options)
        return found


def _split_folders(tree: Tree) -> dict[str, str]:
    """Split -> the folder at the top that is called like it."""
    found: dict[str, list[str]] = defaultdict(list)
    tops = {n.partition("/")[0] for n in tree.folders}
    for name in sorted(tops):
        if split := split_of(name):
            found[split].append(name)
    for split, folders in found.items():
        if len(folders) > 1:
            raise DataError(
                f"{tree.root} has {' and '.join(folders)}: keep one of them as {split}/"
            )
    by_word = splits_in(tops)
    if not found and by_word and _has_folders(tree, _inner(tree, by_word["train"])):
        found = {split: [name] for split, name in by_word.items()}
    if found and "train" not in found:
        others = tops - {folders[0] for folders in found.values()}
        if others:
            _refuse_split_names(tree, sorted(tops))
        first = next(iter(found.values()))[0]
        raise DataError(f"{tree.root} has {first}/ but no train/. Name the folder that holds both")
    return {split: _inner(tree, found[split][0]) for split in SPLITS if split in found}


def _has_folders(tree: Tree, folder: str) -> bool:
    return any(name.startswith(f"{folder}/") for name in tree.folders)


def _inner(tree: Tree, folder: str) -> str:
    """The folder of the same name within one that holds nothing else, as in train/train/."""
    inner = f"{folder}/{folder.rpartition('/')[2]}"
    below = [
        n for n in (*tree.folders, *(f.path for f in tree.files)) if n.startswith(f"{folder}/")
    ]
    alone = all(name == inner or name.startswith(f"{inner}/") for name in below)
    return inner if inner in tree.folders and alone else folder


def _picture_folder(tree: Tree) -> str:
    """The folder `images` that has the class folders, beside others without pictures of their own.

    Empty where there is none: then all folders at the top are classes.
    """
    of_top: dict[str, set[str]] = defaultdict(set)
    for file in tree.files:
        top, _, rest = file.path.partition("/")
        if is_picture(file):
            of_top[top].add(rest.rpartition("/")[0].partition("/")[0])
    named = [name for name in of_top if name.lower() in IMAGE_FOLDERS]
    if len(named) != 1 or len({name.partition("/")[0] for name in tree.folders}) < 2:
        return ""
    classes = of_top.pop(named[0])
    if len(classes) < 2 or "" in classes or any(map(split_of, classes)):
        return ""
    return named[0] if all(map(goes_with_pictures, of_top)) else ""


def _refuse_split_names(tree: Tree, names: list[str]) -> None:
    by_word = splits_in(names).values()
    if called := [name for name in names if is_like_a_split(name) or name in by_word]:
        raise DataError(
            f"{tree.root}: {listed(called)} {'is' if len(called) == 1 else 'are'} called like "
            "splits of a data set, not like classes. Put class folders into train/ and val/, name "
            "the file that has the labels (--labels FILE), or say that they are classes: --layout "
            "folders"
        )


@dataclass
class _Branch:
    """What lies in one folder of class folders."""

    classes: dict[str, list[File]] = field(default_factory=dict)
    loose: list[File] = field(default_factory=list)
    below: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Class -> folders within it that hold pictures."""
    aside: Counter[str] = field(default_factory=Counter)


def _branch(tree: Tree, folder: str, nested: bool) -> _Branch:
    prefix = f"{folder}/" if folder else ""
    found = _Branch()
    for name in tree.folders:
        if name.startswith(prefix) and name.count("/") == prefix.count("/"):
            found.classes[name[len(prefix) :]] = []
    if nested:
        found.classes = {}
    for file in tree.files:
        if not file.path.startswith(prefix):
            continue
        *folders, _ = file.path[len(prefix) :].split("/")
        if file.extension in NOT_PICTURES:
            found.aside[f".{file.extension} files"] += 1
        elif beside := next(filter(goes_with_pictures, folders[1:]), ""):
            found.aside[f"files in folders called {beside}"] += 1
        elif not folders:
            if is_picture(file):
                found.loose.append(file)
            else:
                found.aside["files outside class folders"] += 1
        else:
            name = _nested_name(folders) if nested else folders[0]
            found.classes.setdefault(name, []).append(file)
            if len(folders) > 1 and folders[1].lower() not in IMAGE_FOLDERS:
                found.below[folders[0]].add(folders[1])
    return found


def _nested_name(folders: list[str]) -> str:
    if len(folders) > 1 and folders[-1].lower() in IMAGE_FOLDERS:
        folders = folders[:-1]
    return ".".join(folders)


def _add(found: LabelledFiles, branch: _Branch, split: str) -> None:
    for name, files in branch.classes.items():
        found.rows += [Labelled(file, split, name) for file in files]
    found.empty[split] = tuple(sorted(n for n, files in branch.classes.items() if not files))
    found.aside += branch.aside


def _take_links(found: LabelledFiles, folder: str, split: str) -> None:
    """Links within a folder of classes: to files, reported; to whole folders, refused."""
    prefix = f"{folder}/" if folder else ""
    for link in found.tree.links:
        if not link.path.startswith(prefix):
            continue
        if link.is_folder:
            raise DataError(
                f"{found.tree.root}/{link.path}: {link.why}. Point --source at the real folder, "
                "copy the pictures into it, or add --follow-links"
            )
        label = link.path[len(prefix) :].partition("/")[0]
        if "/" in link.path[len(prefix) :]:
            found.rejected.append(Rejected(link.path, split or "train", label, link.why))


def _refuse_loose(where: str, branch: _Branch, remedy: str) -> None:
    remedy += named_by_files(branch.loose)
    raise DataError(
        f"{where} holds {counted(len(branch.loose), 'picture')} outside class folders (first: "
        f"{listed([file.name for file in branch.loose], 3)}). {remedy}"
    )


def has_flat_split(tree: Tree) -> bool:
    """Whether train/ has class folders while val/ or test/ is one heap of pictures."""
    try:
        folders = _split_folders(tree)
    except DataError:
        return False
    branches = {split: _branch(tree, folder, False) for split, folder in folders.items()}
    train = branches.pop("train", _Branch())
    flat = [branch for branch in branches.values() if branch.loose]
    return bool(flat) and not train.loose and any(train.classes.values())


def _label_loose(
    found: LabelledFiles, branch: _Branch, split: str, labels: dict[str, str], table: str
) -> None:
    """Take the pictures outside class folders with the labels of a table."""
    missing = 0
    for file in branch.loose:
        label = labels.get(file.name) or labels.get(file.name.rpartition(".")[0])
        if label:
            found.rows.append(Labelled(file, split, label))
        else:
            missing += 1
    if missing == len(branch.loose):
        _refuse_loose(found.tree.root, branch, f"{table} names none of them")
    if missing:
        found.aside[f"pictures of {split} that the table does not name"] += missing


def _read_classes(tree: Tree, found: LabelledFiles, options: SourceOptions) -> None:
    folder = _picture_folder(tree) if options.layout == "auto" else ""
    branch = _branch(tree, folder, options.nested)
    _take_links(found, folder, "")
    if folder:
        found.notes.append(f"classes are looked for in {printable(folder)}/")
        outside = sum(not file.path.startswith(f"{folder}/") for file in tree.files)
        found.aside[f"files outside {folder}/"] += outside
    with_pictures = [name for name, files in branch.classes.items() if files]
    if with_pictures and options.layout == "auto":
        tops = {path.partition("/")[0] for path in tree.folders}
        _refuse_split_names(tree, sorted(tops))
        _refuse_parts(tree, with_pictures)
        _refuse_repeated(tree, branch, with_pictures)
    inner = [f"{name}/{f}" for name in branch.below for f in branch.below[name] if split_of(f)]
    if inner and options.layout == "auto":
        raise DataError(
            f"{tree.root}: {listed(sorted(inner), 4)} are called like splits but lie below the "
            "classes. Sort the pictures into train/<class>/ and test/<class>/, or take all of them "
            "for their class: --layout folders --val-fraction 0.1"
        )
    if branch.loose and with_pictures:
        remedy = "Move them into class folders or out of the source; if a file has their labels, "
        _refuse_loose(tree.root, branch, remedy + "name it with --labels")
    _add(found, branch, "")
    _note_nested(found, branch, options)
    _refuse_none(found)


def _refuse_parts(tree: Tree, names: list[str]) -> None:
    """Raise DataError for `images` as a class, or classes that all are called like masks. One that
    is so among others may be a class: mask, no_mask."""
    images = {name for name in names if name.lower() in IMAGE_FOLDERS}
    parts = [n for n in sorted(names) if goes_with_pictures(n) or n in images]
    if images or len(parts) == len(names):
        raise DataError(
            f"{tree.root}: {listed(parts)} {'is' if len(parts) == 1 else 'are'} called like a part "
            "of a data set, not like a class. Put the pictures into class folders, name the file "
            "that has their labels (--labels FILE), or say that these are classes: --layout "
            "folders"
        )


def _refuse_repeated(tree: Tree, branch: _Branch, names: list[str]) -> None:
    """Raise DataError where all classes hold the same folders: those are the classes."""
    below = {frozenset(branch.below.get(name, ())) for name in names}
    folders = next(iter(below))
    if len(names) > 1 and len(below) == 1 and len(folders) > 1:
        shown, first = listed(sorted(names), 3), sorted(names)[0]
        if any(map(split_of, folders)):
            return
        raise DataError(
            f"{tree.root}: {shown} all hold the same folders ({listed(sorted(folders), 3)}), which "
            f"look like the classes. Name one as the source (--source {tree.root}/{first}), or "
            f"say that {shown} are the classes: --layout folders"
        )


def _read_splits(
    tree: Tree, split_folders: dict[str, str], found: LabelledFiles, options: SourceOptions
) -> None:
    for split, folder in split_folders.items():
        branch = _branch(tree, folder, options.nested)
        with_pictures = [name for name, files in branch.classes.items() if files]
        where = f"{tree.root}/{folder}"
        labels, table = {}, options.labels
        if branch.loose and split != "train" and table:
            labels = labels_by_name(tree, options)
        elif branch.loose and split != "train":
            classes = {row.label for row in found.rows}
            labels, table = labels_of_split(tree, split, classes, options)
        if labels:
            _label_loose(found, branch, split, labels, table)
        elif split == "test" and not with_pictures:
            found.aside[f"pictures without labels in {folder}/"] += len(branch.loose)
            continue
        elif branch.loose:
            remedy = f"Sort them into {folder}/<class>/, or name the file that has their labels: "
            _refuse_loose(where, branch, remedy + "--labels FILE")
        _take_links(found, folder, split)
        _add(found, branch, split)
        _note_nested(found, branch, options)
        origin = f"{folder}/, labels from {table}" if labels else f"{folder}/"
        found.split_origins[split] = origin
    _note_unused(tree, split_folders, found)
    _refuse_none(found)


def _note_unused(tree: Tree, split_folders: dict[str, str], found: LabelledFiles) -> None:
    used = {folder.partition("/")[0] for folder in split_folders.values()}
    others = sorted({n.partition("/")[0] for n in tree.folders} - used)
    others += sorted(link.path for link in tree.links if link.is_folder and "/" not in link.path)
    if others:
        train = split_folders["train"]
        more = " ..." if len(others) > 5 else ""
        found.warnings.append(f"not used: {', '.join(others[:5])}{more} beside {train}/")
    for file in tree.files:
        top = file.path.partition("/")[0]
        if top not in used and is_picture(file):
            where = f"{top}/" if "/" in file.path else "the folder itself"
            found.aside[f"pictures in {where}"] += 1
        elif top not in used:
            found.aside["files that are no pictures"] += 1


def _note_nested(found: LabelledFiles, branch: _Branch, options: SourceOptions) -> None:
    deep = sorted(branch.below)
    if deep and not options.nested:
        inner = ", ".join(sorted(branch.below[deep[0]])[:3])
        found.notes.append(
            f"{counted(len(deep), 'class', 'classes')} with folders below "
            f"({printable(deep[0])}: {printable(inner)}); their pictures count for the class. "
            "--nested makes every folder a class"
        )


def _refuse_none(found: LabelledFiles) -> None:
    """Raise DataError where no picture is left, naming links if they are the reason."""
    if any(row.split in ("", "train") for row in found.rows):
        return
    links: list[Link] = found.tree.links
    if links:
        first = links[0]
        raise DataError(
            f"{found.tree.root} holds no pictures but {counted(len(links), 'link')} that cannot "
            f"be followed (first: {printable(first.path)}: {first.why}). Add --follow-links to "
            "take what they lead to, or copy the pictures into the source"
        )
    packed = [file for file in found.tree.files if file.path.lower().endswith(ARCHIVES)]
    if packed:
        remedy = (
            "Unpack them" if packed[0].place else "Name one of them as the source, or unpack them"
        )
        raise DataError(
            f"{found.tree.root} holds no pictures in class folders but "
            f"{counted(len(packed), 'archive')} ({listed([f.path for f in packed], 3)}). {remedy}"
        )
    loose = [file for file in found.tree.files if is_picture(file)]
    outside = f" ({counted(len(loose), 'picture')} outside them)" if loose else ""
    raise DataError(
        f"{found.tree.root} holds no pictures in class folders{outside}. It needs "
        "train/<class>/* and "
        "val/<class>/*, or <class>/* with --val-fraction, or a file with labels (--labels FILE)"
        + named_by_files(loose)
    )
