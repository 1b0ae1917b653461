"""Splitting validation off: stratified, seeded, stable; and groups that stay whole."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.data.shards import DataError
from ftlib.preparation.sources.layout import Labelled
from ftlib.preparation.sources.listing import Listing, scan
from ftlib.preparation.sources.options import SourceOptions
from ftlib.preparation.sources.splits import (
    groups_split_off,
    guessed_groups,
    split_off,
    torn_groups,
)
from ftlib.preparation.sources.tree import File
from ftlib.settings import ConfigError
from tests.preparation.sources.files import labels, many, tree


def options(**values: Any) -> SourceOptions:
    return SourceOptions(**values)


def held_out(found: Listing) -> set[str]:
    return {e.file for e in found.entries if e.split == "val"}


def test_val_fraction_is_stratified_seeded_and_keeps_its_choice(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", n=40), *many("b", n=10), *many("c", n=2))
    chosen = held_out(scan(root, options(val_fraction=0.1, seed=1)))
    assert [sum(file.startswith(c) for file in chosen) for c in "abc"] == [4, 1, 1]
    assert chosen == held_out(scan(root, options(val_fraction=0.1, seed=1)))
    assert chosen != held_out(scan(root, options(val_fraction=0.1, seed=2)))
    assert chosen < held_out(scan(root, options(val_fraction=0.3, seed=1)))
    tree(root, "a/new.jpg")
    assert len(chosen ^ held_out(scan(root, options(val_fraction=0.1, seed=1)))) <= 2


def test_classes_of_one_picture_are_all_named_or_kept_in_train(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b"), *many("x", "y", "z", n=1))
    with pytest.raises(
        DataError,
        match=r"3 classes of 5 have one picture .x, y, z.*--singles train",
    ):
        scan(root, options(val_fraction=0.1))
    found = scan(root, options(val_fraction=0.1, singles="train"))
    assert found.counts == {"train": 21, "val": 2}
    assert "no validation pictures of 3 of 5 classes (x, y, z)" in found.warnings[0]


def test_no_group_is_put_into_two_splits(tmp_path: Path) -> None:
    files = [f"{c}/p{p:02d}_{i}.jpg" for p in range(20) for c in "ab" for i in range(3)]
    root = tree(tmp_path, *files, "a/odd.jpg")
    found = scan(root, options(val_fraction=0.2, group_pattern=r"(p\d+)_"))
    splits = defaultdict(set)
    for file, (split, _) in labels(found).items():
        splits[file[2:5]].add(split)
    assert all(len(found) == 1 for found in splits.values())
    assert 18 <= found.counts["val"] <= 30
    assert "1 picture in no group" in found.warnings[0]
    assert "21 groups of pictures" in found.notes


def test_groups_that_given_splits_tear_apart_are_refused(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("train/a", "train/b", "val/a", "val/b", n=3))
    with pytest.raises(DataError, match=r"3 groups of 3 have pictures in more than one split"):
        scan(root, options(group_pattern=r"(\d+)\.jpg"))


def test_wrong_patterns_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--group-pattern \(: not a regular expression"):
        options(group_pattern="(")
    with pytest.raises(ConfigError, match=r"give one of them"):
        options(group_pattern="x", group_column="y")


@given(
    files=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=40, unique=True),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_a_class_keeps_a_picture_in_each_split(
    files: list[str], fraction: float, seed: int
) -> None:
    held = split_off(files, fraction, seed)
    assert held <= set(files)
    assert len(held) == (0 if len(files) == 1 else min(max(held and 1, len(held)), len(files) - 1))
    assert len(files) == 1 or 1 <= len(held) < len(files)
    assert held == split_off(files[::-1], fraction, seed)


@settings(deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=4, max_size=60),
    fraction=st.floats(0.05, 0.5),
)
def test_groups_never_empty_a_class_of_train(
    groups: list[tuple[int, str]], fraction: float
) -> None:
    found = [
        Labelled(File(f"{i}.jpg", 1, 0), "train", label, f"g{group}")
        for i, (group, label) in enumerate(groups)
    ]
    held = groups_split_off(found, fraction, 42)
    for label in {row.label for row in found}:
        assert any(row.group not in held for row in found if row.label == label)


def patients(*numbers: int, split: str = "", n: int = 4) -> list[str]:
    """Pictures of two classes; each patient has one class."""
    return [f"{split}{'ab'[p % 2]}/patient{p:03d}_{i}.png" for p in numbers for i in range(n)]


def test_patients_in_two_given_splits_are_named_with_their_pictures(tmp_path: Path) -> None:
    root = tree(tmp_path, *patients(*range(8), split="train/"), *patients(8, 9, split="val/"))
    assert not scan(root).warnings
    tree(root, "val/b/patient003_8.png", "val/b/patient003_9.png", "val/a/patient006_9.png")
    (warning,) = scan(root).warnings
    assert "2 groups of 10, with 3 pictures outside train" in warning
    assert "(patient003: 4 train, 2 val; patient006: 4 train, 1 val)" in warning
    assert "move each into one split" in warning


def test_a_random_share_of_patients_is_a_warning_whose_advice_keeps_them_whole(
    tmp_path: Path,
) -> None:
    root = tree(tmp_path, *patients(*range(10)))
    (warning,) = scan(root, options(val_fraction=0.25)).warnings
    pattern = warning.rpartition("add --group-pattern '")[2].rstrip("'")
    kept = scan(root, options(val_fraction=0.25, group_pattern=pattern))
    assert not kept.warnings and "10 groups of pictures" in kept.notes
    of_split = {s: {e.file[:12] for e in kept.entries if e.split == s} for s in ("train", "val")}
    assert of_split["train"] and of_split["val"] and not of_split["train"] & of_split["val"]


def test_a_column_of_lesions_is_taken_for_groups(tmp_path: Path) -> None:
    root = tree(tmp_path, *(f"img/{i}.jpg" for i in range(12)))
    rows = "".join(f"L{i // 4},{i}.jpg,{'ab'[i // 4 % 2]}\n" for i in range(12))
    (root / "data.csv").write_text(f"lesion_id,image,label\n{rows}")
    (warning,) = scan(root, options(val_fraction=0.25)).warnings
    assert "column 'lesion_id'" in warning and "add --group-column lesion_id" in warning
    whole = scan(root, options(val_fraction=0.25, group_column="lesion_id"))
    assert not any("lesion" in warning for warning in whole.warnings)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ([f"c/{p}_{side}.jpeg" for p in range(9) for side in ("left", "right")], "0"),
        ([f"v_g{g:02d}_c{c:02d}_f{f:03d}.jpg" for g in (1, 2) for c in (1, 2) for f in (1, 2)], ""),
        ([f"c/person{p}_virus_{i}.jpeg" for p in range(5) for i in range(2)], "person0_virus"),
        ([f"c/{p:08d}_{i:03d}.png" for p in range(5) for i in range(3)], "00000000"),
        ([f"c/scan {p} ({i}).png" for p in range(5) for i in range(3)], "scan 0"),
        ([f"c/video{p}/{i:04d}.jpg" for p in range(5) for i in range(3)], "video0"),
        ([f"c/img7_{p}_aug{i}.jpg" for p in range(5) for i in range(3)], "img7_0"),
    ],
)
def test_names_that_look_like_groups(names: list[str], first: str) -> None:
    assert guessed_groups(names, [""] * len(names), 1)[1][0] == (first or "v_g01_c01")


@pytest.mark.parametrize(
    "names",
    [
        [f"n0144076{c}/n0144076{c}_{i}.JPEG" for c in range(5) for i in range(9)],
        [f"val/{c}/ILSVRC2012_val_{i:08d}.JPEG" for c in "ab" for i in range(9)],
        [f"{c}/{c}.{i}.jpg" for c in ("cat", "dog") for i in range(9)],
        [f"train/{c}/{i:05d}.png" for c in "0123" for i in range(9)],
        [f"c/2007_{i:06d}.jpg" for i in range(9)],
        [f"00{c}.Bird{c}/Bird{c}_{i:04d}_{i + 9}.jpg" for c in (1, 2) for i in range(9)],
    ],
)
def test_names_of_classes_and_numbers_are_no_groups(names: list[str]) -> None:
    classes = len({name.rpartition("/")[0] for name in names})
    assert guessed_groups(names, [""] * len(names), classes) == ("", [])


def test_numbers_that_start_anew_in_each_split_are_no_groups() -> None:
    names = [f"{split}/0000-{i:06d}-x1.jpg" for split in ("train", "val") for i in range(9)]
    assert guessed_groups(names, [name.partition("/")[0] for name in names], 2) == ("", [])


def test_torn_groups_come_with_the_most_held_out_pictures_first() -> None:
    groups = ["p", "p", "q", "q", "q", "r", "", ""]
    splits = ["train", "val", "", "test", "test", "val", "train", "val"]
    assert [str(group) for group in torn_groups(groups, splits)] == [
        "q: 1 train, 2 test",
        "p: 1 train, 1 val",
    ]
