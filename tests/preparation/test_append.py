"""Adding to a prepared set: old rows stay, new pictures and classes follow, kills do no harm."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from ftlib.data.shards import DataError, Dataset
from ftlib.preparation import prepare as preparing
from ftlib.preparation import shard_task
from ftlib.preparation.options import PrepareOptions
from ftlib.preparation.prepare import prepare
from tests.preparation.sources.files import jpeg, many, tree


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two classes of six pictures in train, two in val."""
    root = tmp_path / "pictures"
    for i, name in enumerate(many("train/ant", "train/bee", n=6) + many("val/ant", "val/bee", n=2)):
        tree(root, name, data=jpeg(i))
    return root


def contents(dataset: Dataset, split: str) -> list[tuple[str, int, bytes]]:
    part = dataset.split(split)
    return [(part.path(i), int(part.labels[i]), bytes(part.image(i))) for i in range(len(part))]


def test_new_pictures_and_classes_follow_the_old_rows(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    old = prepare(source, out, progress=False).dataset
    before = {split: contents(old, split) for split in old.splits}
    shards = {p.name: p.stat().st_ino for p in out.glob("*.parquet")}
    tree(source, "train/ant/new.jpg", data=jpeg(100))
    tree(source, "train/aphid/0.jpg", data=jpeg(101))  # sorts between the old classes
    tree(source, "val/aphid/1.jpg", data=jpeg(102))
    done = prepare(source, out, append=True, progress=False)
    new = done.dataset
    assert new.classes == ("ant", "bee", "aphid") and new.digest != old.digest
    assert contents(new, "train")[:12] == before["train"]
    assert contents(new, "train")[12:] == [
        ("train/ant/new.jpg", 0, jpeg(100)),
        ("train/aphid/0.jpg", 2, jpeg(101)),
    ]
    assert contents(new, "val") == [*before["val"], ("val/aphid/1.jpg", 2, jpeg(102))]
    assert new.manifest["splits"]["train"]["per_class"] == [7, 6, 1]
    assert shards.items() <= {p.name: p.stat().st_ino for p in out.glob("*.parquet")}.items()
    assert new.manifest["made"]["before"]["digest"] == old.digest
    new.verify(deep=True)
    assert prepare(source, out, append=True, progress=False).already_done
    assert Dataset.open(str(out)).digest == new.digest


def test_statistics_are_those_of_all_pictures(source: Path, tmp_path: Path) -> None:
    extra = tmp_path / "extra"
    for i, name in enumerate(many("train/ant", "train/bee", n=9)[4:]):
        tree(extra, name.replace("/0", "/n0"), data=jpeg(200 + i))
    prepare(source, tmp_path / "set", progress=False)
    added = prepare(
        extra, tmp_path / "set", append=True, val_fraction=0, progress=False
    ).dataset.manifest
    shutil.copytree(extra, source, dirs_exist_ok=True)
    whole = prepare(source, tmp_path / "whole", progress=False).dataset.manifest
    for key in ("mean", "std"):
        np.testing.assert_allclose(added["statistics"][key], whole["statistics"][key], atol=2e-4)
    assert added["statistics"]["bytes"] == whole["statistics"]["bytes"]
    assert added["splits"]["train"]["per_class"] == whole["splits"]["train"]["per_class"]


def test_one_new_class_alone_can_be_added(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "set", progress=False)
    for i in range(10):
        tree(tmp_path / "more", f"wasp/{i}.jpg", data=jpeg(300 + i))
    done = prepare(
        tmp_path / "more", tmp_path / "set", append=True, val_fraction=0.2, progress=False
    )
    assert done.dataset.classes == ("ant", "bee", "wasp")
    assert done.dataset.manifest["splits"]["val"]["per_class"] == [2, 2, 2]


def test_identical_pictures_among_old_and_new_ones_are_named(source: Path, tmp_path: Path) -> None:
    prepare(source, tmp_path / "set", progress=False)
    tree(source, "val/ant/copy.jpg", data=jpeg(0))
    done = prepare(source, tmp_path / "set", append=True, progress=False)
    assert "train/ant/00.jpg = val/ant/copy.jpg" in done.report["warnings"][-1]


def test_what_cannot_be_added_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(DataError, match=r"there is no such data set"):
        prepare(source, out, append=True, progress=False)
    prepare(source, out, progress=False)
    with pytest.raises(DataError, match=r"--overwrite and --append: give one"):
        prepare(source, out, append=True, overwrite=True, progress=False)
    tree(source, "train/ant/new.jpg", data=jpeg(100))
    with pytest.raises(DataError, match=r"--append: .*made with other options"):
        prepare(source, out, append=True, rules=PrepareOptions(quality=50), progress=False)
    tree(tmp_path / "more", "train/Ant/0.jpg", data=jpeg(7))
    with pytest.raises(DataError, match=r"differ only in case"):
        prepare(tmp_path / "more", out, append=True, val_fraction=0, progress=False)
    tree(tmp_path / "other", "train/ant/x.jpg", "val/wasp/0.jpg", data=jpeg(8))
    with pytest.raises(DataError, match=r"no training pictures of 1 class .wasp"):
        prepare(tmp_path / "other", out, append=True, progress=False)


def test_an_interruption_leaves_the_old_set_readable(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_task, "ROWS_PER_SHARD", 4)
    out = tmp_path / "set"
    old = prepare(source, out, progress=False).dataset
    for i in range(9):
        tree(source, f"train/bee/new{i}.jpg", data=jpeg(400 + i))
    expected = tmp_path / "copy"
    shutil.copytree(out, expected)
    whole = prepare(source, expected, append=True, progress=False).dataset
    write = preparing.storage.write_file

    def fail_at_manifest(uri: str, data: bytes) -> None:
        if uri.endswith("manifest.json"):
            raise KeyboardInterrupt
        write(uri, data)

    monkeypatch.setattr(preparing.storage, "write_file", fail_at_manifest)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, out, append=True, progress=False)
    still = Dataset.open(str(out))
    still.verify(deep=True)
    assert still.digest == old.digest
    made = {p.name: os.stat(p).st_mtime_ns for p in out.glob("*.parquet")}
    monkeypatch.setattr(preparing.storage, "write_file", write)
    done = prepare(source, out, append=True, progress=False)
    assert done.dataset.digest == whole.digest
    assert made == {p.name: os.stat(p).st_mtime_ns for p in out.glob("*.parquet")}
    done.dataset.verify(deep=True)
    index = json.loads((out / "manifest.json").read_text())["splits"]["train"]["index"]["file"]
    assert {p.name for p in out.glob("train*.npy")} == {index}
