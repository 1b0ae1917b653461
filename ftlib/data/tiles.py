"""JPEGs that restart markers divide into a grid of tiles, and cutting a crop's tiles out of them.

A baseline JPEG stores minimum coded units (MCUs, 8 or 16 pixels a side) row by row. Each
restart marker resets the decoder, so the data between two markers decode by themselves. Where a
whole number of such intervals makes a row of MCUs, the intervals are tiles. `Tiles.cut` copies
the tiles that cover a box behind a header with the new size, and renumbers their markers: the
result is a shorter, ordinary JPEG for any decoder. Within the box it decodes to exactly the
pixels of the whole picture.

`encode` writes such files, with a table of the tiles' places in an application segment, so that
nobody has to search for markers. Any viewer opens them. Markers make them a few percent longer,
Huffman codes made for each picture about as much shorter.
"""

from __future__ import annotations

import io
import struct
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL import Image

from ftlib.data.decode import Jpeg, as_memoryview

TILE = 32
"""Width of a tile in pixels, as near as the picture's width allows. Smaller tiles fit a crop
closer and cost more bytes."""
CONTEXT = 1
"""Pixels around a box that decoding its edge looks at, to interpolate halved chroma; pictures with
full chroma need none."""
TABLE = b"ftlib-tiles\0"
"""Begins the APP11 segment, before the layout (`_Layout`) and the end of each tile: uint16
(little-endian) up to 64 KiB, uint32 beyond."""
_FIELDS, _SIZE = struct.Struct("<IIHHBBH"), struct.Struct(">HH")
_U2, _U4 = np.dtype("<u2"), np.dtype("<u4")
_NUMBERS = np.resize(np.arange(0xD0, 0xD8, dtype=np.uint8), 1 << 15)


class Cut(NamedTuple):
    jpeg: bytearray
    """The tiles as a JPEG."""
    top: int
    left: int
    """Place of its first pixel in the whole picture."""


