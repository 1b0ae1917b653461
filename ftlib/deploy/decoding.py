"""Decode pictures of unknown senders in processes with bounded memory and time, within a budget.

Two lanes keep clients apart. Pictures that decode quickly share the fast lane. Large ones wait in
the slow lane, where one process of low priority takes them in turn, so that a client who sends
nothing but 49-megapixel PNGs slows down only the others in that lane. Whoever would go over a
lane's budget is refused at once with status 429.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftlib.deploy.errors import RequestError
from ftlib.picture import Header

CHILD = Path(__file__).with_name("decoder_process.py")
CHILD_ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
SECONDS_TO_START = 60.0
FAST_MEGAPIXELS = 4.0
"""Pictures that cost more to decode than so many megapixels of a PNG go to the slow lane."""
PREPROCESSING = (
    *("size", "short", "interpolation"),
    *("background", "max_megapixels", "depth_range", "depth_bits"),
)
"""What a decoding process needs to know of `meta.json`."""
STATUS = {"too_large": 413, "out_of_memory": 413}
"""HTTP status of a picture refused for this reason; 400 for all others."""


@dataclass(frozen=True)
class LaneSettings:
    processes: int
    megapixels: float
    """Budget of all pictures in the lane together, waiting ones too, in `cost`'s megapixels."""
    memory_bytes: int
    """Most that one process may use for one picture."""
    cpu_seconds: float
    """Most CPU time of one picture."""
    wall_seconds: float
    """Most time that one picture may take once a process has it."""
    niceness: int
    """Added to the process's nice value: 10 leaves it a tenth of a busy core."""


def lanes(max_megapixels: float, cpus: int) -> tuple[LaneSettings, LaneSettings]:
    """The (fast, slow) lane of a server with so many CPUs."""
    fast = LaneSettings(
        processes=max(1, min(4, cpus)),
        megapixels=64 * FAST_MEGAPIXELS,
        memory_bytes=512 << 20,
        cpu_seconds=10.0,
        wall_seconds=30.0,
        niceness=0,
    )
    slow = LaneSettings(
        processes=1,
        megapixels=2 * max_megapixels,
        memory_bytes=(256 << 20) + int(max_megapixels * 24e6),
        cpu_seconds=30.0,
        wall_seconds=120.0,
        niceness=10,
    )
    return fast, slow


def cost(header: Header, length: int, short: int) -> float:
    """What decoding a file of `length` bytes costs, in megapixels of a PNG.

    A JPEG is decoded at a fraction of its size where that is enough for a shorter side of `short`
    pixels, so its cost follows its bytes; a progressive one is decoded whole.
    """
    width, height = header.size or (7000, 7000)  # HEIC and the like with an unreadable header
    pixels = width * height / 1e6
    if header.kind != "JPEG":
        return pixels
    if header.progressive:
        return pixels / 2 + length / 4e6
    shrink = max(s for s in (1, 2, 4, 8) if s == 1 or s <= 0.5 * min(width, height) / short)
    return pixels / shrink**2 / 4 + length / 4e6


class Decoders:
    """Both lanes. `decode` belongs to one event loop."""

    def __init__(self, picture_code: Path, meta: Mapping[str, Any], cpus: int) -> None:
        limit = float(meta.get("max_megapixels", 50.0))
        about = {name: meta[name] for name in PREPROCESSING if name in meta}
        self._short = int(meta["short"])
        self._shape = (int(meta["size"]), int(meta["size"]), 3)
        self._fast, self._slow = (
            _Lane(settings, picture_code, about) for settings in lanes(limit, cpus)
        )

    async def start(self) -> None:
        """Start the fast lane's processes; the slow one starts with its first picture."""
        await self._fast.start()

    async def decode(self, data: bytes, header: Header) -> np.ndarray:
        """uint8[S, S, 3]. Raises RequestError with the status to answer."""
        megapixels = cost(header, len(data), self._short)
        lane = self._fast if megapixels <= FAST_MEGAPIXELS else self._slow
        pixels = await lane.decode(data, megapixels)
        return np.frombuffer(pixels, np.uint8).reshape(self._shape)

    async def close(self) -> None:
        await asyncio.gather(self._fast.close(), self._slow.close())


class _Lane:
    def __init__(self, settings: LaneSettings, code: Path, meta: Mapping[str, Any]) -> None:
        self._settings = settings
        self._children = [_Child(settings, code, meta) for _ in range(settings.processes)]
        self._idle = list(self._children)
        self._turn = asyncio.Semaphore(settings.processes)
        self._megapixels = 0.0

    async def start(self) -> None:
        await asyncio.gather(*(child.start() for child in self._children))

    async def decode(self, data: bytes, megapixels: float) -> bytes:
        if self._megapixels and self._megapixels + megapixels > self._settings.megapixels:
            raise RequestError(429, "too many large pictures at once. Try again in a second")
        self._megapixels += megapixels
        try:
            async with self._turn:
                child = self._idle.pop()
                try:
                    return await child.decode(data)
                finally:
                    self._idle.append(child)
        finally:
            self._megapixels -= megapixels

    async def close(self) -> None:
        await asyncio.gather(*(child.close() for child in self._children))


class _Child:
    """One `decoder_process.py`; started again after it died."""

    def __init__(self, settings: LaneSettings, code: Path, meta: Mapping[str, Any]) -> None:
        self._settings = settings
        self._first = {
            "picture_code": str(code),
            "meta": dict(meta),
            "memory_bytes": settings.memory_bytes,
            "cpu_seconds": settings.cpu_seconds,
            "niceness": settings.niceness,
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(CHILD), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **CHILD_ENVIRONMENT},
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        try:
            first = json.dumps(self._first).encode()
            await asyncio.wait_for(self._ask(first), SECONDS_TO_START)
        except (OSError, EOFError, asyncio.TimeoutError) as error:
            await self.close()
            raise RuntimeError(f"a decoding process did not start: {error!r}") from error

    async def decode(self, data: bytes) -> bytes:
        if self._process is None:
            await self.start()
        try:
            answer = await asyncio.wait_for(self._ask(data), self._settings.wall_seconds)
        except asyncio.TimeoutError:
            await self.close()
            raise RequestError(503, "decoding it took too long. Try again later") from None
        except (OSError, EOFError):
            await self.close()
            raise RequestError(400, "the decoder gave up on this picture") from None
        except asyncio.CancelledError:
            await self.close()
            raise
        if answer[:1] == b"+":
            return answer[1:]
        found = json.loads(answer[1:])
        raise RequestError(STATUS.get(found["reason"], 400), found["detail"])

    async def _ask(self, message: bytes) -> bytes:
        assert self._reader is not None and self._writer is not None
        self._writer.writelines((len(message).to_bytes(4, "big"), message))
        await self._writer.drain()
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        return await self._reader.readexactly(size)

    async def close(self) -> None:
        """End the process, at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._writer is not None:
            writer, self._writer, self._reader = self._writer, None, None
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
