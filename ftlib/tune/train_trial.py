"""Trains one trial or confirmation run through `launch`, and checks the recipe once before.

Imports no Ray: `launch` and Ray Tune come in when a trial starts.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np

from ftlib.config import Gates, Run
from ftlib.gc_pause import lasting_imports, lasting_objects
from ftlib.paths import runs_root
from ftlib.settings import from_dict, override
from ftlib.storage import join, read_json
from ftlib.tune.epoch_report import TrainReportCallback, epoch_point, epoch_seconds

if TYPE_CHECKING:
    from ftlib.track.tracked_run import TrackedRun, TrackerHandle
    from ftlib.training.initial_weights import InitialWeights

ABBREVIATIONS = {
    "dropout": "do",
    "drop_path": "dp",
    "mixup_alpha": "mx",
    "cutmix_alpha": "cm",
    "randaugment_m": "m",
    "randaugment_n": "n",
    "randaugment_p": "p",
    "lr": "lr",
    "weight_decay": "wd",
    "batch_size": "b",
    "erasing_p": "er",
    "label_smoothing": "ls",
    "schedule": "",
    "optimizer": "",
    "warmup_epochs": "wu",
}
TITLE_LENGTH = 30
"""MLflow's table shows about the first 22 characters of a run's name."""


class TrialStoppedError(Exception):
    """Raised by `report` inside a trial's training when the trial shall end now."""


Report = Callable[[int, Mapping[str, float]], None]
"""report(epoch, metrics with `score`): gives an epoch to the search. Raises TrialStoppedError."""


class TrialConfig(TypedDict):
    """What a trial's process gets; plain values."""

    number: int
    name: str
    """t03; of a confirmation run `t18 s42`."""
    run: dict[str, Any]
    """The whole recipe, as JSON."""
    title: str
    """Name of the run in MLflow."""
    params: dict[str, Any]
    """The searched settings, as MLflow parameters."""
    tags: dict[str, str]
    """More MLflow tags."""


class TrialResult(TypedDict):
    """What a finished trial returns; plain values."""

    score: float
    """Best top-1 of the scored split, in percent."""
    run_dir: str
    best_dir: str
    mlflow_run_id: str
    metrics: dict[str, float]
    history: list[dict[str, float]]
    """An entry per epoch, as the trial store keeps it."""
    found: bool
    """The run had finished in an earlier start; nothing was trained."""


class TrainTrial(Protocol):
    """Trains a trial: `train_run` with its context bound, or a stand-in in tests."""

    def __call__(self, config: TrialConfig, report: Report) -> TrialResult: ...


@dataclass(frozen=True)
class SweepInputs:
    """Data and starting weights, the same for all trials of a sweep."""

    data_name: str
    data_digest: str
    labels: np.ndarray
    """int64[n]: classes of the train split."""
    seen: np.ndarray
    """bool[n]: images of the train split that the starting weights have seen."""
    init_uri: str = ""
    """Where the starting weights lie; empty for scratch."""
    init_sha256: str = ""
    seen_by: tuple[str, ...] = ()
    """Runs that trained the starting weights, the latest first."""
    val_images: int = 0
    """Images of the validation split."""
    seen_in_val: int = 0
    """Validation images that the starting weights have seen."""
    unchecked: tuple[str, ...] = ()
    """Data sets and weights whose images could not be compared with this data set's."""
    source: InitialWeights | None = None
    """The starting weights as they were found; None for scratch."""

    def at(self, folder: str) -> SweepInputs:
        """The same, with the starting weights where `copy_weights` puts them."""
        if self.source is None:
            return self
        from ftlib.training.initial_weights import copied

        return replace(self, init_uri=copied(self.source, folder).uri)

    def copy_weights(self, folder: str) -> None:
        """Copy published weights and bare files to where all trials read them."""
        if self.source is not None:
            from ftlib.training.initial_weights import materialize

            materialize(self.source, folder)


def check(run: Run) -> SweepInputs:
    """Find everything wrong with the recipe that can be known before Ray starts.

    Raises ConfigError, DataError or LaunchError.
    """
    with lasting_objects():
        from ftlib.launch.launch import prepare_run
    from ftlib.training import seen_rows

    ready = prepare_run(replace(run, name=""))
    source, dataset = ready.source, ready.dataset
    seen = seen_rows.of_weights(source, run.model.init_from, runs_root(run), dataset)
    in_train, unchecked = seen.in_split(dataset, "train")
    in_val, _ = seen.in_split(dataset, "val")
    return SweepInputs(
        data_name=dataset.name,
        data_digest=dataset.digest,
        labels=dataset.split("train").labels,
        seen=in_train,
        init_uri=source.uri if source else "",
        init_sha256=source.sha256 if source else "",
        seen_by=seen.runs,
        val_images=len(in_val),
        seen_in_val=int(in_val.sum()),
        unchecked=(*unchecked, *seen.unknown),
        source=source,
    )


