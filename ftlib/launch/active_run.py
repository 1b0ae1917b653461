"""The second and third step of a launch: a run with its lease, its workers and its MLflow run open.

    with open_run(prepared, options) as active:
        outcome = active.finish(active.train())

However the block ends, the MLflow run is ended too, with what happened.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

from ftlib import settings, storage
from ftlib.launch import cluster, executor, finalize, gates, preflight, run_record, summary
from ftlib.launch.errors import LeaseLostError, StoppedError
from ftlib.launch.lease import Lease
from ftlib.launch.outcome import Outcome, TrainingResult
from ftlib.launch.prepared_run import PreparedRun
from ftlib.launch.progress import ProgressDisplay
from ftlib.launch.signals import Signals
from ftlib.paths import local_run_folder, runs_root
from ftlib.storage import join
from ftlib.text import wrapped
from ftlib.track.lineage import run_tags
from ftlib.track.logged_params import params_of
from ftlib.track.tracking import (
    TrackedRun,
    Tracking,
    check_addresses,
    open_tracking,
    warm_up,
)
from ftlib.track.views import phases_view
from ftlib.track.writer import Writer
from ftlib.training import checkpoint, seen_rows
from ftlib.training.initial_weights import materialize

FINAL = ("train", "probe")
"""Kinds of runs whose model is the end of something, and may be scored on `test`. Trials and runs
that are compared are not: their scores choose."""
LATE_SECONDS = 60.0
"""A trial's process that outlives its sweep's driver, on a machine that was cut off, notices within
this time that its Ray has ended."""


class RunTracker(Protocol):
    """What starts MLflow runs: `ftlib.track.tracking.Tracking`, its handle, or a trial's own."""

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
    ) -> TrackedRun: ...


@dataclass(frozen=True)
class LaunchOptions:
    """How a run is launched; see `launch` for the meaning of each. Nothing here changes results."""

    local: bool = False
    kind: str = "train"
    tags: Mapping[str, Any] = field(default_factory=dict)
    parent_run_id: str | None = None
    tracking: RunTracker | None = None
    on_report: Callable[[dict[str, float]], None] | None = None
    callbacks: Sequence[Any] = ()
    quiet: bool = False
    announce: bool = True
    """Say how large the run is, and how and where it trains."""

    def say(self, text: str) -> None:
        """Print `text`, unless the launch is quiet."""
        if not self.quiet:
            print(text, flush=True)


class ReportHook:
    """Calls the caller's report hook and remembers what it raised."""

    def __init__(self, on_report: Callable[[dict[str, float]], None]) -> None:
        self.on_report = on_report
        self.raised: BaseException | None = None
        self.best: dict[str, float] = {}
        """The latest `best/*` metrics."""

    def __call__(self, metrics: dict[str, float]) -> None:
        self.best = {k: v for k, v in metrics.items() if k.startswith("best/")}
        try:
            self.on_report(metrics)
        except BaseException as error:
            self.raised = error
            raise


