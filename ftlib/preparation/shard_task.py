"""Making one shard: the unit of work, of restart, and of what a crash can cost."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

import numpy as np

from ftlib import storage
from ftlib.data.shards import INDEX, PARTS, SCHEMA, SPLITS, DataError, canonical, file_sha256
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox
from ftlib.preparation.shard_writer import ShardWriter
from ftlib.preparation.sources.layout import Entry
from ftlib.preparation.sources.naming import text_of
from ftlib.preparation.sources.places import TooLargeError, read_file

ROWS_PER_SHARD = 4096
BYTES_PER_SHARD = 512 << 20
"""ImageNet's 140 GB make about 330 shards; an interruption costs half a minute of one core."""
READS_AT_ONCE = 8
"""Requests that one shard makes to an address at a time."""
VALIDATION_VERSION = 3
"""Increment when `ftlib.preparation.validate` would store other bytes for the same file, so that
older unfinished shards are made again; a finished set of the version before counts as done."""
PART = np.dtype([*INDEX.descr, ("id", "<u8")])
"""The index record and the first 8 bytes of the stored picture's sha256, to find identical ones."""


class ShardRecord(TypedDict):
    """What is known of a finished shard; stored as JSON beside it until the set is complete."""

    task: str
    """Digest of the task that made it."""
    name: str
    split: str
    file: str
    rows: int
    bytes: int
    sha256: str
    content: str
    """sha256 (hex) of the rows' labels, names and pictures, in order."""
    index_sha256: str
    refused: list[list[str]]
    """Rows of (file, split, class, reason, detail)."""
    repaired: list[list[str]]
    """Rows of (file, split, class, repairs)."""
    moments: list[float]
    """Sums over its pictures of the mean of each channel and of its square."""


@dataclass(frozen=True)
class ShardTask:
    """Everything needed to make one shard, on any machine that reaches `root` and `out`."""

    name: str
    root: str
    out: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    rules: PrepareOptions

    @property
    def split(self) -> str:
        return self.name.partition("-")[0]

    @property
    def digest(self) -> str:
        """sha256 (hex) of what goes in: rules, classes, and every file's name, size and time.

        The same digest gives the same shard.
        """
        return self.digest_of(VALIDATION_VERSION)

    def digest_of(self, version: int) -> str:
        """The digest under another `VALIDATION_VERSION`."""
        files = [[e.file, e.split, e.label, e.bytes, e.mtime_ns] for e in self.entries]
        versions = [SCHEMA, version]
        return hashlib.sha256(
            canonical([*versions, self.name, list(self.classes), self.rules.to_dict(), files])
        ).hexdigest()


def plan(
    root: str,
    out: str,
    classes: tuple[str, ...],
    entries: Sequence[Entry],
    rules: PrepareOptions,
    first: Mapping[str, int] | None = None,
) -> list[ShardTask]:
    """Entries, in their order, cut into shards.

    The cuts depend on the files alone, never on workers or machine. `first` gives the number of
    each split's first shard; 0 where it is not named.
    """
    tasks: list[ShardTask] = []
    for split in SPLITS:
        waiting: list[Entry] = []
        size, number = 0, (first or {}).get(split, 0)
        for entry in [*(e for e in entries if e.split == split), None]:
            if waiting and (
                entry is None
                or len(waiting) >= ROWS_PER_SHARD
                or size + entry.bytes > BYTES_PER_SHARD
            ):
                name = f"{split}-{number:05d}"
                batch = tuple(waiting)
                tasks.append(ShardTask(name, root, out, classes, entries=batch, rules=rules))
                waiting, size, number = [], 0, number + 1
            if entry is not None:
                waiting.append(entry)
                size += entry.bytes
    return tasks


def finished(task: ShardTask) -> ShardRecord | None:
    """The record of this very task, if it was done before and its file is whole: by sha256, by size
    on an object store."""
    try:
        record: ShardRecord = json.loads(storage.read_file(_part(task, "json")) or b"null")
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("task") != task.digest:
        return None
    index = storage.read_file(_part(task, "npy"))
    if index is None or hashlib.sha256(index).hexdigest() != record["index_sha256"]:
        return None
    if record["rows"] == 0:
        return record
    return record if _is_whole(task, record) else None


def _is_whole(task: ShardTask, record: ShardRecord) -> bool:
    target = storage.join(task.out, record["file"])
    if storage.is_remote(task.out):
        fs, path = storage.filesystem(target)
        return bool(fs.get_file_info(path).size == record["bytes"])
    local = Path(target.removeprefix("file://"))
    return (
        local.is_file()
        and local.stat().st_size == record["bytes"]
        and file_sha256(local) == record["sha256"]
    )


