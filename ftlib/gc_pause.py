"""Python's cyclic garbage collector off for a while."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """No garbage collection within the block; for imports, and for what makes as many objects.

    Modules are objects that stay. Looking through them over and over while torch, Ray and MLflow
    are imported takes a quarter of the imports' time. Not for training: tensors in a cycle would
    never be freed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