class ActiveRun:
    """A run that is ready to train. Made by `open_run`."""

    def __init__(
        self,
        prepared: PreparedRun,
        options: LaunchOptions,
        *,
        lease: Lease,
        placement: cluster.Placement,
        can_grow: bool,
        tracked: TrackedRun,
        own_tracking: Tracking | None = None,
    ) -> None:
        self.prepared, self.options = prepared, options
        self.placement, self.can_grow = placement, can_grow
        self.lease, self.tracked = lease, tracked
        self.writer: Writer = tracked.writer()
        self.hook = ReportHook(options.on_report) if options.on_report else None
        self.own_tracking = own_tracking
        """The tracking that was opened for this run alone."""
        self.ended = False

    def train(self) -> TrainingResult:
        """Train to the end, or raise what stopped it."""
        prepared, options = self.prepared, self.options
        task = executor.TrainingTask(
            run=prepared.run,
            dataset=prepared.dataset,
            run_dir=prepared.run_dir,
            source=prepared.source_dict,
            writer=self.writer,
            lease=self.lease,
            placement=self.placement,
            can_grow=self.can_grow,
            on_report=self.hook,
            callbacks=options.callbacks,
        )
        with contextlib.ExitStack() as stack:
            out = _null_output(stack) if options.quiet else None
            display = stack.enter_context(ProgressDisplay(prepared.run.name, out))
            stack.enter_context(finalize.system_metrics(prepared.run, self.writer))
            if options.local:
                return executor.run_local(task, display)
            return executor.run_on_cluster(task, display)

    def finish(self, result: TrainingResult) -> Outcome:
        """Check the gates, keep the result, log figures and the model, end the MLflow run.

        A trial draws no figures: it has its curves in MLflow and in the sweep's report.
        """
        self.lease.fence()
        prepared, run, kind = self.prepared, self.prepared.run, self.options.kind
        start = prepared.source.top1 if prepared.source else None
        metrics = {name: float(value) for name, value in result["metrics"].items()}
        outcome = Outcome(
            name=run.name,
            status="completed",
            metrics=metrics,
            run_dir=prepared.run_dir,
            best_dir=self._best_folder(result),
            mlflow_run_id=self.tracked.run_id,
            mlflow_url=self.tracked.url,
            mlflow_opened_by=self.tracked.opened_by,
            compare_url=self.tracked.view_url(phases_view()) if kind == "train" else "",
            gates=gates.check(run.gates, metrics, start),
            start_top1=start,
            figures=self._figures(result) if kind == "train" else [],
        )
        if kind in FINAL:
            test = finalize.score_test(outcome, prepared.dataset, self.options.say)
            outcome = dataclasses.replace(outcome, test=test)
        report = finalize.log_end(self.tracked, self.writer, run, prepared.dataset, outcome)
        outcome = dataclasses.replace(outcome, figures=outcome.figures + report)
        if kind in FINAL:
            self.writer.put({"op": "experiment_note"})
        # Last, since it makes the run a finished one: what is stopped before is done again.
        self._write_result(result, outcome)
        seconds = time.monotonic() - prepared.began
        outcome = dataclasses.replace(outcome, seconds=seconds)
        written = any(file.endswith("/report.html") for file in report)
        link = self.tracked.artifact_link("report/report.html") if written else ""
        self.end("completed", summary.note(outcome, prepared.source, link))
        with contextlib.suppress(storage.StorageError):
            storage.delete_folder(join(prepared.run_dir, "ray"))
        return outcome

    def end(self, outcome: str, note: str) -> None:
        """End the MLflow run, once: completed, pruned, failed or killed."""
        if not self.ended:
            self.ended = True
            self.tracked.finish(outcome, note)

    def end_after(self, error: BaseException) -> None:
        """End the MLflow run with what `error` means for it."""
        if isinstance(error, LeaseLostError):
            self.ended = True  # by the launch that has the run now
            if self.own_tracking is not None:
                self.own_tracking.abandon()
            return
        if isinstance(error, StoppedError):
            self.end("killed", error.message)
            self.options.say(wrapped(f"{self.prepared.run.name}: {error.message}"))
            return
        if self.hook is not None and self.hook.raised is error:
            outcome = "pruned"
            self.writer.metrics(self.hook.best, step=0)
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            outcome = "killed"
        else:
            outcome = "failed"
        self.end(outcome, f"{type(error).__name__}: {error}")

    def _best_folder(self, result: TrainingResult) -> str:
        """The folder of the weights that the scores are of. StorageError where they differ."""
        if not result["best_epoch"]:
            return ""
        run_dir = self.prepared.run_dir
        step, epoch = result["best_step"], result["best_epoch"]
        return checkpoint.verify_best(run_dir, step, epoch).folder

    def _figures(self, result: TrainingResult) -> list[str]:
        prepared = self.prepared
        return finalize.figures(
            prepared.run_dir,
            result["history"],
            run=prepared.run,
            dataset=prepared.dataset,
            source=prepared.source,
        )

    def _write_result(self, result: TrainingResult, outcome: Outcome) -> None:
        """Write result.json, which makes the run a finished one."""
        history = result["history"]
        values = {
            "status": outcome.status,
            "epochs": int(history[-1]["epoch"]) if history else 0,
            "step": result["step"],
            "split": result["split"],
            "metrics": outcome.metrics,
            "best": outcome.best_dir.removeprefix(outcome.run_dir).strip("/"),
            "gates": gates.as_json(outcome.gates),
            "start_top1": outcome.start_top1,
            "test": outcome.test.to_dict() if outcome.test else None,
            "figures": outcome.figures,
            "history": history,
        }
        data = json.dumps(values, indent=2).encode()
        storage.write_file(join(outcome.run_dir, "result.json"), data)


@contextlib.contextmanager
def open_run(prepared: PreparedRun, options: LaunchOptions) -> Iterator[ActiveRun]:
    """Take the run's lease, find its workers, start (or reopen) its MLflow run and its record.

    Raises LaunchError, StorageError or TrackingError where one of them cannot be had.
    """
    run, run_dir = prepared.run, prepared.run_dir
    preflight.check_storage(run_dir, prepared.plan.disk_bytes)
    if options.tracking is None:
        check_addresses(run.track)
    late = 0.0 if options.kind in FINAL else LATE_SECONDS
    with Lease(run_dir, run.name, late) as lease, contextlib.ExitStack() as stack:
        if options.announce:
            plan = f"{run.name}: {prepared.plan}"
            options.say(wrapped(plan))
            for line in prepared.plan.far_outside:
                options.say(wrapped(f"  note: {line}", "    "))
        if options.tracking is None:
            stack.callback(warm_up(run.track).join)
        prepared = _with_copied_weights(prepared, options)
        if options.local:
            placement, can_grow = _local_placement(prepared), False
        else:
            placement, can_grow = _cluster_placement(prepared)
        stack.enter_context(Signals(raise_at_once=True))
        if not options.local:
            preflight.check_nodes(run_dir, prepared.dataset.path)
        own = (
            None if options.tracking else stack.enter_context(_open_tracking(prepared, lease.token))
        )
        tracking: RunTracker | None = options.tracking or own
        assert tracking is not None
        lease.fence()  # its first line takes the journal over
        tracked = _start_run(prepared, options, tracking)
        active = ActiveRun(
            prepared,
            options,
            lease=lease,
            placement=placement,
            can_grow=can_grow,
            tracked=tracked,
            own_tracking=own,
        )
        try:
            seen = seen_rows.record(run_dir, run, prepared.dataset, prepared.source, runs_root(run))
            _new_record(prepared, tracked, seen).write(run_dir)
            finalize.log_start(active.writer, run, prepared.dataset, options.kind)
            if options.announce:
                resumed = prepared.record is not None
                options.say(summary.starting(run, run_dir, tracked, placement, resumed=resumed))
            yield active
        except BaseException as error:
            active.end_after(error)
            raise


