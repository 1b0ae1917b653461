"""Where the bytes of a picture lie, and how any process reads them.

A file of its own is named by the source's root and its path. Other pictures lie inside a container
(an archive, a Parquet file); a `Place` says where, is small and can be pickled, so that a worker on
another machine can read it. Containers and files may lie on disk or at an address.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol, TypeVar

from ftlib import storage
from ftlib.data.shards import DataError

ATTEMPTS = 4
"""Times that a read from an address is tried."""
FIRST_WAIT = 0.5
"""Seconds before the second attempt at most; `storage.pauses` has the others."""
LARGEST_FILE = 1 << 30
"""Bytes. Larger files are not read into memory."""
GZIP_STEP = 32 << 20
"""Bytes of decompressed data between two points from which reading can start."""


T = TypeVar("T")


class Place(Protocol):
    """Where the bytes of one picture lie."""

    def read(self) -> bytes:
        """The picture's bytes. Raises OSError where they cannot be read."""
        ...


class TooLargeError(ValueError):
    """A file of more than `LARGEST_FILE` bytes."""


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that lie uncompressed in a container: a member of a tar, or of a zip."""

    container: str
    offset: int
    length: int

    def read(self) -> bytes:
        return _whole(read_range(self.container, self.offset, self.length), self.length, self)


@dataclass(frozen=True, slots=True)
class DeflatedSpan:
    """A member of a zip. `packed` is its length in the archive, `length` that of its contents."""

    container: str
    offset: int
    packed: int
    length: int

    def read(self) -> bytes:
        packed = _whole(read_range(self.container, self.offset, self.packed), self.packed, self)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpack.decompress(packed, self.length + 1)
        except zlib.error as error:
            raise OSError(f"{self.container} is damaged ({error})") from None
        if len(data) > self.length:
            raise OSError(f"{self.container} is damaged: a member is larger than the archive says")
        return _whole(data, self.length, self)


@dataclass(frozen=True, slots=True)
class GzipSpan:
    """A member of a tar.gz. `offset` counts in the decompressed tar."""

    container: str
    offset: int
    length: int

    def read(self) -> bytes:
        data = gzip_reader(self.container).read(self.offset, self.length)
        return _whole(data, self.length, self)


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """One value of a Parquet file: `row` counts within the row group `group`."""

    container: str
    column: str
    group: int
    row: int

    def read(self) -> bytes:
        value = _row_group(self.container, self.column, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if data is None:
            raise OSError(f"{self.container}: row {self.row} of group {self.group} has no bytes")
        return bytes(data)


def _whole(data: bytes, length: int, place: Span | DeflatedSpan | GzipSpan) -> bytes:
    if len(data) != length:
        raise OSError(f"{place.container} is cut short: {len(data):,} of {length:,} bytes")
    return data


# --- files and containers ---


def read_file(root: str, path: str, limit: int = LARGEST_FILE) -> bytes:
    """The file `path` below `root`, a folder or an address.

    Raises OSError where it cannot be read, TooLargeError where it has more than `limit` bytes.
    """
    where = storage.join(root, path)

    def read() -> bytes:
        with opened(where) as file:
            return file.read(limit + 1)

    data = retried(read) if storage.is_remote(root) else read()
    if len(data) > limit:
        raise TooLargeError(f"{where} has more than {limit:,} bytes")
    return data


def read_range(container: str, offset: int, length: int) -> bytes:
    """`length` bytes of a container from `offset`; fewer at its end."""

    def read() -> bytes:
        with opened(container) as file:
            file.seek(offset)
            return file.read(length)

    return retried(read) if storage.is_remote(container) else read()


@contextmanager
def opened(where: str) -> Iterator[IO[bytes]]:
    """A file on disk or at an address, open for reading at any position."""
    if not storage.is_remote(where):
        with open(where.removeprefix("file://"), "rb") as file:
            yield file
        return
    fs, path = filesystem(where)
    with fs.open_input_file(path) as remote:
        yield remote


def filesystem(where: str) -> tuple[Any, str]:
    """(pyarrow file system, path within it) of an address; hf:// and https:// through fsspec."""
    scheme = where.partition("://")[0]
    if scheme not in ("hf", "http", "https"):
        return storage.filesystem(where)
    try:
        import fsspec
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, path = fsspec.core.url_to_fs(where)
    except ImportError as error:
        raise DataError(
            f"{where}: reading {scheme}:// needs another package ({error}). Install it, or copy "
            "the pictures to a folder"
        ) from error
    return PyFileSystem(FSSpecHandler(fs)), path


