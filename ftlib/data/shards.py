"""Prepared data sets: read one picture in microseconds, and recognize files that were changed.

A set is a folder (or an s3://, gs:// ... address) with

    manifest.json        classes, counts, size and sha256 of every file; written last, so a set
                         without it is unfinished
    train.index.npy      one record per picture of the split (`INDEX`): shard, byte offset and
                         length, label, size, CRC-32
    train-00000.parquet  standard Parquet; the `image` column is PLAIN, uncompressed and without
                         dictionary, so a picture is one contiguous run of bytes in the file and
                         is read by memory-mapping, without Parquet

and the same for `val`, and for `test` where the pictures came with one. Pictures are upright
three-channel JPEGs (`ftlib.preparation.validate`). Other readers (pandas, DuckDB, Ray Data) open
the shards as they open any Parquet file; the pages carry checksums.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from ftlib import storage
from ftlib.config import Data
from ftlib.data.cache import Cache
from ftlib.paths import data_path, job_command

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
"""One picture. `shard` counts within the split; `offset` is where its JPEG begins, in bytes."""
BLOCKS_IN_CACHE = 3
"""Blocks of shards that `data.cache_limit` has room for: the last, the present and the next one."""


class DataError(ValueError):
    """A data set that cannot be used, or pictures that cannot be prepared."""


class FileEntry(TypedDict):
    """One file of a set, as the manifest lists it."""

    file: str
    bytes: int
    sha256: str


class ShardEntry(FileEntry):
    rows: int


def canonical(value: object) -> bytes:
    """JSON with one spelling, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def checksum(manifest: Mapping[str, Any]) -> str:
    """sha256 (hex) of a manifest without its own `checksum` entry."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(canonical(content)).hexdigest()


def file_sha256(path: str | Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest of the set at `path`, checked.

    Raises DataError: not there, not a prepared set, unfinished, damaged, too new, or with names in
    it that lead out of the set's folder.
    """
    try:
        data = storage.read_file(storage.join(path, MANIFEST))
    except (OSError, storage.StorageError) as error:
        raise DataError(
            f"{path} cannot be read ({error}). Check the address, the credentials and the network"
        ) from error
    if data is None:
        raise DataError(_explain_missing_manifest(path))
    try:
        manifest = json.loads(data)
    except ValueError:
        raise DataError(f"{path}/{MANIFEST} is damaged: it is not valid JSON. {_REMEDY}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(
            f"{path}/{MANIFEST} does not belong to a prepared data set. Name a folder that "
            "jobs/prepare.py wrote"
        )
    if not isinstance(manifest.get("schema"), int) or manifest["schema"] > SCHEMA:
        raise DataError(
            f"{path} was prepared by a newer ftlib (schema {manifest.get('schema')}, this one "
            f"reads up to {SCHEMA}). Update ftlib, or prepare the set again"
        )
    if manifest.get("checksum") != checksum(manifest):
        raise DataError(
            f"{path}/{MANIFEST} is damaged or was edited: its checksum does not fit. {_REMEDY}"
        )
    _check_contents(path, manifest)
    return manifest


def _check_contents(path: str, manifest: Mapping[str, Any]) -> None:
    """Raise DataError unless names, digests and counts are what they should be.

    The checksum is no protection: whoever writes the manifest writes it too.
    """
    what = f"{path}/{MANIFEST}"
    try:
        # A set in a hidden folder may be called like it.
        storage.safe_name(str(manifest["name"]).lstrip(".") or ".", f"{what}: name")
        _check_sha256(manifest["digest"], f"{what}: digest")
        if not all(isinstance(name, str) for name in manifest["classes"]):
            raise ValueError(f"{what}: a class has a name that is not text")
        for name in {"train", "val", *manifest["splits"]}:
            split = manifest["splits"][name]
            for entry in (split["index"], *split["shards"]):
                storage.safe_name(entry["file"], f"{what}: splits/{name}")
                _check_sha256(entry["sha256"], f"{what}: {entry['file']}")
                _check_count(entry["bytes"], f"{what}: bytes of {entry['file']}")
            _check_count(split["rows"], f"{what}: rows of {name}")
            for entry in split["shards"]:
                _check_count(entry["rows"], f"{what}: rows of {entry['file']}")
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{what} is damaged: an entry is missing or wrong ({reason})") from None
    except ValueError as error:
        raise DataError(f"{error}. Do not use this set unless you know who wrote it") from None