def trial_recipe(
    run: Run, root: str, inputs: SweepInputs, resources: Mapping[str, float], *, name: str
) -> Run:
    """`run` as a trial trains it: kept below `root`, with its share of the cluster.

    It starts from the very weights of `inputs`, and goes without what only a run of its own needs:
    success criteria, packaged model, system metrics.
    """
    cpus = int(resources.get("CPU", 1)) or 1
    changes: dict[str, Any] = {
        "name": name,
        "checkpoint.storage": root,
        "gates": Gates(force=run.gates.force or "checked before the sweep"),
        "track.log_model": False,
        "track.system_metrics": False,
        "cluster.cpus_per_worker": cpus,
        "cluster.gpus_per_worker": resources.get("GPU", 0.0),
    }
    if inputs.init_uri:
        changes["model.init_from"] = f"file:{inputs.init_uri}"
    if run.data.loader_workers < 0:
        changes["data.loader_workers"] = max(cpus - 1, 0)
    return override(run, changes)


@dataclass(frozen=True)
class TitledTracking:
    """A tracking handle that names the run of `launch` after the trial and its settings."""

    handle: TrackerHandle
    title: str
    params: Mapping[str, Any]

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
    ) -> TrackedRun:
        return self.handle.start_run(
            self.title,
            tags={**tags, "reason": ""},  # clears the reason of an earlier stop
            params={**params, **self.params},
            parent=parent,
            run_id=run_id,
        )


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep get beside their own settings. Picklable."""

    split: str
    """The scored split; its top-1 is the score."""
    local: bool
    """Train in the trial's own process; otherwise in workers of its own."""
    kind: str
    """MLflow tag: trial, or confirmation."""
    tags: Mapping[str, Any]
    parent: str
    """MLflow reference of the parent run."""
    tracking: TrackerHandle
    keep_predictions: bool = False
    """Also keep which validation images were classified correctly."""


def train_run(context: TrialContext, config: TrialConfig, report: Report) -> TrialResult:
    """Train `config["run"]` with `launch` and report each scored epoch."""
    with lasting_imports():
        from ftlib.launch.launch import launch

    run = from_dict(Run, config["run"])
    split = context.split
    callbacks: list[Any] = []
    if not context.local:
        callbacks = [TrainReportCallback(split)]

    def on_report(metrics: Mapping[str, float]) -> None:
        if f"{split}/top1" in metrics:
            report(int(metrics["epoch"]), epoch_point(metrics, split))

    tracking: Any = TitledTracking(context.tracking, config["title"], config["params"])
    with train_within_tune() if context.local else contextlib.nullcontext():
        outcome = launch(
            run,
            local=context.local,
            kind=context.kind,
            tags={**context.tags, "trial": config["name"], **config["tags"]},
            parent_run_id=context.parent,
            tracking=tracking,
            on_report=on_report if context.local else None,
            callbacks=callbacks,
            quiet=True,
        )
    stored = read_json(join(outcome.run_dir, "result.json")) or {}
    history = [
        {**epoch_point(row, split), "epoch": row["epoch"], "seconds": epoch_seconds(row, split)}
        for row in stored.get("history", [])
        if f"{split}/top1" in row
    ]
    if context.keep_predictions:
        from ftlib.tune.stored_predictions import predictions

        predictions(outcome.run_dir)
    return {
        "score": outcome.metrics[f"best/{split}_top1"],
        "run_dir": outcome.run_dir,
        "best_dir": outcome.best_dir,
        "mlflow_run_id": outcome.mlflow_run_id,
        "metrics": dict(outcome.metrics),
        "history": history,
        "found": outcome.status == "finished",
    }


@contextlib.contextmanager
def train_within_tune() -> Iterator[None]:
    """Let Ray Train's local mode work inside a Tune function.

    Train refuses every call there, to catch code written for the joint API of Ray 2.6. In local
    mode the call is meant: Train runs the loop in this process, and Tune gets epochs by `report`.
    """
    from ray.tune.trainable import trainable_fn_utils

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    known = trainable_fn_utils._in_tune_session
    trainable_fn_utils._in_tune_session = lambda: False
    try:
        yield
    finally:
        trainable_fn_utils._in_tune_session = known


def title(name: str, values: Mapping[str, Any]) -> str:
    """A run name that tells trials apart in a narrow column: `t03 do.02 mx.4 m9`."""
    words = [name]
    for path, value in values.items():
        last = re.sub(r"\W", "", path.split(".")[-1])
        text = f"{value:.2g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
        words.append(ABBREVIATIONS.get(last, last[:2]) + re.sub(r"^0\.", ".", text))
    return " ".join(words)[:TITLE_LENGTH].rstrip()
