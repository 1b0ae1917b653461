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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlib import storage
from ftlib.data.shards import INDEX, PARTS, SCHEMA, DataError, canonical, file_sha256
from ftlib.preparation.options import ImageRejectedError, PrepareOptions
from ftlib.preparation.sandbox import DecoderSandbox
from ftlib.preparation.shard_writer import ShardWriter
from ftlib.preparation.sources import Entry

ROWS_PER_SHARD = 4096
BYTES_PER_SHARD = 512 << 20
"""ImageNet's 140 GB make about 330 shards; half a minute of one core is lost when one is interrupted."""
ADMISSION = 3
"""Version of `ftlib.preparation.validate`. Increment it when other bytes would be stored for the same
file, so that older unfinished shards are made again; a finished set of the version before counts as
done."""
PART = np.dtype([*INDEX.descr, ("id", "<u8")])
"""The index record and the first 8 bytes of the stored picture's sha256, to find identical pictures."""


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
    def digest(self) -> str:
        """sha256 (hex) of what goes in: rules, classes, and every file's name, size and time.

        The same digest gives the same shard.
        """
        return self.digest_of(ADMISSION)

    def digest_of(self, admission: int) -> str:
        """The digest under another version of `ADMISSION`."""
        files = [[e.file, e.split, e.label, e.bytes, e.mtime_ns] for e in self.entries]
        rules = self.rules.to_dict()
        content = [SCHEMA, admission, self.name, list(self.classes), rules, files]
        return hashlib.sha256(canonical(content)).hexdigest()


def plan(
    root: str, out: str, classes: tuple[str, ...], entries: tuple[Entry, ...], rules: PrepareOptions
) -> list[ShardTask]:
    """Entries, in their order, cut into shards. The cuts depend on the files alone, never on workers or machine."""
    tasks: list[ShardTask] = []
    for split in ("train", "val"):
        waiting: list[Entry] = []
        size = number = 0
        for entry in [*(e for e in entries if e.split == split), None]:
            if waiting and (
                entry is None
                or len(waiting) >= ROWS_PER_SHARD
                or size + entry.bytes > BYTES_PER_SHARD
            ):
                tasks.append(
                    ShardTask(f"{split}-{number:05d}", root, out, classes, tuple(waiting), rules)
                )
                waiting, size, number = [], 0, number + 1
            if entry is not None:
                waiting.append(entry)
                size += entry.bytes
    return tasks


def finished(task: ShardTask) -> dict[str, Any] | None:
    """The record of this very task, if it was done before and its file is whole (sha256; the size on an object store)."""
    try:
        record = json.loads(storage.read_file(_part(task, "json")) or b"null")
    except ValueError:
        return None
    if not isinstance(record, dict) or record.get("task") != task.digest:
        return None
    index = storage.read_file(_part(task, "npy"))
    if index is None or hashlib.sha256(index).hexdigest() != record["index_sha256"]:
        return None
    if record["rows"] == 0:
        return record
    target = storage.join(task.out, record["file"])
    if storage.is_remote(task.out):
        fs, path = storage.filesystem(target)
        return record if fs.get_file_info(path).size == record["bytes"] else None
    local = Path(target.removeprefix("file://"))
    return (
        record
        if local.is_file()
        and local.stat().st_size == record["bytes"]
        and file_sha256(local) == record["sha256"]
        else None
    )


