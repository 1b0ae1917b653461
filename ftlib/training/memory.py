"""Memory of the training process on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what tensors leave behind, for the next step's tensors, for as
    long as this process lives.

    glibc hands freed memory back to the system, and every training step then faults the same pages
    in again: a tenth to a quarter of its time (docs/performance.md). Does nothing where the C
    library has no such setting.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)
