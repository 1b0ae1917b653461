"""What connects a sweep with `launch`: checking the recipe once, and training one trial or confirmation run."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ftlib.config import Gates, Run
from ftlib.settings import from_dict, override
from ftlib.storage import join, read_json
from ftlib.tune.trial import Report, point

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
"""MLflow's table shows the first 22 or so characters of a run's name."""


@dataclass(frozen=True)
class SweepInputs:
    """What all runs of a sweep share."""

    data_name: str
    data_digest: str
    init_uri: str
    """Where the starting weights lie; empty for scratch and imagenet."""
    init_sha256: str
    start_top1: float | None
    workers: int


def check(run: Run) -> SweepInputs:
    """Everything about the recipe that can be known to be wrong, before Ray starts. Raises ConfigError, DataError or LaunchError."""
    from ftlib.launch.launch import prepare

    ready = prepare(replace(run, name=""))
    source = ready.source
    return SweepInputs(
        ready.dataset.name,
        ready.dataset.digest,
        source.uri if source else "",
        source.sha256 if source else "",
        source.top1 if source else None,
        run.cluster.high,
    )


def variant(
    run: Run, root: str, basis: SweepInputs, resources: Mapping[str, float], *, name: str = ""
) -> Run:
    """`run` as one of many: kept below `root`, from the very weights of `basis`, with its share of the cluster, and without what only a single
    run needs (success criteria, packaged model, system metrics)."""
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
    if basis.init_uri:
        changes["model.init_from"] = f"file:{basis.init_uri}"
    if run.data.loader_workers < 0:
        changes["data.loader_workers"] = max(cpus - 1, 0)
    return override(run, changes)


@dataclass(frozen=True)
class TitledTracking:
    """A tracking handle under which `launch` starts its run with a telling name and the swept settings as parameters."""

    handle: Any
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
    ) -> Any:
        # A run that goes on is no longer stopped for a reason.
        return self.handle.start_run(
            self.title,
            tags={**tags, "reason": ""},
            params={**params, **self.params},
            parent=parent,
            run_id=run_id,
        )


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep get, beside their own settings. Picklable."""

    split: str
    """The scored split, whose top-1 is the score."""
    local: bool
    """Train in the trial's own process; otherwise in workers of its own."""
    kind: str
    """MLflow tag: trial, or confirmation."""
    tags: Mapping[str, Any]
    parent: str
    """MLflow reference of the parent run."""
    tracking: Any
    """A tracking Handle."""
    predictions: bool = False
    """Also keep which validation images were answered right."""


def train_run(shared: TrialContext, config: dict[str, Any], report: Report) -> dict[str, Any]:
    """Train `config["run"]` (JSON; also there: name, title, params) and return score, folders and history."""
    from ftlib.launch.launch import launch

    run = from_dict(Run, config["run"])
    split = shared.split
    callbacks: list[Any] = []
    if not shared.local:
        from ftlib.tune.bridge import TrainReportCallback

        callbacks = [TrainReportCallback(f"{split}/top1")]

    def on_report(metrics: Mapping[str, float]) -> None:
        if f"{split}/top1" in metrics:
            report(int(metrics["epoch"]), point(metrics, split))

    tracking: Any = TitledTracking(shared.tracking, config["title"], config["params"])
    with train_within_tune() if shared.local else contextlib.nullcontext():
        outcome = launch(
            run,
            local=shared.local,
            kind=shared.kind,
            tags={**shared.tags, "trial": config["name"], **config.get("tags", {})},
            parent_run_id=shared.parent,
            tracking=tracking,
            on_report=on_report if shared.local else None,
            callbacks=callbacks,
            quiet=True,
        )
    stored = read_json(join(outcome.run_dir, "result.json")) or {}
    history = [
        {**point(row, split), "epoch": row["epoch"], "seconds": seconds(row, split)}
        for row in stored.get("history", [])
        if f"{split}/top1" in row
    ]
    if shared.predictions:
        from ftlib.tune.stored_predictions import answers

        answers(outcome.run_dir)
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
    """Let Ray Train's local mode work in a Tune function. Train refuses every call there, to catch code written for Ray 2.6's joint API; in local mode
    both are meant: Train carries the training out in this process, and Tune gets its epochs from `report`."""
    from ray.tune.trainable import trainable_fn_utils

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    known = trainable_fn_utils._in_tune_session
    trainable_fn_utils._in_tune_session = lambda: False
    try:
        yield
    finally:
        trainable_fn_utils._in_tune_session = known


def seconds(row: Mapping[str, float], split: str) -> float:
    return row.get("train/epoch_s", 0.0) + row.get(f"{split}/seconds", 0.0)


def title(name: str, values: Mapping[str, Any]) -> str:
    """A run name that tells trials apart in a narrow column: `t03 do.02 mx.4 m9`."""
    words = [name]
    for path, value in values.items():
        last = re.sub(r"\W", "", path.split(".")[-1])
        text = f"{value:.2g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
        words.append(ABBREVIATIONS.get(last, last[:2]) + re.sub(r"^0\.", ".", text))
    return " ".join(words)[:TITLE_LENGTH].rstrip()