def build(
    task: ShardTask,
    examiner: DecoderSandbox,
    tick: Callable[[int], None],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Make the shard, or find that it is made; returns its record. `tick(n)` is told of every n files done.

    The examiner's rules are the task's; it stays with the caller, who uses it for the next shard.
    Raises DataError when a file cannot be read or the shard cannot be written: storage trouble is not a bad picture.
    """
    if (record := finished(task)) is not None:
        tick(len(task.entries))
        return record
    remote = storage.is_remote(task.out)
    folder = (
        Path(tempfile.mkdtemp(prefix="ftlib-"))
        if remote
        else Path(task.out.removeprefix("file://"))
    )
    temporary = folder / f".tmp-{task.name}-{uuid.uuid4().hex[:8]}"
    try:
        return _build(task, temporary, examiner, tick, stopped)
    except (OSError, storage.StorageError) as error:
        raise cannot_write(task.out, error) from error
    finally:
        temporary.unlink(missing_ok=True)
        if remote:
            shutil.rmtree(folder, ignore_errors=True)


def _build(
    task: ShardTask,
    temporary: Path,
    examiner: DecoderSandbox,
    tick: Callable[[int], None],
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    refused: list[list[str]] = []
    repaired: list[list[str]] = []
    moments = np.zeros(6)
    writer = ShardWriter(temporary)
    try:
        for entry in task.entries:
            if stopped():
                raise DataError("stopped")
            name = task.classes[entry.label]
            try:
                picture = examiner.examine(os.path.join(task.root, entry.file))
            except ImageRejectedError as error:
                refused.append([_text(entry.file), entry.split, name, error.reason, error.detail])
            except OSError as error:
                raise DataError(
                    f"{os.path.join(task.root, entry.file)} cannot be read ({error.strerror or error}). If the disk is well, "
                    "make the file readable or delete it; then give the same command again: it goes on where it stopped"
                ) from error
            else:
                writer.add(
                    picture.jpeg,
                    entry.label,
                    _text(name),
                    _text(entry.file),
                    picture.height,
                    picture.width,
                )
                moments += picture.moments
                if picture.repairs:
                    repaired.append(
                        [_text(entry.file), entry.split, name, " ".join(picture.repairs)]
                    )
            tick(1)
        written = writer.finish()
    finally:
        writer.abandon()
    index = np.zeros(written.rows, PART)
    for field in INDEX.names or ():
        index[field] = written.index[field]
    index["id"] = writer.ids
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    record = {
        "task": task.digest,
        "name": task.name,
        "split": task.name.partition("-")[0],
        "file": f"{task.name}.parquet",
        "rows": written.rows,
        "bytes": written.bytes,
        "sha256": written.sha256,
        "content": written.content,
        "index_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "refused": refused,
        "repaired": repaired,
        "moments": moments.tolist(),
    }
    if written.rows:
        publish(temporary, storage.join(task.out, str(record["file"])))
    storage.write_file(_part(task, "npy"), buffer.getvalue())
    storage.write_file(_part(task, "json"), json.dumps(record).encode())
    return record


def part_index(task: ShardTask) -> np.ndarray:
    """The `PART` records of a finished shard."""
    data = storage.read_file(_part(task, "npy"))
    if data is None:
        raise DataError(
            f"{task.out} does not hold what the workers wrote. On several machines --out must be storage that all of them share, or s3://... or gs://..."
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


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
    with open(local, "rb") as source, fs.open_output_stream(path) as target:
        while block := source.read(8 << 20):
            target.write(block)


def cannot_write(out: str, error: Exception) -> DataError:
    if isinstance(error, storage.StorageError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    remedy = {
        errno.ENOSPC: "the disk is full. Free some space, or choose another --out",
        errno.EDQUOT: "the quota is used up. Free some space, or choose another --out",
        errno.EFBIG: "files may not grow that large here (ulimit -f, or the file system's limit). Raise it, or choose another --out",
        errno.EROFS: "the disk is read-only. Choose another --out",
        errno.EACCES: "permission denied. Choose an --out that you may write to",
        errno.EPERM: "permission denied. Choose an --out that you may write to",
        errno.ENOTDIR: "a part of the path is a file. Choose another --out",
        errno.EEXIST: "there is a file of that name. Choose another --out",
    }.get(getattr(error, "errno", None) or 0, f"{error}. Check that the storage is there")
    return DataError(
        f"cannot write {out}: {remedy}. What is finished is kept: the same command goes on where it stopped"
    )


def _part(task: ShardTask, kind: str) -> str:
    return storage.join(task.out, PARTS, f"{task.name}.{kind}")


def _text(name: str) -> str:
    """A file name as Unicode; bytes that are none become U+FFFD."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
