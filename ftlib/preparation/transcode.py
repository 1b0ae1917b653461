"""Turn an ordinary JPEG into one of tiles (`ftlib.data.tiles`), without loss.

The coefficients stay the same; they are coded in other pieces. Only the Huffman codes are read
(ITU-T T.81, F.2.2), to learn where blocks begin. A tile's bits are copied as they are but for the
first brightness and color of each, which are written as values and no longer as differences from
the tile before.

A table says for every bit of the scan which code would begin there. So the loop that follows the
codes, the only one in Python, is two look-ups per code. An ImageNet picture takes about 50 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np

from ftlib.data.tiles import interval, with_table

_END = 100
"""What an end-of-block code counts as, in coefficients: more than any run that is not one."""


class _CannotTileError(ValueError):
    """Not a JPEG of the kind that can be tiled."""


@dataclass(frozen=True)
class _Codes:
    """A Huffman table: symbols per code length 1 to 16, and symbols in the order of their codes."""

    counts: tuple[int, ...]
    symbols: bytes

    def words(self) -> list[tuple[int, int, int]]:
        """(symbol, code, length) of each (C.2)."""
        found, code, at = [], 0, 0
        for length, count in enumerate(self.counts, 1):
            for _ in range(count):
                if code >= (1 << length) - 1:  # a code of ones only is not allowed
                    raise _CannotTileError
                found.append((self.symbols[at], code, length))
                code, at = code + 1, at + 1
            code <<= 1
        return found

    def by_window(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8[65536] twice: the symbol that 16 bits begin with, its code's length (0: none)."""
        symbol, size = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        for value, code, length in self.words():
            here = slice(code << 16 - length, code + 1 << 16 - length)
            symbol[here], size[here] = value, length
        return symbol, size

    def with_symbols(self, wanted: set[int]) -> _Codes:
        """The table with codes for these symbols too, longer than all others.

        The code of ones only, which every table leaves free, makes room for them.
        """
        counts, symbols = list(self.counts), self.symbols
        for symbol in sorted(wanted - set(symbols)):
            longest = max(length for length, count in enumerate(counts, 1) if count)
            if longest == 16:
                raise _CannotTileError
            counts[longest] = 1
            symbols += bytes([symbol])
        return _Codes(tuple(counts), symbols)


@dataclass(frozen=True)
class _Component:
    blocks: int
    """Per MCU."""
    dc: int
    ac: int
    """Identifiers of its Huffman tables."""


@dataclass(frozen=True)
class _Frame:
    head: bytes
    """All segments but Huffman tables and the start of the scan."""
    scan: bytes
    """The segment that starts the scan."""
    data: bytes
    """The coded data without stuffed zeros, up to the end-of-image marker."""
    codes: dict[int, _Codes]
    """By class (0 or 16) + identifier."""
    components: tuple[_Component, ...]
    mcus: int
    interval: int
    """MCUs per tile."""


def tiled(jpeg: bytes) -> bytes:
    """The JPEG with restart markers that make tiles, and their table.

    Every decoder gives the same pixels. A JPEG that is progressive, gray or cut short, or has other
    restart markers or more than one scan, comes back as it is.
    """
    try:
        frame = _read(jpeg)
        windows = _windows(frame.data)
        return with_table(_write(frame, windows, *_blocks(frame, windows)))
    except (ValueError, LookupError):  # it is another kind, or headers and data do not fit together
        return jpeg


