"""Shared memory that loader processes fill and the training process reads, used again and again.

New shared memory costs a page fault per 4 KiB in the process that fills it and another in the
one that reads it: 0.1 ms and more per picture of 224 px. So the ring's slots are reused: a slot
is handed out for a batch of the plan, and comes back when nothing refers to the batch's memory
any more, views included. Where every slot is in use `take` returns None, and the batch is
pickled instead.
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
    """`slots` pieces of `size` bytes.

    Pickled into a process that is being started it becomes a `MappedRing`.
    """

    def __init__(self, slots: int, size: int) -> None:
        self.size, self.number = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE, next(_numbers)
        self._file = _unnamed_file()
        os.ftruncate(self._file, max(1, slots) * self.size)
        self._bytes = np.frombuffer(mmap.mmap(self._file, 0), np.uint8)
        self._free = deque(range(slots))
        _RINGS[self.number] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRing, (reduction.DupFd(self._file), self.size, self.number)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # the memory stays while a batch refers to it

    def take(self, size: int) -> int | None:
        """A free slot for `size` bytes, or None where there is none.

        The slot that came back last, because its pages are the warmest in the cache.
        """
        if size > self.size:
            return None
        try:
            return self._free.pop()
        except IndexError:
            return None


class MappedRing:
    """The ring in a process that fills it."""

    def __init__(self, file: Any, size: int, number: int) -> None:
        """`file`: what `multiprocessing.reduction.DupFd` gives; its `detach` is the descriptor."""
        descriptor = file.detach()
        self.size, self.number = size, number
        self._bytes = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
        os.close(descriptor)

    def view(self, slot: int, shape: Sequence[int]) -> np.ndarray:
        """uint8[shape] at the beginning of the slot."""
        count, offset = int(np.prod(shape)), slot * self.size
        return np.frombuffer(self._bytes.data, np.uint8, count, offset).reshape(shape)


def lease(number: int, slot: int, shape: Sequence[int]) -> np.ndarray:
    """uint8[shape]: what was written to a slot of the ring with that number, in the process that
    made the ring.

    The slot comes back when the last array or tensor on this memory is gone.
    """
    return np.asarray(_Lease(_RINGS[number], slot, tuple(shape)))


class _Lease:
    """Keeps a slot while numpy refers to it, through the array interface."""

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
    """The descriptor of a file in memory without a name.

    It is gone with the processes, however they end, and does not count to the limit of /dev/shm.
    """
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ftlib-loader")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
