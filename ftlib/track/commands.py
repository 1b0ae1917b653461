"""What `jobs/track.py` does: open the UI, say what waits, deliver it, end dead runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from ftlib.paths import home
from ftlib.settings import ConfigError
from ftlib.track import leftovers, library_log, links, orphans
from ftlib.track.journal import find_journals, undelivered
from ftlib.track.redact import redact_address
from ftlib.track.store import client, ensure_store, reach


def ui(uri: str, port: int, only_print: bool) -> None:
    """Become the MLflow server of a store that has none, or print the command."""
    arguments = links.ui_arguments(uri, port)
    if only_print or not arguments:
        print(links.ui_command(uri, port))
        return
    ensure_store(uri)
    print(
        f"MLflow at {links.ui_base(uri, port)}/#/experiments?workflowType=machine_learning "
        "(ready in about 10 s; Ctrl-C ends it)",
        flush=True,
    )
    os.execvpe(arguments[0], arguments, {**os.environ, **links.UI_ENVIRONMENT})


def environment(uri: str) -> None:
    """Print the shell lines with which `mlflow` and Python find this store, to be evaluated.

    `mlflow models serve` starts uvicorn by its name, so the environment's programs are on the path.
    """
    print(f"export MLFLOW_TRACKING_URI={shlex.quote(uri)}")
    print(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')


def _journal_folders(folders: Sequence[str]) -> list[Path]:
    roots = [Path(folder).expanduser() for folder in folders] or [home()]
    for root in roots:
        if not root.is_dir():
            raise ConfigError(
                f"{root}: no such folder. Name one that holds runs, such as $FTLIB_HOME/runs"
            )
    return [found for root in roots for found in leftovers.journal_folders(root)]


def status(folders: Sequence[str]) -> None:
    """Print which journals hold something that MLflow does not have."""
    found = [
        leftovers.describe(path)
        for folder in _journal_folders(folders)
        for path in find_journals(folder)
    ]
    waiting = [journal for journal in found if journal.waiting or journal.rejected]
    for journal in waiting:
        rejected = f", {journal.rejected} not taken" if journal.rejected else ""
        unknown = "" if journal.run_id else " (MLflow does not know the run yet)"
        print(
            f"{journal.name}: {journal.waiting} records wait for {journal.uri}{rejected}{unknown}"
        )
    rest = f"{len(waiting)} with something left" if waiting else "everything delivered"
    print(f"{len(found)} runs, {rest}")


def deliver(uri: str, folders: Sequence[str], requeue: bool, any_uri: bool) -> None:
    """Deliver what waits; runs that were not ended are ended as killed.

    Args:
        requeue: also try once more what MLflow did not take.
        any_uri: also what was written for another store.

    Raises:
        TrackingError: the store cannot be reached, or fails at every try.
    """
    found = _journal_folders(folders)
    if requeue:
        count = sum(leftovers.requeue_folder(folder) for folder in found)
        print(f"{count} records that MLflow did not take are tried again")
    waiting = [folder for folder in found if undelivered(folder)]
    if not waiting:
        print("everything has been delivered")
        return
    log_folder = home()
    library_log.start(log_folder)
    try:
        ensure_store(uri)
        reach(uri)
        for folder in waiting:
            _deliver(folder, uri, any_uri)
    finally:
        library_log.stop(log_folder)


def _deliver(folder: Path, uri: str, any_uri: bool) -> None:
    names = leftovers.deliver_patiently(folder, uri, client(uri), any_uri=any_uri, say=print)
    if names is None:
        print(f"{folder}: its driver is running and delivers by itself")
        return
    for name in names:
        print(f"{name}: delivered to {redact_address(uri)}")
    for path in undelivered(folder):
        journal = leftovers.describe(path)
        if journal.waiting:
            print(
                f"{journal.name}: {journal.waiting} records are for {journal.uri}. Name that "
                "server with --uri, or any other to deliver there"
            )


def reap(uri: str, stale_minutes: float) -> None:
    """End the runs that MLflow shows as RUNNING although their driver is gone.

    Raises:
        TrackingError: the store cannot be reached.
    """
    ensure_store(uri)
    reach(uri)
    ended = orphans.reap(client(uri), None, stale_minutes * 60, say=print)
    for run in ended:
        print(f"{run.info.run_name} ({run.info.run_id}): its driver is gone; ended as KILLED")
    print(f"{len(ended)} runs ended")
