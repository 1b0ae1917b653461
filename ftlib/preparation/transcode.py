"""An ordinary JPEG to one of tiles (`ftlib.data.tiles`), without loss: the same coefficients, coded in other pieces.

Only the Huffman codes are read (ITU-T T.81, F.2.2), to learn where blocks begin. A tile's bits are copied as they are but for the first
brightness and colour of each, which are written as values and no longer as differences from the tile before.

A table says for every bit of the scan what a code beginning there would be; so the loop that follows the codes, the only one in Python,
is two look-ups per code. An ImageNet picture takes about 50 ms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from ftlib.data.tiles import interval, with_table

_END = 100
"""What an end-of-block code counts as, in coefficients: more than any run that is not one."""


class _Other(ValueError):
    """Not a JPEG of the kind that can be tiled."""


@dataclass(frozen=True)
class _Codes:
    """A Huffman table: symbols per code length 1 to 16, and the symbols in the order of their codes."""

    counts: tuple[int, ...]
    symbols: bytes

    def words(self) -> list[tuple[int, int, int]]:
        """(symbol, code, length) of each (C.2)."""
        found, code, at = [], 0, 0
        for length, count in enumerate(self.counts, 1):
            for _ in range(count):
                if code >= (1 << length) - 1:  # a code of ones only is not allowed
                    raise _Other
                found.append((self.symbols[at], code, length))
                code, at = code + 1, at + 1
            code <<= 1
        return found

    def by_window(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8[65536] twice: the symbol that 16 bits begin with, and its code's length (0: none)."""
        symbol, size = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        for value, code, length in self.words():
            here = slice(code << 16 - length, code + 1 << 16 - length)
            symbol[here], size[here] = value, length
        return symbol, size

    def with_symbols(self, wanted: set[int]) -> _Codes:
        """With codes for these symbols, too, longer than all others: the code of ones that every table leaves free makes room."""
        counts, symbols = list(self.counts), self.symbols
        for symbol in sorted(wanted - set(symbols)):
            longest = max(length for length, count in enumerate(counts, 1) if count)
            if longest == 16:
                raise _Other
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
    """The JPEG with restart markers that make tiles, and their table; as it is where it is progressive, grey, cut short, has restart
    markers of another kind or more than one scan. Every decoder gives the same pixels."""
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
            raise _Other
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        segment, body = jpeg[at : at + 2 + length], jpeg[at + 4 : at + 2 + length]
        at += 2 + length
        if marker == 0xDA:
            break
        if marker == 0xC4:
            while body:
                counts = tuple(body[1:17])
                codes[body[0]] = _Codes(counts, body[17 : 17 + sum(counts)])
                body = body[17 + sum(counts) :]
            continue
        if marker == 0xC0:
            height, width = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            sizes = {
                body[6 + 3 * i]: (body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15)
                for i in range(body[5])
            }
        elif 0xC1 <= marker <= 0xCF or marker == 0xDD:
            raise _Other
        head.append(segment)
    if len(sizes) != 3 or body[0] != 3 or not height or not width or jpeg[-2:] != b"\xff\xd9":
        raise _Other
    data = jpeg[at:-2]
    if data.count(b"\xff") != data.count(b"\xff\x00"):
        raise _Other  # other markers, or more scans
    components = tuple(
        _Component(
            sizes[body[1 + 2 * i]][0] * sizes[body[1 + 2 * i]][1],
            body[2 + 2 * i] >> 4,
            16 + (body[2 + 2 * i] & 15),
        )
        for i in range(3)
    )
    if any(c.dc not in codes or c.ac not in codes for c in components):
        raise _Other
    mcu_width, mcu_height = (8 * max(size[i] for size in sizes.values()) for i in (0, 1))
    if not 8 <= mcu_width <= 32 or not 8 <= mcu_height <= 32:
        raise _Other
    mcus = -(-height // mcu_height) * -(-width // mcu_width)
    return _Frame(
        b"".join(head),
        segment,
        data.replace(b"\xff\x00", b"\xff"),
        codes,
        components,
        mcus,
        interval(width, mcu_width),
    )


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
            run = np.where(symbol == 0, _END, (symbol >> 4) + 1)
            runs[key] = (
                np.where(size > 0, run, 2 * _END).astype(np.uint8)[windows].tobytes() + b"\xff" * 64
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
                raise _Other
    if not 0 <= 8 * len(frame.data) - at < 8:
        raise _Other
    return np.array(starts).reshape(frame.mcus, -1), at


def _write(frame: _Frame, windows: np.ndarray, starts: np.ndarray, end: int) -> bytes:
    firsts = np.arange(0, frame.mcus, frame.interval)
    codes = dict(frame.codes)
    column, changes = (
        0,
        [],
    )  # of each component: its table, and per tile where its first difference begins and ends and what takes its place
    for component in frame.components:
        values, ends = _differences(
            windows, starts[:, column : column + component.blocks].ravel(), codes[component.dc]
        )
        absolute = values.cumsum()[firsts * component.blocks]
        wanted = {int(value).bit_length() for value in np.unique(np.abs(absolute))}
        codes[component.dc] = codes[component.dc].with_symbols(wanted)
        changes.append(
            (
                component.dc,
                starts[firsts, column].tolist(),
                ends[firsts * component.blocks].tolist(),
                absolute.tolist(),
            )
        )
        column += component.blocks
    new = [_coder(codes[key]) for key, *_ in changes]
    bits, ones = np.unpackbits(np.frombuffer(frame.data, np.uint8)), np.ones(8, np.uint8)
    tile_ends = [*starts[firsts[1:], 0].tolist(), end]
    pieces, lengths = [], []
    for tile, tile_end in enumerate(tile_ends):
        n = 0
        for number, (_, _, ends, values) in enumerate(changes):
            code = new[number](values[tile])
            until = changes[number + 1][1][tile] if number + 1 < len(changes) else tile_end
            pieces += [code, bits[ends[tile] : until]]
            n += len(code) + until - ends[tile]
        pieces.append(ones[: -n % 8])
        lengths.append(-(-n // 8))
    packed = np.packbits(np.concatenate(pieces)).tobytes()
    at, coded = 0, []
    for tile, length in enumerate(lengths):
        coded += [
            packed[at : at + length].replace(b"\xff", b"\xff\x00"),
            bytes((0xFF, 0xD0 + tile % 8)),
        ]
        at += length
    coded[-1] = b"\xff\xd9"
    tables = [
        b"\xff\xc4" + (19 + len(c.symbols)).to_bytes(2, "big") + bytes([key, *c.counts]) + c.symbols
        for key, c in codes.items()
    ]
    return b"".join(
        [
            frame.head,
            *tables,
            b"\xff\xdd\0\4",
            frame.interval.to_bytes(2, "big"),
            frame.scan,
            *coded,
        ]
    )


def _differences(
    windows: np.ndarray, at: np.ndarray, codes: _Codes
) -> tuple[np.ndarray, np.ndarray]:
    """int64[n] twice: the difference of each block that begins at a bit, and where its bits end (F.2.2.1)."""
    symbol, size = codes.by_window()
    category, length = symbol[windows[at]].astype(np.int64), size[windows[at]].astype(np.int64)
    if category.max(initial=0) > 11 or (at + length).max(initial=0) > len(windows):
        raise _Other
    extra = windows[np.minimum(at + length, len(windows) - 1)].astype(np.int64) >> 16 - category
    return np.where(
        extra < (1 << category) >> 1, extra - (1 << category) + 1, extra
    ), at + length + category


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
