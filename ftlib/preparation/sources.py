"""Where pictures come from: folders of classes, scikit-learn's digits, and the sets that torchvision downloads.

A source is a folder. `scan` lists what is in it and says at once what cannot be trained on; built-in sources are written as such a
folder first, so that they go the same way as the user's own pictures.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.data.shards import DataError
from ftlib.settings import nearest

VAL_NAMES = ("val", "valid", "validation")
NOT_PICTURES = frozenset(
    {
        "txt",
        "csv",
        "tsv",
        "json",
        "jsonl",
        "xml",
        "yaml",
        "yml",
        "md",
        "html",
        "htm",
        "log",
        "db",
        "ini",
        "npy",
        "npz",
        "pt",
        "pth",
        "pkl",
        "mat",
        "h5",
        "py",
        "ipynb",
        "sh",
        "zip",
        "tar",
        "gz",
        "tgz",
        "mp4",
        "mov",
        "avi",
        "wav",
        "pdf",
        "lock",
    }
)
"""Extensions of files that are left aside without a word but in the report; everything else is examined, whatever its name."""
DIGITS_SIDE = 32
DIGITS_QUALITY = 95
DIGITS_VAL = 0.2
DIGITS_SEED = 42


@dataclass(frozen=True)
class Entry:
    """One file. `file` is its name below the source's root, with slashes."""

    file: str
    split: str
    label: int
    bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Found:
    """What `scan` found: entries by split, class and name; files left aside, by extension; links that were refused, with why."""

    root: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    ignored: dict[str, int]
    refused_links: tuple[tuple[str, str, str, str], ...]
    """(file, split, class, why)"""
    warnings: tuple[str, ...]


def scan(root: str | Path, val_fraction: float | None = None, seed: int = 42) -> Found:
    """List `root`, which holds train/<class>/* and val/<class>/*, or <class>/* (then `val_fraction` is needed; 0 for no val).

    Classes are train's folder names, sorted; below a class, subfolders count too. Hidden files are passed over. Raises DataError for:
    no folder, no pictures, one class, an empty class, a val class that train does not have, no val, a link out of the folder, a class
    too small to split.
    """
    root = os.path.abspath(Path(root).expanduser())
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise DataError(
            f"--val-fraction {val_fraction:g}: needs to be from 0 to below 1, such as 0.1"
        )
    if not os.path.isdir(root):
        raise DataError(
            f"--source {root}: there is no such folder. Name a folder with train/<class>/* and val/<class>/*, a folder of classes, or one of {', '.join(names())}"
        )
    walk = _Walk(root)
    train_dir, val_dirs = (
        os.path.join(root, "train"),
        [name for name in VAL_NAMES if os.path.isdir(os.path.join(root, name))],
    )
    warnings: list[str] = []
    if os.path.isdir(train_dir):
        if len(val_dirs) > 1:
            raise DataError(f"{root} has {' and '.join(val_dirs)}: keep one of them as val/")
        if val_dirs and val_fraction is not None:
            raise DataError(
                f"--val-fraction would do nothing: {root} has its own {val_dirs[0]}/. Leave the option out, or point --source at {train_dir}"
            )
        if not val_dirs and val_fraction is None:
            also = (
                " There is a test/, which is not used; rename it to val/ if it is meant to be."
                if os.path.isdir(os.path.join(root, "test"))
                else ""
            )
            raise DataError(
                f"{root} has train/ but no val/. Add --val-fraction 0.1 to split it off train, stratified.{also}"
            )
        train = walk.classes("train")
        val = walk.classes(val_dirs[0]) if val_dirs else {}
        others = sorted(
            e.name
            for e in _items(root)
            if e.is_dir() and not e.name.startswith(".") and e.name not in ("train", *val_dirs)
        )
        if others:
            warnings.append(
                f"not used: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''} beside train/"
            )
    else:
        if val_dirs:
            raise DataError(
                f"{root} has {val_dirs[0]}/ but no train/. Name the folder that holds both"
            )
        train, val = walk.classes(""), {}
        if train and val_fraction is None:
            raise DataError(
                f"{root} has {len(train)} class folders but no train/ and val/. Add --val-fraction 0.1 to split it, stratified (0 for no val at all)"
            )
    _check(root, train, val)
    classes = tuple(sorted(train))
    label = {name: i for i, name in enumerate(classes)}
    entries = []
    for name in classes:
        held_out = (
            _split_off(root, name, [e.file for e in train[name]], val_fraction, seed)
            if val_fraction
            else set()
        )
        entries += [
            Entry(
                e.file, "val" if e.file in held_out else "train", label[name], e.bytes, e.mtime_ns
            )
            for e in train[name]
        ]
    entries += [
        Entry(e.file, "val", label[name], e.bytes, e.mtime_ns)
        for name in sorted(val)
        for e in val[name]
    ]
    if val and (missing := [name for name in classes if not val.get(name)]):
        warnings.append(
            f"no validation pictures of {len(missing)} of {len(classes)} classes ({', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}): they are trained but never scored"
        )
    if not any(e.split == "val" for e in entries):
        warnings.append(
            "no validation pictures: a training run needs data.tuning_fraction above 0, or a set prepared with --val-fraction above 0"
        )
    entries.sort(key=lambda e: (e.split, e.label, e.file))
    return Found(
        root,
        classes,
        tuple(entries),
        dict(sorted(walk.ignored.items())),
        tuple(walk.refused),
        tuple(warnings),
    )