class _Layout(NamedTuple):
    """What a header says about the tiles."""

    size_at: int
    """Offset of height and width in the frame header."""
    data_at: int
    """Offset of the coded data."""
    height: int
    width: int
    mcu_height: int
    mcu_width: int
    interval: int
    """MCUs per tile."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        tile_width = self.interval * self.mcu_width
        return -(-self.height // self.mcu_height), -(-self.width // tile_width)


def interval(width: int, mcu: int) -> int:
    """MCUs per tile for a picture of this width.

    Of the divisors of the MCUs in a row, the one that comes closest to `TILE` pixels.
    """
    across, wanted = ceil(width / mcu), TILE // mcu
    divisors = [d for d in range(1, min(across, 2 * wanted) + 1) if across % d == 0]
    return min(divisors, key=lambda d: abs(np.log2(d / wanted)))


def encode(pixels: np.ndarray, quality: int, subsampling: str = "420") -> bytes:
    """uint8[H, W, 3] as a baseline JPEG of tiles.

    `subsampling` of the chroma is 444, 422 or 420; any other value means 444.
    """
    halved = {"422": 1, "420": 2}.get(subsampling, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out,
        "JPEG",
        quality=quality,
        subsampling=halved,
        optimize=True,
        restart_marker_blocks=interval(pixels.shape[1], 16 if halved else 8),
    )
    return with_table(out.getvalue())


def with_table(jpeg: bytes) -> bytes:
    """The JPEG with a table of its tiles, after the application segments at its beginning.

    Unchanged where it has no tiles, has a table already, or has too many tiles for one.
    """
    data = memoryview(jpeg)
    layout = _layout(data)
    if layout is None or _table_at(data)[1] or (ends := _found(data, layout)) is None:
        return jpeg
    numbers = ends.astype("<u2" if ends[-1] <= 0xFFFF else "<u4").tobytes()
    length = 2 + len(TABLE) + _FIELDS.size + len(numbers)
    if length > 0xFFFF:
        return jpeg
    at, _ = _table_at(data)
    moved = layout._replace(
        size_at=layout.size_at + 2 + length, data_at=layout.data_at + 2 + length
    )
    return b"".join(
        [
            jpeg[:at],
            b"\xff\xeb",
            length.to_bytes(2, "big"),
            TABLE,
            _FIELDS.pack(*moved),
            numbers,
            jpeg[at:],
        ]
    )


class Tiles(NamedTuple):
    """What the header and the table of a JPEG say about its tiles."""

    data: memoryview
    table_at: int
    table_end: int
    """Begin and end of the table's segment; the end is 0 where there is none."""
    layout: _Layout
    ends: np.ndarray | None
    """uint16 or uint32[tiles]: end of each, counted from `layout.data_at`; None without a table."""

    def cut(self, top: int, left: int, height: int, width: int, shrink: int = 1) -> Cut | None:
        """The tiles that cover a box (in pixels, within the picture).

        None where nearly all would be needed, or where the file is damaged. `shrink`: the
        result will be decoded to 1/shrink of each side (up to 1/8; the cut begins at a multiple
        of 8 pixels).
        """
        data, layout, ends = self.data, self.layout, self.ends
        tile_height, tile_width = layout.mcu_height, layout.interval * layout.mcu_width
        full_chroma = layout.mcu_width == tile_height == 8
        context = 0 if full_chroma else CONTEXT * shrink
        rows, columns = layout.grid
        x0, x1 = _covering(left - context, left + width + context, tile_width, columns)
        y0, y1 = _covering(top - context, top + height + context, tile_height, rows)
        if (x1 - x0) * (y1 - y0) > 0.9 * columns * rows:
            return None
        if ends is None and (ends := _found(data, layout)) is None:
            return None  # damaged, or more than one scan: the decoder judges the whole file
        # Begin and end of each row of tiles, as plain numbers: numpy's calls cost more for so few.
        first = y0 * columns + x0
        if first:
            begins = ends[first - 1 : y1 * columns - 1 : columns].tolist()
        else:
            begins = [0, *ends[columns - 1 : (y1 - 1) * columns : columns].tolist()]
        stops = ends[y0 * columns + x1 - 1 : (y1 - 1) * columns + x1 : columns].tolist()
        header = self._header(
            min(y1 * tile_height, layout.height) - y0 * tile_height,
            min(x1 * tile_width, layout.width) - x0 * tile_width,
        )
        pieces: list[bytearray | memoryview] = [header]
        moved, length = [], len(header)
        for begin, stop in zip(begins, stops):
            pieces.append(data[layout.data_at + begin : layout.data_at + stop])
            moved.append(length - begin - 1)  # to the second byte of the marker that ends a tile
            length += stop - begin
        spliced = bytearray().join(pieces)
        at = (ends.reshape(rows, columns)[y0:y1, x0:x1] + np.array(moved)[:, None]).ravel()
        few = len(at) <= len(_NUMBERS)
        np.frombuffer(spliced, np.uint8)[at] = (
            _NUMBERS[: len(at)] if few else np.resize(_NUMBERS, len(at))
        )
        spliced[-1] = 0xD9
        return Cut(spliced, y0 * tile_height, x0 * tile_width)

    def _header(self, height: int, width: int) -> bytearray:
        """The file's header for another size, without the table, which a decoder has no use for."""
        size_at, data_at = self.layout.size_at, self.layout.data_at
        header = bytearray(self.data[: self.table_at if self.table_end else data_at])
        if self.table_end:
            header += self.data[self.table_end : data_at]
            size_at -= self.table_end - self.table_at
        _SIZE.pack_into(header, size_at, height, width)
        return header


def _covering(begin: int, end: int, tile: int, count: int) -> tuple[int, int]:
    """The tiles that cover the pixels begin to end - 1: the first, and the last plus 1.

    There are `count` tiles of `tile` pixels.
    """
    return max(begin, 0) // tile, min(-(-end // tile), count)


