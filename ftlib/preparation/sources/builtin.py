"""Built-in sources: scikit-learn's digits, and the sets that torchvision downloads.

They are written as folders of pictures first, so that they go the same way as the user's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from ftlib.data.shards import DataError
from ftlib.preparation.sources.splits import split_off
from ftlib.settings import nearest

DIGITS_SIDE = 32
DIGITS_QUALITY = 95
DIGITS_VAL = 0.4
DIGITS_SEED = 42


def names() -> tuple[str, ...]:
    """Names that `make_folders` knows."""
    return ("digits", *TORCHVISION)


def make_folders(name: str, root: str | Path) -> Path:
    """Write the built-in source `name` as folders of pictures below `root`, once; returns `root`.

    A folder that was begun but not finished is written again. Raises DataError: unknown name, no
    network, disk full.
    """
    root = Path(root)
    if name not in names():
        raise DataError(
            f"--source {name}: neither a folder nor a built-in set.{nearest(name, list(names()))} "
            f"Built-in sets: {', '.join(names())}"
        )
    done = root / ".complete"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".lock"):  # a second process waits, and finds it done
            if not done.exists():
                if name == "digits":
                    _write_digits(root)
                else:
                    _write_torchvision(name, root)
                done.touch()
    except OSError as error:
        raise DataError(
            f"{root} cannot be written ({error.strerror or error}). Free some space, or set "
            "FTLIB_HOME to another place"
        ) from error
    return root


def _write_digits(root: Path) -> None:
    """scikit-learn's 1,797 scanned digits (Alpaydin and Kaynak 1998; 8x8 pixels, 17 gray levels) as
    32x32 RGB JPEGs, split 80/20 by class."""
    import cv2
    from sklearn.datasets import load_digits

    data = load_digits()
    for label in range(10):
        rows = np.flatnonzero(data.target == label)
        files = [f"{label}/{row:04d}.jpg" for row in rows]
        held_out = split_off(files, DIGITS_VAL, DIGITS_SEED)
        for split in ("train", "val"):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
        for row, file in zip(rows, files):
            small = (data.images[row] * (255 / 16)).round().astype(np.uint8)
            gray = cv2.resize(small, (DIGITS_SIDE, DIGITS_SIDE), interpolation=cv2.INTER_CUBIC)
            (root / ("val" if file in held_out else "train") / file).write_bytes(
                _jpeg(np.repeat(gray[:, :, None], 3, axis=2), DIGITS_QUALITY)
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
    """Download with torchvision and write train/ and val/: the files' own bytes where the set
    consists of files, else JPEGs at quality 95."""
    if opener is None:
        from torchvision import datasets

        opener = getattr(datasets, TORCHVISION[name].dataset)
    downloads = root.parent / f"{name}-download"
    for split, arguments in (("train", TORCHVISION[name].train), ("val", TORCHVISION[name].val)):
        try:
            dataset = opener(root=str(downloads), download=True, **arguments)
        except Exception as error:  # of urllib, ssl, and RuntimeError for a bad checksum
            raise DataError(
                f"{name} could not be downloaded ({error}). This needs a network; where there is "
                "none, copy the pictures here and use --source FOLDER, or take --source digits, "
                "which downloads nothing"
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
    """The JPEG that a torchvision data set reads its row from; None where it keeps arrays.
    torchvision has no public name for it."""
    for attribute in ("_samples", "_image_files", "_images"):
        files = getattr(dataset, attribute, None)
        if files is not None:
            path = Path(files[row][0] if isinstance(files[row], tuple) else files[row])
            return path if path.suffix.lower() in (".jpg", ".jpeg") else None
    return None


def _class_names(dataset: Any) -> list[str]:
    """Folder names of the labels: the set's own class names where it has some, else the numbers,
    padded so that they sort."""
    found = getattr(dataset, "classes", None)
    if not found:
        labels = getattr(dataset, "labels", None)
        found = list(range(int(max(labels if labels is not None else dataset._labels)) + 1))
    width = len(str(len(found) - 1))
    return [_folder_name(name, width) for name in found]


def _folder_name(name: Any, width: int) -> str:
    if isinstance(name, int):
        return f"{name:0{width}d}"
    first = name[0] if isinstance(name, tuple) else str(name)
    return str(first).strip().replace("/", "_")
