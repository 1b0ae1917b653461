"""Shared memory that loader processes fill and the training process reads, used again and again.

New shared memory costs a page fault per 4 KiB in the process that fills it and another in the one that reads it: 0.1 ms and more per
picture of 224 px. A slot of the ring is handed out with a batch's place in the plan and comes back when nothing refers to the batch's
memory any more, views included. Where every slot is in use there is none to take, and the batch travels in memory of its own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections import deque
from collections.abc import Sequence
from itertools import count
from multiprocessing import reduction
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

_RINGS: WeakValueDictionary[int, SharedMemoryRing] = WeakValueDictionary()
_numbers = count()


class SharedMemoryRing:
    """`slots` pieces of `size` bytes. Pickles into processes that are being started, where `view` is what it is for."""

    def __init__(self, slots: int, size: int) -> None:
        self.size, self.number = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, next(_numbers)
        self._file = _unnamed_file()
        os.ftruncate(self._file, max(1, slots) * self.size)
        self._bytes = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        self._free = deque(range(slots))
        _RINGS[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Mapped, (reduction.DupFd(self._file), self.size)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # the memory stays while a batch refers to it

    def take(self, size: int) -> int | None:
        """A slot for `size` bytes that nobody uses: the one that came back last, whose pages are the warmest. None where there is none."""
        if size > self.size:
            return None
        try:
            return self._free.pop()
        except IndexError:
            return None


class _Mapped:
    """The ring in a process that fills it."""

    def __init__(self, file: Any, size: int) -> None:
        descriptor = file.detach()
        self.size = size
        self._bytes = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
        os.close(descriptor)

    def view(self, slot: int, shape: Sequence[int]) -> np.ndarray:
        """uint8[shape] at the slot's beginning."""
        return np.frombuffer(
            self._bytes.data, np.uint8, int(np.prod(shape)), slot * self.size
        ).reshape(shape)


def lease(number: int, slot: int, shape: Sequence[int]) -> np.ndarray:
    """uint8[shape]: what was written to the slot of the ring of that number, in the process that made it. The slot comes back when the
    last array or tensor on this memory is gone."""
    return np.asarray(_Lease(_RINGS[number], slot, tuple(shape)))


class _Lease:
    def __init__(self, ring: SharedMemoryRing, slot: int, shape: tuple[int, ...]) -> None:
        self.ring, self.slot = ring, slot
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "data": (ring._bytes.ctypes.data + slot * ring.size, False),
        }

    def __del__(self) -> None:
        self.ring._free.append(self.slot)


def _unnamed_file() -> int:
    """A file in memory that no name leads to: it is gone with the processes, however they end. It does not count to the limit of /dev/shm."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ftlib-loader")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
