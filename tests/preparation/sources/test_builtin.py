"""Built-in sources: digits and torchvision's sets, written as folders once."""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from ftlib.data.shards import DataError
from ftlib.preparation.sources import builtin
from ftlib.preparation.sources.builtin import make_folders
from ftlib.preparation.sources.listing import scan


def test_digits_are_sklearns_as_jpeg_folders(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    root = make_folders("digits", tmp_path / "digits")
    found = scan(root)
    assert len(found.entries) == 1797 and found.classes == tuple("0123456789")
    counts = np.bincount(data.target)
    held_out = np.bincount([e.label for e in found.entries if e.split == "val"])
    np.testing.assert_array_equal(held_out, np.round(counts * 0.4))
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
    assert builtin._own_file(holder, 0) == own
    assert builtin._own_file(types.SimpleNamespace(_image_files=[Path("x.png")]), 0) is None
    assert builtin._own_file(types.SimpleNamespace(), 0) is None


def test_every_download_is_a_class_of_torchvision() -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    for entry in builtin.TORCHVISION.values():
        assert hasattr(datasets, entry.dataset)


def test_no_network_says_what_to_do(tmp_path: Path) -> None:
    def offline(**_: object) -> None:
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    with pytest.raises(
        DataError,
        match=r"cifar10 could not be downloaded .*name resolution.*a network.*--source digits",
    ):
        builtin._write_torchvision("cifar10", tmp_path / "cifar10", offline)