def _read(jpeg: bytes) -> _Frame:
    at, head, codes = 2, [jpeg[:2]], {}
    sizes: dict[int, tuple[int, int]] = {}
    height = width = 0
    while True:
        if jpeg[at] != 0xFF:
            raise _CannotTileError
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        segment, body = jpeg[at : at + 2 + length], jpeg[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xDA:
            break
        if marker == 0xC4:
            codes.update(_huffman_tables(body))
            continue
        if marker == 0xC0:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            sizes = {
                body[6 + 3 * i]: (body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15)
                for i in range(body[5])
            }
        elif 0xC1 <= marker <= 0xCF or marker == 0xDD:
            raise _CannotTileError
        head.append(segment)
    if len(sizes) != 3 or body[0] != 3 or not height or not width or jpeg[-2:] != b"\xff\xd9":
        raise _CannotTileError
    data = jpeg[at:-2]
    if data.count(b"\xff") != data.count(b"\xff\x00"):
        raise _CannotTileError  # other markers, or more scans
    components = tuple(_component(body[1 + 2 * i], body[2 + 2 * i], sizes) for i in range(3))
    if any(c.dc not in codes or c.ac not in codes for c in components):
        raise _CannotTileError
    mcu_width, mcu_height = (8 * max(size[i] for size in sizes.values()) for i in (0, 1))
    if not 8 <= mcu_width <= 32 or not 8 <= mcu_height <= 32:
        raise _CannotTileError
    return _Frame(
        head=b"".join(head),
        scan=segment,
        data=data.replace(b"\xff\x00", b"\xff"),
        codes=codes,
        components=components,
        mcus=-(-height // mcu_height) * -(-width // mcu_width),
        interval=interval(width, mcu_width),
    )


def _huffman_tables(body: bytes) -> dict[int, _Codes]:
    found = {}
    while body:
        counts = tuple(body[1:17])
        found[body[0]] = _Codes(counts, body[17 : 17 + sum(counts)])
        body = body[17 + sum(counts) :]
    return found


def _component(number: int, tables: int, sizes: dict[int, tuple[int, int]]) -> _Component:
    across, down = sizes[number]
    return _Component(across * down, dc=tables >> 4, ac=16 + (tables & 15))


def _windows(data: bytes) -> np.ndarray:
    """uint16[8 * bytes]: the 16 bits from each bit on; ones behind the end."""
    padded = np.frombuffer(data + b"\xff\xff", np.uint8).astype(np.uint32)
    three = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    return (three[:, None] >> np.arange(8, 0, -1, dtype=np.uint32)).astype(np.uint16).ravel()


def _blocks(frame: _Frame, windows: np.ndarray) -> tuple[np.ndarray, int]:
    """int64[MCUs, blocks per MCU]: the bit at which each block begins; and where the last ends."""
    beyond = bytes(64)  # reading goes a little past the end in damaged data, and then stands still
    steps: dict[int, bytes] = {}
    runs: dict[int, bytes] = {}
    for key in {c.dc for c in frame.components} | {c.ac for c in frame.components}:
        symbol, size = frame.codes[key].by_window()
        steps[key] = (
            np.where(size > 0, size + (symbol & 15), 0).astype(np.uint8)[windows].tobytes() + beyond
        )
        if key >= 16:
            passed = np.where(symbol == 0, _END, (symbol >> 4) + 1)
            runs[key] = (
                np.where(size > 0, passed, 2 * _END).astype(np.uint8)[windows].tobytes()
                + b"\xff" * 64
            )
    order = [
        (steps[c.dc], steps[c.ac], runs[c.ac]) for c in frame.components for _ in range(c.blocks)
    ]
    starts, at = [], 0
    for _ in range(frame.mcus):
        for dc, step, run in order:
            starts.append(at)
            at += dc[at]
            k = 1
            while k < 64:
                k += run[at]
                at += step[at]
            if 64 < k < _END or k >= 2 * _END:
                raise _CannotTileError
    if not 0 <= 8 * len(frame.data) - at < 8:
        raise _CannotTileError
    return np.array(starts).reshape(frame.mcus, -1), at


class _Firsts(NamedTuple):
    """The first difference of a component in every tile, and the value that takes its place."""

    table: int
    """Identifier of the Huffman table."""
    begins: list[int]
    """Per tile: the bit at which the difference begins."""
    ends: list[int]
    values: list[int]


def _write(frame: _Frame, windows: np.ndarray, starts: np.ndarray, end: int) -> bytes:
    codes = dict(frame.codes)
    firsts = _first_values(frame, windows, starts, codes)
    tiles = np.arange(0, frame.mcus, frame.interval)
    coded = _coded_tiles(frame, codes, firsts, [*starts[tiles[1:], 0].tolist(), end])
    tables = [
        b"\xff\xc4" + (19 + len(c.symbols)).to_bytes(2, "big") + bytes([key, *c.counts]) + c.symbols
        for key, c in codes.items()
    ]
    interval = b"\xff\xdd\0\4" + frame.interval.to_bytes(2, "big")
    return b"".join([frame.head, *tables, interval, frame.scan, *coded])


def _first_values(
    frame: _Frame, windows: np.ndarray, starts: np.ndarray, codes: dict[int, _Codes]
) -> list[_Firsts]:
    """Per component. Tables in `codes` that lack a symbol for one of the values get it."""
    tiles = np.arange(0, frame.mcus, frame.interval)
    column, found = 0, []
    for component in frame.components:
        blocks = starts[:, column : column + component.blocks].ravel()
        differences, ends = _differences(windows, blocks, codes[component.dc])
        values = differences.cumsum()[tiles * component.blocks]
        wanted = {int(value).bit_length() for value in np.unique(np.abs(values))}
        codes[component.dc] = codes[component.dc].with_symbols(wanted)
        found.append(
            _Firsts(
                component.dc,
                starts[tiles, column].tolist(),
                ends[tiles * component.blocks].tolist(),
                values.tolist(),
            )
        )
        column += component.blocks
    return found


def _coded_tiles(
    frame: _Frame, codes: dict[int, _Codes], firsts: list[_Firsts], tile_ends: list[int]
) -> list[bytes]:
    """Coded data and marker of each tile, in turn."""
    coders = [_coder(codes[first.table]) for first in firsts]
    bits, ones = np.unpackbits(np.frombuffer(frame.data, np.uint8)), np.ones(8, np.uint8)
    pieces, lengths = [], []
    for tile, tile_end in enumerate(tile_ends):
        stops = [*(first.begins[tile] for first in firsts[1:]), tile_end]
        n = 0
        for first, coder, stop in zip(firsts, coders, stops):
            code = coder(first.values[tile])
            pieces += [code, bits[first.ends[tile] : stop]]
            n += len(code) + stop - first.ends[tile]
        pieces.append(ones[: -n % 8])
        lengths.append(-(-n // 8))
    packed = np.packbits(np.concatenate(pieces)).tobytes()
    at, coded = 0, []
    for tile, length in enumerate(lengths):
        stuffed = packed[at : at + length].replace(b"\xff", b"\xff\x00")
        coded += [stuffed, bytes((0xFF, 0xD0 + tile % 8))]
        at += length
    coded[-1] = b"\xff\xd9"
    return coded


def _differences(
    windows: np.ndarray, at: np.ndarray, codes: _Codes
) -> tuple[np.ndarray, np.ndarray]:
    """int64[n] twice: the difference of each block, and the bit at which it ends (F.2.2.1).

    `at` holds the bits at which blocks begin.
    """
    symbol, size = codes.by_window()
    category, length = symbol[windows[at]].astype(np.int64), size[windows[at]].astype(np.int64)
    if category.max(initial=0) > 11 or (at + length).max(initial=0) > len(windows):
        raise _CannotTileError
    extra = windows[np.minimum(at + length, len(windows) - 1)].astype(np.int64) >> 16 - category
    values = np.where(extra < (1 << category) >> 1, extra - (1 << category) + 1, extra)
    return values, at + length + category


def _coder(codes: _Codes) -> Callable[[int], np.ndarray]:
    """value -> its bits, uint8[n] of 0 and 1 (F.1.2.1)."""
    words = {symbol: f"{code:0{length}b}" for symbol, code, length in codes.words()}

    @cache
    def bits(value: int) -> np.ndarray:
        category = abs(value).bit_length()
        extra = value if value >= 0 else value + (1 << category) - 1
        return np.array(
            list(words[category] + (f"{extra:0{category}b}" if category else "")), np.uint8
        )

    return bits
