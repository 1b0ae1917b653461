"""Public sets whose labels lie in lists of their own form: each as one table.

CUB-200-2011, FGVC-Aircraft, Oxford-IIIT Pet, Oxford Flowers 102 and Stanford Cars, as the archives
of their authors unpack. A set is recognized by the names of its lists.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ftlib.data.shards import DataError
from ftlib.preparation.sources.label_table import LabelTable
from ftlib.preparation.sources.naming import AIRCRAFT, CARS, CUB, FLOWERS, PET
from ftlib.preparation.sources.tree import Tree
from ftlib.text import shorten

LARGEST_LIST = 64 << 20
AGAIN = "Unpack the set's archive again, or name a table of your own: --labels FILE"
Rows = list[tuple[str, ...]]


class Lists:
    """The small files of a source by their names without folders. KeyError where there is none."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._files = {file.name: file for file in tree.files if file.bytes <= LARGEST_LIST}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def pairs(self, name: str) -> dict[str, str]:
        """First word of each line -> the rest of it."""
        text = self._tree.read(self._files[name]).decode()
        found = {}
        for number, line in enumerate(text.splitlines(), start=1):
            first, _, rest = line.strip().partition(" ")
            if first and not rest:
                raise DataError(
                    f"{name}, line {number}: {shorten(line, 60)!r} is one word. {AGAIN}"
                )
            found[first] = rest.strip()
        found.pop("", None)
        return found

    def variable(self, name: str, variable: str) -> Any:
        """A list in a MATLAB file."""
        return matlab_variable(self._tree.read(self._files[name]), name, variable)


def published_table(tree: Tree) -> LabelTable | None:
    """The labels and splits of a public set; None where `tree` has the lists of none.

    Raises DataError where a list cannot be read as its set writes it.
    """
    lists = Lists(tree)
    for names, read in READERS.items():
        if all(name in lists for name in names):
            try:
                table = read(lists)
                if not table.rows:
                    raise DataError(f"{names[0]} names no picture. {AGAIN}")
                return table
            except DataError:
                raise
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise DataError(
                    f"{', '.join(names)} are not as their set has them "
                    f"({type(error).__name__}: {error}). {AGAIN}"
                ) from None
    return None


def matlab_variable(data: bytes, name: str, variable: str) -> Any:
    """A list in a MATLAB file, without dimensions of length 1. Raises DataError."""
    from scipy.io import loadmat

    try:
        return np.atleast_1d(loadmat(io.BytesIO(data), squeeze_me=True)[variable])
    except Exception as error:  # scipy raises many kinds of error on a damaged file
        raise DataError(f"{name} cannot be read ({error}). {AGAIN}") from None


def _cub(lists: Lists) -> LabelTable:
    """Id and file, id and class, id and 1 for train or 0 for test."""
    files, labels, splits = (lists.pairs(name) for name in CUB)
    split_of = {"1": "train", "0": "test"}
    rows: Rows = [(files[i], labels[i], split_of[splits[i]]) for i in files]
    return LabelTable(CUB[0], ("file", "label", "split"), rows)


def _aircraft(lists: Lists) -> LabelTable:
    """Id and label, for three levels of labels; results are published for the variant."""
    levels = ("variant", "family", "manufacturer")
    rows: Rows = []
    for split in ("train", "val", "test"):
        of_level = [lists.pairs(f"images_{level}_{split}.txt") for level in levels]
        rows += [(f"{i}.jpg", *(labels[i] for labels in of_level), split) for i in of_level[0]]
    return LabelTable(AIRCRAFT[0], ("file", *levels, "split"), rows, label="variant")


def _pet(lists: Lists) -> LabelTable:
    """Name and three numbers; the breed is the name without the picture's own number."""
    rows: Rows = []
    for name, split in zip(PET, ("train", "test")):
        for file, numbers in lists.pairs(name).items():
            _class, _species, _breed = map(int, numbers.split())
            rows.append((f"images/{file}.jpg", re.sub(r"_[0-9]+$", "", file), split))
    return LabelTable(PET[0], ("file", "label", "split"), rows)


def _flowers(lists: Lists) -> LabelTable:
    """The labels in the order of the pictures' numbers, and the numbers of each split."""
    labels = lists.variable("imagelabels.mat", "labels")
    rows: Rows = [
        (f"image_{i:05d}.jpg", str(int(_numbered(labels, i))), split)
        for part, split in (("trnid", "train"), ("valid", "val"), ("tstid", "test"))
        for i in map(int, lists.variable("setid.mat", part))
    ]
    return LabelTable(FLOWERS[0], ("file", "label", "split"), rows)


def _cars(lists: Lists) -> LabelTable:
    """A record with file and class for each picture; the class names in a file of their own."""
    names = lists.variable("cars_meta.mat", "class_names")
    rows: Rows = []
    for split, file in (("train", CARS[0]), ("test", "cars_test_annos_withlabels.mat")):
        for record in lists.variable(file, "annotations") if file in lists else ():
            label = str(_numbered(names, int(record["class"])))
            rows.append((f"cars_{split}/{record['fname']}", label, split))
    return LabelTable(CARS[0], ("file", "label", "split"), rows)


def _numbered(values: Any, number: int) -> Any:
    """The value with this number, from 1."""
    if number < 1:
        raise ValueError(f"there is a number {number}, where they begin at 1")
    return values[number - 1]


READERS: dict[tuple[str, ...], Callable[[Lists], LabelTable]] = {
    CUB: _cub,
    AIRCRAFT: _aircraft,
    PET: _pet,
    FLOWERS: _flowers,
    CARS: _cars,
}
"""Names of the lists that a set is recognized by -> how they are read."""
