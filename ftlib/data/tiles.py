"""JPEGs whose restart markers make them a grid of tiles that decode alone, and cutting the tiles of a crop out of one.

A baseline JPEG stores minimum coded units (MCUs, 8 or 16 pixels a side) row by row. Each restart marker resets the decoder, so what
lies between two markers decodes by itself; where a whole number of such intervals makes a row of MCUs, they are tiles. `Tiles.cut` copies
the tiles that cover a box behind a header with the new size, and renumbers their markers: a shorter, ordinary JPEG, for any
decoder. Decoding it gives, within the box, the very pixels of the whole picture.

`encode` writes such files, with a table of where the tiles lie in an application segment, so that nobody need search for markers.
Any viewer opens them; markers make them a few percent longer, and Huffman codes made for each picture as much shorter.
"""

from __future__ import annotations

import io
import struct
from math import ceil
from typing import NamedTuple

import numpy as np
from PIL import Image

TILE = 32
"""Pixels that tiles are made to be wide, where the width allows. Smaller ones cut closer and cost more bytes."""
CONTEXT = 1
"""Pixels around a box that decoding its edge looks at, to interpolate the colour of pictures with halved chroma; others need none."""
TABLE = b"ftlib-tiles\0"
"""Begins the APP11 segment with the layout (`_Layout`) and with where each tile ends: uint16 (little-endian) up to 64 KiB, uint32 beyond."""
_FIELDS, _SIZE = struct.Struct("<IIHHBBH"), struct.Struct(">HH")
_U2, _U4 = np.dtype("<u2"), np.dtype("<u4")
_NUMBERS = np.resize(np.arange(0xD0, 0xD8, dtype=np.uint8), 1 << 15)


class Cut(NamedTuple):
    jpeg: bytearray
    """The tiles as a JPEG."""
    top: int
    left: int
    """Where its first pixel lies in the whole picture."""


class _Layout(NamedTuple):
    """What a header says of the tiles."""

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
        return -(-self.height // self.mcu_height), -(
            -self.width // (self.interval * self.mcu_width)
        )


def interval(width: int, mcu: int) -> int:
    """MCUs per tile for a picture of this width: of the divisors of a row's MCUs the one that comes closest to `TILE` pixels."""
    across, wanted = ceil(width / mcu), TILE // mcu
    divisors = [d for d in range(1, min(across, 2 * wanted) + 1) if across % d == 0]
    return min(divisors, key=lambda d: abs(np.log2(d / wanted)))


