"""ImageNet and Tiny-ImageNet as they are downloaded.

`train/` holds a folder for each synset (n01440764), `val/` is flat and a file beside it has the
labels: LOC_val_solution.csv (Kaggle), the development kit's ground truth, or val_annotations.txt
(Tiny-ImageNet). ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar are read where they lie.
Classes are named by the synset list where there is one, in the order of the synsets.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ftlib import storage
from ftlib.data.shards import DataError
from ftlib.preparation.sources.archive import list_tar
from ftlib.preparation.sources.folders import is_picture
from ftlib.preparation.sources.layout import Labelled, LabelledFiles
from ftlib.preparation.sources.naming import counted, listed
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.places import Span
from ftlib.preparation.sources.published import matlab_variable
from ftlib.preparation.sources.table import labels_by_name
from ftlib.preparation.sources.tree import File, Tree, parents_of

SYNSET = re.compile(r"n[0-9]{8}")
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
LABEL_FILES = ("LOC_val_solution.csv", "val_annotations.txt", GROUND_TRUTH)
SYNSET_LISTS = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
LEVELS_UP = 3
"""Kaggle keeps the labels three folders above train/ and val/."""
LARGEST_LIST = 64 << 20


class ImageNet:
    """Synset folders with a flat val/, or the tars."""

    name = "imagenet"

    def detect(self, tree: Tree, options: SourceOptions) -> bool:
        if _tar(tree, TRAIN_TAR):
            return True
        base = _base(tree)
        return base is not None and bool(_flat(tree, base, "val"))

    def read(self, tree: Tree, options: SourceOptions) -> LabelledFiles:
        outer = tree
        if train_tar := _tar(tree, TRAIN_TAR):
            tree = _from_tars(tree, train_tar)
        base = _base(tree)
        if base is None:
            raise DataError(
                f"{tree.root} has no train/ with folders called like synsets (n01440764), and no "
                f"{TRAIN_TAR}"
            )
        if base:
            outer = tree
            tree = tree.within(base)
        found = LabelledFiles("ImageNet as downloaded", tree, [])
        for file in tree.files:
            match = re.fullmatch(r"train/(n[0-9]{8})/(.*/)?[^/]+", file.path)
            if match and is_picture(file):
                found.rows.append(Labelled(file, "train", match[1]))
        found.split_origins["train"] = TRAIN_TAR if train_tar else "train/"
        _read_val(tree, outer, options, found)
        if test := sum(is_picture(f) for f in tree.files if f.path.startswith("test/")):
            found.aside["pictures without labels in test/"] += test
        if others := sum(not is_picture(file) for file in tree.files):
            found.aside["files that are no pictures"] += others
        _name_synsets(_lookup(tree, outer), found)
        return found


def _tar(tree: Tree, name: str) -> File | None:
    return next((f for f in tree.files if f.name == name and f.place is None), None)


def _base(tree: Tree) -> str | None:
    """The folder that holds train/ with synset folders; None where there is none."""
    for name in sorted(tree.folders, key=lambda n: (n.count("/"), n)):
        parent, _, last = name.rpartition("/")
        if SYNSET.fullmatch(last) and (parent == "train" or parent.endswith("/train")):
            return parent.removesuffix("train").rstrip("/")
    return None


def _flat(tree: Tree, base: str, split: str) -> list[File]:
    """The pictures of a split that lie in no class folder (one folder `images` is none)."""
    prefix = f"{base}/{split}/" if base else f"{split}/"
    found = []
    for file in tree.files:
        if file.path.startswith(prefix) and is_picture(file):
            folders = file.path[len(prefix) :].split("/")[:-1]
            if folders in ([], ["images"]):
                found.append(file)
    return found


def _from_tars(tree: Tree, train_tar: File) -> Tree:
    """The pictures inside the tars as train/<synset>/* and val/*."""
    if storage.is_remote(tree.root):
        raise DataError(f"{tree.root}: copy {TRAIN_TAR} to a disk first; it is read many times")
    found = Tree(tree.root)
    path = storage.join(tree.root, train_tar.path)
    for synset in list_tar(path).files:
        name = synset.name.removesuffix(".tar")
        if not SYNSET.fullmatch(name) or not isinstance(synset.place, Span):
            found.skipped["files that are no tar of a synset"] += 1
            continue
        for file in list_tar(path, (synset.place.offset, synset.place.length)).files:
            found.files.append(replace(file, path=f"train/{name}/{file.name}"))
        found.folders |= {"train", f"train/{name}"}
    if val_tar := _tar(tree, VAL_TAR):
        for file in list_tar(storage.join(tree.root, val_tar.path)).files:
            found.files.append(replace(file, path=f"val/{file.name}"))
        found.folders.add("val")
    return found.sort()


# --- labels of val ---

Lookup = Callable[[str], bytes | None]


def _lookup(tree: Tree, outer: Tree) -> Lookup:
    """Reads a small file by its name: in the source, or in the folders above it."""

    def read(name: str) -> bytes | None:
        for place in (tree, outer):
            for file in place.files:
                if file.name == name and file.bytes <= LARGEST_LIST:
                    return place.read(file, LARGEST_LIST)
        if storage.is_remote(outer.root):
            return None
        start = outer.root if Path(outer.root).is_dir() else str(Path(outer.root).parent)
        for folder in parents_of(start, LEVELS_UP):
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        return None

    return read


def _read_val(tree: Tree, outer: Tree, options: SourceOptions, found: LabelledFiles) -> None:
    flat = _flat(tree, "", "val")
    if not flat:
        return
    labels: dict[str, str] | None = None
    if options.labels:
        named, said = labels_by_name(tree, options), options.labels
        labels = {name: label.split()[0] for name, label in named.items() if label}
    else:
        labels, said = _val_labels(_lookup(tree, outer), flat, outer)
    if labels is None:
        raise DataError(
            f"{tree.root}/val holds {counted(len(flat), 'picture')} outside class folders, and no "
            f"file with their labels was found (looked for {', '.join(LABEL_FILES)} there and in "
            "the folders above). Put it beside val/, or name it: --labels FILE"
        )
    missing = []
    for file in flat:
        label = labels.get(file.name) or labels.get(file.name.rpartition(".")[0])
        if label:
            found.rows.append(Labelled(file, "val", label))
        else:
            missing.append(file.name)
    if missing:
        raise DataError(
            f"{said} has no label for {counted(len(missing), 'picture')} of val/ (first: "
            f"{listed(missing, 3)})"
        )
    found.split_origins["val"] = f"val/, labels from {said}"


def _val_labels(lookup: Lookup, flat: list[File], outer: Tree) -> tuple[dict[str, str] | None, str]:
    """(name of a picture -> synset, the file that says so); None where there is no such file."""
    if data := lookup("LOC_val_solution.csv"):
        rows = [line.partition(",") for line in data.decode(errors="replace").splitlines()[1:]]
        return {n: v.split()[0] for n, _, v in rows if v.strip()}, "LOC_val_solution.csv"
    if data := lookup("val_annotations.txt"):
        cells = [line.split("\t") for line in data.decode(errors="replace").splitlines()]
        return {c[0]: c[1] for c in cells if len(c) > 1}, "val_annotations.txt"
    truth, synsets = lookup(GROUND_TRUTH), _devkit_synsets(lookup("meta.mat"))
    if truth is None:
        truth, synsets = _devkit(outer)
    if truth is None or not synsets:
        return None, ""
    numbers = [int(word) for word in truth.split()]
    if len(numbers) != len(flat):
        raise DataError(
            f"{GROUND_TRUTH} has {len(numbers):,} labels, val/ has {counted(len(flat), 'picture')}"
        )
    names = sorted(file.name for file in flat)
    return {name: synsets[number] for name, number in zip(names, numbers)}, GROUND_TRUTH


def _devkit(tree: Tree) -> tuple[bytes | None, dict[int, str]]:
    """(ground truth, number -> synset) of a development kit that is still packed."""
    for file in tree.files:
        if re.fullmatch(r"ILSVRC2012_devkit.*\.tar\.gz", file.name) and file.bytes <= LARGEST_LIST:
            with tarfile.open(fileobj=io.BytesIO(tree.read(file)), mode="r:gz") as kit:
                members = {Path(m.name).name: m for m in kit if m.isreg() and m.size < LARGEST_LIST}
                return (
                    _member(kit, members.get(GROUND_TRUTH)),
                    _devkit_synsets(_member(kit, members.get("meta.mat"))),
                )
    return None, {}


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes | None:
    file = tar.extractfile(member) if member else None
    return file.read() if file else None


def _devkit_synsets(data: bytes | None) -> dict[int, str]:
    """The kit's numbers of the synsets, from its meta.mat."""
    if not data:
        return {}
    synsets = matlab_variable(data, "meta.mat", "synsets")
    try:
        return {int(row[0]): str(row[1]) for row in synsets}
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"meta.mat cannot be read ({error})") from None


def _name_synsets(lookup: Lookup, found: LabelledFiles) -> None:
    """Set the classes' titles from the first synset list there is: n01440764 tench, Tinca tinca."""
    for name in SYNSET_LISTS:
        if data := lookup(name):
            break
    else:
        return
    used = {row.label for row in found.rows}
    titles = {}
    for line in data.decode("utf-8", "replace").splitlines():
        synset, _, words = line.strip().replace("\t", " ").partition(" ")
        if synset in used and words.strip():
            titles[synset] = words.split(",")[0].strip()
    repeated = Counter(titles.values())
    found.titles = {
        synset: title if repeated[title] == 1 else f"{title} ({synset})"
        for synset, title in titles.items()
    }
    found.notes.append(f"{counted(len(titles), 'class name')} from {name}")
