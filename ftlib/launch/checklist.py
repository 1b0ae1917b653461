"""A run's checklist: what a launch needs, each checked alone, so that no failure hides another."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from ftlib.config import Run
from ftlib.data.shards import Dataset, open_dataset
from ftlib.launch import cluster, preflight
from ftlib.launch.prepared_run import PreparedRun, prepare_run
from ftlib.paths import runs_root
from ftlib.storage import StorageError, is_remote
from ftlib.text import wrapped
from ftlib.track.redact import redact
from ftlib.track.store import TrackingError, reach, resolve_uri, sqlite_path

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    state: State
    text: str

    def __str__(self) -> str:
        return wrapped(f"{self.state:<4}  {self.name:<15} {self.text}", " " * 22)


@dataclass(frozen=True)
class Checklist:
    """What the checks found."""

    checks: list[Check]
    prepared: PreparedRun | None
    """None where something failed."""
    placement: cluster.Placement | None

    @property
    def ok(self) -> bool:
        """Whether the run can be launched."""
        return all(c.state != "fail" for c in self.checks)


def check(run: Run) -> Checklist:
    """Check data, recipe, starting model, devices, storage and tracking.

    Writes nothing of the run's: a small file is written below the folder of all runs, read back and
    deleted.
    """
    checks: list[Check] = []

    def one(name: str, look: Callable[[], tuple[State, str]]) -> bool:
        try:
            checks.append(Check(name, *look()))
        except (ValueError, StorageError, OSError) as error:
            checks.append(Check(name, "fail", str(error)))
            return False
        return True

    dataset: list[Dataset] = []
    plans: list[preflight.RunPlan] = []
    prepared: list[PreparedRun] = []
    placements: list[cluster.Placement] = []
    complete = one("data", lambda: _data(run, dataset))
    complete = complete and one("recipe", lambda: _recipe(run, dataset[0], plans))
    if complete:
        one("starting model", lambda: _start(run, prepared))
    one("devices", lambda: _devices(run, placements))
    one("storage", lambda: _storage(run, plans[0].disk_bytes if plans else 0))
    one("tracking", lambda: _tracking(run))
    return Checklist(
        checks, prepared[0] if prepared else None, placements[0] if placements else None
    )


def _data(run: Run, found: list[Dataset]) -> tuple[State, str]:
    dataset = open_dataset(run.data)
    dataset.verify()
    found.append(dataset)
    train, val = len(dataset.split("train")), len(dataset.split("val"))
    return "ok", (
        f"{dataset.name}: {train:,} training and {val:,} validation images of "
        f"{len(dataset.classes):,} classes; every file is there"
    )


def _recipe(run: Run, dataset: Dataset, found: list[preflight.RunPlan]) -> tuple[State, str]:
    plan = preflight.plan(run, dataset)
    found.append(plan)
    return ("warn" if plan.far_outside else "ok"), ". ".join([str(plan), *plan.far_outside])


def _start(run: Run, found: list[PreparedRun]) -> tuple[State, str]:
    prepared = prepare_run(run)
    found.append(prepared)
    text = prepared.source_name or run.model.init_from
    if prepared.source is not None and prepared.source.top1 is not None:
        text += f", {prepared.source.top1:.2f} % top-1"
    if prepared.source is not None and prepared.source.new_head:
        text += ", with a new classifier"
    if prepared.forced_gate:
        return "warn", prepared.forced_gate
    if prepared.finished:
        return "warn", (
            f"{text}; but this run is finished already ({prepared.run_dir}): launching it again "
            "trains nothing"
        )
    if prepared.record is not None:
        text += f"; an earlier launch of {prepared.run.name} will be resumed"
    return "ok", text


def _devices(run: Run, found: list[cluster.Placement]) -> tuple[State, str]:
    if os.environ.get("RAY_ADDRESS"):
        cluster.connect()
        cluster.refuse_open(run.cluster.allow_open)
        capacity = cluster.capacity()
    else:
        capacity = cluster.this_machine()
    placement = cluster.placement(run.cluster, capacity)
    found.append(placement)
    each = " and ".join(f"{v:g} {k}" for k, v in placement.resources.items())
    workers = f"{placement.high} worker{'s' if placement.high != 1 else ''}, {each} each"
    if not placement.gpus:
        return "warn", f"{workers}: training on CPUs"
    if torch.cuda.is_available():
        return "ok", f"{workers}; here: {torch.cuda.get_device_name(0)}"
    return "ok", f"{workers} (this machine has no GPU: what is timed below is its CPU)"


def _storage(run: Run, needed: int) -> tuple[State, str]:
    root = runs_root(run)
    preflight.check_storage(root, needed)
    text = f"{root}: written and read back"
    if not is_remote(root):
        free = psutil.disk_usage(root).free
        text += f"; {free / 1e9:,.0f} GB free, {needed / 1e9:.2g} GB needed"
    return "ok", text


def _tracking(run: Run) -> tuple[State, str]:
    uri = resolve_uri(run.track.uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return "ok", f"{redact(uri)} (will be made)"
    try:
        reach(uri)
    except TrackingError:
        if not run.track.offline:
            raise
        return "warn", (
            f"{redact(uri)} does not answer; with --track.offline the run is journalled and "
            "delivered later"
        )
    return "ok", redact(uri)
