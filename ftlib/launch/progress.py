"""A run's progress while it trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING, TextIO

from ftlib.console import LINE_SECONDS, live_bar
from ftlib.text import wrapped

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class ProgressDisplay:
    """Shows progress points (`WorkerContext.progress`); a context manager.

    A second point of the same step carries the epoch's validation score and ends the epoch's line.
    """

    def __init__(self, title: str, out: TextIO | None = None) -> None:
        self.title, self.out = title, out or sys.stderr
        self._step, self._ended, self._line = -1, -1, 0.0
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressDisplay:
        columns = ("{task.description}", "bar", "share", "{task.fields[numbers]}")
        self._bar = live_bar(self.out, *columns)
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Text of its own, of one line before it is wrapped."""
        text = wrapped(text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.out, flush=True)

    def show(self, values: dict[str, float]) -> None:
        step, epoch = int(values["step"]), int(values["epoch"])
        if step < self._step:  # the workers were restarted and repeat some steps
            self.say(f"{self.title}  goes on from step {step}")
            self._ended = min(self._ended, epoch - 1)
        ends_epoch = step == self._step and epoch != self._ended
        # The epoch's own line follows it, after the evaluation.
        closes = step * values["epochs"] == epoch * values["steps"]
        self._step = step
        if self._bar is not None:
            self._show_bar(self._bar, values)
        if ends_epoch:
            self._ended = epoch
            self.say(sentence(values, ends_epoch=True))
            self._line = time.monotonic()
        elif self._bar is None and not closes and time.monotonic() - self._line > LINE_SECONDS:
            self.say(sentence(values))
            self._line = time.monotonic()

    def _show_bar(self, bar: RichProgress, values: dict[str, float]) -> None:
        if self._task is None:
            self._task = bar.add_task(self.title, total=values["steps"], numbers="")
        bar.update(self._task, completed=values["step"], numbers=sentence(values))


def sentence(values: dict[str, float], ends_epoch: bool = False) -> str:
    """One line of numbers: the epoch and its loss, scores in percent, speed, time left."""
    words = [f"epoch {values['epoch']:.0f}/{values['epochs']:.0f}"]
    if not ends_epoch:
        words.append(f"step {values['step']:.0f}/{values['steps']:.0f}")
    words += [f"loss {values['loss']:.3f}", f"top-1 {values['top1']:.1f} %"]
    if "val_top1" in values:
        words.append(f"val {values['val_top1']:.2f} % (best {values['best']:.2f})")
    words.append(f"{values['images_per_s']:,.0f} images/s")
    if values["step"] < values["steps"]:
        words.append(f"{duration(values['seconds_left'])} left")
    return "  ".join(words)


def duration(seconds: float) -> str:
    """Such as 0:03:20."""
    return str(timedelta(seconds=round(min(max(seconds, 0), 1e9))))


def duration_short(seconds: float) -> str:
    """Such as 3.2 s, or 0:03:20 from a minute on."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)
