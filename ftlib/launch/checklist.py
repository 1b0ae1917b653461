"""A run's checklist: everything that a launch will need, each thing by itself, so that one failure hides no other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from ftlib.config import Run
from ftlib.data.shards import Dataset
from ftlib.launch import cluster, launch, preflight
from ftlib.paths import data_path, runs_root
from ftlib.storage import StorageError, is_remote
from ftlib.track.redact import redact
from ftlib.track.store import TrackingError, reach, resolve_uri, sqlite_path


@dataclass(frozen=True)
class Check:
    """One line of the checklist."""

    name: str
    state: Literal["ok", "warn", "fail"]
    text: str

    def __str__(self) -> str:
        return f"{self.state:<4}  {self.name:<15} {self.text}"


@dataclass(frozen=True)
class Ready:
    """What the checks found out."""

    checks: list[Check]
    prepared: launch.PreparedRun | None
    """None where something failed."""
    placement: cluster.Placement | None

    @property
    def ok(self) -> bool:
        return all(c.state != "fail" for c in self.checks)


def check(run: Run) -> Ready:
    """Look at data, recipe, starting model, devices, storage and tracking. Writes nothing of the run's: a small file is written below the
    folder of all runs, read back and deleted."""
    checks: list[Check] = []

    def one(name: str, work: Callable[[], tuple[Literal["ok", "warn"], str] | str]) -> bool:
        try:
            found = work()
        except (ValueError, StorageError, OSError) as error:
            checks.append(Check(name, "fail", str(error)))
            return False
        state, text = ("ok", found) if isinstance(found, str) else found
        checks.append(Check(name, state, text))  # type: ignore[arg-type]
        return True

    dataset: list[Dataset] = []
    plans: list[preflight.RunPlan] = []
    prepared: list[launch.PreparedRun] = []
    placements: list[cluster.Placement] = []
    whole = one("data", lambda: _data(run, dataset))
    whole = whole and one("recipe", lambda: _recipe(run, dataset[0], plans))
    if whole:
        one("starting model", lambda: _start(run, prepared))
    one("devices", lambda: _devices(run, placements))
    one("storage", lambda: _storage(run, plans[0].disk_bytes if plans else 0))
    one("tracking", lambda: _tracking(run))
    return Ready(checks, prepared[0] if prepared else None, placements[0] if placements else None)


def _data(run: Run, found: list[Dataset]) -> str:
    dataset = Dataset.open(data_path(run.data.path))
    dataset.verify()
    found.append(dataset)
    train, val = len(dataset.split("train")), len(dataset.split("val"))
    return f"{dataset.name}: {train:,} training and {val:,} validation images of {len(dataset.classes):,} classes; every file is there"


def _recipe(run: Run, dataset: Dataset, found: list[preflight.RunPlan]) -> str:
    found.append(preflight.plan(run, dataset))
    return str(found[0])


def _start(run: Run, found: list[launch.PreparedRun]) -> tuple[Literal["ok", "warn"], str] | str:
    ready = launch.prepare(run)
    found.append(ready)
    source = (
        run.model.init_from if ready.source is None else ready.source.run_name or ready.source.uri
    )
    text = source + (
        f", {ready.source.top1:.2f} % top-1"
        if ready.source is not None and ready.source.top1 is not None
        else ""
    )
    if ready.note:
        return "warn", ready.note
    if ready.result and ready.result.get("status") == "completed":
        return (
            "warn",
            f"{text}; but this run is finished already ({ready.run_dir}): launching it again trains nothing",
        )
    return (
        f"{text}; an earlier launch of {ready.run.name} will be gone on with"
        if ready.record is not None
        else text
    )


def _devices(run: Run, found: list[cluster.Placement]) -> tuple[Literal["ok", "warn"], str] | str:
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
    return (
        f"{workers}; here: {torch.cuda.get_device_name(0)}"
        if torch.cuda.is_available()
        else f"{workers} (this machine has no GPU: what is timed below is its CPU)"
    )


def _storage(run: Run, needed: int) -> str:
    root = runs_root(run)
    preflight.check_storage(root, needed)
    return f"{root}: written and read back" + (
        ""
        if is_remote(root)
        else f"; {psutil.disk_usage(root).free / 1e9:,.0f} GB free, {needed / 1e9:.2g} GB needed"
    )


def _tracking(run: Run) -> tuple[Literal["ok", "warn"], str] | str:
    uri = resolve_uri(run.track.uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        return f"{redact(uri)} (will be made)"
    try:
        reach(uri)
    except TrackingError as error:
        if run.track.offline:
            return (
                "warn",
                f"{redact(uri)} does not answer; with --track.offline the run is journalled and delivered later",
            )
        raise error
    return redact(uri)
