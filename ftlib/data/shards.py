"""Prepared data sets: reading one picture in microseconds, and knowing when a file is not what was written.

A set is a folder (or an s3://, gs:// ... address) with

    manifest.json        what there is: classes, counts, every file's size and sha256; written last, so a set without one is unfinished
    train.index.npy      one record per picture of the split (`INDEX`): its shard, byte offset and length, label, size, CRC-32
    train-00000.parquet  standard Parquet; its `image` column is PLAIN, uncompressed and without dictionary, so that a picture is one
                         contiguous run of bytes in the file and is read by memory-mapping, without Parquet

and the same for `val`. Pictures are upright three-channel JPEGs (`ftlib.preparation.validate`). Other readers (pandas, DuckDB, Ray Data) open the
shards as they open any Parquet file; the pages carry checksums.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ftlib import storage
from ftlib.data.cache import Cache

FORMAT = "ftlib-dataset"
SCHEMA = 1
MANIFEST = "manifest.json"
PARTS = ".parts"
SPLITS = ("train", "val", "test")
"""Every set has `train` and `val`; `test` only where the pictures came with one."""
INDEX = np.dtype(
    [
        ("shard", "<i4"),
        ("label", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("crc32", "<u4"),
    ]
)
"""One picture. `shard` counts within the split; `offset` is where its JPEG begins in that file, in bytes."""


class DataError(ValueError):
    """A data set that cannot be used, or pictures that cannot be prepared; the message says where and what to do."""


def canonical(value: Any) -> bytes:
    """JSON with one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) of a manifest less its own `checksum` entry."""
    return hashlib.sha256(
        canonical({k: v for k, v in manifest.items() if k != "checksum"})
    ).hexdigest()


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of the set at `path`, checked. Raises DataError: not there, not a prepared set, unfinished, damaged, too new."""
    try:
        data = storage.read_file(storage.join(path, MANIFEST))
    except (OSError, storage.StorageError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Check the address, the credentials and the network"
        ) from error
    if data is None:
        raise DataError(_why_no_manifest(path))
    try:
        manifest = json.loads(data)
    except ValueError:
        raise DataError(f"{path}/{MANIFEST} is damaged: it is not valid JSON. {_REMEDY}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{path}/{MANIFEST} does not belong to a prepared data set. Name a folder that jobs/prepare.py wrote"
        )
    if not isinstance(manifest.get("schema"), int) or manifest["schema"] > SCHEMA:
        raise DataError(
            f"{path} was prepared by a newer ftlib (schema {manifest.get('schema')}, this one reads up to {SCHEMA}). Update ftlib, or prepare the set again"
        )
    if manifest.get("checksum") != checksum(manifest):
        raise DataError(
            f"{path}/{MANIFEST} is damaged or was edited: its checksum does not fit. {_REMEDY}"
        )
    return manifest


def _why_no_manifest(path: str) -> str:
    command = f"python jobs/prepare.py --source FOLDER_OF_PICTURES --out {path}"
    if storage.is_remote(path):
        return f"{path} holds no prepared data set (no {MANIFEST}). Check the address, or prepare one there: {command}"
    folder = Path(path.removeprefix("file://"))
    if not folder.exists():
        return f"{path}: there is no such data set. Prepare one: {command} (--source digits needs no pictures)"
    if (folder / PARTS).is_dir():
        return f"{path} was not prepared to the end. Give the same jobs/prepare.py command again: it goes on where it stopped"
    if folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir()):
        return f"{path} is not a prepared data set (no {MANIFEST}). If it holds folders of pictures, prepare them first: python jobs/prepare.py --source {path}"
    return f"{path} is not a prepared data set (no {MANIFEST}). Prepare one: {command}"


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split. `start` is the split's row at which it begins."""

    file: str
    start: int
    rows: int
    bytes: int
    sha256: str