def _with_copied_weights(prepared: PreparedRun, options: LaunchOptions) -> PreparedRun:
    """Published weights and bare files are copied into the run's folder, where all workers read."""
    source = prepared.source
    if source is not None and source.notes:
        options.say(f"{prepared.run.name}: starting from {prepared.source_name}")
        for line in source.notes:
            options.say(wrapped(f"  {line}", "    "))
    return dataclasses.replace(prepared, source=materialize(source, prepared.run_dir))


def _local_placement(prepared: PreparedRun) -> cluster.Placement:
    """One worker with all of this machine's CPUs, or as many as it asks for."""
    asked, node = prepared.run.cluster, cluster.this_machine().nodes[0]
    if asked.gpus_per_worker > 0 and not node.gpus:
        return cluster.placement(asked, cluster.this_machine())  # it says what is wrong
    gpu = bool(node.gpus) and asked.gpus_per_worker != 0
    cpus = min(asked.cpus_per_worker or int(node.cpus), int(node.cpus))
    return cluster.Placement(low=1, high=1, gpus=float(gpu), cpus=cpus)


def _cluster_placement(prepared: PreparedRun) -> tuple[cluster.Placement, bool]:
    """(the workers that the run gets, whether the cluster can grow). Connects to Ray first."""
    asked = prepared.run.cluster
    cluster.connect()
    cluster.refuse_open(asked.allow_open)
    capacity = cluster.capacity()
    return cluster.placement(asked, capacity), capacity.can_grow


def _open_tracking(prepared: PreparedRun, owner: str) -> Tracking:
    return open_tracking(
        prepared.run.track,
        experiment=prepared.dataset.name,
        journal_dir=local_run_folder(prepared.run_dir) / "journal",
        resuming=bool(prepared.mlflow.get("run_id")),
        owner=owner,
    )


def _start_run(prepared: PreparedRun, options: LaunchOptions, tracking: RunTracker) -> TrackedRun:
    """Start the run in MLflow, or reopen the one that an earlier launch made."""
    run = prepared.run
    tags = run_tags(
        run,
        kind=options.kind,
        dataset=(prepared.dataset.name, prepared.dataset.digest),
        extra={**_lineage(prepared), **options.tags},
    )
    return tracking.start_run(
        run.name,
        tags=tags,
        params=params_of(run),
        parent=options.parent_run_id,
        run_id=prepared.mlflow.get("run_id") or None,
    )


def _lineage(prepared: PreparedRun) -> dict[str, str]:
    """MLflow tags: where the run lies and where its first weights come from."""
    run = prepared.run
    return {
        "run_name": run.name,
        "run_dir": prepared.run_dir,
        "fingerprint": prepared.fingerprint[:12],
        "init": prepared.source_name,
        "forced_gate": prepared.forced_gate,
        "strict_elastic": str(run.cluster.strict_elastic).lower(),
    }


def _new_record(
    prepared: PreparedRun, tracked: TrackedRun, seen: seen_rows.SeenRows
) -> run_record.RunRecord:
    """run.json for this launch."""
    old, dataset = prepared.record, prepared.dataset
    return run_record.RunRecord(
        run=settings.to_dict(prepared.run),
        fingerprint=prepared.fingerprint,
        data={
            "name": dataset.name,
            "digest": dataset.digest,
            "classes": list(dataset.classes),
            "path": dataset.path,
        },
        init=prepared.source_dict,
        seen={"images": seen.count(dataset.digest), "digest": seen.digest},
        mlflow={
            "uri": tracked.uri,
            "experiment_id": tracked.experiment_id,
            "run_id": tracked.run_id,
        },
        launches=(old.launches if old else 0) + 1,
        fingerprint_version=old.fingerprint_version if old else run_record.FINGERPRINT_VERSION,
        ops=old.ops if old else list(run_record.recorded_ops(prepared.run, None)),
        created=old.created if old else time.time(),
    )


def _null_output(stack: contextlib.ExitStack) -> TextIO:
    """Where a quiet run's progress goes."""
    return stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