def encode(pixels: np.ndarray, quality: int, subsampling: str = "420") -> bytes:
    """uint8[H, W, 3] as a baseline JPEG of tiles. `subsampling` of the chroma is 444, 422 or 420; for any other it is left out (444)."""
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
    """The JPEG with a table of its tiles, behind the segments that applications begin it with; as it is where it has no tiles, has a table
    already, or has too many tiles for one."""
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
    """What is known of a JPEG's tiles before any of them is looked at."""

    data: memoryview
    table_at: int
    table_end: int
    """Where the table's segment begins and ends; its end is 0 where there is none."""
    layout: _Layout
    ends: np.ndarray | None
    """uint16 or uint32[tiles]: where each ends, counted from `layout.data_at`; None where no table says it."""

    def cut(self, top: int, left: int, height: int, width: int, shrink: int = 1) -> Cut | None:
        """The tiles that cover a box (in pixels, within the picture), or None where nearly all would be needed.
        `shrink`: the result will be decoded to 1/shrink of each side (up to 1/8; the cut begins at a multiple of 8 pixels)."""
        data, table_at, table_end, layout, ends = self
        size_at, data_at, full_height, full_width, tile_height, mcu_width, interval = layout
        tile_width, context = (
            interval * mcu_width,
            0 if mcu_width == tile_height == 8 else CONTEXT * shrink,
        )
        rows, columns = layout.grid
        x0, x1 = (
            max(left - context, 0) // tile_width,
            min(-(-(left + width + context) // tile_width), columns),
        )
        y0, y1 = (
            max(top - context, 0) // tile_height,
            min(-(-(top + height + context) // tile_height), rows),
        )
        if (x1 - x0) * (y1 - y0) > 0.9 * columns * rows:
            return None
        if ends is None and (ends := _found(data, layout)) is None:
            return None  # damaged, or more than one scan: for the decoder to judge, whole
        # Where each row's tiles begin and end, in plain numbers: for so few, numpy's calls would cost more than its arithmetic.
        first = y0 * columns + x0
        begins = (
            ends[first - 1 : y1 * columns - 1 : columns].tolist()
            if first
            else [0, *ends[columns - 1 : (y1 - 1) * columns : columns].tolist()]
        )
        stops = ends[y0 * columns + x1 - 1 : (y1 - 1) * columns + x1 : columns].tolist()
        header = bytearray(data[: table_at if table_end else data_at])
        if table_end:  # a tile's table is of no use to a decoder
            header += data[table_end:data_at]
            size_at -= table_end - table_at
        _SIZE.pack_into(
            header,
            size_at,
            min(y1 * tile_height, full_height) - y0 * tile_height,
            min(x1 * tile_width, full_width) - x0 * tile_width,
        )
        pieces, moved, length = [header], [], len(header)
        for begin, stop in zip(begins, stops):
            pieces.append(data[data_at + begin : data_at + stop])
            moved.append(length - begin - 1)  # to the second byte of the marker that ends a tile
            length += stop - begin
        spliced = bytearray().join(pieces)
        at = (ends.reshape(rows, columns)[y0:y1, x0:x1] + np.array(moved)[:, None]).ravel()
        np.frombuffer(spliced, np.uint8)[at] = (
            _NUMBERS[: len(at)] if len(at) <= len(_NUMBERS) else np.resize(_NUMBERS, len(at))
        )
        spliced[-1] = 0xD9
        return Cut(spliced, y0 * tile_height, x0 * tile_width)


def tiles_of(jpeg: bytes | bytearray | memoryview | np.ndarray) -> Tiles | None:
    """The JPEG's tiles, by its header alone; None where it has none."""
    data = memoryview(jpeg)  # type: ignore[arg-type]  # an array is one, too
    table_at, table_end = _table_at(data)
    layout, ends = _listed(data, table_at, table_end) if table_end else (None, None)
    if layout is None and (layout := _layout(data)) is None:
        return None
    return Tiles(data, table_at, table_end, layout, ends)


def _table_at(data: memoryview) -> tuple[int, int]:
    """Where the table's segment begins and ends; its end is 0 where there is none, and its beginning where it would be."""
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
    """The layout and the tiles' ends as the file's table says; None where the table is not this file's."""
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
    """int64[tiles]: where each tile ends (after its marker), counted from `layout.data_at`, by searching for the markers; None where their
    number does not fit."""
    rows, columns = layout.grid
    body = np.frombuffer(data, np.uint8)[layout.data_at :]
    escapes = np.flatnonzero(body[:-1] == 0xFF)
    markers = escapes[(body[escapes + 1] & 0xF8) == 0xD0]  # each follows a tile
    if len(markers) != rows * columns - 1 or body[-2] != 0xFF or body[-1] != 0xD9:
        return None
    return np.append(markers + 2, len(body))


def _layout(data: memoryview) -> _Layout | None:
    """From the header of a baseline JPEG with one scan whose restart interval divides a row of MCUs; None for all others."""
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
    factors = [data[frame + 6 + 3 * i] for i in range(count)]
    across, down = (
        (1, 1) if count == 1 else (max(f >> 4 for f in factors), max(f & 15 for f in factors))
    )
    if height == 0 or -(-width // (8 * across)) % spacing:
        return None
    return _Layout(frame, at + 2 + length, height, width, 8 * down, 8 * across, spacing)