def tiles_of(jpeg: Jpeg) -> Tiles | None:
    """The JPEG's tiles, from its header alone; None where it has none."""
    data = as_memoryview(jpeg)
    table_at, table_end = _table_at(data)
    layout, ends = _listed(data, table_at, table_end) if table_end else (None, None)
    if layout is None and (layout := _layout(data)) is None:
        return None
    return Tiles(data, table_at, table_end, layout, ends)


def _table_at(data: memoryview) -> tuple[int, int]:
    """Begin and end of the table's segment. Without one the end is 0, and the begin its place."""
    at, size = 2, len(data)
    while at + 4 <= size and data[at] == 0xFF and 0xE0 <= data[at + 1] <= 0xEF:
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if data[at + 1] == 0xEB and data[at + 4 : at + 4 + len(TABLE)] == TABLE:
            return at, end
        at = end
    return at, 0


def _listed(
    data: memoryview, table_at: int, table_end: int
) -> tuple[_Layout, np.ndarray] | tuple[None, None]:
    """The layout and the ends of the tiles from the file's table.

    (None, None) where the table does not belong to this file.
    """
    numbers_at = table_at + 4 + len(TABLE) + _FIELDS.size
    if not numbers_at <= table_end <= len(data):
        return None, None
    layout = _Layout(*_FIELDS.unpack_from(data, numbers_at - _FIELDS.size))
    if not all(layout):
        return None, None
    rows, columns = layout.grid
    of_two = table_end - numbers_at == 2 * rows * columns
    if not of_two and table_end - numbers_at != 4 * rows * columns:
        return None, None
    ends = np.frombuffer(data, _U2 if of_two else _U4, rows * columns, numbers_at)
    if layout.data_at + int(ends[-1]) != len(data) or data[-2] != 0xFF or data[-1] != 0xD9:
        return None, None
    if (
        layout.size_at < table_end
        or data[layout.size_at - 5 : layout.size_at - 3] != b"\xff\xc0"
        or _SIZE.unpack_from(data, layout.size_at) != (layout.height, layout.width)
    ):
        return None, None
    return layout, ends


def _found(data: memoryview, layout: _Layout) -> np.ndarray | None:
    """int64[tiles]: end of each tile (after its marker), counted from `layout.data_at`.

    By searching for the markers; None where their number does not fit.
    """
    rows, columns = layout.grid
    body = np.frombuffer(data, np.uint8)[layout.data_at :]
    escapes = np.flatnonzero(body[:-1] == 0xFF)
    markers = escapes[(body[escapes + 1] & 0xF8) == 0xD0]  # each follows a tile
    if len(markers) != rows * columns - 1 or body[-2] != 0xFF or body[-1] != 0xD9:
        return None
    return np.append(markers + 2, len(body))


def _layout(data: memoryview) -> _Layout | None:
    """The layout from the header of a baseline JPEG with one scan and a restart interval that
    divides a row of MCUs; None for all others."""
    at, spacing, frame, size = 2, 0, 0, len(data)
    while at + 4 <= size and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xC0:
            frame = at + 5
        elif marker == 0xDD and at + 6 <= size:
            spacing = data[at + 4] << 8 | data[at + 5]
        elif marker == 0xDA:
            break
        elif 0xC1 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # progressive, lossless or arithmetic
        at += 2 + length
    else:
        return None
    if not frame or not spacing or at + 2 + length + 2 > size or data[at + 4] != data[frame + 4]:
        return None
    height, width = data[frame] << 8 | data[frame + 1], data[frame + 2] << 8 | data[frame + 3]
    count = data[frame + 4]
    if count == 0:
        return None
    factors = [data[frame + 6 + 3 * i] for i in range(count)]
    across, down = max(f >> 4 for f in factors), max(f & 15 for f in factors)
    if count == 1:  # the MCU of a single component is one block, whatever its factors
        across, down = 1, 1
    if height == 0 or -(-width // (8 * across)) % spacing:
        return None
    return _Layout(
        size_at=frame,
        data_at=at + 2 + length,
        height=height,
        width=width,
        mcu_height=8 * down,
        mcu_width=8 * across,
        interval=spacing,
    )
