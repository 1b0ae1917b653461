"""JPEGs whose restart markers make them a grid of tiles that decode alone, and cutting the tiles of a crop out of one.

A baseline JPEG stores minimum coded units (MCUs, 8 or 16 pixels a side) row by row. Each restart marker resets the decoder, so what
lies between two markers decodes by itself; where a whole number of such intervals makes a row of MCUs, they are tiles. `cut` copies
the tiles that cover a box behind a header with the new size, and renumbers their markers: a shorter, ordinary JPEG, for any
decoder. Decoding it gives, within the box, the very pixels of the whole picture.

`encode` writes such files, with a table of the tiles' lengths in an application segment, so that `cut` need not search for markers.
Any viewer opens them; they are about four percent longer.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

TILE = 32
"""Pixels that tiles are made to be wide, where the width allows. Smaller ones cut closer and cost more bytes."""
CONTEXT = 2
"""Pixels around a box that decoding its edge looks at, to interpolate the colour of pictures with halved chroma."""
TABLE = b"ftlib-tiles\0"
"""Begins the APP11 segment whose rest is uint16 (little-endian): the bytes of each tile and the marker after it."""
_NUMBERS = np.resize(np.arange(0xD0, 0xD8, dtype=np.uint8), 1 << 15)


@dataclass(frozen=True)
class Cut:
    jpeg: bytearray
    """The tiles as a JPEG."""
    top: int
    left: int
    """Where its first pixel lies in the whole picture."""


@dataclass(frozen=True, slots=True)
class _Layout:
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
    table_at: int
    """Offset of the table of lengths, 0 where there is none."""
    table_end: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return -(-self.height // self.mcu_height), -(-self.width // (self.interval * self.mcu_width))


def interval(width: int, mcu: int) -> int:
    """MCUs per tile for a picture of this width: of the divisors of a row's MCUs the one that comes closest to `TILE` pixels."""
    across, wanted = ceil(width / mcu), TILE // mcu
    divisors = [d for d in range(1, min(across, 2 * wanted) + 1) if across % d == 0]
    return min(divisors, key=lambda d: abs(np.log2(d / wanted)))


def encode(pixels: np.ndarray, quality: int, subsampling: str = "420") -> bytes:
    """uint8[H, W, 3] as a baseline JPEG of tiles. `subsampling` of the chroma is 444, 422 or 420; for any other it is left out (444)."""
    halved = {"422": 1, "420": 2}.get(subsampling, 0)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=halved, restart_marker_blocks=interval(pixels.shape[1], 16 if halved else 8))
    return with_table(out.getvalue())


def with_table(jpeg: bytes) -> bytes:
    """The JPEG with the table of its tiles' lengths, before the first quantization table; as it is where it has no tiles, or too many or
    too long ones for the table."""
    layout = _layout(memoryview(jpeg))
    if layout is None or layout.table_at or (bounds := _found(memoryview(jpeg), layout)) is None:
        return jpeg
    lengths = np.diff(bounds)
    if lengths.max() > 0xFFFF or len(TABLE) + 2 + 2 * len(lengths) > 0xFFFF:
        return jpeg
    body = TABLE + lengths.astype("<u2").tobytes()
    at = 2
    while 0xE0 <= jpeg[at + 1] <= 0xEF:  # JFIF and Exif want to come first
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return jpeg[:at] + b"\xff\xeb" + (len(body) + 2).to_bytes(2, "big") + body + jpeg[at:]