class Dataset:
    """A prepared set. Cheap to open, safe to pickle (it is opened anew) and to use from forked processes."""

    def __init__(self, path: str, manifest: dict[str, Any], cache: Cache | None) -> None:
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.digest: str = manifest["digest"]
        """sha256 (hex) of the classes and of every picture's bytes, label and file name, in order: the same wherever the set lies."""
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self._cache = cache
        self._splits: dict[str, Split] = {}

    @staticmethod
    def open(path: str, cache: str | None = None) -> Dataset:
        """The set at `path`, a folder or an address that pyarrow.fs knows (s3://, gs://, ...).

        Files of a remote set are copied to `cache` (default $FTLIB_HOME/cache) when they are first needed. Raises DataError: nothing
        there, not a prepared set, unfinished, schema too new, a damaged manifest or index, a shard missing or of another size.
        """
        path = str(path).rstrip("/") or "/"
        manifest = read_manifest(path)
        if storage.is_remote(path):
            dataset = Dataset(
                path, manifest, Cache.of(path, manifest["name"], manifest["digest"], cache)
            )
        else:
            dataset = Dataset(str(Path(path.removeprefix("file://")).absolute()), manifest, None)
            dataset._check_sizes()
        for split in dataset.splits:
            dataset.split(split)
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.open, (self.path, None if self._cache is None else str(self._cache.root))

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.split(name))} {name}" for name in self.splits)
        return f"Dataset({self.name}@{self.digest[:12]}, {len(self.classes)} classes, {counts})"

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that this set has: `train`, `val` and, in some sets, `test`."""
        return tuple(name for name in SPLITS if name in self.manifest["splits"])

    def split(self, name: str) -> Split:
        """One split by its name. Raises DataError where the set does not have it."""
        if name not in self.splits:
            raise DataError(
                f"{self.path} has the splits {' and '.join(self.splits)}, not {name!r}. "
                "Prepare it from pictures that have this split, or choose another one"
            )
        if name not in self._splits:
            self._splits[name] = Split(self, name)
        return self._splits[name]

    def verify(self, deep: bool = False) -> None:
        """Check that every file is there at its size; `deep`: also that its sha256 is right (reads everything). Raises DataError."""
        if self._cache is None:
            self._check_sizes()
        for entry in self._files():
            if deep and (found := file_sha256(self.file(entry))) != entry["sha256"]:
                raise DataError(
                    f"{self.path}/{entry['file']} is damaged: its sha256 is {found[:12]}..., the manifest says {entry['sha256'][:12]}.... {_REMEDY}"
                )

    def fetch(self) -> None:
        """Copy all files of a remote set to the cache now, not when they are first needed."""
        for entry in self._files():
            self.file(entry)

    def file(self, entry: Mapping[str, Any]) -> Path:
        """The local path of one of the manifest's files, fetched and checked when the set is remote."""
        if self._cache is None:
            return Path(self.path) / entry["file"]
        try:
            return self._cache.get(entry["file"], entry["bytes"], entry["sha256"])
        except (OSError, ValueError, storage.StorageError) as error:
            raise DataError(
                f"{self.path}/{entry['file']} cannot be fetched: {error}. {_REMEDY}"
            ) from error

    def _files(self) -> Iterator[dict[str, Any]]:
        for split in self.manifest["splits"].values():
            yield split["index"]
            yield from split["shards"]

    def _check_sizes(self) -> None:
        for entry in self._files():
            path = Path(self.path) / entry["file"]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path} is missing ({error.strerror}). {_REMEDY}") from None
            if size != entry["bytes"]:
                raise DataError(
                    f"{path} has {size:,} bytes, the manifest says {entry['bytes']:,}: it is damaged. {_REMEDY}"
                )


_REMEDY = (
    "Restore the file, or prepare the set again: the same jobs/prepare.py command with --overwrite"
)


