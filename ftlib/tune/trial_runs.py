"""Runs the trials of a sweep or the confirmation runs of a promotion, and keeps account of them.

`run_trials` is the common part of both. Three listeners take the engine's events: the store writer
(files), the table (screen) and the tracker (MLflow).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ftlib.config import Run
from ftlib.gc_pause import lasting_objects
from ftlib.launch.errors import StoppedError
from ftlib.settings import to_dict
from ftlib.text import wrapped
from ftlib.tune import spaces, train_trial
from ftlib.tune.live_table import TrialTable
from ftlib.tune.resources import TrialResources, allocate
from ftlib.tune.train_trial import (
    Report,
    SweepInputs,
    TrainTrial,
    TrialConfig,
    TrialContext,
    TrialResult,
)
from ftlib.tune.trial_store import Trial, TrialStore

if TYPE_CHECKING:
    from ftlib.track.tracked_run import TrackedRun
    from ftlib.track.tracking import Tracking
    from ftlib.tune.asha import AsynchronousHalving
    from ftlib.tune.ray_tune import TrialEnd, TrialListener

OpenTracking = Callable[..., "Tracking"]


@dataclass(frozen=True)
class Hooks:
    """The outside of a sweep or promotion, which tests replace."""

    check: Callable[[Run], SweepInputs] = train_trial.check
    train: Callable[[TrialContext, TrialConfig, Report], TrialResult] = train_trial.train_run
    """Called in each trial's process."""
    open_tracking: OpenTracking | None = None
    """None: `ftlib.track.tracking.open_tracking`."""
    out: TextIO | None = None
    """Where progress is printed; None: stdout."""


DEFAULT_HOOKS = Hooks()


@dataclass(frozen=True)
class TrialGroup:
    """What the trials of one store have in common: those of a sweep, or of a promotion."""

    store: TrialStore
    base: Run
    """The recipe as these trials run it."""
    inputs: SweepInputs
    split: str
    """The scored split: tuning or val."""
    kind: str
    """MLflow tag of each run: trial or confirmation."""
    tags: Mapping[str, str]
    """More MLflow tags."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Settings that every trial but the recipe's own has."""
    keep_predictions: bool = False
    """Also keep which validation images each run classified correctly."""

    def recipe_of(self, trial: Trial) -> Run:
        """The recipe with the trial's values and seed."""
        run = with_values(self.base, trial, self.constants)
        return run if trial.seed is None else replace(run, seed=trial.seed)

    def title(self, trial: Trial) -> str:
        """Name of the trial's run in MLflow."""
        if trial.seed is not None:
            return trial.label
        if trial.origin == "recipe":
            return f"{trial.name} recipe"
        return train_trial.title(trial.name, trial.values)

    def params(self, trial: Trial) -> dict[str, Any]:
        """The searched settings as MLflow parameters, named as those that every run logs."""
        return {param_name(path): value for path, value in trial.values.items()}

    def config(self, trial: Trial, resources: Mapping[str, float]) -> TrialConfig:
        """What the trial's process gets; `resources` of each worker."""
        run = train_trial.trial_recipe(
            self.recipe_of(trial),
            self.store.trials_root(),
            self.inputs,
            resources,
            name=trial.name,
        )
        return {
            "number": trial.number,
            "name": trial.label,
            "run": to_dict(run),
            "title": self.title(trial),
            "params": self.params(trial),
            "tags": {} if trial.seed is None else {"config_id": trial.origin},
        }


@dataclass(frozen=True)
class OpenGroup:
    """A group with all that its trials need while they run."""

    group: TrialGroup
    resources: TrialResources
    tracking: Tracking
    parent: TrackedRun
    """The run in MLflow that holds the trials' runs."""
    table: TrialTable


