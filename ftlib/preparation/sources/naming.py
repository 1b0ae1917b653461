"""Names of splits and classes: what they mean, and which cannot be used."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ftlib.text import printable

SPLIT_NAMES = {
    "train": ("train", "training", "trainset", "trainingset"),
    "val": ("val", "valid", "validation", "valset", "validset", "validationset"),
    "test": ("test", "testing", "testset", "testingset"),
}
"""Split -> its usual names, in lower case and without separators."""
_SPLIT_OF = {name: split for split, found in SPLIT_NAMES.items() for name in found}
_LIKE_A_SPLIT = re.compile(
    r"(train(ing)?|test(ing)?|val(id(ation)?)?)(set)?"
    r"(images?|imgs?|data|pictures?|photos?|files?|jpe?gs?|pngs?)?[0-9]*"
)
_BESIDE_PICTURES = re.compile(
    r"(annotations?|labels?|masks?|segmentations?|trimaps?|groundtruths?|(bounding|b)box(es)?)"
)
SHOWN = 10

CUB = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
AIRCRAFT = ("images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt")
PET = ("trainval.txt", "test.txt")
FLOWERS = ("imagelabels.mat", "setid.mat")
CARS = ("cars_train_annos.mat", "cars_meta.mat")
PUBLISHED = frozenset((*CUB, *AIRCRAFT, *PET, *FLOWERS, *CARS))
"""Names of the lists that public sets are recognized by."""


def plain(name: str) -> str:
    """A name in lower case without separators."""
    return re.sub(r"[-_. ]+", "", name.casefold())


def split_of(name: str) -> str:
    """The split that a folder's or a column's name means: train, val, test, or nothing."""
    return _SPLIT_OF.get(plain(name), "")


def split_in(name: str) -> str:
    """The split that a word of a file's name means, such as data/train-00000-of-00002.parquet."""
    found = {split_of(word) for word in re.split(r"[^A-Za-z]+", name)} - {""}
    return found.pop() if len(found) == 1 else ""


def is_like_a_split(name: str) -> bool:
    """Whether a folder is called like a split of a data set, such as train_images."""
    return _LIKE_A_SPLIT.fullmatch(plain(name)) is not None


def goes_with_pictures(name: str) -> bool:
    """Whether a folder is called like what other programs keep beside pictures, such as masks."""
    return _BESIDE_PICTURES.fullmatch(plain(name)) is not None


def splits_in(names: Iterable[str]) -> dict[str, str]:
    """Split -> the one name with a word for it, as seg_train and seg_test; empty without train."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if split := split_in(name):
            found[split].append(name)
    if len(found) < 2 or len(found["train"]) != 1:
        return {}
    return {split: named[0] for split, named in found.items() if len(named) == 1}


def text_of(name: str) -> str:
    """A file name as Unicode; bytes that are no UTF-8 become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def unusable(name: str) -> str:
    """Why a class cannot have this name; empty where it can."""
    if not name.strip():
        return "it is empty"
    if any("\udc80" <= c <= "\udcff" for c in name):
        return "it is not UTF-8"
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        return "it has control characters"
    return ""


def similar(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names that differ only in case, Unicode form, or spaces around them."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[unicodedata.normalize("NFC", name.strip()).casefold()].append(name)
    return [tuple(sorted(group)) for group in groups.values() if len(group) > 1]


def listed(names: Sequence[str], most: int = SHOWN) -> str:
    """Names for a message, the first of them where there are many."""
    shown = ", ".join(printable(name) for name in names[:most])
    return f"{shown} ... ({len(names):,} in all)" if len(names) > most else shown


def counted(n: int, one: str, many: str = "") -> str:
    """'1 picture', '1,200 pictures'."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def natural(labels: Iterable[str]) -> tuple[str, ...]:
    """Labels in their order: by value where all are whole numbers, else by name."""
    found = set(labels)
    if found and all(re.fullmatch(r"-?[0-9]{1,15}", label) for label in found):
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    return tuple(sorted(found))
