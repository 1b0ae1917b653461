"""Listing folders: what is a class, what is left aside, and every reason for which a folder cannot be prepared."""

from __future__ import annotations

import os
import types
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ftlib.data.shards import DataError
from ftlib.preparation import sources
from ftlib.preparation.sources import make_folders, scan


def tree(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"x")
    return root


def many(*classes: str, split: str = "", n: int = 10) -> list[str]:
    return [f"{split}{name}/{i:02d}.jpg" for name in classes for i in range(n)]


def test_train_and_val_folders(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("b", "a", split="train/"), *many("a", "b", split="val/", n=2))
    found = scan(root)
    assert found.classes == ("a", "b") and found.warnings == ()
    assert [(e.file, e.split, e.label) for e in found.entries][:2] == [
        ("train/a/00.jpg", "train", 0),
        ("train/a/01.jpg", "train", 0),
    ]
    assert [e.split for e in found.entries].count("val") == 4
    assert [e.file for e in found.entries] == sorted(e.file for e in found.entries)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_other_names_of_val(tmp_path: Path, name: str) -> None:
    assert any(
        e.split == "val"
        for e in scan(
            tree(tmp_path, *many("a", "b", split="train/"), *many("a", "b", split=f"{name}/"))
        ).entries
    )


def test_val_fraction_is_stratified_seeded_and_keeps_its_choice(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", n=40), *many("b", n=10), *many("c", n=2))
    found = scan(root, 0.1, seed=1)
    chosen = {e.file for e in found.entries if e.split == "val"}
    assert [sum(file.startswith(c) for file in chosen) for c in "abc"] == [4, 1, 1]
    assert chosen == {e.file for e in scan(root, 0.1, seed=1).entries if e.split == "val"}
    assert chosen != {e.file for e in scan(root, 0.1, seed=2).entries if e.split == "val"}
    larger = {e.file for e in scan(root, 0.3, seed=1).entries if e.split == "val"}
    assert chosen < larger
    (root / "a" / "new.jpg").write_bytes(b"x")
    assert len(chosen ^ {e.file for e in scan(root, 0.1, seed=1).entries if e.split == "val"}) <= 2


def test_train_without_val_is_split_on_request(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", split="train/"))
    assert sum(e.split == "val" for e in scan(root, 0.2).entries) == 4
    with pytest.raises(DataError, match=r"train/ but no val/. Add --val-fraction 0.1"):
        scan(root)
    tree(root, "test/a/0.jpg")
    with pytest.raises(DataError, match=r"There is a test/, which is not used"):
        scan(root)


def test_no_validation_at_all_must_be_asked_for(tmp_path: Path) -> None:
    root = tree(tmp_path, *many("a", "b", n=1))
    with pytest.raises(
        DataError, match=r"2 class folders but no train/ and val/. Add --val-fraction"
    ):
        scan(root)
    with pytest.raises(
        DataError,
        match=r"class a has one picture.*at least two.*--val-fraction 0 to put everything into train",
    ):
        scan(root, 0.1)
    found = scan(root, 0)
    assert {e.split for e in found.entries} == {
        "train"
    } and "no validation pictures" in found.warnings[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no pictures in class folders"),
        (["a.jpg"], "holds no pictures in class folders"),
        (many("a"), "one class .a.*at least two"),
        ([*many("a", "b"), "c/"], "1 of 3 classes is empty .c"),
        ([*many("a", "b"), "c/notes.txt"], "1 of 3 classes is empty .c"),
        (
            [*many("cat", "dog", split="train/"), *many("cat", "dogs", split="val/")],
            "val has the class 'dogs', which train does not have. Did you mean dog?",
        ),
        ([*many("a", "b", split="train/"), "val/a/"], "val holds no pictures"),
        (
            [*many("a", "b", split="train/"), *many("a", split="val/"), *many("a", split="valid/")],
            "val and valid: keep one",
        ),
        (many("a", "b", split="val/"), "has val/ but no train/"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    tmp_path: Path, files: list[str], message: str
) -> None:
    for file in files:
        if file.endswith("/"):
            (tmp_path / file).mkdir(parents=True)
        else:
            tree(tmp_path, file)
    with pytest.raises(DataError, match=message):
        scan(
            tmp_path,
            None if any("/" in f and f.startswith(("train", "val")) for f in files) else 0.1,
        )


def test_impossible_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such folder.*digits"):
        scan(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"--val-fraction 1: needs"):
        scan(tmp_path, 1.0)
    tree(tmp_path, *many("a", "b", split="train/"), *many("a", "b", split="val/"))
    with pytest.raises(DataError, match=r"--val-fraction would do nothing"):
        scan(tmp_path, 0.1)


def test_a_class_without_validation_is_a_warning(tmp_path: Path) -> None:
    found = scan(
        tree(
            tmp_path,
            *many("a", "b", "c", split="train/"),
            *many("a", "b", split="val/"),
            "extra/x.jpg",
        )
    )
    assert found.warnings[0] == "not used: extra beside train/"
    assert "no validation pictures of 1 of 3 classes (c)" in found.warnings[1]


def test_subfolders_count_and_other_files_are_left_aside(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        *many("a", "b"),
        "a/images/deep/x.JPEG",
        "a/boxes.txt",
        "b/notes.txt",
        "b/labels.csv",
        "a/.hidden.jpg",
        "a/.cache/y.jpg",
        "b/Thumbs.db",
        "b/no_extension",
    )
    found = scan(root, 0)
    files = {e.file for e in found.entries}
    assert "a/images/deep/x.JPEG" in files and "b/no_extension" in files and len(files) == 22
    assert found.ignored == {"csv": 1, "txt": 2}


def test_links_stay_within_the_source(tmp_path: Path) -> None:
    outside = tree(tmp_path / "outside", "secret.jpg", "class/x.jpg")
    root = tree(tmp_path / "root", *many("a", "b"))
    os.symlink(root / "b" / "00.jpg", root / "a" / "inside.jpg")
    os.symlink(outside / "secret.jpg", root / "a" / "out.jpg")
    os.symlink("nowhere", root / "a" / "dangling.jpg")
    os.symlink(root / "a", root / "a" / "loop")
    os.mkfifo(root / "a" / "pipe.jpg")
    found = scan(root, 0)
    assert sorted(e.file for e in found.entries if "/0" not in e.file) == ["a/inside.jpg"]
    why = {file: text for file, _, _, text in found.refused_links}
    assert (
        "leads out of the source folder" in why["a/out.jpg"]
        and "leads nowhere" in why["a/dangling.jpg"]
        and "neither a file" in why["a/pipe.jpg"]
    )
    os.symlink(outside / "class", root / "c")
    with pytest.raises(
        DataError, match=r"leads out of the source folder.*Point --source at the real folder"
    ):
        scan(root, 0)


# --- built-in sources -------------------------------------------------------------------------------------------------------------


def test_digits_are_sklearns_as_jpeg_folders(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    root = make_folders("digits", tmp_path / "digits")
    found = scan(root)
    assert len(found.entries) == 1797 and found.classes == tuple("0123456789")
    counts = np.bincount(data.target)
    held_out = np.bincount([e.label for e in found.entries if e.split == "val"])
    np.testing.assert_array_equal(held_out, np.round(counts * 0.2))
    for entry in found.entries[::200]:
        picture = simplejpeg.decode_jpeg((root / entry.file).read_bytes())
        assert picture.shape == (32, 32, 3)
        row = int(Path(entry.file).stem)
        assert data.target[row] == entry.label
        small = np.asarray(
            Image.fromarray(picture).convert("L").resize((8, 8), Image.Resampling.BOX)
        ).astype(float)
        assert np.corrcoef(small.ravel(), data.images[row].ravel())[0, 1] > 0.95
    times = {e.file: e.mtime_ns for e in found.entries}
    make_folders("digits", tmp_path / "digits")
    assert times == {e.file: e.mtime_ns for e in scan(root).entries}


def test_unknown_built_in_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"neither a folder nor a built-in set. Did you mean cifar10"
    ):
        make_folders("cifar-10", tmp_path)


class FakeDataset:
    """What torchvision's classes look like: arrays as PIL pictures, or files with a name each."""

    classes = ["T-shirt/top", "boot"]

    def __init__(self, root: str, download: bool, **which: object) -> None:
        assert download
        self.which = which

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[Image.Image, int]:
        return Image.new("L", (28, 28), 40 * row), row % 2


def test_downloads_become_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets, "FashionMNIST", FakeDataset)
    found = scan(make_folders("fashionmnist", tmp_path / "fashionmnist"))
    assert found.classes == ("T-shirt_top", "boot") and len(found.entries) == 8


def test_downloads_keep_the_bytes_of_files(tmp_path: Path) -> None:
    own = tmp_path / "own.jpg"
    own.write_bytes(b"\xff\xd8 its own bytes")
    holder = types.SimpleNamespace(_samples=[(str(own), 0)])
    assert sources._own_file(holder, 0) == own
    assert sources._own_file(types.SimpleNamespace(_image_files=[Path("x.png")]), 0) is None
    assert sources._own_file(types.SimpleNamespace(), 0) is None


def test_every_download_is_a_class_of_torchvision() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for entry in sources.TORCHVISION.values():
        assert hasattr(datasets, entry.dataset)


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    def offline(**_: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    with pytest.raises(
        DataError,
        match=r"cifar10 could not be downloaded .*name resolution.*needs a network.*--source digits",
    ):
        sources._write_torchvision("cifar10", tmp_path / "cifar10", offline)