def run_trials(
    opened: OpenGroup,
    next_trial: Callable[[], Trial | None],
    train: Callable[[TrialContext, TrialConfig, Report], TrialResult],
    *,
    halving: AsynchronousHalving | None = None,
    listeners: Sequence[TrialListener] = (),
) -> bool:
    """Run trials until `next_trial` returns None; see `ray_tune.execute`.

    listeners: told of each event after the store, the table and MLflow.
    Returns False when a signal ended it early. Either way no trial's MLflow run is left open.
    """
    from ftlib.tune import ray_tune

    group, resources, tracking = opened.group, opened.resources, opened.tracking
    parent = opened.parent.reference
    context = TrialContext(
        split=group.split,
        local=resources.local,
        kind=group.kind,
        tags=group.tags,
        parent=parent,
        tracking=tracking.handle(),
        keep_predictions=group.keep_predictions,
    )
    function: TrainTrial = functools.partial(train, context)
    tracker = TrialTracker(group, tracking, parent, local=resources.local)
    groups = ray_tune.placement_groups()
    try:
        with opened.table:
            finished = ray_tune.execute(
                next_trial,
                lambda trial: group.config(trial, resources.each),
                function,
                (TrialStoreWriter(group.store), opened.table, tracker, *listeners),
                resources=resources.reserved,
                slots=resources.slots,
                halving=halving,
                reuse=resources.local,
            )
    except StoppedError as error:
        opened.table.say(wrapped(f"{group.store.name}: {error.message}"))
        raise
    finally:
        tracker.close()
    ray_tune.remove_placement_groups(groups)
    return finished


class TrialStoreWriter:
    """Listener that writes each event into the trial store."""

    def __init__(self, store: TrialStore) -> None:
        self.store = store

    def started(self, trial: Trial) -> None:
        """Nothing to write: the trial was written before it was handed out."""

    def progressed(self, trial: Trial, point: Mapping[str, float]) -> None:
        trial.record(point)
        self.store.save(trial)

    def ended(self, trial: Trial, end: TrialEnd) -> None:
        if end.outcome == "interrupted":
            return  # it stays open, and the next start goes on with it
        result = dict(end.result)
        trial.outcome, trial.reason = end.outcome, end.reason
        trial.history = result.pop("history", None) or trial.history
        trial.result = result
        self.store.save(trial)


class TrialTracker:
    """Listener that ends the MLflow runs of trials which could not do it themselves."""

    def __init__(self, group: TrialGroup, tracking: Tracking, parent: str, *, local: bool) -> None:
        self.group, self.tracking, self.parent, self.local = group, tracking, parent, local
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="trial-tracker")
        self._stopped: list[tuple[Trial, str]] = []
        """(trial, outcome) of those whose processes were stopped from outside."""

    def started(self, trial: Trial) -> None:
        """Nothing to do: the trial's own process starts its run."""

    def progressed(self, trial: Trial, point: Mapping[str, float]) -> None:
        """Nothing to do: the trial's own process logs its epochs."""

    def ended(self, trial: Trial, end: TrialEnd) -> None:
        if end.outcome in ("pruned", "interrupted"):
            self._stopped.append((trial, "pruned" if end.outcome == "pruned" else "killed"))
            if not self.local:  # in local mode the trial's own process logs it
                self._worker.submit(self._log_best, trial)
        if end.outcome == "failed":
            self._worker.submit(self._finish_failed, trial)
        elif end.outcome == "completed" and end.result.get("found"):
            self._worker.submit(self._finish_found, trial)
        elif end.outcome == "pruned" and not self.local:
            title = self.group.title(trial)
            self._worker.submit(self.tracking.end_orphan, title, "pruned", end.reason)

    def _best(self, trial: Trial) -> dict[str, float]:
        """The best score of a trial that was stopped, so that charts of all trials show it."""
        if not trial.history:
            return {}
        best = max(trial.history, key=lambda point: point["score"])
        return {f"best/{self.group.split}_top1": best["score"], "best/epoch": best["epoch"]}

    def _log_best(self, trial: Trial) -> None:
        if best := self._best(trial):
            self.tracking.writer_of(self.group.title(trial)).metrics(best, step=0)

    def close(self) -> None:
        """End what is still open, once no trial runs any more."""
        self._worker.shutdown(wait=True)
        for trial, outcome in self._stopped:
            reason = trial.reason or "the sweep was stopped"
            # A process of Tune's that ends with the sweep has not logged its trial's best score.
            best = self._best(trial) if self.local else None
            self.tracking.end_orphan(self.group.title(trial), outcome, reason, best)

    def _reopen(self, trial: Trial) -> TrackedRun:
        kind = {"kind": self.group.kind, "trial": trial.label}
        return self.tracking.start_run(
            self.group.title(trial),
            tags={**kind, **self.group.tags, "reason": ""},
            params=self.group.params(trial),
            parent=self.parent,
        )

    def _finish_found(self, trial: Trial) -> None:
        """The driver died between the end of the training and that of the run in MLflow."""
        run = self._reopen(trial)
        metrics = trial.result.get("metrics", {})
        run.writer().metrics({k: v for k, v in metrics.items() if isinstance(v, float)}, step=0)
        run.finish("completed")

    def _finish_failed(self, trial: Trial) -> None:
        """Say in MLflow why it failed, in a new run if it failed before it had one."""
        run = self._reopen(trial)
        if trace := trial.result.get("traceback"):
            run.writer().text(trace, "errors/traceback.txt")
        run.finish("failed", trial.reason)