def retried(read: Callable[[], T]) -> T:
    """`read()`, tried again after an OSError that is not about the file itself."""
    for pause in (*storage.pauses(FIRST_WAIT, ATTEMPTS), None):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if pause is None:
                raise
        time.sleep(pause)
    raise AssertionError("unreachable")


def _row_group(container: str, column: str, group: int) -> Any:
    """One column of a row group. Rows are read in their order, so each thread keeps the last."""
    import pyarrow.parquet as pq

    key = (container, _version(container), column, group)
    if getattr(_ROW_GROUP, "key", None) == key:
        return _ROW_GROUP.values

    def read() -> Any:
        with opened(container) as file, pq.ParquetFile(file) as parquet:
            return parquet.read_row_group(group, columns=[column]).column(0)

    values = retried(read) if storage.is_remote(container) else read()
    _ROW_GROUP.key, _ROW_GROUP.values = key, values
    return values


_ROW_GROUP = threading.local()


def _version(container: str) -> int:
    """What changes when a file on disk does; 0 at an address."""
    return 0 if storage.is_remote(container) else os.stat(container).st_mtime_ns


# --- gzip ---


class GzipReader:
    """Random access to a gzip file: the decompressor's state is kept every `GZIP_STEP` bytes.

    A reader belongs to one thread; the states are shared by all readers of the file.
    """

    def __init__(self, container: str, points: list[tuple[int, int, Any]]) -> None:
        self._container = container
        self._points = points
        """(position in the contents, position in the file, decompressor at that point)"""
        self._restart(0, 0, zlib.decompressobj(16 + zlib.MAX_WBITS))

    def _restart(self, position: int, packed: int, unpack: Any) -> None:
        self._position, self._packed, self._unpack = position, packed, unpack
        self._ahead = b""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes of the contents from `offset`; fewer at the end. Raises OSError."""
        self._start_near(offset)
        with opened(self._container) as file:
            file.seek(self._packed)
            while self._position < offset:
                if not self._advance(file, min(offset - self._position, 1 << 20)):
                    return b""
            pieces: list[bytes] = []
            while length > 0 and (piece := self._advance(file, min(length, 1 << 20))):
                pieces.append(piece)
                length -= len(piece)
            return b"".join(pieces)

    def _start_near(self, offset: int) -> None:
        """Go to the last known point before `offset`, unless this reader is nearer already."""
        nearest = max((p for p in self._points if p[0] <= offset), default=None, key=lambda p: p[0])
        if nearest and (offset < self._position or nearest[0] > self._position):
            self._restart(nearest[0], nearest[1], nearest[2].copy())
        elif offset < self._position:
            self._restart(0, 0, zlib.decompressobj(16 + zlib.MAX_WBITS))

    def _advance(self, file: IO[bytes], most: int) -> bytes:
        """The next piece of the contents, of at most `most` bytes; empty at the end."""
        while True:
            if self._unpack.eof:  # the next member of a file of several
                rest = self._unpack.unused_data + self._ahead
                self._ahead = b""
                rest = rest or self._packed_block(file)
                if not rest.strip(b"\0"):  # the end, or padding after it
                    return b""
                self._unpack = zlib.decompressobj(16 + zlib.MAX_WBITS)
                self._ahead = rest
            data = self._unpack.unconsumed_tail or self._ahead
            self._ahead = b""
            try:
                piece = self._unpack.decompress(data, most)
            except zlib.error as error:
                raise OSError(f"{self._container} is damaged ({error})") from None
            if piece:
                self._position += len(piece)
                return piece
            if not self._unpack.eof and not self._unpack.unconsumed_tail:
                self._keep_point()
                self._ahead = self._packed_block(file)
                if not self._ahead:
                    raise OSError(f"{self._container} is cut short")

    def _packed_block(self, file: IO[bytes]) -> bytes:
        block = file.read(1 << 16)
        self._packed += len(block)
        return block

    def _keep_point(self) -> None:
        with _POINTS_LOCK:
            last = self._points[-1][0] if self._points else 0
            if self._position >= last + GZIP_STEP:
                self._points.append((self._position, self._packed, self._unpack.copy()))


_POINTS: dict[tuple[str, int], list[tuple[int, int, Any]]] = {}
_POINTS_LOCK = threading.Lock()
_READERS = threading.local()


def gzip_reader(container: str) -> GzipReader:
    """This thread's reader of a file."""
    key = (container, _version(container))
    if getattr(_READERS, "key", None) != key:
        with _POINTS_LOCK:
            points = _POINTS.setdefault(key, [])
        _READERS.key, _READERS.reader = key, GzipReader(container, points)
    reader: GzipReader = _READERS.reader
    return reader
