"""Early stopping: Ray Tune's asynchronous successive halving (ASHA, Li et al. 2020), rebuilt from the ledger when a sweep is restarted."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from ftlib.tune.trial_store import Trial


class AsynchronousHalving(ASHAScheduler):
    """ASHA that knows a trial by its number in the ledger, never stops the recipe's own trial (what the others are compared with), and never
    "stops" a trial in its last epoch.

    At epochs `grace`, `grace * reduction`, ... a trial goes on if it is in the best 1/`reduction` of the trials that have come so far.
    """

    def __init__(
        self, epochs: int, grace: int = 1, reduction: float = 3, protected: Iterable[int] = (0,)
    ):
        # max_t beyond the last epoch: Tune kills a trial that reaches max_t before its training function can finish.
        super().__init__(
            time_attr="epoch",
            metric="score",
            mode="max",
            max_t=epochs + 1,
            grace_period=min(grace, epochs),
            reduction_factor=reduction,
        )
        self.epochs = epochs
        self.protected = frozenset(protected)
        self.stopped: dict[int, int] = {}
        """Number of each trial that was stopped -> the epoch."""

    def replay(self, trials: Iterable[Trial]) -> None:
        """Take in what earlier drivers saw, so that new trials are measured against the same rungs."""
        nobody: Any = None  # ASHA does not use the controller
        for trial in sorted(trials, key=lambda t: t.number):
            known: Any = SimpleNamespace(trial_id=trial.name)
            super().on_trial_add(nobody, known)
            for point in trial.history:
                super().on_trial_result(nobody, known, dict(point))

    def milestones(self) -> list[int]:
        return sorted(int(m) for m, _ in self._brackets[0]._rungs if m <= self.epochs)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, _known(trial))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "outcome" in result or "score" not in result:
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, _known(trial), result)
        number = trial.config["number"]
        if (
            decision != TrialScheduler.STOP
            or number in self.protected
            or result["epoch"] >= self.epochs
        ):
            return TrialScheduler.CONTINUE
        self.stopped[number] = int(result["epoch"])
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._trial_info.pop(_known(trial).trial_id, None)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._trial_info.pop(_known(trial).trial_id, None)


def _known(trial: Any) -> Any:
    return SimpleNamespace(trial_id=f"t{trial.config['number']:02d}")
