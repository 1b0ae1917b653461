"""A local copy of a remote set's files, made file by file as they are needed and shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ftlib import storage


@dataclass(frozen=True)
class Cache:
    """Copies of the files at `uri` below `root`, in a folder of their own per content (`digest`), so a changed set never mixes."""

    uri: str
    root: Path
    folder: Path

    @staticmethod
    def of(uri: str, name: str, digest: str, root: str | None = None) -> Cache:
        if root is None:
            from ftlib.paths import home

            root = str(home() / "cache")
        return Cache(uri, Path(root), Path(root) / f"{name}-{digest[:16]}")

    def get(self, file: str, size: int, sha256: str) -> Path:
        """The local path of `file`, copied first if it is not here. Raises OSError, or ValueError when the copy's sha256 is wrong.

        Processes that need the same file wait for one copy. A copy appears under its name only when whole and checked.
        """
        target = self.folder / file
        if _has(target, size):
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with _only_one(self.folder / f".{file}.lock"):
            if _has(target, size):
                return target
            if shutil.disk_usage(self.folder).free < size:
                raise OSError(
                    f"the cache {self.folder} has no room for {size:,} bytes; free some, or set FTLIB_HOME to a larger disk"
                )
            temporary = self.folder / f".tmp-{file}-{os.getpid()}"
            try:
                digest = self._copy(file, temporary)
                if digest != sha256:
                    raise ValueError(
                        f"its sha256 is {digest[:12]}..., the manifest says {sha256[:12]}..."
                    )
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def _copy(self, file: str, target: Path) -> str:
        fs, path = storage.filesystem(storage.join(self.uri, file))
        digest = hashlib.sha256()
        with fs.open_input_stream(path) as source, open(target, "wb") as copy:
            while block := source.read(8 << 20):
                digest.update(block)
                copy.write(block)
        return digest.hexdigest()


def _has(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with open(lock, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield
