"""SIGTERM and Ctrl-C: the first one asks training to stop with a checkpoint, the second one stops at once."""

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
    """How long a stop may take: `ray job stop` kills after RAY_JOB_STOP_WAIT_TIME_S (3 s unless it is set), others wait."""
    if os.environ.get("RAY_JOB_SUBMISSION_ID"):
        return max(float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) - 1.5, 1.0)
    return 60.0


class Signals:
    """Catches SIGTERM and SIGINT while it is entered, in the main thread; elsewhere (a trial's thread) it does nothing.

    Enter it after ray.init, which installs a handler of its own. `on_first` runs within the handler and must only set something.
    """

    def __init__(
        self,
        on_first: Callable[[], None] = lambda: None,
        raise_second: bool = True,
        at_once: bool = False,
    ) -> None:
        self.on_first, self.raise_second, self.at_once = on_first, raise_second, at_once
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
        return NAMES.get(signal.Signals(self.number or signal.SIGTERM), "a signal")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.count += 1
        if self.at_once:  # nothing is being trained
            raise StoppedError(number, "stopped; the same command goes on")
        if self.count == 1:
            self.on_first()
        elif self.raise_second:
            raise StoppedError(
                number, "stopped at once; the same command goes on from the newest checkpoint"
            )