class Split:
    """The pictures of one split, by row: 0 to len - 1, in the order of class and file name."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset = dataset
        self.name = name
        made = dataset.manifest["splits"][name]
        self.rows: int = made["rows"]
        self.shards: tuple[Shard, ...] = _shards(made["shards"])
        self._entries = made["shards"]
        self._index = _read_index(dataset, made["index"], self.rows)
        self._maps: list[memoryview | None] = [None] * len(self.shards)
        self._checked = bytearray(self.rows)
        self._paths = lru_cache(maxsize=8)(self._read_paths)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset.split, (self.dataset, self.name)  # another process maps the files itself

    def __len__(self) -> int:
        return self.rows

    @property
    def labels(self) -> np.ndarray:
        """int64[n], positions in `dataset.classes`."""
        return self._index["label"].astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """int32[n, 2]: height and width in pixels."""
        return np.stack([self._index["height"], self._index["width"]], axis=1)

    def image(self, row: int) -> memoryview:
        """The JPEG's bytes, read-only and without a copy. The first time this process reads a row its CRC-32 is checked.

        Raises DataError, naming shard, row and file, when the bytes are not those that were prepared.
        """
        shard, _, _, _, offset, length, crc = self._index[self._row(row)].item()
        view = (self._maps[shard] or self._map(shard))[offset : offset + length]
        if not self._checked[row]:
            if zlib.crc32(view) != crc:
                raise DataError(
                    f"{self.where(row)}: the stored bytes were altered since the set was prepared. {_REMEDY}"
                )
            self._checked[row] = 1
        return view

    def path(self, row: int) -> str:
        """The file's name below its source folder, such as `train/cat/17.jpg`."""
        shard = int(self._index["shard"][self._row(row)])
        return self._paths(shard)[row - self.shards[shard].start]

    def where(self, row: int) -> str:
        """'FOLDER/train-00003.parquet, row 17 (train/cat/17.jpg)', for messages."""
        shard = self.shards[int(self._index["shard"][self._row(row)])]
        try:
            name = self.path(row)
        except Exception:  # the names lie in the same damaged file
            name = "name unreadable"
        return f"{self.dataset.path}/{shard.file}, row {row - shard.start} ({name})"

    def _row(self, row: int) -> int:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.name}, which has {self.rows}")
        return row

    def _map(self, shard: int) -> memoryview:
        """Map a shard. The mapping outlives the file handle, so a set of thousands of shards needs no handles."""
        import pyarrow as pa

        path = self.dataset.file(self._entries[shard])
        try:
            with pa.memory_map(str(path)) as file:
                view = memoryview(file.read_buffer()).cast("B")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error}). {_REMEDY}") from error
        if len(view) != self.shards[shard].bytes:
            raise DataError(
                f"{path} has {len(view):,} bytes, the manifest says {self.shards[shard].bytes:,}: it is damaged. {_REMEDY}"
            )
        self._maps[shard] = view
        return view

    def _read_paths(self, shard: int) -> list[str]:
        import pyarrow.parquet as pq

        return pq.read_table(
            self.dataset.file(self._entries[shard]),
            columns=["path"],
            page_checksum_verification=True,
        )["path"].to_pylist()


def _shards(entries: list[dict[str, Any]]) -> tuple[Shard, ...]:
    shards, start = [], 0
    for entry in entries:
        shards.append(Shard(entry["file"], start, entry["rows"], entry["bytes"], entry["sha256"]))
        start += entry["rows"]
    return tuple(shards)


def _read_index(dataset: Dataset, entry: Mapping[str, Any], rows: int) -> np.ndarray:
    """The split's records, memory-mapped, after their sha256 was checked: a wrong offset would give a wrong picture."""
    path = dataset.file(entry)
    try:
        if file_sha256(path) != entry["sha256"]:
            raise ValueError("its sha256 is not the manifest's")
        index = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
        if index.dtype != INDEX or len(index) != rows:
            raise ValueError("it does not hold the manifest's rows")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). {_REMEDY}") from None
    return index.view(np.ndarray)  # a memmap's own way to an element takes four times as long