def cut(jpeg: bytes | memoryview | np.ndarray, top: int, left: int, height: int, width: int, shrink: int = 1) -> Cut | None:
    """The tiles that cover a box (in pixels, within the picture), or None where the file has no tiles or nearly all would be needed.
    `shrink`: the result will be decoded to 1/shrink of each side (up to 1/8; the cut begins at a multiple of 8 pixels)."""
    data = memoryview(jpeg)
    layout = _layout(data)
    if layout is None:
        return None
    rows, columns = layout.grid
    tile_width, tile_height, context = layout.interval * layout.mcu_width, layout.mcu_height, CONTEXT * shrink
    x0, x1 = max(left - context, 0) // tile_width, min(-(-(left + width + context) // tile_width), columns)
    y0, y1 = max(top - context, 0) // tile_height, min(-(-(top + height + context) // tile_height), rows)
    if (x1 - x0) * (y1 - y0) > 0.9 * columns * rows:
        return None
    bounds = _listed(data, layout)
    if bounds is None and (bounds := _found(data, layout)) is None:
        return None  # damaged, or more than one scan: for the decoder to judge, whole
    starts = bounds[y0 * columns + x0 : y1 * columns : columns]
    ends = bounds[1:].reshape(rows, columns)[y0:y1, x0:x1]
    begins, stops = starts.tolist(), ends[:, -1].tolist()
    at, size_at = layout.data_at, layout.size_at
    if layout.table_at:
        header = bytearray(data[: layout.table_at]) + data[layout.table_end : at]
        if size_at > layout.table_at:
            size_at -= layout.table_end - layout.table_at
    else:
        header = bytearray(data[:at])
    cut_height = min(y1 * tile_height, layout.height) - y0 * tile_height
    cut_width = min(x1 * tile_width, layout.width) - x0 * tile_width
    header[size_at : size_at + 4] = cut_height.to_bytes(2, "big") + cut_width.to_bytes(2, "big")
    spliced = bytearray().join([header, *[data[at + begin : at + stop] for begin, stop in zip(begins, stops)]])
    lengths = ends[:, -1] - starts
    ends = ends + (lengths.cumsum() - lengths - starts + (len(header) - 1))[:, None]  # where they are now, less the marker's second byte
    numbers_at = ends.ravel()
    out = np.frombuffer(spliced, np.uint8)
    out[numbers_at] = _NUMBERS[: len(numbers_at)] if len(numbers_at) <= len(_NUMBERS) else 0xD0 + np.arange(len(numbers_at)) % 8
    spliced[-1] = 0xD9
    return Cut(spliced, y0 * tile_height, x0 * tile_width)


def _listed(data: memoryview, layout: _Layout) -> np.ndarray | None:
    """int64[tiles + 1]: where tiles begin (after the marker before them) and the last ends, from `layout.data_at` on, as the file's table says.
    None where there is no table or it is not this file's."""
    rows, columns = layout.grid
    if layout.table_end - layout.table_at != 4 + len(TABLE) + 2 * rows * columns:
        return None
    bounds = np.zeros(rows * columns + 1, np.int64)
    np.cumsum(np.frombuffer(data, "<u2", rows * columns, layout.table_at + 4 + len(TABLE)), out=bounds[1:])
    if layout.data_at + int(bounds[-1]) != len(data) or data[-2] != 0xFF or data[-1] != 0xD9:
        return None
    return bounds


def _found(data: memoryview, layout: _Layout) -> np.ndarray | None:
    """The same by searching for the markers; None where their number does not fit."""
    rows, columns = layout.grid
    body = np.frombuffer(data, np.uint8)[layout.data_at :]
    escapes = np.flatnonzero(body[:-1] == 0xFF)
    markers = escapes[(body[escapes + 1] & 0xF8) == 0xD0]  # each follows a tile
    if len(markers) != rows * columns - 1 or body[-2] != 0xFF or body[-1] != 0xD9:
        return None
    return np.concatenate(([0], markers + 2, [len(body)]))


def _layout(data: memoryview) -> _Layout | None:
    """From the header of a baseline JPEG with one scan whose restart interval divides a row of MCUs; None for all others."""
    at, spacing, frame, table_at, table_end, size = 2, 0, 0, 0, 0, len(data)
    while at + 4 <= size and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == 0xC0:
            frame = at + 5
        elif marker == 0xDD and at + 6 <= size:
            spacing = data[at + 4] << 8 | data[at + 5]
        elif marker == 0xDA:
            break
        elif marker == 0xEB and data[at + 4 : at + 4 + len(TABLE)] == TABLE:
            table_at, table_end = at, at + 2 + length
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
    across, down = (1, 1) if count == 1 else (max(f >> 4 for f in factors), max(f & 15 for f in factors))
    if height == 0 or -(-width // (8 * across)) % spacing:
        return None
    return _Layout(frame, at + 2 + length, height, width, 8 * down, 8 * across, spacing, table_at, table_end)
