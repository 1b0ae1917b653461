"""Faults by counting: every write, rename and sync gets a number, and those wanted fail."""

import builtins
import errno
import os
import threading
from pathlib import Path

from ftlib import storage
from ftlib.preparation import shard_writer


class FailingWrites:
    """Fails as a full disk does: a write after half of its bytes, a rename or a sync instead.

    Counted from 0, over all that `storage`, `shard_writer` and `Path.write_bytes` do; what a write
    of `storage` syncs by itself is part of it. With `opens`, a folder, every file that anybody else
    opens for writing in it counts too, and Path.rename: for what MLflow and shutil write.
    """

    def __init__(self, monkeypatch, wanted=lambda number, path: False, opens=None):
        self.count, self.wanted, self.opens = 0, wanted, opens
        self._inside = threading.local()
        self._write = storage._write_durably
        monkeypatch.setattr(storage, "_write_durably", self._write_durably)
        self._shard_write = shard_writer._Hashing.write
        monkeypatch.setattr(
            shard_writer._Hashing, "write", lambda file, data: self._write_shard(file, data)
        )
        self._path_write = Path.write_bytes
        monkeypatch.setattr(Path, "write_bytes", lambda path, data: self._write_path(path, data))
        monkeypatch.setattr(
            Path,
            "write_text",
            lambda path, text, encoding="utf-8", **_: self._write_path(path, text.encode()),
        )
        if opens:
            self._open, self._rename_path = builtins.open, Path.rename
            monkeypatch.setattr(builtins, "open", self._open_to_write)
            monkeypatch.setattr(Path, "rename", lambda path, target: self._move(path, target))
        self._replace, self._fsync = os.replace, os.fsync
        monkeypatch.setattr(os, "replace", self._rename)
        monkeypatch.setattr(os, "fsync", self._sync)

    def _fails(self, path):
        number, self.count = self.count, self.count + 1
        return self.wanted(number, str(path))

    def _full(self):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write_durably(self, path, data):
        self._inside.write = True
        try:
            if self._fails(path):
                self._path_write(Path(path), data[: len(data) // 2])
                raise self._full()
            self._write(path, data)
        finally:
            self._inside.write = False

    def _write_shard(self, file, data):
        if self._fails(file._file.name):
            file._file.write(bytes(data)[: len(data) // 2])
            raise self._full()
        return self._shard_write(file, data)

    def _write_path(self, path, data):
        if self._fails(path):
            self._path_write(path, data[: len(data) // 2])
            raise self._full()
        return self._path_write(path, data)

    def _open_to_write(self, file, mode="r", *arguments, **named):
        inside = str(file).startswith(str(self.opens)) and not getattr(self._inside, "write", False)
        opened = self._open(file, mode, *arguments, **named)
        if inside and set("wax") & set(mode) and self._fails(file):
            opened.close()  # it exists, and is empty
            raise self._full()
        return opened

    def _move(self, source, target):
        if self._fails(target):
            raise self._full()
        return self._rename_path(source, target)

    def _rename(self, source, target):
        if self._fails(target):
            raise self._full()
        self._replace(source, target)

    def _sync(self, handle):
        if not getattr(self._inside, "write", False) and self._fails(f"sync of {handle}"):
            raise self._full()
        self._fsync(handle)


def whole(folder, *, but=()):
    """Path below `folder` -> bytes, of all files but those that are, or lie in, one of `but`;
    temporary ones must be gone."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and not set(path.relative_to(folder).parts) & set(but)
    }
    assert not [name for name in found if ".tmp-" in name]
    return found
