"""Parquet files of pictures as Hugging Face writes them: structs, class names, splits, order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftlib.data.shards import DataError
from ftlib.preparation.sources.listing import scan
from ftlib.preparation.sources.options import SourceOptions
from tests.preparation.sources.files import rows

NO_VAL = SourceOptions(val_fraction=0)


def write(
    path: Path,
    labels: list[Any],
    names: list[str] | None = None,
    paths: list[str | None] | None = None,
    **columns: list[Any],
) -> Path:
    """A file with the columns image (bytes, path), label and `columns`, two rows in a group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = paths or [f"{i}.jpg" for i in range(len(labels))]
    images = [{"bytes": b"picture %d" % i, "path": name} for i, name in enumerate(paths)]
    table = pa.table({"image": images, "label": labels, **columns})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    pq.write_table(table, path, row_group_size=2)
    return path


def test_class_names_come_from_the_metadata_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train-00000-of-00001.parquet", [1, 0, 1, 0, 0], ["dog", "cat"])
    write(
        tmp_path / "data" / "validation-00000-of-00001.parquet", [0, 1], ["dog", "cat"], ["x", "y"]
    )
    found = scan(tmp_path)
    assert found.classes == ("dog", "cat") and found.counts == {"train": 5, "val": 2}
    assert rows(found)[:3] == [
        ("train", "cat", "0.jpg"),
        ("train", "dog", "1.jpg"),
        ("train", "cat", "2.jpg"),
    ]
    assert [e.place.read() for e in found.entries if e.place][:3] == [
        b"picture 0",
        b"picture 1",
        b"picture 2",
    ]


def test_one_file_is_a_source(tmp_path: Path) -> None:
    path = write(tmp_path / "pets.parquet", ["cat", "dog", "cat"])
    write(tmp_path / "other.parquet", ["x", "y"])
    found = scan(path, NO_VAL)
    assert found.classes == ("cat", "dog") and len(found.entries) == 3


def test_plain_bytes_and_a_split_column(tmp_path: Path) -> None:
    table = pa.table(
        {"jpg": [b"a", b"b", b"c"], "cls_id": [3, 5, 3], "split": ["train", "train", "test"]}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"column of labels is not clear.*--label-column"):
        scan(tmp_path, NO_VAL)
    found = scan(tmp_path, SourceOptions(val_fraction=0, label_column="cls_id"))
    assert found.counts == {"train": 2, "test": 1} and found.classes == ("3", "5")


def test_unlabelled_rows_are_left_aside(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0, 1, -1, None, 1], ["a", "b"])
    found = scan(tmp_path, NO_VAL)
    assert found.counts == {"train": 3} and found.aside == {"rows without a label": 2}


def test_names_that_repeat_get_their_place_before_them(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0, 1, 0], ["a", "b"], ["0.jpg", "0.jpg", None])
    files = [e.file for e in scan(tmp_path, NO_VAL).entries]
    assert files[0] == "x.parquet/0000-000000-0.jpg" and len(set(files)) == 3


def test_other_class_names_in_another_file_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train-0.parquet", [0, 1], ["a", "b"])
    write(tmp_path / "train-1.parquet", [0, 1], ["b", "a"])
    with pytest.raises(DataError, match=r"train-1.parquet has other class names"):
        scan(tmp_path, NO_VAL)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    with pytest.raises(DataError, match=r"x.parquet"):
        scan(tmp_path, SourceOptions(layout="parquet", val_fraction=0))


def test_groups_stay_together(tmp_path: Path) -> None:
    patients = [f"p{i // 4}" for i in range(40)]
    write(tmp_path / "x.parquet", [i // 4 % 2 for i in range(40)], ["a", "b"], patient=patients)
    found = scan(tmp_path, SourceOptions(val_fraction=0.3, group_column="patient"))
    of: dict[str, set[str]] = {}
    for entry in found.entries:
        of.setdefault(patients[int(entry.file[:-4])], set()).add(entry.split)
    assert all(len(splits) == 1 for splits in of.values()) and found.counts["val"] >= 8
