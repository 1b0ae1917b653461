"""The time that a sweep may take, over all its starts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ftlib.launch.progress import duration
from ftlib.tune.trial_store import Trial, TrialStore

if TYPE_CHECKING:
    from ftlib.tune.ray_tune import TrialEnd


class TimeBudget:
    """Counts the time in which a sweep's trials run. A TrialListener, which keeps it in the store.

    limit: in seconds; infinity for none.
    """

    def __init__(self, store: TrialStore, limit: float) -> None:
        self.store, self.limit = store, limit
        self.before = float(store.about.get("spent_seconds", 0.0))
        """Seconds of earlier starts."""
        self.began = time.monotonic()
        self.refused = False
        """A trial was not started because of the budget."""

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self.began

    def allows_another(self) -> bool:
        """Whether another trial is expected to end within the budget.

        The expectation is the mean time of the trials that ran to their end; before the first of
        them has ended, trials start as long as there is time left.
        """
        done = [t for t in self.store.trials.values() if t.outcome == "completed"]
        times = [float(t.result.get("wall_seconds", t.seconds)) for t in done]
        expected = sum(times) / len(times) if times else 0.0
        allowed = self.spent < self.limit and self.spent + expected <= self.limit
        self.refused = self.refused or not allowed
        return allowed

    def started(self, trial: Trial) -> None:
        """Nothing to count yet."""

    def progressed(self, trial: Trial, point: Mapping[str, float]) -> None:
        """Nothing to count yet."""

    def ended(self, trial: Trial, end: TrialEnd) -> None:
        self.store.save_about(spent_seconds=self.spent)

    def __str__(self) -> str:
        return f"{duration(self.spent)} of {duration(self.limit)}"
