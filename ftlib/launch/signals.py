"""SIGTERM and Ctrl-C: the first stops training with a checkpoint, the second stops at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from ftlib.launch.errors import StoppedError

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


def grace_seconds() -> float:
    """How long a stop may take before the driver ends without a checkpoint.

    `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S (3 s unless it is set); others wait longer.
    """
    if os.environ.get("RAY_JOB_SUBMISSION_ID"):
        return max(float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - 1.5, 1.0)
    return 60.0


class Signals:
    """Catches SIGTERM and SIGINT while it is entered, in the main thread.

    In another thread (a trial's) it does nothing.

    Args:
        on_first: called within the handler at the first signal; must only set something.
        raise_second: raise StoppedError at the second signal.
        raise_at_once: raise StoppedError at the first signal; for when nothing is being trained.
    """

    def __init__(
        self,
        on_first: Callable[[], None] = lambda: None,
        raise_second: bool = True,
        raise_at_once: bool = False,
    ) -> None:
        self.on_first, self.raise_second = on_first, raise_second
        self.raise_at_once = raise_at_once
        self.number: int | None = None
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._handle) for n in NAMES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @property
    def name(self) -> str:
        """The signal that came, for a person."""
        return NAMES.get(signal.Signals(self.number or signal.SIGTERM), "a signal")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.count += 1
        if self.raise_at_once:
            raise StoppedError(number, "stopped; the same command goes on")
        if self.count == 1:
            self.on_first()
        elif self.raise_second:
            raise StoppedError(
                number, "stopped at once; the same command goes on from the newest checkpoint"
            )
