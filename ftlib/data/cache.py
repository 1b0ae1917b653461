"""A local copy of a remote set's files.

Files are copied when they are first needed, one by one, and shared by all processes of a machine.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from ftlib import storage


@dataclass(frozen=True)
class Cache:
    """Copies of the files at `uri`, in a folder below `root` that belongs to their content.

    A changed set has another digest and so another folder: the two never mix.
    """

    uri: str
    root: Path
    folder: Path

    @staticmethod
    def of(uri: str, name: str, digest: str, root: str | None = None) -> Cache:
        """`name` and `digest` are the set's. Raises storage.UnsafeNameError for `a/b` as a name."""
        if root is None:
            from ftlib.paths import home

            root = str(home() / "cache")
        folder = storage.inside(root, f"{name.lstrip('.')}-{digest[:16]}", what=f"name of {uri}")
        return Cache(uri, Path(root), Path(folder))

    def get(self, file: str, size: int, sha256: str) -> Path:
        """The local path of `file`, copied first if it is not here.

        Processes that need the same file wait for one copy. A copy appears under its name only when
        it is whole and checked. Raises OSError, or ValueError when the name leads out of the folder
        or the copy's sha256 is wrong.
        """
        target = Path(storage.inside(str(self.folder), file, what=f"file of {self.uri}"))
        if _has(target, size):
            return target
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / f".{file}.lock"):
            if _has(target, size):
                return target
            self._check_space(size)
            temporary = self.folder / f".tmp-{file}-{os.getpid()}"
            try:
                found = self._copy(file, temporary)
                if found != sha256:
                    raise ValueError(
                        f"its sha256 is {found[:12]}..., the manifest says {sha256[:12]}..."
                    )
                os.replace(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
        return target

    def _check_space(self, size: int) -> None:
        if shutil.disk_usage(self.folder).free < size:
            raise OSError(
                f"the cache {self.folder} has no room for {size:,} bytes; free some, or set "
                "FTLIB_HOME to a larger disk"
            )

    def _copy(self, file: str, target: Path) -> str:
        """Copy `file` to `target` and return its sha256 (hex)."""
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