# --- shared by the drivers -------------------------------------------------------------------


def with_values(recipe: Run, trial: Trial, constants: Mapping[str, Any]) -> Run:
    """The recipe with a trial's values and the space's constants; trial 0 is the recipe itself."""
    if trial.origin == "recipe":
        return recipe
    return spaces.apply(recipe, {**constants, **trial.values})


def param_name(path: str) -> str:
    """A setting's name in MLflow, which allows no brackets: augment.crop_scale[0], crop_scale_0."""
    from ftlib.track.logged_params import short_name

    return short_name(path).replace("[", "_").replace("]", "")


def connect(run: Run, trials: int, parallel: int) -> TrialResources:
    """Join or start Ray, and share it out among `trials` trials; raises LaunchError."""
    from ftlib.launch import cluster
    from ftlib.track.tracking import warm_up
    from ftlib.tune import ray_tune

    with lasting_objects():
        ray_tune.preload()
        warming = warm_up(run.track)  # Ray's processes take seconds to start
        try:
            cluster.connect(dashboard=run.cluster.high > 1)
        finally:
            warming.join()
    cluster.refuse_open(run.cluster.allow_open)
    return allocate(run, cluster.capacity(), trials, parallel)


@dataclass(frozen=True)
class ParentRun:
    """How the MLflow run of a sweep or promotion is opened."""

    title: str
    kind: str
    sweep: str
    journal: Path
    tags: Mapping[str, str] = field(default_factory=dict)


def open_parent(
    group: TrialGroup, run: ParentRun, open_tracking: OpenTracking | None
) -> tuple[Tracking, TrackedRun]:
    """Open tracking and the parent run of all trials, or reopen the one that the store knows."""
    from ftlib.track import tracking as track
    from ftlib.track.lineage import run_tags
    from ftlib.track.logged_params import params_of

    store, inputs = group.store, group.inputs
    known = store.about.get("mlflow_run_id", "")
    tracking = (open_tracking or track.open_tracking)(
        group.base.track,
        experiment=inputs.data_name,
        journal_dir=run.journal,
        resuming=bool(known),
    )
    tags = run_tags(
        group.base,
        kind=run.kind,
        dataset=(inputs.data_name, inputs.data_digest),
        sweep=run.sweep,
        extra=run.tags,
    )
    parent = tracking.start_run(
        run.title, tags=tags, params=params_of(group.base), run_id=known or None
    )
    if parent.run_id and parent.run_id != known:
        store.save_about(mlflow_run_id=parent.run_id)
    return tracking, parent
