"""Progress: a bar on a terminal, plain lines where the output goes to a file or a pipe."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_SECONDS = 10.0
"""Seconds between two plain lines."""


def live_bar(out: TextIO, *columns: str, transient: bool = False) -> RichProgress | None:
    """A bar on `out` with text columns such as "{task.description}"; None where `out` is no
    terminal. It has to be started and stopped.

    "bar", "share", "count" and "left" stand for rich's bar, percentage, count and time left.
    """
    if not out.isatty():
        return None
    from rich import progress
    from rich.console import Console

    known = {
        "bar": progress.BarColumn(None if "share" in columns else 40),
        "share": progress.TaskProgressColumn(),
        "count": progress.MofNCompleteColumn(),
        "left": progress.TimeRemainingColumn(),
    }
    made = [known.get(name) or progress.TextColumn(name) for name in columns]
    return progress.Progress(*made, console=Console(file=out), transient=transient)


class Progress:
    """Progress of a count on standard error; a context manager."""

    def __init__(self, total: int, title: str, *, unit: str = "files", shown: bool = True) -> None:
        self._total, self._title, self._unit, self._shown = total, title, unit, shown
        self._done, self._started, self._last = 0, time.monotonic(), time.monotonic()
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            columns = ("{task.description}", "bar", "count", "{task.fields[speed]}", "left")
            self._bar = live_bar(sys.stderr, *columns)
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=self._total, speed="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._shown and kind is None:
            self._line()

    def advance(self, n: int = 1) -> None:
        """`n` more are done."""
        self.update(self._done + n, self._total)

    def update(self, done: int, total: int) -> None:
        """`done` of `total` are done."""
        self._done, self._total = done, total
        if self._bar is not None:
            speed = f"{self._speed():,.0f} {self._unit}/s"
            self._bar.update(self._task, completed=done, total=total, speed=speed)
        elif self._shown and done < total and time.monotonic() - self._last >= LINE_SECONDS:
            self._line()  # the last line is written at the end

    def _speed(self) -> float:
        return self._done / max(1e-3, time.monotonic() - self._started)

    def _line(self) -> None:
        self._last = time.monotonic()
        print(
            f"{self._title}: {self._done:,} of {self._total:,} {self._unit}, "
            f"{self._speed():,.0f} {self._unit}/s",
            file=sys.stderr,
            flush=True,
        )