def _check_sha256(value: object, what: str) -> None:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{what} is {storage.shorten(repr(value), 80)}, not a sha256 in hex")


def _check_count(value: object, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} is {storage.shorten(repr(value), 80)}, not a whole number")


def _explain_missing_manifest(path: str) -> str:
    command = job_command("prepare", f"--source FOLDER_OF_PICTURES --out {shlex.quote(path)}")
    if storage.is_remote(path):
        return (
            f"{path} holds no prepared data set (no {MANIFEST}). Check the address, or prepare one "
            f"there: {command}"
        )
    folder = Path(path.removeprefix("file://"))
    if not folder.exists():
        return (
            f"{path}: there is no such data set. Prepare one: {command} "
            "(--source digits needs no pictures)"
        )
    if (folder / PARTS).is_dir():
        return (
            f"{path} was not prepared to the end. Give the same jobs/prepare.py command again: it "
            "goes on where it stopped"
        )
    if folder.is_dir() and any(entry.is_dir() for entry in folder.iterdir()):
        return (
            f"{path} is not a prepared data set (no {MANIFEST}). If it holds folders of pictures, "
            f"prepare them first: {job_command('prepare', f'--source {shlex.quote(path)}')}"
        )
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
    """A prepared set. Cheap to open and to pickle: a copy checks no file a second time."""

    def __init__(
        self, path: str, manifest: dict[str, Any], cache: Cache | None, checked: bool = False
    ) -> None:
        """`manifest`: as `read_manifest` returns it. `checked`: its index files were checked."""
        self.path = path
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.digest: str = manifest["digest"]
        """sha256 (hex) of the classes and of every picture's bytes, label and file name, in order:
        the same wherever the set lies."""
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self._cache = cache
        self._checked = checked
        self._splits: dict[str, Split] = {}

    @staticmethod
    def open(path: str, cache: str | None = None, limit: float = 0.0) -> Dataset:
        """The set at `path`, a folder or an address that pyarrow.fs knows (s3://, gs://, ...).

        Files of a remote set are copied to `cache` (default $FTLIB_HOME/cache) when they are first
        needed; `limit` is the GB that its shards may take there, 0 for no limit. Raises DataError:
        nothing there, not a prepared set, unfinished, schema too new, a damaged manifest or index,
        a shard missing or of another size; StorageError when a remote set's storage fails.
        """
        path = str(path).rstrip("/") or "/"
        manifest = read_manifest(path)
        if storage.is_remote(path):
            name, digest = manifest["name"], manifest["digest"]
            copies = Cache.of(path, name=name, digest=digest, root=cache, limit=int(limit * 1e9))
            dataset = Dataset(path, manifest, copies)
        else:
            folder = str(Path(path.removeprefix("file://")).absolute())
            dataset = Dataset(folder, manifest, None)
            dataset._check_sizes()
        for split in dataset.splits:
            dataset.split(split)
        dataset._checked = True
        return dataset

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.path, self.manifest, self._cache, self._checked)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(self.split(name))} {name}" for name in self.splits)
        return f"Dataset({self.name}@{self.digest[:12]}, {len(self.classes)} classes, {counts})"

    @property
    def cache_limit(self) -> int:
        """Most bytes that copies of its shards may take on this machine; 0 for no limit."""
        return 0 if self._cache is None else self._cache.limit

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that this set has: `train`, `val` and, in some sets, `test`."""
        return tuple(name for name in SPLITS if name in self.manifest["splits"])

    @property
    def rules(self) -> dict[str, Any] | None:
        """The options that the set was prepared with; None where its manifest does not say."""
        rules = self.manifest["made"].get("rules")
        return dict(rules) if rules else None

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
        """Check that every file is there at its size. Raises DataError.

        `deep`: also that its sha256 is right, which reads everything.
        """
        self._check_sizes()
        if not deep:
            return
        for entry in self._files():
            found = file_sha256(self.file(entry))
            if found != entry["sha256"]:
                raise DataError(
                    f"{self.path}/{entry['file']} is damaged: its sha256 is {found[:12]}..., the "
                    f"manifest says {entry['sha256'][:12]}.... {_REMEDY}"
                )

    def fetch(self) -> None:
        """Copy all files of a remote set to the cache now, not when they are first needed."""
        for entry in self._files():
            self.file(entry)

    def file(self, entry: FileEntry) -> Path:
        """The local path of one of the manifest's files, fetched and checked if the set is remote.

        Raises DataError for a file that is missing or damaged there, StorageError when the storage
        cannot be reached or the disk is full.
        """
        if self._cache is None:
            return Path(self.path) / entry["file"]
        try:
            return self._cache.get(entry["file"], entry["bytes"], entry["sha256"])
        except (FileNotFoundError, ValueError) as error:
            raise DataError(
                f"{self.path}/{entry['file']} cannot be fetched: {error}. {_REMEDY}"
            ) from error
        except (OSError, storage.StorageError) as error:
            raise storage.StorageError(
                f"{self.path}/{entry['file']} cannot be fetched: {error}. Check the network, the "
                "credentials and the disk"
            ) from error

    def is_here(self, entry: FileEntry) -> bool:
        """Whether `file` would copy nothing."""
        return self._cache is None or self._cache.has(entry["file"], entry["bytes"])

    def _files(self) -> Iterator[FileEntry]:
        for split in self.manifest["splits"].values():
            yield split["index"]
            yield from split["shards"]

    def _check_sizes(self) -> None:
        """Raise DataError for a missing or truncated file. A remote set replaces its own copies."""
        if self._cache is not None:
            return
        for entry in self._files():
            path = Path(self.path) / entry["file"]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"{path} is missing ({error.strerror}). {_REMEDY}") from None
            _check_size(path, size, entry["bytes"])


def open_dataset(data: Data) -> Dataset:
    """The set that a recipe's `data` names, below its `cache_limit`. Raises as `Dataset.open`, and
    ConfigError where no set is named."""
    return Dataset.open(data_path(data.path), limit=data.cache_limit)


_REMEDY = (
    "Restore the file, or prepare the set again: the same jobs/prepare.py command with --overwrite"
)


def _check_size(path: Path, size: int, expected: int) -> None:
    if size != expected:
        raise DataError(
            f"{path} has {size:,} bytes, the manifest says {expected:,}: it is damaged. {_REMEDY}"
        )


class Split:
    """The pictures of one split, by row: 0 to len - 1, in the order of class and file name."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        self.dataset = dataset
        self.name = name
        entry = dataset.manifest["splits"][name]
        self.rows: int = entry["rows"]
        self._entries: list[ShardEntry] = entry["shards"]
        self.shards: tuple[Shard, ...] = _shards(self._entries)
        self._index = _read_index(dataset, entry["index"], self.rows, len(self.shards))
        self._maps: list[memoryview | None] = [None] * len(self.shards)
        self._mapped: deque[int] = deque()
        """Shards that are mapped, in the order of mapping."""
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

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """int64[b]: the labels of `rows` alone, without a copy of all."""
        return self._index["label"][rows].astype(np.int64)

    @property
    def sizes(self) -> np.ndarray:
        """int32[n, 2]: height and width in pixels."""
        return np.stack([self._index["height"], self._index["width"]], axis=1)

    @property
    def sha256(self) -> np.ndarray:
        """S64[n]: sha256 (hex) of each picture's bytes, read from the shards."""
        digests = [d for shard in range(len(self.shards)) for d in self._read(shard, "sha256")]
        return np.array(digests, "S64")

    def image(self, row: int) -> memoryview:
        """The JPEG's bytes, read-only and without a copy.

        The first time this process reads a row its CRC-32 is checked. Raises DataError, naming
        shard, row and file, when the bytes are not those that were prepared.
        """
        shard, _, _, _, offset, length, crc = self._index[self._row(row)].item()
        view = (self._maps[shard] or self._map(shard))[offset : offset + length]
        if not self._checked[row]:
            if zlib.crc32(view) != crc:
                raise DataError(
                    f"{self.where(row)}: the stored bytes were altered since the set was prepared. "
                    f"{_REMEDY}"
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
        """Map a shard into memory.

        The mapping outlives the file handle, so a set of thousands of shards needs no handles.
        """
        view = self._open_map(shard)
        self._unmap_for(len(view))
        self._maps[shard] = view
        self._mapped.append(shard)
        return view

    def _open_map(self, shard: int) -> memoryview:
        import pyarrow as pa

        limited = self.dataset.cache_limit > 0
        for left in reversed(range(3 if limited else 1)):
            path = self.dataset.file(self._entries[shard])
            try:
                with pa.memory_map(str(path)) as file:
                    view = memoryview(file.read_buffer()).cast("B")
            except OSError as error:
                if left:  # another process may have deleted it to make room
                    continue
                raise DataError(f"{path} cannot be read ({error}). {_REMEDY}") from error
            _check_size(path, len(view), self.shards[shard].bytes)
            return view
        raise AssertionError("unreachable")

    def _unmap_for(self, size: int) -> None:
        """Under a limit, let go of old mappings: a deleted file takes room while it is mapped."""
        limit = self.dataset.cache_limit // BLOCKS_IN_CACHE
        if limit == 0:
            return
        mapped = size + sum(self.shards[shard].bytes for shard in self._mapped)
        while self._mapped and mapped > limit:
            shard = self._mapped.popleft()
            self._maps[shard] = None
            mapped -= self.shards[shard].bytes

    def fetch(self, shard: int) -> None:
        """Copy a shard of a remote set to the cache, if it is not there. Raises as `file` does."""
        self.dataset.file(self._entries[shard])

    def is_here(self, shard: int) -> bool:
        """Whether a shard lies on this machine, or in a folder that is mounted here."""
        return self.dataset.is_here(self._entries[shard])

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """int64[b]: the numbers of the shards that `rows` lie in."""
        return self._index["shard"][rows].astype(np.int64)

    def _read_paths(self, shard: int) -> list[str]:
        return self._read(shard, "path")

    def _read(self, shard: int, column: str) -> list[str]:
        import pyarrow.parquet as pq

        file = self.dataset.file(self._entries[shard])
        table = pq.read_table(file, columns=[column], page_checksum_verification=True)
        return table[column].to_pylist()


def _shards(entries: list[ShardEntry]) -> tuple[Shard, ...]:
    shards, start = [], 0
    for entry in entries:
        shards.append(Shard(entry["file"], start, entry["rows"], entry["bytes"], entry["sha256"]))
        start += entry["rows"]
    return tuple(shards)


def _read_index(dataset: Dataset, entry: FileEntry, rows: int, shards: int) -> np.ndarray:
    """The split's records, memory-mapped.

    Its sha256 is checked once, by the process that opens the set: a wrong offset would give a wrong
    picture. Raises DataError.
    """
    path = dataset.file(entry)
    try:
        if not dataset._checked and file_sha256(path) != entry["sha256"]:
            raise ValueError("its sha256 is not the manifest's")
        index = np.load(path, mmap_mode="r" if rows else None, allow_pickle=False)
        if index.dtype != INDEX or len(index) != rows:
            raise ValueError("it does not hold the manifest's rows")
        if not dataset._checked and rows:
            _check_range(index["label"], len(dataset.classes), "class")
            _check_range(index["shard"], shards, "shard")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}). {_REMEDY}") from None
    return index.view(np.ndarray)  # element access through np.memmap takes four times as long


def _check_range(values: np.ndarray, count: int, what: str) -> None:
    if values.min() < 0 or values.max() >= count:
        raise ValueError(f"it names a {what} beyond the manifest's {count:,}")
