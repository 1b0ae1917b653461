"""The first step of a launch: everything about a run that can be known before anything starts."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import storage
from ftlib.config import Run
from ftlib.data.shards import Dataset, open_dataset
from ftlib.launch import finalize, gates, preflight, run_record
from ftlib.launch.outcome import Outcome
from ftlib.paths import local_run_folder, runs_root
from ftlib.report.metrics import TestSplit
from ftlib.storage import join
from ftlib.training import checkpoint
from ftlib.training.initial_weights import InitialWeights, resolve_init, with_preprocessing


@dataclass(frozen=True)
class PreparedRun:
    """A run that may start: everything about it is known and checked."""

    run: Run
    """With its name filled in."""
    dataset: Dataset
    source: InitialWeights | None
    fingerprint: str
    run_dir: str
    record: run_record.RunRecord | None
    """From an earlier launch of this run."""
    result: dict[str, Any] | None
    """The contents of result.json, if the run is finished."""
    plan: preflight.RunPlan
    forced_gate: str
    """A gate that was overridden, and why; empty where none was."""
    began: float
    """When preparing began, by `time.monotonic`, in seconds."""

    @property
    def finished(self) -> bool:
        """Whether an earlier launch trained the run to its end."""
        return bool(self.result) and (self.result or {}).get("status") == "completed"

    @property
    def mlflow(self) -> dict[str, str]:
        """uri, experiment_id and run_id of the run in MLflow; empty before its first launch."""
        return (self.record.mlflow if self.record else None) or {}

    @property
    def source_name(self) -> str:
        """What the first weights are called; empty for none."""
        return self.source.label if self.source else ""

    @property
    def source_dict(self) -> dict[str, Any] | None:
        """The first weights' origin as plain values."""
        return self.source.to_dict() if self.source else None

    def finished_outcome(self) -> Outcome:
        """The outcome of a run that is finished, from its result.json."""
        result = self.result or {}
        report = local_run_folder(self.run_dir) / "report"  # the home may have been moved since
        return Outcome(
            name=self.run.name,
            status="finished",
            metrics=result.get("metrics", {}),
            run_dir=self.run_dir,
            best_dir=join(self.run_dir, result["best"]) if result.get("best") else "",
            mlflow_run_id=self.mlflow.get("run_id", ""),
            gates=[gates.Gate(**g) for g in result.get("gates", {}).get("gates", [])],
            start_top1=result.get("start_top1"),
            test=TestSplit.from_dict(result["test"]) if result.get("test") else None,
            figures=[str(report / Path(file).name) for file in result.get("figures", [])],
        )


def prepare_run(run: Run) -> PreparedRun:
    """Open the data, find the starting weights, name the run and check all of it.

    Starts nothing and writes nothing. Raises ConfigError, DataError or LaunchError (all
    ValueErrors) with what to do.
    """
    began = time.monotonic()
    dataset = open_dataset(run.data)
    plan = preflight.plan(run, dataset)
    root = runs_root(run)
    if run.name:
        record = run_record.RunRecord.read(join(root, run.name))
    else:
        record = _unnamed_imagenet_run(run, dataset, root)
    source, known = _initial_weights(run, dataset, root, record)
    if record is None or "preprocessing" in record.run.get("model", {}):
        # Runs from before that setting keep the mean, std and crop that they were given.
        run = with_preprocessing(run, source)
    init_sha256 = source.sha256 if source else None
    ops = run_record.recorded_ops(run, record)
    fingerprint = run_record.fingerprint(run, dataset.digest, init_sha256, ops)
    if not run.name:
        name = run_record.default_name(run, dataset.name, fingerprint)
        run = dataclasses.replace(run, name=name)
    run_dir = join(root, run.name)
    record = record or run_record.RunRecord.read(run_dir)
    if record is not None:
        run_record.refuse_other_settings(run, run_dir, record, fingerprint, dataset.digest)
        run = run_record.with_ops(run, ops)
    forced_gate = ""
    if source is not None and not known:
        forced = (
            gates.refuse_failed(run, source.label, source.result),
            gates.refuse_seen(run, dataset, source, root),
        )
        forced_gate = "; ".join(filter(None, forced))
    return PreparedRun(
        run=run,
        dataset=dataset,
        source=source,
        fingerprint=fingerprint,
        run_dir=run_dir,
        record=record,
        result=storage.read_json(join(run_dir, "result.json")),
        plan=plan,
        forced_gate=forced_gate,
        began=began,
    )


def _initial_weights(
    run: Run, dataset: Dataset, root: str, record: run_record.RunRecord | None
) -> tuple[InitialWeights | None, bool]:
    """(the starting weights, whether an earlier launch chose them).

    A run that has begun keeps the weights it began with, even if better ones exist by now.
    """
    if record is not None and record.run.get("model", {}).get("init_from") == run.model.init_from:
        if record.init is not None:
            return InitialWeights.from_dict(record.init), True
        if _only_resumes(record, root):
            return None, True
    find = finalize.model_finder(run, root)
    source = resolve_init(run, dataset.name, dataset.digest, dataset.classes, root, fetch=find)
    return source, False


def _unnamed_imagenet_run(run: Run, dataset: Dataset, root: str) -> run_record.RunRecord | None:
    """The record of an unnamed run from before published weights entered the fingerprint."""
    if run.model.init_from != "imagenet":
        return None
    name = run_record.default_name(
        run, dataset.name, run_record.fingerprint(run, dataset.digest, None)
    )
    record = run_record.RunRecord.read(join(root, name))
    return record if record is not None and _only_resumes(record, root) else None


def _only_resumes(record: run_record.RunRecord, root: str) -> bool:
    """Whether the run began with published weights that were not recorded, and has a checkpoint
    that makes them unnecessary."""
    if record.init is not None or record.run.get("model", {}).get("init_from") != "imagenet":
        return False
    return bool(checkpoint.steps(join(root, str(record.run.get("name")), "checkpoints")))
