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
from ftlib.preparation.sources.splits import groups_split_off, split_off
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
