"""Runs whose driver died without a word: found by their heartbeat and ended as killed, so that nothing stays RUNNING for ever."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import psutil

from ftlib.track.journal import machine

if TYPE_CHECKING:
    from mlflow import MlflowClient

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""A heartbeat older than this belongs to a dead driver (or to one that has not reached the server for as long; it reopens its runs)."""


def driver_tag() -> str:
    """This process, so that another one on the same machine can tell whether it still lives."""
    return f"{machine()} {os.getpid()} {psutil.Process().create_time():.0f}"


def heartbeat_tags() -> dict[str, str]:
    return {"ftlib.driver": driver_tag(), "ftlib.heartbeat": f"{time.time():.0f}"}


def driver_is_dead(tags: dict[str, str], stale_seconds: float = STALE_SECONDS) -> bool:
    """From a run's tags: known at once on the driver's own machine, by an old heartbeat elsewhere. Runs without them are not ours."""
    if "ftlib.driver" not in tags:
        return False
    with contextlib.suppress(ValueError):
        where, pid, born = tags["ftlib.driver"].rsplit(" ", 2)
        if where == machine():
            try:
                return abs(psutil.Process(int(pid)).create_time() - float(born)) > 2
            except psutil.NoSuchProcess:
                return True
    try:
        return time.time() - float(tags.get("ftlib.heartbeat", "0")) > stale_seconds
    except ValueError:
        return True


def reap(
    mlflow: MlflowClient,
    experiments: Sequence[str] | None = None,
    stale_seconds: float = STALE_SECONDS,
) -> list[Any]:
    """End the RUNNING runs of dead drivers as KILLED, at the time of their last heartbeat. Returns them.

    Args:
        experiments: ids to look in; None looks in all.
    """
    if experiments is None:
        experiments = [e.experiment_id for e in mlflow.search_experiments()]
    ended, token = [], None
    while experiments:
        page = mlflow.search_runs(
            list(experiments),
            filter_string="attributes.status = 'RUNNING'",
            max_results=500,
            page_token=token,
        )
        for run in page:
            if driver_is_dead(run.data.tags, stale_seconds):
                last = int(float(run.data.tags.get("ftlib.heartbeat", "0")) * 1000) or None
                mlflow.set_tag(run.info.run_id, "outcome", "killed")
                mlflow.set_tag(run.info.run_id, "reason", "the driver process died")
                mlflow.set_terminated(run.info.run_id, "KILLED", end_time=last)
                ended.append(run)
        token = page.token
        if not token:
            break
    return ended
