"""Starts the process that delivers leftover journals while a job does its work.

The process is separate because importing MLflow in a thread, beside a job's own imports, can
deadlock on Python's import locks. It imports MLflow only if something waits, ends by itself, and
loses nothing when it is killed. Imports only the standard library, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from ftlib.paths import home

DELAY_SECONDS = 2.0
"""A job that ends sooner (--help, a typing mistake) starts nothing."""

_lock = threading.Lock()
_timer: threading.Timer | None = None
_process: subprocess.Popen[bytes] | None = None


def _start() -> None:
    global _process
    root = home()
    with _lock, contextlib.suppress(OSError):
        if _timer is None or not any((root / "runs").glob("*/journal")):
            return
        _process = subprocess.Popen(
            [sys.executable, "-m", "ftlib.track.leftovers", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).parents[2],
        )


@contextlib.contextmanager
def delivery(delay_seconds: float = DELAY_SECONDS) -> Iterator[None]:
    """Deliver what waits below $FTLIB_HOME if what is inside takes longer than `delay_seconds`."""
    global _timer
    timer = threading.Timer(delay_seconds, _start)
    timer.daemon = True
    with _lock:
        _timer = timer
    timer.start()
    try:
        yield
    finally:
        with _lock:
            timer.cancel()
            _timer = None


def stop() -> None:
    """End the delivery of this process, before it opens tracking and delivers leftovers itself."""
    global _timer, _process
    with _lock:
        if _timer is not None:
            _timer.cancel()
            _timer = None
        process, _process = _process, None
    if process is not None:
        process.terminate()
        process.wait()
