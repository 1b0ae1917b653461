"""The trials of a sweep as an Optuna journal beside the store, for optuna-dashboard.

    optuna-dashboard $FTLIB_HOME/runs/SWEEP/optuna.journal

The file is a copy for people. It is written anew when a sweep starts and gets each trial that ends;
ftlib never reads it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.tune.spaces import Axis, Space
from ftlib.tune.suggest import distribution, encode, trial_state
from ftlib.tune.trial_store import Trial

if TYPE_CHECKING:
    import optuna

    from ftlib.tune.ray_tune import TrialEnd

log = logging.getLogger("ftlib.tune")

FILE = "optuna.journal"


class OptunaJournal:
    """A TrialListener that adds each trial to the journal when it ends."""

    def __init__(self, file: Path, name: str, space: Space) -> None:
        self.file, self.name, self.space = file, name, space
        self.study: optuna.Study | None = None

    def start(self, trials: Iterable[Trial]) -> None:
        """Begin the file anew, with the trials that have ended."""
        with self._never_fails():
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend

            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for stale in (self.file, self.file.with_name(self.file.name + ".lock")):
                stale.unlink(missing_ok=True)
            storage = JournalStorage(JournalFileBackend(str(self.file)))
            self.study = optuna.create_study(
                storage=storage, study_name=self.name, direction="maximize"
            )
            for trial in sorted(trials, key=lambda t: t.number):
                if trial.outcome:
                    self._add(trial)

    def started(self, trial: Trial) -> None:
        """Only ended trials are in the journal."""

    def progressed(self, trial: Trial, point: Mapping[str, float]) -> None:
        """Only ended trials are in the journal."""

    def ended(self, trial: Trial, end: TrialEnd) -> None:
        if self.study is not None and end.outcome != "interrupted":
            with self._never_fails():
                self._add(trial)

    def _add(self, trial: Trial) -> None:
        import optuna

        state = trial_state(trial)
        axes = {
            path: _including(self.space.axis(path), value)
            for path, value in trial.values.items()
            if _is_shown(self.space.axis(path), value)
        }
        assert self.study is not None
        self.study.add_trial(
            optuna.trial.create_trial(
                state=state,
                value=trial.score if state == optuna.trial.TrialState.COMPLETE else None,
                params={path: encode(trial.values[path]) for path in axes},
                distributions=axes,
                intermediate_values={int(p["epoch"]): p["score"] for p in trial.history},
                user_attrs={"trial": trial.name, "origin": trial.origin, "reason": trial.reason},
            )
        )

    @contextlib.contextmanager
    def _never_fails(self) -> Any:
        """A copy for people must not stop a sweep."""
        try:
            yield
        except Exception as error:
            self.study = None
            log.warning("the Optuna journal %s is not written (%s)", self.file, error)


def _is_shown(axis: Axis, value: Any) -> bool:
    return axis.kind != "choice" or axis.holds(value)


def _including(axis: Axis, value: Any) -> Any:
    """The axis as Optuna's distribution, widened where the recipe's own value lies outside."""
    import optuna

    if axis.holds(value):
        return distribution(axis)
    low, high = min(axis.low, value), max(axis.high, value)
    log_scale = axis.log and low > 0
    if axis.kind == "int":
        return optuna.distributions.IntDistribution(int(low), int(high), log=log_scale)
    return optuna.distributions.FloatDistribution(low, high, log=log_scale)
