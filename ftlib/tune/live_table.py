"""What is seen of a sweep while it runs: a live table on a terminal, a line per event elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from ftlib.tune.trial_store import Trial

ROWS = 16
"""Trials in the live table: those that run, then the best that are over."""


class Table:
    """Shows the trials of a ledger; a context manager. `total` may be infinite-like; `slots` trials run at once."""

    def __init__(
        self,
        trials: Mapping[int, Trial],
        names: Mapping[str, str],
        total: int,
        epochs: int,
        slots: int,
        split: str,
        out: TextIO | None = None,
    ) -> None:
        self.trials, self.names, self.total, self.epochs, self.slots, self.split = (
            trials,
            names,
            total,
            epochs,
            slots,
            split,
        )
        self.out = out or sys.stdout
        self.live: Any = None
        self.running: dict[int, float] = {}
        self.began = time.monotonic()
        self.spent: list[float] = []
        """Wall-clock seconds of the trials that ended here."""

    def __enter__(self) -> Table:
        if self.out.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(
                get_renderable=self.render,
                console=Console(file=self.out),
                refresh_per_second=2,
                transient=False,
            )
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self.out, flush=True)

    # --- events ---

    def started(self, trial: Trial) -> None:
        self.running[trial.number] = time.monotonic()
        if self.live is None:
            self.say(
                f"{trial.label}  starts  {self.values(trial)}"
                if not trial.history
                else f"{trial.label}  goes on after epoch {trial.epoch}"
            )

    def progressed(self, trial: Trial) -> None:
        if self.live is None:
            self.say(
                f"{trial.label}  epoch {trial.epoch}/{self.epochs}  top-1 {trial.history[-1]['score']:.2f} %  {self.best_words()}  {self.left_words()}"
            )

    def ended(self, trial: Trial, outcome: str) -> None:
        since = self.running.pop(trial.number, None)
        if since is not None and outcome != "interrupted":
            self.spent.append(time.monotonic() - since)
        if self.live is None or outcome == "failed":
            score = f"top-1 {trial.score:.2f} %" if trial.score is not None else ""
            self.say(f"{trial.label}  {outcome}  {score}  {trial.reason}".rstrip())

    # --- words ---

    def values(self, trial: Trial) -> str:
        from ftlib.tune.suggest import describe

        return ("the recipe: " if trial.origin == "recipe" else "") + describe(
            trial.values, self.names
        )

    @property
    def done(self) -> int:
        return sum(bool(t.outcome) for t in self.trials.values())

    def best(self) -> Trial | None:
        over = [t for t in self.trials.values() if t.score is not None and t.outcome != "failed"]
        return max(over, key=lambda t: t.score or 0.0, default=None)

    def best_words(self) -> str:
        best = self.best()
        return "" if best is None else f"best {best.score:.2f} % ({best.label})"

    def seconds_left(self) -> float | None:
        """From the mean time of the trials that are over, those running counted as half done; None before the first."""
        if not self.spent:
            return None
        waiting = max(self.total - self.done - len(self.running), 0) + len(self.running) / 2
        return waiting * sum(self.spent) / len(self.spent) / max(self.slots, 1)

    def left_words(self) -> str:
        left = self.seconds_left()
        return f"{self.done} of {self.total} done" + (
            "" if left is None else f", about {duration(left)} left"
        )

    def render(self) -> Any:
        from rich.table import Table as Grid

        grid = Grid(
            title=f"{self.best_words() or 'no score yet'}   {self.left_words()}   {duration(time.monotonic() - self.began)} so far",
            title_justify="left",
            caption=f"top-1 in percent, of the {self.split} split",
            caption_justify="left",
        )
        for heading in ("trial", *self.names.values()):
            grid.add_column(heading, no_wrap=True)
        for heading in ("epoch", "top-1", "best"):
            grid.add_column(heading, justify="right")
        grid.add_column("state")
        running = [self.trials[n] for n in sorted(self.running)]
        over = sorted(
            (t for t in self.trials.values() if t.number not in self.running and t.outcome),
            key=lambda t: -(t.score if t.score is not None else -1.0),
        )
        best = self.best()
        for trial in [*running, *over][:ROWS]:
            shown = [_short(trial.values.get(p, "-")) for p in self.names]
            state = "running" if trial.number in self.running else trial.outcome
            style = (
                "bold green"
                if trial is best
                else ""
                if trial.number in self.running
                else "dim"
                if trial.outcome != "completed"
                else ""
            )
            grid.add_row(
                trial.label
                + (" recipe" if trial.origin == "recipe" and trial.seed is None else ""),
                *shown,
                f"{trial.epoch}/{self.epochs}",
                f"{trial.history[-1]['score']:.2f}" if trial.history else "",
                f"{trial.score:.2f}" if trial.score is not None else "",
                state,
                style=style,
            )
        if len(running) + len(over) > ROWS:
            grid.add_row(
                "...", *[""] * (len(self.names) + 3), f"{len(running) + len(over) - ROWS} more"
            )
        return grid


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """Such as 0:03:20."""
    seconds = int(max(seconds, 0))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
