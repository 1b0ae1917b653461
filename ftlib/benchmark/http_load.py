"""Clients of a model server, good and hostile ones, in a process of their own.

python -m ftlib.benchmark.http_load PORT SECONDS < CLIENTS.json    # {"good": 8, "pages": 4, ...}

It prints JSON: per kind of client the requests answered, the seconds that each took, and how many
answers had which status. Good clients send a photo, read the answer and send the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def photo(seed: int = 0, height: int = 375, width: int = 500) -> bytes:
    """A JPEG of about 70 kB that is as hard to decode as a photo."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    large = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    large.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def truncated_photo() -> bytes:
    whole = photo(1)
    return whole[: len(whole) * 3 // 5]


def large_png(side: int = 7000) -> bytes:
    """A PNG of 49 megapixels in 142 kB: decoded it takes 150 MB."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    rows = zlib.compress((b"\0" + bytes(3 * side)) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def many_pages(pages: int = 8_000) -> bytes:
    """A TIFF of 8 x 8 pixels and a long chain of pages that all show them: 0.9 MB."""
    fields = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 8, 279: 64}
    page = struct.pack("<H", len(fields))
    page += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    at, step = 8 + 64, len(page) + 4  # the chain begins behind the file's header and the pixels
    nexts = [at + (i + 1) * step for i in range(pages - 1)]
    chain = b"".join(page + struct.pack("<I", next_page) for next_page in nexts)
    return b"II*\0" + struct.pack("<I", at) + bytes(64) + chain + page + bytes(4)


BODIES: dict[str, Callable[[], bytes]] = {
    "good": photo,
    "truncated": truncated_photo,
    "large": large_png,
    "pages": many_pages,
}


@dataclass
class Kind:
    """What all clients of a kind have seen."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    broken: int = 0
    """Connections that ended without an answer."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": self.seconds,
            "statuses": {str(status): n for status, n in self.statuses.items()},
            "broken": self.broken,
        }


async def sender(port: int, body: bytes, seen: Kind, until: float) -> None:
    """Sends the same body again and again over one connection, or a new one where it was closed."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    streams: Streams | None = None
    while (left := until - time.monotonic()) > 0:
        started = time.perf_counter()
        try:
            streams = streams or await asyncio.open_connection("127.0.0.1", port)
            streams[1].writelines((head, body))
            status, closes = await asyncio.wait_for(answer(streams[0]), left + 5)
        except (OSError, EOFError, asyncio.TimeoutError, ValueError):
            seen.broken += 1
            await close(streams)
            streams = None
            await asyncio.sleep(0.05)
            continue
        seen.seconds.append(time.perf_counter() - started)
        seen.statuses[status] += 1
        if closes:
            await close(streams)
            streams = None
    await close(streams)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bool]:
    """(status, whether the server closes the connection) of one answer, read to its end."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    await reader.readexactly(int(headers.get("content-length", 0)))
    return int(lines[0].split()[1]), headers.get("connection") == "close"


async def close(streams: Streams | None) -> None:
    if streams is not None:
        streams[1].close()
        with contextlib.suppress(OSError):
            await streams[1].wait_closed()


async def slow_sender(port: int, seen: Kind, until: float) -> None:
    """A body that arrives at a byte a second."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError):
            streams = await asyncio.open_connection("127.0.0.1", port)
            streams[1].write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
            while time.monotonic() < until and not streams[0].at_eof():
                streams[1].write(b"x")
                await streams[1].drain()
                await asyncio.sleep(1)
            await close(streams)
            seen.broken += 1


async def idle_connection(port: int, seen: Kind, until: float) -> None:
    """A connection that sends nothing."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, asyncio.TimeoutError):
            streams = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.wait_for(streams[0].read(1), max(0.1, until - time.monotonic()))
            await close(streams)
            seen.broken += 1


async def run(port: int, seconds: float, clients: dict[str, int]) -> dict[str, Any]:
    until = time.monotonic() + seconds
    seen = {kind: Kind() for kind in clients}
    tasks = []
    for kind, count in clients.items():
        body = BODIES[kind]() if kind in BODIES else b""
        for _ in range(count):
            if kind == "slow":
                tasks.append(slow_sender(port, seen[kind], until))
            elif kind == "idle":
                tasks.append(idle_connection(port, seen[kind], until))
            else:
                tasks.append(sender(port, body, seen[kind], until))
    await asyncio.gather(*tasks)
    return {kind: found.to_dict() for kind, found in seen.items()}


if __name__ == "__main__":
    wanted = json.load(sys.stdin)
    print(json.dumps(asyncio.run(run(int(sys.argv[1]), float(sys.argv[2]), wanted))))
