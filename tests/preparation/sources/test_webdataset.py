"""WebDataset tars: samples, labels, splits by name, one tar or many."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from ftlib.data.shards import DataError
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import labels, rows

NO_VAL = SourceOptions(val_fraction=0)


def pack(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for ending, data in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def samples(n: int, first: int = 0) -> dict[str, dict[str, bytes]]:
    return {
        f"{i:04d}": {"jpg": b"picture %d" % i, "cls": b"%d" % (i % 2)}
        for i in range(first, first + n)
    }


def test_one_tar_is_a_set(tmp_path: Path) -> None:
    found = scan(pack(tmp_path / "set.tar", samples(4)), NO_VAL)
    assert found.layout == "WebDataset" and found.classes == ("0", "1")
    assert rows(found)[0] == ("train", "0", "0000.jpg")
    assert [e.place.read() for e in found.entries if e.place] == [
        b"picture 0",
        b"picture 2",
        b"picture 1",
        b"picture 3",
    ]


def test_tars_of_several_splits(tmp_path: Path) -> None:
    pack(tmp_path / "pets-train-000000.tar", samples(4))
    pack(tmp_path / "pets-train-000001.tar", samples(4, 4))
    pack(tmp_path / "pets-val-000000.tar", samples(2, 8))
    (tmp_path / "README.md").write_text("x")
    found = scan(tmp_path)
    assert found.counts == {"train": 8, "val": 2}
    assert labels(found)["0008.jpg"] == ("val", "0")


def test_the_same_keys_in_two_tars_get_their_tars_name(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", samples(2))
    pack(tmp_path / "b.tar", samples(2))
    files = {e.file for e in scan(tmp_path, NO_VAL).entries}
    assert files == {f"{tar}.tar/{key}.jpg" for tar in "ab" for key in ("0000", "0001")}


def test_labels_in_json(tmp_path: Path) -> None:
    records = [{"label": "cat", "width": 5}, {"label": "dog", "width": 6}]
    parts = {f"k{i}": {"json": json.dumps(r).encode(), "png": b"p"} for i, r in enumerate(records)}
    assert scan(pack(tmp_path / "x.tar", parts), NO_VAL).classes == ("cat", "dog")
    unclear = {"a": {"jpg": b"p", "json": b'{"width": 5}'}}
    with pytest.raises(DataError, match=r"label of a is not clear.*width"):
        scan(pack(tmp_path / "y.tar", unclear), NO_VAL)


def test_samples_without_picture_or_label_are_counted(tmp_path: Path) -> None:
    parts = {**samples(20), "x": {"cls": b"1"}, "y": {"jpg": b"p"}}
    found = scan(pack(tmp_path / "x.tar", parts), NO_VAL)
    assert found.counts == {"train": 20}
    assert found.aside == {"samples without a label": 1, "samples without a picture": 1}
