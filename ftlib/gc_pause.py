"""Python's cyclic garbage collector off for a while, and kept away from what stays."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection within the block; for imports, and for what makes as many objects.

    Modules are objects that stay. Looking through them over and over while torch, Ray and MLflow
    are imported takes a quarter of the imports' time. Not for training (`gc_resumed`): tensors in a
    cycle would never be freed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def gc_resumed() -> Iterator[None]:
    """Garbage collection on within a block of `gc_paused`."""
    paused = not gc.isenabled()
    gc.enable()
    try:
        yield
    finally:
        if paused:
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
