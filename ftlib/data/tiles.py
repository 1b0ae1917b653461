"""JPEGs whose restart markers make them a grid of tiles that decode alone, and cutting the tiles of a crop out of one.

A baseline JPEG stores minimum coded units (MCUs, 8 or 16 pixels a side) row by row. Each restart marker resets the decoder, so what
lies between two markers decodes by itself; where a whole number of such intervals makes a row of MCUs, they are tiles. `cut` copies
the tiles that cover a box behind a header with the new size, and renumbers their markers: a shorter, ordinary JPEG, for any
decoder. Decoding it gives, within the box, the very pixels of the whole picture.

`encode` writes such files. Any viewer opens them; they are one to four percent longer.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from math import ceil

import numpy as np
from PIL import Image

TILE = 64
"""Pixels that tiles are made to be wide, where the width allows. Smaller ones cut closer and cost more bytes."""
CONTEXT = 2
"""Pixels around a box that decoding its edge looks at, to interpolate the colour of pictures with halved chroma."""


@dataclass(frozen=True)
class Cut:
    jpeg: bytearray
    """The tiles as a JPEG."""
    top: int
    left: int
    """Where its first pixel lies in the whole picture."""


@dataclass(frozen=True)
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


def encode(pixels: np.ndarray, quality: int, subsampling: str = "420") -> bytes:
    """uint8[H, W, 3] as a baseline JPEG of tiles. `subsampling` of the chroma is 444, 422 or 420; for any other it is left out (444)."""
    halved = {"422": 1, "420": 2}.get(subsampling, 0)
    mcu = 16 if halved else 8
    across, wanted = ceil(pixels.shape[1] / mcu), TILE // mcu
    divisors = [d for d in range(1, min(across, 2 * wanted) + 1) if across % d == 0]
    interval = min(divisors, key=lambda d: abs(np.log2(d / wanted)))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality, subsampling=halved, restart_marker_blocks=interval)
    return out.getvalue()


def cut(jpeg: bytes | memoryview | np.ndarray, top: int, left: int, height: int, width: int, shrink: int = 1) -> Cut | None:
    """The tiles that cover a box (in pixels, within the picture), or None where the file has no tiles or nearly all would be needed.
    `shrink`: the result will be decoded to 1/shrink of each side (up to 1/8; the cut begins at a multiple of 8 pixels)."""
    data = np.frombuffer(jpeg, np.uint8)
    layout = _layout(data)
    if layout is None:
        return None
    tile_width, context = layout.interval * layout.mcu_width, CONTEXT * shrink
    columns, rows = ceil(layout.width / tile_width), ceil(layout.height / layout.mcu_height)
    x0, x1 = max(left - context, 0) // tile_width, min(ceil((left + width + context) / tile_width), columns)
    y0, y1 = max(top - context, 0) // layout.mcu_height, min(ceil((top + height + context) / layout.mcu_height), rows)
    if (x1 - x0) * (y1 - y0) > 0.9 * columns * rows:
        return None
    body = data[layout.data_at :]
    escapes = np.flatnonzero(body[:-1] == 0xFF)
    markers = escapes[(body[escapes + 1] & 0xF8) == 0xD0]  # each follows a tile
    if len(markers) != rows * columns - 1 or body[-2] != 0xFF or body[-1] != 0xD9:
        return None  # damaged, or more than one scan: for the decoder to judge, whole
    ends = np.append(markers, len(body) - 2)
    first, last = np.arange(y0, y1) * columns + x0, np.arange(y0, y1) * columns + x1 - 1
    starts, stops = np.where(first > 0, ends[first - 1] + 2, 0), ends[last] + 2
    offset = layout.data_at
    header = bytearray(data[:offset])
    cut_height = min(y1 * layout.mcu_height, layout.height) - y0 * layout.mcu_height
    cut_width = min(x1 * tile_width, layout.width) - x0 * tile_width
    header[layout.size_at : layout.size_at + 4] = cut_height.to_bytes(2, "big") + cut_width.to_bytes(2, "big")
    view = memoryview(data)
    spliced = bytearray().join([header, *(view[a:b] for a, b in zip((starts + offset).tolist(), (stops + offset).tolist()))])
    # Each row's tiles lie one after the other: their ends, where the rows now are, are where the markers go.
    begins = offset + np.cumsum(stops - starts) - (stops - starts)
    tiles = first[:, None] + np.arange(x1 - x0)
    at = (begins[:, None] + ends[tiles] - starts[:, None]).ravel()
    out = np.frombuffer(spliced, np.uint8)
    out[at] = 0xFF
    out[at + 1] = 0xD0 + np.arange(len(at)) % 8
    out[at[-1] + 1] = 0xD9
    return Cut(spliced, y0 * layout.mcu_height, x0 * tile_width)


def _layout(data: np.ndarray) -> _Layout | None:
    """From the header of a baseline JPEG with one scan whose restart interval divides a row of MCUs; None for all others."""
    head = data[:4096].tobytes()  # markers lie close together in files without embedded thumbnails
    at, interval, frame = 2, 0, None
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker == 0xC0:
            frame = at + 5
        elif marker == 0xDD:
            interval = int.from_bytes(head[at + 4 : at + 6], "big")
        elif marker == 0xDA:
            break
        elif 0xC1 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return None  # progressive, lossless or arithmetic
        at += 2 + length
    else:
        return None
    if frame is None or interval == 0 or head[at + 4] != head[frame + 4]:
        return None
    height, width = int.from_bytes(head[frame : frame + 2], "big"), int.from_bytes(head[frame + 2 : frame + 4], "big")
    count = head[frame + 4]
    factors = [(head[frame + 6 + 3 * i] >> 4, head[frame + 6 + 3 * i] & 15) for i in range(count)]
    across, down = (1, 1) if count == 1 else (max(h for h, _ in factors), max(v for _, v in factors))
    if height == 0 or ceil(width / (8 * across)) % interval:
        return None
    return _Layout(frame, at + 2 + length, height, width, 8 * down, 8 * across, interval)
