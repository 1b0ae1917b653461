"""Early stopping: Ray Tune's ASHA (Li et al. 2020), rebuilt from the trial store on a restart."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from ftlib.tune.trial_store import Trial

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.experiment import Trial as TuneTrial


class AsynchronousHalving(ASHAScheduler):
    """Asynchronous successive halving over the trials of a trial store.

    At epochs `grace`, `grace * reduction`, ... a trial goes on if it is among the best
    1/`reduction` of the trials that have reached that epoch. Three differences from Ray's class:
    trials are known by their number in the store, the recipe's own trial is never stopped (the
    others are compared with it), and no trial is "stopped" in its last epoch.
    """

    def __init__(
        self, epochs: int, grace: int = 1, reduction: float = 3, protected: Iterable[int] = (0,)
    ):
        # max_t lies beyond the last epoch: Tune kills a trial that reaches it, before the training
        # function can finish.
        super().__init__(
            time_attr="epoch",
            metric="score",
            mode="max",
            max_t=epochs + 1,
            grace_period=min(grace, epochs),
            reduction_factor=reduction,
        )
        self.epochs, self.reduction = epochs, reduction
        self.protected = frozenset(protected)
        self.stopped: dict[int, int] = {}
        """Number of each trial that was stopped -> the epoch."""

    def replay(self, trials: Iterable[Trial]) -> None:
        """Feed in the epochs of earlier drivers, so that new trials meet the same thresholds."""
        controller: Any = None  # ASHA does not use it
        for trial in sorted(trials, key=lambda t: t.number):
            known: Any = SimpleNamespace(trial_id=trial.name)
            super().on_trial_add(controller, known)
            for point in trial.history:
                super().on_trial_result(controller, known, dict(point))

    def milestones(self) -> list[int]:
        """Epochs after which trials may be stopped."""
        return sorted(int(m) for m, _ in self._brackets[0]._rungs if m <= self.epochs)

    def on_trial_add(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        super().on_trial_add(tune_controller, _by_number(trial))

    def on_trial_result(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> str:
        if "outcome" in result or "score" not in result:
            return TrialScheduler.CONTINUE
        decision = super().on_trial_result(tune_controller, _by_number(trial), result)
        number = trial.config["number"]
        if (
            decision != TrialScheduler.STOP
            or number in self.protected
            or result["epoch"] >= self.epochs
        ):
            return TrialScheduler.CONTINUE
        self.stopped[number] = int(result["epoch"])
        return decision

    def on_trial_complete(
        self, tune_controller: TuneController, trial: TuneTrial, result: dict[str, Any]
    ) -> None:
        self._trial_info.pop(_by_number(trial).trial_id, None)

    def on_trial_remove(self, tune_controller: TuneController, trial: TuneTrial) -> None:
        self._trial_info.pop(_by_number(trial).trial_id, None)


def _by_number(trial: TuneTrial) -> Any:
    """Tune's trial under the id that it has in the trial store."""
    return SimpleNamespace(trial_id=f"t{trial.config['number']:02d}")
