"""One set of pictures in every form gives the same rows, bytes and labels."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ftlib.data.shards import DataError, Dataset
from ftlib.preparation import shard_task
from ftlib.preparation.prepare import prepare
from tests.preparation.sources.files import jpeg, many, tree

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with train, val and test; one PNG under a wrong name among them."""
    from PIL import Image

    root = tmp_path / "pets"
    names = [*many("train/cat", "train/dog", n=8), *many("val/cat", "val/dog", n=3)]
    for i, name in enumerate([*names, *many("test/cat", "test/dog", n=2)]):
        tree(root, name, data=jpeg(i))
    Image.new("RGB", (20, 20), (9, 99, 199)).save(root / "train" / "cat" / "00.jpg", "PNG")
    return root


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jpg"))


def label_rows(folder: Path) -> list[tuple[str, str, str]]:
    """(file, label, split)"""
    found = [path.relative_to(folder) for path in pictures(folder)]
    return [(str(path), path.parts[1], path.parts[0]) for path in found]


def as_csv(folder: Path) -> Path:
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("file", "label", "split"), *label_rows(folder)])
    return folder / "labels.csv"


def as_json(folder: Path) -> Path:
    records = [dict(zip(("file", "label", "split"), row)) for row in label_rows(folder)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "labels.jsonl"


def as_zip(folder: Path) -> Path:
    with zipfile.ZipFile(folder.parent / "pets.zip", "w", zipfile.ZIP_DEFLATED) as out:
        for path in pictures(folder):
            out.write(path, path.relative_to(folder.parent))
    return folder.parent / "pets.zip"


def as_tar(folder: Path) -> Path:
    with tarfile.open(folder.parent / "pets.tar", "w") as out:
        out.add(folder, ".")
    return folder.parent / "pets.tar"


def as_tar_gz(folder: Path) -> Path:
    with tarfile.open(folder.parent / "pets.tar.gz", "w:gz") as out:
        out.add(folder, "pets")
    return folder.parent / "pets.tar.gz"


def as_parquet(folder: Path) -> Path:
    """As Hugging Face writes it, with ClassLabel and a file for each split."""
    out = folder.parent / "parquet"
    names = ["cat", "dog"]
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    about = json.dumps({"info": {"features": features}})
    for split in ("train", "validation", "test"):
        rows = [row for row in label_rows(folder) if split.startswith(row[2])]
        images = [{"bytes": (folder / file).read_bytes(), "path": file} for file, _, _ in rows]
        table = pa.table({"image": images, "label": [names.index(v) for _, v, _ in rows]})
        path = out / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            table.replace_schema_metadata({"huggingface": about}), path, row_group_size=3
        )
    return out


def as_webdataset(folder: Path) -> Path:
    out = folder.parent / "wds"
    out.mkdir()
    for split in ("train", "val", "test"):
        with tarfile.open(out / f"pets-{split}-000000.tar", "w") as tar:
            for file, label, of in label_rows(folder):
                if of == split:
                    tar.add(folder / file, file)
                    member = tarfile.TarInfo(f"{file[:-4]}.cls")
                    member.size = len(label)
                    tar.addfile(member, io.BytesIO(label.encode()))
    return out


def as_links(folder: Path) -> Path:
    """Links within a folder, which need no option."""
    out = folder.parent / "links"
    out.mkdir()
    folder.rename(out / ".store")
    for split in ("train", "val", "test"):
        os.symlink(out / ".store" / split, out / split)
    return out


FORMS = [as_csv, as_json, as_zip, as_tar, as_tar_gz, as_parquet, as_webdataset, as_links]


def contents(dataset: Dataset) -> list[tuple[str, str, str, bytes]]:
    """(split, class, file, bytes) of every row, in order."""
    return [
        (split, dataset.classes[part.labels[i]], part.path(i), bytes(part.image(i)))
        for split in dataset.splits
        for part in [dataset.split(split)]
        for i in range(len(part))
    ]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_rows_bytes_and_labels_of_the_folder(
    folder: Path, tmp_path: Path, form: Callable[[Path], Path]
) -> None:
    plain = prepare(folder, tmp_path / "plain", workers=1, progress=False).dataset
    assert {name: len(plain.split(name)) for name in plain.splits} == {
        "train": 16,
        "val": 6,
        "test": 4,
    }
    other = prepare(form(folder), tmp_path / "other", workers=1, progress=False)
    assert contents(other.dataset) == contents(plain)
    assert other.dataset.digest == plain.digest and other.report["repaired"] == 1


KILLED_AFTER = """
import os, sys
sys.path.insert(0, {root!r})
from ftlib.preparation import shard_task
from ftlib.preparation.prepare import prepare
shard_task.ROWS_PER_SHARD = 4
seen = 0
publish = shard_task.publish
def counted(local, uri):
    global seen
    publish(local, uri)
    seen += 1
    if seen == 2:
        os.kill(os.getpid(), 9)
shard_task.publish = counted
prepare({source!r}, {out!r}, workers=1, engine="local", progress=False)
"""


@pytest.mark.parametrize("form", [as_csv, as_zip, as_tar_gz, as_parquet], ids=lambda f: f.__name__)
def test_killed_every_form_goes_on_where_it_stopped(
    folder: Path, tmp_path: Path, form: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = form(folder), tmp_path / "set"
    code = KILLED_AFTER.format(root=str(ROOT), source=str(source), out=str(out))
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    assert len(kept) == 2
    with pytest.raises(DataError, match=r"not prepared to the end"):
        Dataset.open(str(out))
    monkeypatch.setattr(shard_task, "ROWS_PER_SHARD", 4)
    done = prepare(source, out, workers=1, progress=False).dataset
    done.verify(deep=True)
    now = {p.name: p.stat().st_mtime_ns for p in out.glob("*.parquet")}
    first = min(kept)  # killed between a shard and its record, the second one is made again
    assert now[first] == kept[first] and len(now) == 7


def test_an_archive_that_was_changed_is_prepared_anew(folder: Path, tmp_path: Path) -> None:
    path = as_zip(folder)
    first = prepare(path, tmp_path / "set", workers=1, progress=False).dataset
    assert prepare(path, tmp_path / "set", workers=1, progress=False).already_done
    tree(folder, "train/cat/07.jpg", data=jpeg(99))
    as_zip(folder)
    with pytest.raises(DataError, match=r"made from other files"):
        prepare(path, tmp_path / "set", workers=1, progress=False)
    again = prepare(path, tmp_path / "set", workers=1, overwrite=True, progress=False).dataset
    assert again.digest != first.digest
