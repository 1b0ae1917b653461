"""Shards: any bytes come back from memory-mapping, other Parquet readers agree, and damage is
recognized."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib import storage
from ftlib.data import cache
from ftlib.data.shards import DataError, Dataset, checksum, file_sha256
from ftlib.preparation import shard_task
from ftlib.preparation.prepare import prepare
from ftlib.preparation.shard_writer import ShardWriter


def jpeg(seed: int, height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels, quality=90, colorspace="RGB", colorsubsampling="444")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared set of 3 classes, 20 + 5 pictures each, in several shards per split."""
    root = tmp_path_factory.mktemp("shards")
    for split, each in (("train", 20), ("val", 5)):
        for label, name in enumerate(("ant", "bee", "wasp")):
            folder = root / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                (folder / f"{i:02d}.jpg").write_bytes(
                    jpeg(1000 * label + i + (500 if split == "val" else 0), 12 + label, 16 + i)
                )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_task, "ROWS_PER_SHARD", 17)
        prepare(root / "pictures", root / "set", progress=False)
    return root / "set"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 4]))


def sign(folder: Path, **changes: object) -> None:
    """Change the manifest and give it a right checksum."""
    manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
    manifest["checksum"] = checksum(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.binary(max_size=300)
        | st.sampled_from(
            [b"", b"PAR1", b"\0" * 9, b"\x04\0\0\0abcd", b"\xfc" * 1020, b"x" * 70_000]
        ),
        min_size=1,
        max_size=600,
    )
)
def test_any_bytes_are_found_at_their_offset_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, values: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.parquet"
    writer = ShardWriter(path)
    for i, value in enumerate(values):
        writer.add(value, label=i % 3, class_name="abc"[i % 3], path=f"{i}.jpg", size=(1, 1))
    written = writer.finish()
    data = path.read_bytes()
    assert [
        data[o : o + n] for o, n in zip(written.index["offset"], written.index["length"])
    ] == values
    assert pq.read_table(path, page_checksum_verification=True)["image"].to_pylist() == values


def test_memory_mapped_pictures_equal_those_of_other_readers(made: Path) -> None:
    dataset = Dataset.open(str(made))
    assert dataset.classes == ("ant", "bee", "wasp") and dataset.name == "set"
    for name, rows in (("train", 60), ("val", 15)):
        split = dataset.split(name)
        table = pandas.concat(
            [pandas.read_parquet(made / s.file) for s in split.shards], ignore_index=True
        )
        assert (len(split) == rows == len(table) and len(split.shards) > 1) or name == "val"
        assert [bytes(split.image(i)) for i in range(rows)] == list(table["image"])
        np.testing.assert_array_equal(split.labels, table["label"])
        np.testing.assert_array_equal(split.sizes, table[["height", "width"]])
        assert [split.path(i) for i in range(rows)] == list(table["path"])
        assert list(table["class"]) == [dataset.classes[label] for label in split.labels]
        assert split.labels.dtype == np.int64 and split.sizes.dtype == np.int32
        for i in (0, rows - 1):
            assert simplejpeg.decode_jpeg(split.image(i)).shape == (*split.sizes[i], 3)
            source = made.parent / "pictures" / split.path(i)
            assert source.read_bytes() == split.image(i)


def test_the_picture_column_is_plain_and_uncompressed_and_pages_carry_checksums(
    made: Path, tmp_path: Path
) -> None:
    shard = made / "train-00000.parquet"
    for group in range(pq.ParquetFile(shard).metadata.num_row_groups):
        column = pq.ParquetFile(shard).metadata.row_group(group).column(0)
        assert (
            column.path_in_schema == "image"
            and column.compression == "UNCOMPRESSED"
            and not column.has_dictionary_page
            and not column.is_stats_set
        )
    hurt = tmp_path / "hurt.parquet"
    shutil.copy(shard, hurt)
    damage(hurt, 400)
    with pytest.raises(OSError, match=r"CRC"):
        pq.read_table(hurt, page_checksum_verification=True)


def test_images_are_views_not_copies(made: Path) -> None:
    split = Dataset.open(str(made)).split("train")
    view = split.image(3)
    assert isinstance(view, memoryview) and view.readonly and view.format == "B"
    assert np.shares_memory(np.frombuffer(view, np.uint8), np.frombuffer(split.image(3), np.uint8))


def test_open_sets_hold_no_file_handle_per_shard(made: Path) -> None:
    dataset = Dataset.open(str(made))
    gc.collect()  # handles that other tests left must not go in between
    before = len(os.listdir("/proc/self/fd"))
    split = dataset.split("train")
    views = [split.image(row) for row in range(len(split))]
    assert len(os.listdir("/proc/self/fd")) == before and len(views) == 60


