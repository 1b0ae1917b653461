"""Python's cyclic garbage collector off for a while, and kept away from what stays."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_paused = _resumed = 0
"""Blocks of each kind that are entered, in all threads: the collector is the whole process's."""
_enabled = True
"""Whether it was on before the first of them."""


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection within the block; for imports, and for what makes as many objects.

    Modules are objects that stay. Looking through them over and over while torch, Ray and MLflow
    are imported takes a quarter of the imports' time. Not for training (`gc_resumed`): tensors in a
    cycle would never be freed.
    """
    _count(paused=1)
    try:
        yield
    finally:
        _count(paused=-1)


@contextlib.contextmanager
def gc_resumed() -> Iterator[None]:
    """Garbage collection as it was before `gc_paused`, also where other threads have paused it."""
    _count(resumed=1)
    try:
        yield
    finally:
        _count(resumed=-1)


def _count(paused: int = 0, resumed: int = 0) -> None:
    global _paused, _resumed, _enabled
    with _lock:
        if not _paused and not _resumed:
            _enabled = gc.isenabled()
        _paused += paused
        _resumed += resumed
        if _enabled and (not _paused or _resumed):
            gc.enable()
        else:
            gc.disable()


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """`gc_paused` for the imports of a process of ftlib's own, whose collector leaves out for good
    what there is when the first such block ends.

    With torch, Ray and MLflow imported, each full collection takes 0.7 s. Only at a process's
    start: garbage that is there at that moment is never freed.
    """
    with gc_paused():
        yield
        if not gc.get_freeze_count():
            gc.freeze()


@contextlib.contextmanager
def lasting_objects() -> Iterator[None]:
    """`gc_paused` for what is made once in a process and stays, such as a later import.

    In a process that began with `lasting_imports` the collector leaves it out as well.
    """
    with gc_paused():
        yield
        if gc.get_freeze_count():
            gc.freeze()
