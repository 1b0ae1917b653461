"""The progress of a sweep: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ftlib.launch.progress import duration
from ftlib.text import wrapped
from ftlib.tune.trial_store import Trial

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

    from ftlib.tune.ray_tune import TrialEnd

ROWS = 16
"""Trials in the live table: those that run, then the best of those that have ended."""


class _Start(NamedTuple):
    time: float
    """On time.monotonic's clock."""
    epoch: int
    """Epochs that the trial had behind it."""


class TrialTable:
    """A context manager and a TrialListener (see ray_tune) that shows the trials of a store."""

    def __init__(
        self,
        trials: Mapping[int, Trial],
        names: Mapping[str, str],
        *,
        total: int,
        epochs: int,
        slots: int,
        split: str,
        out: TextIO | None = None,
    ) -> None:
        """names: path -> column, of the searched settings. slots: trials at once."""
        self.trials, self.names = trials, names
        self.total, self.epochs, self.slots, self.split = total, epochs, slots, split
        self.out = out or sys.stdout
        self.live: Live | None = None
        self.running: dict[int, _Start] = {}
        """Number of each running trial -> where it started."""
        self.began = time.monotonic()
        self.spent: list[float] = []
        """Wall-clock seconds of the trials that ended here."""

    def __enter__(self) -> TrialTable:
        if self.out.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.out)
            self.live = Live(get_renderable=self.render, console=console, refresh_per_second=2)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a line, above the live table where there is one."""
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.out, flush=True)

    # --- events ---

    def started(self, trial: Trial) -> None:
        self.running[trial.number] = _Start(time.monotonic(), trial.epoch)
        if self.live is None:
            event = (
                f"goes on after epoch {trial.epoch}"
                if trial.history
                else f"starts  {self._values(trial)}"
            )
            self.say(wrapped(f"{trial.label}  {event}"))

    def progressed(self, trial: Trial, point: Mapping[str, float]) -> None:
        if self.live is None:
            self.say(
                wrapped(
                    f"{trial.label}  epoch {trial.epoch}/{self.epochs}  "
                    f"top-1 {point['score']:.2f} %  {self._best_text()}  {self._progress_text()}"
                )
            )

    def ended(self, trial: Trial, end: TrialEnd) -> None:
        start = self.running.pop(trial.number, None)
        if start is not None and end.outcome != "interrupted":
            self.spent.append(time.monotonic() - start.time)
        if self.live is None or end.outcome == "failed":
            score = f"top-1 {trial.score:.2f} %" if trial.score is not None else ""
            self.say(wrapped(f"{trial.label}  {end.outcome}  {score}  {trial.reason}".rstrip()))

    # --- texts ---

    def _values(self, trial: Trial) -> str:
        from ftlib.tune.suggest import describe

        prefix = "the recipe: " if trial.origin == "recipe" else ""
        return prefix + describe(trial.values, self.names)

    def _best(self) -> Trial | None:
        scored = [t for t in self.trials.values() if t.score is not None and t.outcome != "failed"]
        return max(scored, key=lambda t: t.score or 0.0, default=None)

    def _best_text(self) -> str:
        best = self._best()
        return "" if best is None else f"best {best.score:.2f} % ({best.label})"

    def seconds_left(self) -> float | None:
        """Estimated: the mean time per trial for those that wait, its own pace for a running one
        (half of the mean before its first epoch has ended). None before the first trial has ended.
        """
        if not self.spent:
            return None
        mean = sum(self.spent) / len(self.spent)
        done = sum(bool(t.outcome) for t in self.trials.values())
        running = [self._seconds_of(n, mean) for n in self.running]
        waiting = max(self.total - done - len(running), 0) * mean
        return max((waiting + sum(running)) / max(self.slots, 1), max(running, default=0.0))

    def _seconds_of(self, number: int, mean: float) -> float:
        """How long a running trial still takes unless it is stopped early."""
        start, epoch = self.running[number], self.trials[number].epoch
        if epoch <= start.epoch:
            return mean / 2
        pace = (time.monotonic() - start.time) / (epoch - start.epoch)
        return pace * (self.epochs - epoch)

    def _progress_text(self) -> str:
        done = sum(bool(t.outcome) for t in self.trials.values())
        left = self.seconds_left()
        remaining = "" if left is None else f", about {duration(left)} left"
        return f"{done} of {self.total} done{remaining}"

    def render(self) -> Table:
        from rich.table import Table

        elapsed = duration(time.monotonic() - self.began)
        table = Table(
            title=f"{self._best_text() or 'no score yet'}   {self._progress_text()}   "
            f"{elapsed} so far",
            title_justify="left",
            caption=f"top-1 in percent, of the {self.split} split",
            caption_justify="left",
        )
        for heading in ("trial", *self.names.values()):
            table.add_column(heading, no_wrap=True)
        for heading in ("epoch", "top-1", "best"):
            table.add_column(heading, justify="right")
        table.add_column("state")
        running = [self.trials[n] for n in sorted(self.running)]
        ended = sorted(
            (t for t in self.trials.values() if t.number not in self.running and t.outcome),
            key=lambda t: -(t.score if t.score is not None else -1.0),
        )
        best = self._best()
        for trial in [*running, *ended][:ROWS]:
            table.add_row(*self._row(trial), style=self._style(trial, best))
        if (hidden := len(running) + len(ended) - ROWS) > 0:
            table.add_row("...", *[""] * (len(self.names) + 3), f"{hidden} more")
        return table

    def _row(self, trial: Trial) -> list[str]:
        is_recipe = trial.origin == "recipe" and trial.seed is None
        return [
            trial.label + (" recipe" if is_recipe else ""),
            *(_short(trial.values.get(p, "-")) for p in self.names),
            f"{trial.epoch}/{self.epochs}",
            f"{trial.history[-1]['score']:.2f}" if trial.history else "",
            f"{trial.score:.2f}" if trial.score is not None else "",
            "running" if trial.number in self.running else trial.outcome,
        ]

    def _style(self, trial: Trial, best: Trial | None) -> str:
        if trial is best:
            return "bold green"
        if trial.number in self.running or trial.outcome == "completed":
            return ""
        return "dim"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
