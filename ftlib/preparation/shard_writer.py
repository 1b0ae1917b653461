"""Writing one shard: Parquet whose pictures lie contiguous and uncompressed, with the record of
where each one begins."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftlib.data.shards import INDEX, canonical

ROW_GROUP_ROWS = 256
ROW_GROUP_BYTES = 32 << 20
COLUMNS = pa.schema(
    [
        pa.field("image", pa.binary(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Written:
    """A finished shard: its rows, size, sha256, the sha256 of its contents in order, and its index
    (`shard` still 0)."""

    rows: int
    bytes: int
    sha256: str
    content: str
    index: np.ndarray


class _Hashing(io.RawIOBase):
    """A file that hashes what goes through it."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close()
        self.sha256 = hashlib.sha256()
        self.discards = False
        """What is written from now on goes nowhere."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.discards:
            self._file.write(data)
            self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        return self._file.fileno()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()


class ShardWriter:
    """Add rows, then `finish`. Only the path it was given is touched; the caller renames the file
    when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = 0
        self._sink = _Hashing(path)
        self._content = hashlib.sha256()
        self._waiting: list[tuple[Any, ...]] = []
        self._waiting_bytes = 0
        self._index: list[tuple[int, ...]] = []
        self.ids: list[int] = []
        """The first 8 bytes of each picture's sha256."""
        self._writer = pq.ParquetWriter(
            self._sink,
            COLUMNS,
            compression={name: "NONE" if name == "image" else "SNAPPY" for name in COLUMNS.names},
            use_dictionary=["class"],
            column_encoding={"image": "PLAIN"},
            # Statistics of the pictures would be whole pictures in the footer.
            write_statistics=["label", "height", "width"],
            write_page_checksum=True,
        )

    def add(
        self, jpeg: bytes, *, label: int, class_name: str, path: str, size: tuple[int, int]
    ) -> None:
        """Append one picture; `size` is (height, width) in pixels."""
        height, width = size
        sha256 = hashlib.sha256(jpeg).hexdigest()
        self.ids.append(int(sha256[:16], 16))
        self._content.update(canonical([label, path, sha256]))
        self._waiting.append((jpeg, label, class_name, path, height, width, sha256))
        self._waiting_bytes += len(jpeg)
        self._index.append((0, label, height, width, 0, len(jpeg), zlib.crc32(jpeg)))
        self.rows += 1
        if len(self._waiting) >= ROW_GROUP_ROWS or self._waiting_bytes >= ROW_GROUP_BYTES:
            self._write_group()

    def finish(self) -> Written:
        """Write what is left, flush it to disk (fsync), and find every picture's offset in it."""
        self._write_group()
        self._writer.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        index = locate(self.path, np.array(self._index, dtype=INDEX))
        return Written(
            self.rows,
            self.path.stat().st_size,
            self._sink.sha256.hexdigest(),
            self._content.hexdigest(),
            index,
        )

    def abandon(self) -> None:
        """Close without finishing, after an error."""
        # Arrow's writer writes a footer when it is closed, or else when it is collected: at any
        # later moment, with an error from a closed file.
        self._sink.discards = True
        with contextlib.suppress(OSError, pa.ArrowException):
            self._writer.close()
        self._sink.close()

    def _write_group(self) -> None:
        if self._waiting:
            columns = [
                pa.array(values, type=field.type)
                for values, field in zip(zip(*self._waiting), COLUMNS)
            ]
            self._writer.write_table(
                pa.Table.from_arrays(columns, schema=COLUMNS), row_group_size=len(self._waiting)
            )
            self._waiting, self._waiting_bytes = [], 0


def locate(path: Path, index: np.ndarray) -> np.ndarray:
    """`index` with `offset` filled in, by walking through the file.

    A PLAIN value is its length (4 bytes, little-endian) and its bytes. Values of a page follow one
    another; between pages lie headers and other columns. Each value is looked for where the last
    one ended and recognized by its length and CRC-32, so the offsets are right whatever pyarrow
    puts in between. Raises ValueError when a picture is not in the file.
    """
    index = index.copy()
    with pa.memory_map(str(path)) as file:
        data = memoryview(file.read_buffer()).cast("B")
    at = 4  # after Parquet's magic
    for row, record in enumerate(index):
        length, crc = int(record["length"]), int(record["crc32"])
        prefix = length.to_bytes(4, "little")
        while True:
            if data[at : at + 4] == prefix and zlib.crc32(data[at + 4 : at + 4 + length]) == crc:
                break
            at = _next(data, prefix, at + 1)
            if at < 0:
                raise ValueError(
                    f"row {row} is not in {path}: pyarrow {pa.__version__} did not write it PLAIN "
                    "and uncompressed"
                )
        index[row]["offset"] = at + 4
        at += 4 + length
    return index


def _next(data: memoryview, prefix: bytes, start: int) -> int:
    """Where `prefix` comes next at or after `start`; -1 if nowhere. Copies 64 KiB at a time, as
    memoryview has no find."""
    while start < len(data):
        found = bytes(data[start : start + (64 << 10) + 3]).find(prefix)
        if found >= 0:
            return start + found
        start += 64 << 10
    return -1
