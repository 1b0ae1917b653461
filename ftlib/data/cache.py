"""A local copy of a remote set's files.

Files are copied when they are first needed, one by one, and shared by all processes of a machine.
With a limit, the files that were not used for longest make room for new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ftlib import storage

log = logging.getLogger("ftlib.data")

TRIES = 5
"""How often a file is asked for; storage on a network fails now and then."""
FIRST_WAIT = 0.5
"""Seconds before the second try at most; `storage.pauses` has the others."""


@dataclass(frozen=True)
class Cache:
    """Copies of the files at `uri`, in a folder below `root` that belongs to their content.

    A changed set has another digest and so another folder: the two never mix.
    """

    uri: str
    root: Path
    folder: Path
    limit: int = 0
    """Most bytes that copies of shards may take; 0 for no limit."""

    @staticmethod
    def of(uri: str, *, name: str, digest: str, root: str | None = None, limit: int = 0) -> Cache:
        """`name` and `digest` are the set's. Raises storage.UnsafeNameError for `a/b` as a name."""
        if root is None:
            from ftlib.paths import home

            root = str(home() / "cache")
        folder = storage.inside(root, f"{name.lstrip('.')}-{digest[:16]}", what=f"name of {uri}")
        return Cache(uri, Path(root), Path(folder), limit)

    def get(self, file: str, size: int, sha256: str) -> Path:
        """The local path of `file`, copied first if it is not here.

        Processes that need the same file wait for one copy. A copy appears under its name only when
        it is whole and checked. Under a limit it may be deleted again when other files are asked
        for. Raises OSError or StorageError when the storage cannot be reached or the disk is full,
        and ValueError when the name leads out of the folder or the copy's sha256 is wrong.
        """
        target = Path(storage.inside(str(self.folder), file, what=f"file of {self.uri}"))
        if self._has(target, size):
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{file}.lock"):
            if self._has(target, size):
                return target
            for left_behind in self.folder.glob(f".tmp-{file}-*"):  # of a killed process
                left_behind.unlink(missing_ok=True)
            self._make_room(size)
            temporary = self.folder / f".tmp-{file}-{os.getpid()}"
            try:
                self._copy_checked(file, temporary, sha256)
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def has(self, file: str, size: int) -> bool:
        """Whether the copy of `file` is here."""
        return self._has(self.folder / file, size)

    def _has(self, path: Path, size: int) -> bool:
        try:
            found = path.stat().st_size == size
            if found and self.limit:
                os.utime(path)  # the time of its last use
        except OSError:
            return False
        return found

    def _make_room(self, size: int) -> None:
        """Delete shards under a limit, the longest unused first. Raises OSError for a full disk."""
        if self.limit:
            with FileLock(self.folder / ".room.lock"):
                shards = sorted(_shards(self.folder))
                free = self.limit - sum(bytes_ for _, bytes_, _ in shards)
                for _, bytes_, path in shards:
                    if free >= size:
                        break
                    path.unlink(missing_ok=True)
                    free += bytes_
        if shutil.disk_usage(self.folder).free < size:
            raise OSError(
                f"the cache {self.folder} has no room for {size:,} bytes; free some, set "
                "FTLIB_HOME to a larger disk, or set data.cache_limit"
            )

    def _copy_checked(self, file: str, target: Path, sha256: str) -> None:
        """Copy `file` to `target`, asking again where the storage fails."""
        for pause in (*storage.pauses(FIRST_WAIT, TRIES), None):
            try:
                found = self._copy(file, target)
                if found == sha256:
                    return
                raise ValueError(
                    f"its sha256 is {found[:12]}..., the manifest says {sha256[:12]}..."
                )
            except (OSError, storage.StorageError, ValueError) as error:
                if pause is None or isinstance(error, FileNotFoundError):
                    raise
                log.info("%s/%s: %s; asking again in %.1f s", self.uri, file, error, pause)
                time.sleep(pause)

    def _copy(self, file: str, target: Path) -> str:
        """Copy `file` to `target` and return its sha256 (hex)."""
        fs, path = storage.filesystem(storage.join(self.uri, file))
        digest = hashlib.sha256()
        with fs.open_input_stream(path) as source, open(target, "wb") as copy:
            while block := source.read(8 << 20):
                digest.update(block)
                copy.write(block)
        return digest.hexdigest()


def _shards(folder: Path) -> list[tuple[int, int, Path]]:
    """(time of last use in ns, bytes, path) of the shards in the folder."""
    found = []
    for path in folder.glob("*.parquet"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, stat.st_size, path))
    return found