def build(
    task: ShardTask,
    sandbox: DecoderSandbox,
    tick: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> ShardRecord:
    """Make the shard, or find that it is made; returns its record. `tick(n)` reports n more files.

    The sandbox has the task's rules; it stays with the caller, who uses it for the next shard.
    Raises DataError when a file cannot be read or the shard cannot be written: storage trouble is
    not a bad picture.
    """
    if (record := finished(task)) is not None:
        tick(len(task.entries))
        return record
    remote = storage.is_remote(task.out)
    local = Path(task.out.removeprefix("file://"))
    folder = Path(tempfile.mkdtemp(prefix="ftlib-")) if remote else local
    temporary = folder / f".tmp-{task.name}-{uuid.uuid4().hex[:8]}"
    try:
        return _build(task, temporary, sandbox, tick, stopped)
    except (OSError, storage.StorageError) as error:
        raise cannot_write(task.out, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        if remote:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class _Outcome:
    """What became of a shard's files."""

    refused: list[list[str]] = field(default_factory=list)
    repaired: list[list[str]] = field(default_factory=list)
    moments: np.ndarray = field(default_factory=lambda: np.zeros(6))


def _build(
    task: ShardTask,
    temporary: Path,
    sandbox: DecoderSandbox,
    tick: Callable[[int], None],
    stopped: Callable[[], bool],
) -> ShardRecord:
    outcome = _Outcome()
    writer = ShardWriter(temporary)
    try:
        for entry, data in _read_ahead(task):
            if stopped():
                raise DataError("stopped")
            _add(task, entry, data, sandbox=sandbox, writer=writer, outcome=outcome)
            tick(1)
        written = writer.finish()
    finally:
        writer.abandon()
    index = np.zeros(written.rows, PART)
    for name in INDEX.names or ():
        index[name] = written.index[name]
    index["id"] = writer.ids
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    record = ShardRecord(
        task=task.digest,
        name=task.name,
        split=task.split,
        file=f"{task.name}.parquet",
        rows=written.rows,
        bytes=written.bytes,
        sha256=written.sha256,
        content=written.content,
        index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest(),
        refused=outcome.refused,
        repaired=outcome.repaired,
        moments=outcome.moments.tolist(),
    )
    if written.rows:
        publish(temporary, storage.join(task.out, record["file"]))
    storage.write_file(_part(task, "npy"), buffer.getvalue())
    storage.write_file(_part(task, "json"), json.dumps(record).encode())
    return record


def _add(
    task: ShardTask,
    entry: Entry,
    data: bytes | Exception | None,
    *,
    sandbox: DecoderSandbox,
    writer: ShardWriter,
    outcome: _Outcome,
) -> None:
    """Examine one file and write it. `data` None: the sandbox reads the file itself."""
    name, file = text_of(task.classes[entry.label]), text_of(entry.file)
    where = storage.join(task.root, entry.file)
    try:
        if isinstance(data, Exception):
            raise data
        picture = sandbox.examine(where if data is None else data, file)
    except ImageRejectedError as error:
        outcome.refused.append([file, entry.split, name, error.reason, error.detail])
    except TooLargeError as error:
        outcome.refused.append([file, entry.split, name, "too_large", str(error)])
    except OSError as error:
        raise DataError(
            f"{where} cannot be read ({error.strerror or error}). If the storage is well, make the "
            "file readable or delete it; then give the same command again: it goes on where it "
            "stopped"
        ) from error
    else:
        size = (picture.height, picture.width)
        writer.add(picture.jpeg, label=entry.label, class_name=name, path=file, size=size)
        outcome.moments += picture.moments
        if picture.repairs:
            outcome.repaired.append([file, entry.split, name, " ".join(picture.repairs)])


def _read_ahead(task: ShardTask) -> Iterator[tuple[Entry, bytes | Exception | None]]:
    """The task's entries with their bytes; None for files on disk, which the sandbox reads.

    Files at an address are requested ahead, at most `READS_AT_ONCE` at a time.
    """
    remote = storage.is_remote(task.root)
    if not remote:
        for entry in task.entries:
            yield entry, _bytes_of(task.root, entry) if entry.place else None
        return
    waiting: deque[tuple[Entry, Future[bytes | Exception]]] = deque()
    with ThreadPoolExecutor(READS_AT_ONCE) as pool:
        try:
            for entry in task.entries:
                waiting.append((entry, pool.submit(_bytes_of, task.root, entry)))
                if len(waiting) > READS_AT_ONCE:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _bytes_of(root: str, entry: Entry) -> bytes | Exception:
    try:
        return entry.place.read() if entry.place else read_file(root, entry.file)
    except (OSError, TooLargeError) as error:
        return error


def part_index(task: ShardTask) -> np.ndarray:
    """The `PART` records of a finished shard."""
    data = storage.read_file(_part(task, "npy"))
    if data is None:
        raise DataError(
            f"{task.out} does not hold what the workers wrote. On several machines --out must be "
            "storage that all of them share, or s3://... or gs://..."
        )
    found: np.ndarray = np.load(io.BytesIO(data), allow_pickle=False)
    return found


def publish(local: Path, uri: str) -> None:
    """Put a finished local file at its place: a rename on the same disk, an upload elsewhere."""
    if not storage.is_remote(uri):
        target = Path(uri.removeprefix("file://"))
        os.replace(local, target)
        handle = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        return
    fs, path = storage.filesystem(uri)
    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with open(local, "rb") as source, fs.open_output_stream(path) as stream:
        while block := source.read(8 << 20):
            stream.write(block)


_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some space, or choose another --out",
    errno.EDQUOT: "the quota is used up. Free some space, or choose another --out",
    errno.EFBIG: "files may not grow that large here (ulimit -f, or the file system's limit). "
    "Raise it, or choose another --out",
    errno.EROFS: "the disk is read-only. Choose another --out",
    errno.EACCES: "permission denied. Choose an --out that you may write to",
    errno.EPERM: "permission denied. Choose an --out that you may write to",
    errno.ENOTDIR: "a part of the path is a file. Choose another --out",
    errno.EEXIST: "there is a file of that name. Choose another --out",
}


def cannot_write(out: str, error: Exception) -> DataError:
    """The error for storage that does not take a set, with what to do."""
    if isinstance(error, storage.StorageError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    other = f"{error}. Check that the storage is there"
    remedy = _REMEDIES.get(getattr(error, "errno", None) or 0, other)
    return DataError(
        f"cannot write {out}: {remedy}. What is finished is kept: the same command goes on where "
        "it stopped"
    )


def _part(task: ShardTask, kind: str) -> str:
    return storage.join(task.out, PARTS, f"{task.name}.{kind}")