def test_a_pickled_set_reads_the_same_pictures(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    dataset = Dataset.open("set")
    monkeypatch.chdir("/")
    again = pickle.loads(pickle.dumps(dataset))
    assert again.digest == dataset.digest and bytes(again.split("val").image(4)) == bytes(
        dataset.split("val").image(4)
    )


def test_rows_outside_the_split_are_index_errors(made: Path) -> None:
    split = Dataset.open(str(made)).split("val")
    for row in (-1, 15):
        with pytest.raises(IndexError, match=r"of val, which has 15"):
            split.image(row)
    with pytest.raises(DataError, match=r"splits train and val, not 'test'"):
        Dataset.open(str(made)).split("test")


# --- what is not a set, or no longer --------------------------------------------------------------


def test_a_missing_set_is_an_error_that_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"no such data set. Prepare one: \S*python \S*jobs/prepare.py "
        r"--source FOLDER_OF_PICTURES --out",
    ):
        Dataset.open(str(tmp_path / "nothing"))
    (tmp_path / "cat").mkdir()
    with pytest.raises(
        DataError, match=rf"prepare them first: \S*python \S*jobs/prepare.py --source {tmp_path}"
    ):
        Dataset.open(str(tmp_path))
    (tmp_path / ".parts").mkdir()
    with pytest.raises(DataError, match=r"not prepared to the end.*goes on where it stopped"):
        Dataset.open(str(tmp_path))


def test_a_damaged_manifest_is_refused(copy: Path) -> None:
    manifest = copy / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good[:500])
    with pytest.raises(DataError, match=r"not valid JSON.*--overwrite"):
        Dataset.open(str(copy))
    manifest.write_text(good.replace('"ant"', '"aunt"', 1))
    with pytest.raises(DataError, match=r"checksum does not fit"):
        Dataset.open(str(copy))
    manifest.write_text("[1]")
    with pytest.raises(DataError, match=r"does not belong to a prepared data set"):
        Dataset.open(str(copy))
    manifest.write_text(good)
    sign(copy, schema=2)
    with pytest.raises(
        DataError,
        match=r"prepared by a newer ftlib .schema 2, this one reads up to 1.*Update ftlib",
    ):
        Dataset.open(str(copy))


def test_a_missing_or_truncated_shard_is_refused_on_opening(copy: Path) -> None:
    shard = copy / "train-00001.parquet"
    with open(shard, "r+b") as f:
        f.truncate(shard.stat().st_size - 1)
    with pytest.raises(
        DataError, match=r"train-00001.parquet has [0-9,]+ bytes, the manifest says"
    ):
        Dataset.open(str(copy))
    shard.unlink()
    with pytest.raises(DataError, match=r"train-00001.parquet is missing"):
        Dataset.open(str(copy))


def test_a_damaged_index_is_refused_on_opening(copy: Path) -> None:
    damage(copy / "val.index.npy", 200)
    with pytest.raises(DataError, match=r"val.index.npy is damaged"):
        Dataset.open(str(copy))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("label", 3, "class"), ("label", -1, "class"), ("shard", 9, "shard"), ("shard", -1, "shard")],
)
def test_an_index_with_unknown_classes_or_shards_is_refused(
    copy: Path, field: str, value: int, message: str
) -> None:
    """Also when its sha256 in the manifest is right."""
    path = copy / "val.index.npy"
    index = np.load(path)
    index[field][4] = value
    np.save(path, index)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["val"]["index"]["sha256"] = file_sha256(path)
    sign(copy, splits=manifest["splits"])
    with pytest.raises(DataError, match=rf"val.index.npy is damaged \(it names a {message} beyond"):
        Dataset.open(str(copy))


def hostile_manifests(manifest: dict) -> Iterator[tuple[str, dict]]:
    """What is wrong, and the manifest with it: every name, digest and count replaced in turn."""
    for name in ("../../x", "/etc/x", "a\\b", "..", "", "a\nb", "x" * 256, 7, None):
        for split in ("train", "val"):
            changed = copy_of(manifest)
            changed["splits"][split]["index"]["file"] = name
            yield f"index {name!r}", changed
            changed = copy_of(manifest)
            changed["splits"][split]["shards"][-1]["file"] = name
            yield f"shard {name!r}", changed
    for name in ("../../x", "a/b", "a\nb"):
        yield f"name {name!r}", {**copy_of(manifest), "name": name}
    for digest in ("../" * 21 + "x", "A" * 64, "0" * 63, 5):
        yield f"digest {digest!r}", {**copy_of(manifest), "digest": digest}
        changed = copy_of(manifest)
        changed["splits"]["val"]["shards"][0]["sha256"] = digest
        yield f"sha256 {digest!r}", changed
    for count in (-1, 1.5, "9", True, None):
        for place in ("rows", "bytes"):
            changed = copy_of(manifest)
            changed["splits"]["val"]["shards"][0][place] = count
            yield f"{place} {count!r}", changed
    for gone in ("name", "digest", "classes", "splits"):
        yield f"no {gone}", {k: v for k, v in copy_of(manifest).items() if k != gone}
    for split in ("train", "val"):
        changed = copy_of(manifest)
        del changed["splits"][split]
        yield f"no {split}", changed


