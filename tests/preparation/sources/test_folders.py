"""Folders of classes: what is a class and a split, what is left aside, what is refused.

Also the tests of `tree`, which lists a folder on disk.

Modules: folders, wrapping.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.shards import DataError
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from ftlib.settings import ConfigError
from tests.preparation.sources.files import labels, many, rows, tree


def options(**values: object) -> SourceOptions:
    return SourceOptions(**values)  # type: ignore[arg-type]


def test_train_and_val_folders_are_sorted_by_split_class_and_name(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("b", "a", split="train/"), *many("a", "b", split="val/", n=2))
    found = scan(root)
    assert found.classes == ("a", "b") and found.warnings == ()
    assert rows(found)[:2] == [("train", "a", "train/a/00.jpg"), ("train", "a", "train/a/01.jpg")]
    assert found.counts == {"train": 20, "val": 4}
    assert [e.file for e in found.entries] == sorted(e.file for e in found.entries)


@pytest.mark.parametrize("train", ["train", "Training", "TRAIN_SET"])
@pytest.mark.parametrize("val", ["val", "Valid", "validation"])
@pytest.mark.parametrize("test", ["test", "Testing"])
def test_splits_are_found_under_their_usual_names(
    tmp_path: Path, train: str, val: str, test: str
) -> None:
    for name in (train, val, test):
        tree(tmp_path, *many("a", "b", split=f"{name}/", n=2))
    found = scan(tmp_path)
    assert found.counts == {"train": 4, "val": 4, "test": 4}
    assert found.split_origins == {"train": f"{train}/", "val": f"{val}/", "test": f"{test}/"}


def test_val_fraction_leaves_test_as_it_is(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", split="Training/"), *many("a", "b", split="Testing/"))
    assert scan(root, options(val_fraction=0.2)).counts == {"train": 16, "val": 4, "test": 20}
    with pytest.raises(
        DataError, match=r"Testing/.*Training/.*no val.*--val-fraction.*test is kept"
    ):
        scan(root)


def test_no_validation_at_all_must_be_asked_for(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", n=1))
    with pytest.raises(DataError, match=r"2 classes but no val. Add --val-fraction"):
        scan(root)
    found = scan(root, options(val_fraction=0))
    assert found.counts == {"train": 2} and "no validation pictures" in found.warnings[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no pictures in class folders"),
        (["a.jpg"], r"holds no pictures in class folders \(1 picture outside them"),
        (many("a"), "one class .a.*at least two"),
        ([*many("a", "b"), "c/"], "1 of 3 classes is empty .c"),
        ([*many("a", "b"), "c/notes.txt"], "1 of 3 classes is empty .c"),
        (
            [*many("cat", "dog", split="train/"), *many("cat", "dogs", split="val/")],
            "val has the class 'dogs', which train does not have. Did you mean dog?",
        ),
        (
            [*many("a", "b", split="train/"), *many("a", "b", split="val/"), "test/c/0.jpg"],
            "test has the class 'c', which train does not have",
        ),
        ([*many("a", "b", split="train/"), "val/a/"], "val holds no pictures"),
        (
            [*many("a", "b", split="train/"), *many("a", split="val/"), *many("a", split="Valid/")],
            "Valid and val: keep one",
        ),
        (many("a", "b", split="val/"), "has val/ but no train/"),
        ([*many("a", "b"), "x.jpg", "y.png"], "2 pictures outside class folders .first: x.jpg"),
        (
            [*many("a", "b", split="train/"), "train/x.jpg"],
            "train holds 1 picture outside class folders",
        ),
        (
            [*many("a", "b", split="train/"), "val/x.jpg", "val/y.jpg"],
            "val holds 2 pictures outside class folders.*val/<class>/.*--labels FILE",
        ),
        (["train_images/a.jpg", "test_images/b.jpg"], "called like splits of a data set"),
        ([*many("cat", "dog", "test")], "dog, test|test is called like splits|called like splits"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    tree(tmp_path, *files)
    own_val = any(f.startswith(("train/", "val/")) for f in files)
    with pytest.raises(DataError, match=message):
        scan(tmp_path, options(val_fraction=None if own_val else 0.1))


def test_impossible_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder or file.*digits"):
        scan(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"--val-fraction 1: needs"):
        options(val_fraction=1.0)
    tree(tmp_path, *many("a", "b", split="train/"), *many("a", "b", split="val/"))
    with pytest.raises(DataError, match=r"--val-fraction would do nothing"):
        scan(tmp_path, options(val_fraction=0.1))


def test_a_class_without_validation_is_a_warning(tmp_path: Path) -> None:
    tree(tmp_path, *many("a", "b", "c", split="train/"), *many("a", "b", split="val/"))
    found = scan(tree(tmp_path, "extra/x.jpg"))
    assert found.warnings[0] == "not used: extra beside train/"
    assert "no validation pictures of 1 of 3 classes (c)" in found.warnings[1]
    assert found.aside == {"pictures in extra/": 1}


def test_subfolders_count_and_other_files_are_left_aside_with_numbers(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b"), "a/images/deep/x.JPEG", "b/no_extension")
    tree(root, "a/boxes.txt", "b/notes.txt", "b/labels.csv", "a/.hidden.jpg", "a/.cache/y.jpg")
    tree(root, "b/Thumbs.db", "@eaDir/x.jpg", "__MACOSX/a/._0.jpg")
    found = scan(root, options(val_fraction=0))
    files = {e.file for e in found.entries}
    assert files >= {"a/images/deep/x.JPEG", "b/no_extension"} and len(files) == 22
    assert found.classes == ("a", "b")
    assert found.aside == {".csv files": 1, ".txt files": 2, "hidden files and system folders": 5}


def test_flat_test_pictures_are_counted_as_unlabelled(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", split="train/"), "test/1.jpg", "test/2.jpg")
    found = scan(root, options(val_fraction=0))
    assert found.counts == {"train": 20}
    assert found.aside == {"pictures without labels in test/": 2}


def test_nested_folders_are_classes_of_their_own_on_request(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("bird/owl", "bird/hawk", "fish"), "bird/owl/images/x.jpg")
    plain = scan(root, options(val_fraction=0))
    assert plain.classes == ("bird", "fish")
    assert any("bird: hawk, owl" in note and "--nested" in note for note in plain.notes)
    nested = scan(root, options(val_fraction=0, nested=True))
    assert nested.classes == ("bird.hawk", "bird.owl", "fish")
    assert labels(nested)["bird/owl/images/x.jpg"] == ("train", "bird.owl")


def test_unicode_twins_across_splits_are_named_as_such(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("caf\u00e9", "b", split="train/"), "val/cafe\u0301/1.jpg")
    with pytest.raises(DataError, match=r"caf.xe9' differs from 'cafe.u0301' only in"):
        scan(root)


def test_a_folder_around_the_classes_is_stepped_into(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", split="photos/train/", n=1), "photos/val/a/0.jpg")
    found = scan(root)
    assert found.root == f"{root}/photos" and found.counts == {"train": 2, "val": 1}
    assert found.notes == ("classes are looked for in photos/",)


def test_links_are_refused_or_followed(tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside", "secret.jpg", "class/x.jpg")
    root = tree(tmp_path / "root", *many("a", "b"))
    os.symlink(root / "b" / "00.jpg", root / "a" / "inside.jpg")
    os.symlink(outside / "secret.jpg", root / "a" / "out.jpg")
    os.symlink("nowhere", root / "a" / "dangling.jpg")
    os.symlink(root / "a", root / "a" / "loop")
    os.mkfifo(root / "a" / "pipe.jpg")
    found = scan(root, options(val_fraction=0))
    assert [e.file for e in found.entries if "/0" not in e.file] == ["a/inside.jpg"]
    why = {row.file: row.why for row in found.rejected}
    assert "leads out of the source folder" in why["a/out.jpg"]
    assert "leads nowhere" in why["a/dangling.jpg"] and "neither a file" in why["a/pipe.jpg"]
    followed = scan(root, options(val_fraction=0, follow_links=True))
    assert "a/out.jpg" in labels(followed) and len(followed.rejected) == 2
    os.symlink(outside / "class", root / "c")
    with pytest.raises(DataError, match=r"out of the source folder.*real folder.*--follow-links"):
        scan(root, options(val_fraction=0))
    assert scan(root, options(val_fraction=0, follow_links=True)).classes == ("a", "b", "c")


def test_a_set_of_links_names_them_and_the_option(tmp_path: Path) -> None:
    store = tree(tmp_path / "store", *many("a", "b", n=2))
    for name in many("a", "b", n=2):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        os.symlink(store / name, tmp_path / "src" / name)
    with pytest.raises(DataError, match=r"4 links.*first: a/00.jpg.*--follow-links"):
        scan(tmp_path / "src", options(val_fraction=0))
    found = scan(tmp_path / "src", options(val_fraction=0, follow_links=True))
    assert found.counts == {"train": 4}


NAMES = st.text(
    st.characters(blacklist_characters="/\0", blacklist_categories=("Cs", "Cc", "Zl", "Zp")),
    min_size=1,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(names=st.lists(NAMES, min_size=2, max_size=5, unique=True), split=st.booleans())
def test_any_names_are_kept_as_they_are_or_refused_with_a_reason(
    names: list[str], split: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("names")
    usable = [name for name in names if name not in (".", "..") and len(name.encode()) < 200]
    for name in usable:
        tree(root, f"{'train/' if split else ''}{name}/0.jpg")
    try:
        found = scan(root, options(val_fraction=0))
    except DataError as error:
        assert str(root) in str(error)
    else:
        assert set(found.classes) <= set(usable) and len(found.entries) == len(found.classes)
        for file, (_, name) in labels(found).items():
            assert file.split("/")[-2] == name


def test_a_flat_val_beside_class_folders_takes_its_labels_from_a_table(tmp_path: Path) -> None:
    root = tree(tmp_path / "set", *many("train/a", "train/b c", n=2), "val/1.jpg", "val/2.jpg")
    table = tmp_path / "val.csv"
    table.write_text("image,label\n1.jpg,a\n2,b c\n")
    found = scan(root, options(labels=str(table)))
    assert found.counts == {"train": 4, "val": 2}
    assert labels(found)["val/2.jpg"] == ("val", "b c")
    table.write_text("image,label\n1.jpg,c\n2,b c\n")
    with pytest.raises(DataError, match=r"val has the class 'c', which train does not have"):
        scan(root, options(labels=str(table)))


def test_splits_below_the_classes_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a/train", "a/test", "b/train", "b/test", n=2))
    with pytest.raises(DataError, match=r"a/test.*called like splits.*--layout folders"):
        scan(root, options(val_fraction=0))
    found = scan(root, options(val_fraction=0, layout="folders"))
    assert found.counts == {"train": 8}


def test_folders_called_like_splits_are_classes_on_request(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("test1", "test2"))
    with pytest.raises(DataError, match=r"test1, test2 are called like splits.*--layout folders"):
        scan(root, options(val_fraction=0))
    assert scan(root, options(val_fraction=0, layout="folders")).classes == ("test1", "test2")


def test_a_folder_of_archives_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 archives .train.zip, val.zip.. Name one of them"):
        scan(tree(tmp_path, "train.zip", "val.zip"), options(val_fraction=0))
