"""`launch(run)`: from a recipe to a finished, tracked run, or to the next sample of one that was interrupted.

Everything that can be known to be wrong is refused before Ray starts. What is done here belongs to the driver; `worker.py` is what runs
beside the GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.data.shards import Dataset
from ftlib.launch import cluster, executor, finalize, gates, preflight, run_record, summary
from ftlib.launch.errors import StoppedError
from ftlib.launch.progress import ProgressDisplay
from ftlib.launch.signals import Signals
from ftlib.paths import data_path, home, runs_root
from ftlib.storage import is_remote, join
from ftlib.track.lineage import run_tags
from ftlib.track.logged_params import params_of
from ftlib.track.tracking import TrackerHandle, Tracking, ahead, open_tracking
from ftlib.training import initial_weights


@dataclass(frozen=True)
class Outcome:
    """What came of a launch."""

    name: str
    status: str
    """completed; or `finished`, if the run had been completed before."""
    metrics: dict[str, float]
    """best/* and final/* in percent, and the loss."""
    run_dir: str
    best_dir: str
    """Folder of the best model's weights."""
    mlflow_run_id: str = ""
    mlflow_url: str = ""
    gates: list[gates.Gate] = field(default_factory=list)
    start_top1: float | None = None
    """Validation top-1 of the model that the run started from."""
    figures: list[str] = field(default_factory=list)
    """Files of the report: PNG, HTML, CSV."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(g.passed for g in self.gates)


@dataclass(frozen=True)
class PreparedRun:
    """A run that may start: everything about it is known and checked."""

    run: Run
    dataset: Dataset
    source: initial_weights.InitialWeights | None
    fingerprint: str
    run_dir: str
    record: run_record.RunRecord | None
    """Of an earlier launch of this run."""
    result: dict[str, Any] | None
    """result.json, if the run is finished."""
    plan: preflight.RunPlan
    note: str
    """A gate that was overridden, and why."""


def prepare(run: Run) -> PreparedRun:
    """Open the data, find the starting weights, name the run and check all of it; starts nothing and writes nothing.

    Raises ConfigError, DataError or LaunchError (all ValueErrors) with what to do.
    """
    dataset = Dataset.open(data_path(run.data.path))
    plan = preflight.plan(run, dataset)
    root = runs_root(run)
    record = run_record.RunRecord.read(join(root, run.name)) if run.name else None
    source, known = _source(run, dataset, root, record)
    digest = source.sha256 if source else None
    ops = run_record.recorded_ops(run, record)
    print_ = run_record.fingerprint(run, dataset.digest, digest, ops)
    run = dataclasses.replace(
        run, name=run.name or run_record.default_name(run, dataset.name, print_)
    )
    run_dir = join(root, run.name)
    record = record or run_record.RunRecord.read(run_dir)
    if record is not None:
        run_record.refuse_other_settings(run, run_dir, record, print_, dataset.digest)
        run = run_record.with_ops(run, ops)
    note = (
        gates.refuse_failed(run, source.run_name or source.uri, source.result)
        if source and not known
        else ""
    )
    return PreparedRun(
        run,
        dataset,
        source,
        print_,
        run_dir,
        record,
        storage.read_json(join(run_dir, "result.json")),
        plan,
        note,
    )


def _source(
    run: Run, dataset: Dataset, root: str, record: run_record.RunRecord | None
) -> tuple[initial_weights.InitialWeights | None, bool]:
    """(the starting weights, whether they are those of an earlier launch). A run that has begun keeps the weights it began with."""
    if (
        record is not None
        and record.init is not None
        and record.run.get("model", {}).get("init_from") == run.model.init_from
    ):
        return initial_weights.InitialWeights.from_dict(record.init), True
    return initial_weights.resolve_init(
        run, dataset.name, dataset.digest, dataset.classes, root, fetch=finalize.fetch(run, root)
    ), False


def launch(
    run: Run,
    *,
    local: bool = False,
    kind: str = "train",
    tags: Mapping[str, Any] | None = None,
    parent_run_id: str | None = None,
    tracking: Tracking | TrackerHandle | None = None,
    on_report: Callable[[dict[str, float]], None] | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
) -> Outcome:
    """Train `run`, or go on with it, or say that it is finished.

    Args:
        local: train in this process, without Ray workers. For sweeps of small trials and for tests.
        kind: MLflow tag `kind`: train, trial, comparison.
        tags: more MLflow tags.
        parent_run_id: MLflow id (or reference) of the parent run, for trials.
        tracking: an open tracking to use; by default one is opened and closed here.
        on_report: called with each epoch's metrics in local mode. What it raises ends the run as pruned and is raised again.
        callbacks: ray.train.UserCallback objects, on the cluster.
        quiet: print nothing but problems.

    Raises:
        ValueError: ConfigError, DataError, LaunchError, TrackingError: wrong input, and what to do about it.
        RunFailed, StorageError, DivergedError: training failed for good. The MLflow run is ended as failed.
        StoppedError: (a SystemExit) a signal stopped it, with a checkpoint. The MLflow run is ended as killed; the same command goes on.
    """
    started = time.monotonic()
    say = (lambda text: None) if quiet else _say
    ready = prepare(run)
    run = ready.run
    if ready.result and ready.result.get("status") == "completed":
        outcome = _finished(ready)
        say(summary.already_finished(outcome))
        return outcome
    preflight.check_storage(ready.run_dir, ready.plan.disk_bytes)
    with run_record.Lease(ready.run_dir, run.name), contextlib.ExitStack() as stack:
        if local:
            capacity = cluster.this_machine()
            here = capacity.nodes[0]
            placement = cluster.Placement(
                1, 1, float(bool(here.gpus) and run.cluster.gpus_per_worker != 0), int(here.cpus)
            )
        else:
            say(f"{run.name}: {ready.plan}")
            if tracking is None:
                stack.callback(ahead(run.track).join)
            cluster.connect()
            stack.enter_context(Signals(at_once=True))
            cluster.refuse_open(run.cluster.allow_open)
            capacity = cluster.capacity()
            placement = cluster.placement(run.cluster, capacity)
            preflight.check_shared(ready.run_dir, ready.dataset.path)
        if tracking is None:
            tracking = stack.enter_context(
                open_tracking(
                    run.track,
                    experiment=ready.dataset.name,
                    journal_dir=journal_dir(ready.run_dir),
                    resuming=bool(_known_to_mlflow(ready)),
                )
            )
        all_tags = run_tags(
            run,
            kind=kind,
            dataset=(ready.dataset.name, ready.dataset.digest),
            extra={**_lineage(ready), **(tags or {})},
        )
        tracked = tracking.start_run(
            run.name,
            tags=all_tags,
            params=params_of(run),
            parent=parent_run_id,
            run_id=_known_to_mlflow(ready) or None,
        )
        record = _record(ready, tracked)
        record.write(ready.run_dir)
        writer = tracked.writer()
        finalize.open_run(writer, run, ready.dataset)
        say(
            summary.starting(
                run, ready.run_dir, tracked.url, placement, resumed=ready.record is not None
            )
        )
        hook = _Hook(on_report)
        job = executor.Fit(
            run,
            ready.dataset,
            ready.run_dir,
            ready.source.to_dict() if ready.source else None,
            writer,
            placement,
            capacity.can_grow,
            hook if on_report else None,
            callbacks,
        )
        try:
            with (
                ProgressDisplay(run.name, _nowhere(stack) if quiet else None) as screen,
                finalize.system_metrics(run, writer),
            ):
                result = executor.here(job, screen) if local else executor.on_cluster(job, screen)
        except StoppedError as stop:
            tracked.finish("killed", stop.message)
            say(f"{run.name}: {stop.message}")
            raise
        except BaseException as error:
            outcome_word = (
                "pruned"
                if hook.raised is error
                else "killed"
                if isinstance(error, KeyboardInterrupt | SystemExit)
                else "failed"
            )
            tracked.finish(outcome_word, f"{type(error).__name__}: {error}")
            raise
        outcome = _complete(
            ready, tracked, writer, result, time.monotonic() - started, draw=kind == "train"
        )
    say(summary.finished(run, outcome))
    return outcome


def journal_dir(run_dir: str) -> Path:
    """The tracking journal lies with the run, or below $FTLIB_HOME where the run is on an object store."""
    return (
        home() / "runs" / run_dir.rstrip("/").rsplit("/", 1)[-1]
        if is_remote(run_dir)
        else Path(run_dir)
    ) / "journal"


def _complete(
    ready: PreparedRun,
    tracked: Any,
    writer: Any,
    result: dict[str, Any],
    seconds: float,
    draw: bool,
) -> Outcome:
    """Score against the gates, keep the result, log figures (a trial has its curves in MLflow and in the sweep's report) and model, end the MLflow run."""
    metrics = {k: float(v) for k, v in result["metrics"].items()}
    start = ready.source.top1 if ready.source else None
    checked = gates.check(ready.run.gates, metrics, start)
    best = finalize.best_folder(ready.run_dir)
    figures = (
        finalize.figures(
            ready.run_dir,
            result,
            ready.run,
            ready.dataset,
            ready.source.to_dict() if ready.source else None,
        )
        if draw
        else []
    )
    outcome = Outcome(
        ready.run.name,
        "completed",
        metrics,
        ready.run_dir,
        best,
        tracked.run_id,
        tracked.url,
        checked,
        start,
        figures,
        seconds,
    )
    epochs = int(result["history"][-1]["epoch"]) if result["history"] else 0
    storage.write_file(
        join(ready.run_dir, "result.json"),
        json.dumps(
            {
                "status": "completed",
                "epochs": epochs,
                "step": result["step"],
                "split": result["split"],
                "metrics": metrics,
                "best": best.removeprefix(ready.run_dir).strip("/"),
                "gates": gates.as_json(checked),
                "start_top1": start,
                "figures": figures,
                "history": result["history"],
            },
            indent=2,
        ).encode(),
    )
    report = finalize.close_run(
        tracked, writer, ready.run, ready.dataset, outcome, metrics, checked
    )
    outcome = dataclasses.replace(outcome, figures=figures + report)
    written = any(f.endswith("/report.html") for f in report)
    tracked.finish(
        "completed",
        summary.note(
            ready.run,
            outcome,
            ready.source,
            tracked.artifact_link("report/report.html") if written else "",
        ),
    )
    with contextlib.suppress(OSError):
        storage.delete_folder(join(ready.run_dir, "ray"))
    return outcome


def _finished(ready: PreparedRun) -> Outcome:
    result = ready.result or {}
    mlflow = (ready.record.mlflow if ready.record else None) or {}
    checked = [gates.Gate(**g) for g in result.get("gates", {}).get("gates", [])]
    return Outcome(
        ready.run.name,
        "finished",
        result.get("metrics", {}),
        ready.run_dir,
        join(ready.run_dir, result["best"]) if result.get("best") else "",
        mlflow.get("run_id", ""),
        "",
        checked,
        result.get("start_top1"),
        result.get("figures", []),
    )


def _record(ready: PreparedRun, tracked: Any) -> run_record.RunRecord:
    old, dataset = ready.record, ready.dataset
    return run_record.RunRecord(
        run=settings.to_dict(ready.run),
        fingerprint=ready.fingerprint,
        data={
            "name": dataset.name,
            "digest": dataset.digest,
            "classes": list(dataset.classes),
            "path": dataset.path,
        },
        init=ready.source.to_dict() if ready.source else None,
        mlflow={
            "uri": tracked.uri,
            "experiment_id": tracked.experiment_id,
            "run_id": tracked.run_id,
        },
        launches=(old.launches if old else 0) + 1,
        fingerprint_version=old.fingerprint_version if old else run_record.FINGERPRINT_VERSION,
        ops=old.ops if old else list(run_record.recorded_ops(ready.run, None)),
        created=old.created if old else time.time(),
    )


def _known_to_mlflow(ready: PreparedRun) -> str:
    return ((ready.record.mlflow if ready.record else None) or {}).get("run_id", "")


def _lineage(ready: PreparedRun) -> dict[str, str]:
    return {
        "run_name": ready.run.name,
        "run_dir": ready.run_dir,
        "fingerprint": ready.fingerprint[:12],
        "init": ready.source.run_name or ready.source.uri if ready.source else "",
        "forced_gate": ready.note,
        "strict_elastic": str(ready.run.cluster.strict_elastic).lower(),
    }


class _Hook:
    """The caller's report hook; remembers what it raised."""

    def __init__(self, on_report: Callable[[dict[str, float]], None] | None) -> None:
        self.on_report = on_report
        self.raised: BaseException | None = None

    def __call__(self, metrics: dict[str, float]) -> None:
        try:
            assert self.on_report is not None
            self.on_report(metrics)
        except BaseException as error:
            self.raised = error
            raise


def _nowhere(stack: contextlib.ExitStack) -> TextIO:
    """Where a quiet run's progress goes."""
    return stack.enter_context(open(os.devnull, "w", encoding="utf-8"))


def _say(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
