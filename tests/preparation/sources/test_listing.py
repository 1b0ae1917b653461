"""A source as a whole: names that cannot be used, names for classes, and what is printed.

Also the tests of `naming` and `options`.

Modules: listing, layout.
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from ftlib.data.shards import DataError
from ftlib.preparation.sources.listing import describe, scan
from ftlib.preparation.sources.options import SourceOptions
from ftlib.settings import ConfigError
from tests.columns import too_wide
from tests.preparation.sources.files import many, tree


def options(**values: Any) -> SourceOptions:
    return SourceOptions(**{"val_fraction": 0, **values})


@pytest.mark.parametrize(
    "twins",
    [
        ("Cat", "cat"),
        ("dog", "dog "),
        (unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")),
        ("STRASSE", "straße"),
    ],
)
def test_classes_that_look_the_same_are_refused_together(
    tmp_path: Path, twins: tuple[str, str]
) -> None:
    root = tree(tmp_path, *many(*twins, "other", n=1))
    with pytest.raises(DataError, match=r"1 class exist more than once.*--allow-similar-names"):
        scan(root, options())
    assert len(scan(root, options(allow_similar_names=True)).classes) == 3


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a\nb", b"\x1b[31m", b" "])
def test_class_names_that_no_report_can_carry_are_refused(tmp_path: Path, name: bytes) -> None:
    tree(tmp_path, *many("a", "b", n=1))
    os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    with open(os.path.join(os.fsencode(tmp_path), name, b"0.jpg"), "wb") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"1 class cannot keep the name.*--class-names") as refused:
        scan(tmp_path, options())
    str(refused.value).encode()
    assert "\n" not in str(refused.value) and "\x1b" not in str(refused.value)
    names = tmp_path.parent / f"{tmp_path.name}-names.txt"
    names.write_text("odd\nfirst\nsecond\n" if name < b"a" else "first\nsecond\nodd\n")
    if b"\n" not in name:
        found = scan(tmp_path, options(class_names=str(names)))
        assert set(found.classes) == {"first", "second", "odd"}


def test_file_names_that_are_no_utf8_are_mapped_and_said(tmp_path: Path) -> None:
    tree(tmp_path, *many("a", "b", n=1))
    with open(os.path.join(os.fsencode(tmp_path), b"a", b"\xff.jpg"), "wb") as file:
        file.write(b"x")
    found = scan(tmp_path, options())
    assert found.counts == {"train": 3}
    assert found.warnings[-1].startswith("1 file name not UTF-8")
    describe(found).encode()


def test_what_was_understood_is_printed_with_numbers(tmp_path: Path) -> None:
    names = [f"class {i:02d}" for i in range(12)]
    root = tree(tmp_path, *many(*names, split="Training/", n=10), "Training/class 00/notes.txt")
    tree(root, *many(*names[:2], split="Testing/", n=1), "sample.png", ".DS_Store")
    os.symlink("/etc/hostname", root / "Training" / "class 01" / "host.jpg")
    shown = describe(scan(root, options(val_fraction=0.1)))
    assert not too_wide(shown)
    assert shown.replace("\n    ", " ").splitlines() == [
        f"Source: {root} (folders of splits and classes)",
        "  train 108 pictures (Training/)",
        "  val   12 pictures (10 % of each class, --seed 42)",
        "  test  2 pictures (Testing/)",
        "  12 classes: " + ", ".join(names[:10]) + " ... (12 in all)",
        "  cannot be read: 1 file (first: Training/class 01/host.jpg: the link leads out of the "
        "source folder, to /etc/hostname)",
        "  left aside: 1 .txt files, 1 hidden files and system folders, 1 pictures in the folder "
        "itself",
        "  warning: no test pictures of 10 of 12 classes (class 02, class 03, class 04, class 05, "
        "class 06 ... (10 in all)): they are trained but never scored",
    ]


def test_a_layout_that_is_named_is_not_guessed(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b"))
    with pytest.raises(DataError, match=r"no table that names its pictures.*--labels FILE"):
        scan(root, options(layout="table"))
    with pytest.raises(DataError, match=r"no train/ with folders called like synsets"):
        scan(root, options(layout="imagenet"))
    with pytest.raises(ConfigError, match=r"--layout coco: needs to be one of auto, folders"):
        options(layout="coco")
    with pytest.raises(DataError, match=r"neither a folder, an archive"):
        scan(tree(tmp_path, "x.doc") / "x.doc")