def _check(root: str, train: dict[str, list[Entry]], val: dict[str, list[Entry]]) -> None:
    if not any(train.values()):
        raise DataError(
            f"{root} holds no pictures in class folders. It needs train/<class>/* and val/<class>/*, or <class>/* with --val-fraction"
        )
    if empty := [name for name in sorted(train) if not train[name]]:
        raise DataError(
            f"{root}: {len(empty)} of {len(train)} classes {'are' if len(empty) > 1 else 'is'} empty ({', '.join(empty[:5])}). Add pictures or delete the folder"
        )
    if len(train) < 2:
        raise DataError(
            f"{root} has one class ({next(iter(train))}). A classifier needs at least two folders of pictures"
        )
    for name in sorted(val):
        if name not in train and val[name]:
            raise DataError(
                f"{root}: val has the class {name!r}, which train does not have.{nearest(name, list(train))} Rename or delete the folder"
            )
    if val and not any(val.values()):
        raise DataError(
            f"{root}: val holds no pictures. Fill it, or delete it and use --val-fraction"
        )


def _split_off(root: str, name: str, files: list[str], fraction: float, seed: int) -> set[str]:
    """The files of one class that become validation: a share of them, at least one, chosen by a hash of seed and name, so that the
    choice for one file depends little on which others there are."""
    if len(files) < 2:
        raise DataError(
            f"{root}: class {name} has one picture, and --val-fraction needs at least two of each (one to train, one to score). "
            f"Add pictures, delete the class, or use --val-fraction 0 to put everything into train"
        )
    ordered = sorted(
        files,
        key=lambda f: hashlib.sha256(f"{seed}:{f}".encode("utf-8", "surrogateescape")).digest(),
    )
    return set(ordered[: min(len(files) - 1, max(1, round(len(files) * fraction)))])