def copy_of(manifest: dict) -> dict:
    return json.loads(json.dumps(manifest))


@pytest.mark.parametrize("place", ["local", "s3://bucket/"])
def test_hostile_names_digests_and_counts_in_a_manifest_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Refused in words before anything is read or written by it, wherever the set lies."""
    bucket, home = tmp_path / "bucket", tmp_path / "home"
    bucket.mkdir()
    remote = pyarrow.fs.SubTreeFileSystem(str(bucket), pyarrow.fs.LocalFileSystem())
    monkeypatch.setenv("FTLIB_HOME", str(home))
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (remote, uri.removeprefix("s3://bucket/"))
    )
    shutil.copytree(made, bucket / "set")
    path = str(bucket / "set") if place == "local" else place + "set"
    good = json.loads((made / "manifest.json").read_text())
    before = sorted(p.name for p in tmp_path.iterdir())
    for what, manifest in hostile_manifests(good):
        manifest["checksum"] = checksum(manifest)
        (bucket / "set" / "manifest.json").write_text(json.dumps(manifest))
        try:
            Dataset.open(path).fetch()
        except DataError as error:
            assert "manifest.json" in str(error) and len(str(error)) < 600, what
        else:
            pytest.fail(f"taken: {what}")
        assert sorted(p.name for p in tmp_path.iterdir()) == before, what


def test_altered_pictures_are_refused_when_read_and_by_verify(copy: Path) -> None:
    split = Dataset.open(str(copy)).split("train")
    _, _, _, _, offset, length, _ = split._index[20].item()
    damage(copy / "train-00001.parquet", offset + length // 2)
    dataset = Dataset.open(str(copy))
    dataset.split("train").image(19)
    for _ in range(2):  # not only the first time
        with pytest.raises(
            DataError,
            match=r"train-00001.parquet, row 3 \(train/bee/00.jpg\): the stored bytes were altered",
        ):
            dataset.split("train").image(20)
    dataset.verify()
    with pytest.raises(DataError, match=r"train-00001.parquet is damaged: its sha256"):
        dataset.verify(deep=True)


# --- remote ---------------------------------------------------------------------------------------


@pytest.fixture
def bucket(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """s3://bucket/... leads to a local folder, through pyarrow's file system interface."""
    remote = pyarrow.fs.SubTreeFileSystem(str(made.parent), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (remote, uri.removeprefix("s3://bucket/"))
    )
    return made.parent


def test_a_remote_set_is_read_through_the_cache(
    bucket: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FTLIB_HOME", str(tmp_path / "home"))
    local, remote = Dataset.open(str(made)), Dataset.open("s3://bucket/set")
    assert remote.digest == local.digest
    (folder,) = (tmp_path / "home" / "cache").iterdir()
    assert not list(folder.glob("*.parquet"))  # nothing is copied before it is needed
    assert bytes(remote.split("train").image(30)) == bytes(local.split("train").image(30))
    assert [p.name for p in folder.glob("*.parquet")] == ["train-00001.parquet"]
    again = pickle.loads(pickle.dumps(remote))
    again.fetch()
    again.verify(deep=True)
    assert len(list(folder.glob("*.parquet"))) == len(local.split("train").shards) + len(
        local.split("val").shards
    )
    assert not list(folder.glob(".tmp-*"))
    assert [again.split("val").path(i) for i in range(15)] == [
        local.split("val").path(i) for i in range(15)
    ]


def test_a_remote_set_that_was_damaged_is_never_cached(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made, tmp_path / "set")
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "filesystem", lambda uri: (remote, uri.removeprefix("s3://bucket/"))
    )
    monkeypatch.setattr(cache, "FIRST_WAIT", 0.01)
    damage(tmp_path / "set" / "train-00000.parquet", 100)
    dataset = Dataset.open("s3://bucket/set", cache=str(tmp_path / "cache"))
    with pytest.raises(
        DataError, match=r"s3://bucket/set/train-00000.parquet cannot be fetched: its sha256 is"
    ):
        dataset.split("train").image(0)
    assert not list((tmp_path / "cache").rglob("*.parquet"))
    with pytest.raises(DataError, match=r"s3://bucket/nothing holds no prepared data set"):
        Dataset.open("s3://bucket/nothing")