def _items(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as items:
        return list(items)


class _Walk:
    """Lists files below a root without leaving it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.real = os.path.realpath(root)
        self.ignored: Counter[str] = Counter()
        self.refused: list[tuple[str, str, str, str]] = []

    def classes(self, split: str) -> dict[str, list[Entry]]:
        """Class folder -> its files, of the folder `split` below the root."""
        folder = os.path.join(self.root, split)
        self._stay(folder)
        found = {}
        for item in _items(folder):
            if item.is_dir() and not item.name.startswith("."):
                found[item.name] = sorted(
                    self._files(item.path, split or "train", item.name, ()), key=lambda e: e.file
                )
        return found

    def _files(self, folder: str, split: str, name: str, above: tuple[str, ...]) -> Iterator[Entry]:
        real = self._stay(folder)
        if real in above:  # a link to a folder it lies in
            return
        for item in _items(folder):
            if item.name.startswith(".") or item.name.lower() in ("thumbs.db", "desktop.ini"):
                continue
            file = os.path.relpath(item.path, self.root).replace(os.sep, "/")
            if item.is_symlink() and not os.path.exists(item.path):
                self.refused.append((file, split, name, "the link leads nowhere"))
            elif item.is_dir():
                yield from self._files(item.path, split, name, (*above, real))
            elif item.is_symlink() and not self._inside(item.path):
                self.refused.append(
                    (
                        file,
                        split,
                        name,
                        f"the link leads out of the source folder, to {os.path.realpath(item.path)}",
                    )
                )
            elif not item.is_file():
                self.refused.append(
                    (
                        file,
                        split,
                        name,
                        "neither a file nor a folder (a pipe, a socket or a device)",
                    )
                )
            elif (extension := item.name.rpartition(".")[2].lower()) in NOT_PICTURES:
                self.ignored[extension] += 1
            else:
                info = item.stat()
                yield Entry(file, split, -1, info.st_size, info.st_mtime_ns)

    def _inside(self, path: str) -> bool:
        return os.path.commonpath([self.real, os.path.realpath(path)]) == self.real

    def _stay(self, folder: str) -> str:
        real = os.path.realpath(folder)
        if not self._inside(folder):
            raise DataError(
                f"{folder} is a link that leads out of the source folder, to {real}. Point --source at the real folder, or copy the pictures into it"
            )
        return real


# --- built-in sources -------------------------------------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    return ("digits", *TORCHVISION)


def make_folders(name: str, root: str | Path) -> Path:
    """Write the built-in source `name` as folders of pictures below `root`, once; returns that folder.

    A folder that was begun but not finished is written again. Raises DataError: unknown name, no network, disk full.
    """
    root = Path(root)
    if name not in names():
        raise DataError(
            f"--source {name}: neither a folder nor a built-in set.{nearest(name, list(names()))} Built-in sets: {', '.join(names())}"
        )
    done = root / ".complete"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits, and finds it done
            if not done.exists():
                if name == "digits":
                    _write_digits(root)
                else:
                    _write_torchvision(name, root)
                done.touch()
    except OSError as error:
        raise DataError(
            f"{root} cannot be written ({error.strerror or error}). Free some space, or set FTLIB_HOME to another place"
        ) from error
    return root


def _write_digits(root: Path) -> None:
    """scikit-learn's 1,797 scanned digits (8x8 pixels, 17 grey levels; Alpaydin and Kaynak 1998) as 32x32 RGB JPEGs, 80/20 stratified."""
    import cv2
    from sklearn.datasets import load_digits

    data = load_digits()
    for label in range(10):
        rows = np.flatnonzero(data.target == label)
        files = [f"{label}/{row:04d}.jpg" for row in rows]
        held_out = _split_off(str(root), str(label), files, DIGITS_VAL, DIGITS_SEED)
        for split in ("train", "val"):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
        for row, file in zip(rows, files):
            small = (data.images[row] * (255 / 16)).round().astype(np.uint8)
            grey = cv2.resize(small, (DIGITS_SIDE, DIGITS_SIDE), interpolation=cv2.INTER_CUBIC)
            (root / ("val" if file in held_out else "train") / file).write_bytes(
                _jpeg(np.repeat(grey[:, :, None], 3, axis=2), DIGITS_QUALITY)
            )


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    import simplejpeg

    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


@dataclass(frozen=True)
class Downloaded:
    """How torchvision names a data set's class and its two halves."""

    dataset: str
    train: dict[str, Any]
    val: dict[str, Any]


TORCHVISION: dict[str, Downloaded] = {
    "imagenette": Downloaded(
        "Imagenette", {"split": "train", "size": "320px"}, {"split": "val", "size": "320px"}
    ),
    "cifar10": Downloaded("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": Downloaded("CIFAR100", {"train": True}, {"train": False}),
    "flowers102": Downloaded("Flowers102", {"split": "train"}, {"split": "val"}),
    "food101": Downloaded("Food101", {"split": "train"}, {"split": "test"}),
    "pets": Downloaded("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "stl10": Downloaded("STL10", {"split": "train"}, {"split": "test"}),
    "svhn": Downloaded("SVHN", {"split": "train"}, {"split": "test"}),
    "mnist": Downloaded("MNIST", {"train": True}, {"train": False}),
    "fashionmnist": Downloaded("FashionMNIST", {"train": True}, {"train": False}),
}


def _write_torchvision(name: str, root: Path, opener: Callable[..., Any] | None = None) -> None:
    """Download with torchvision and write train/ and val/: the files' own bytes where the set consists of files, else JPEGs at quality 95."""
    if opener is None:
        from torchvision import datasets

        opener = getattr(datasets, TORCHVISION[name].dataset)
    downloads = root.parent / f"{name}-download"
    for split, arguments in (("train", TORCHVISION[name].train), ("val", TORCHVISION[name].val)):
        try:
            dataset = opener(root=str(downloads), download=True, **arguments)
        except (
            Exception
        ) as error:  # urllib's, ssl's, torchvision's RuntimeError for a bad checksum ...
            raise DataError(
                f"{name} could not be downloaded ({error}). This needs a network; where there is none, copy the pictures here and use --source FOLDER, "
                "or take --source digits, which downloads nothing"
            ) from error
        classes = _class_names(dataset)
        for row in range(len(dataset)):
            image, label = dataset[row]
            folder = root / split / classes[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            own = _own_file(dataset, row)
            (folder / f"{row:06d}.jpg").write_bytes(
                own.read_bytes() if own else _jpeg(np.asarray(image.convert("RGB")), 95)
            )


def _own_file(dataset: Any, row: int) -> Path | None:
    """The JPEG a torchvision data set reads its row from; None where it keeps arrays. (torchvision has no public name for it.)"""
    for attribute in ("_samples", "_image_files", "_images"):
        files = getattr(dataset, attribute, None)
        if files is not None:
            path = Path(files[row][0] if isinstance(files[row], tuple) else files[row])
            return path if path.suffix.lower() in (".jpg", ".jpeg") else None
    return None


def _class_names(dataset: Any) -> list[str]:
    """Folder names of the labels: the set's own class names where it has some, else the numbers, padded so that they sort."""
    found = getattr(dataset, "classes", None)
    if not found:
        labels = getattr(dataset, "labels", None)
        found = list(range(int(max(labels if labels is not None else dataset._labels)) + 1))
    width = len(str(len(found) - 1))
    return [
        f"{name:0{width}d}"
        if isinstance(name, int)
        else "_".join(
            part.strip() for part in (name if isinstance(name, tuple) else (str(name),))[:1]
        ).replace("/", "_")
        for name in found
    ]
