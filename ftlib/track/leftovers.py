"""Journals that MLflow does not have yet though their run has ended: found, delivered, described.

A driver leaves one behind when it dies, or when the server was away at the run's end. The next job
on the same home delivers it: `deliver_run` for the run whose command was given again, the delivery
thread of a run that trains, and for other jobs a process of its own (`ftlib.track.background`).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.clock import now_ms
from ftlib.track import background, library_log
from ftlib.track import journal as journals
from ftlib.track.journal import State, close_journal, encode, journal_at, opening, read_all
from ftlib.track.orphans import is_this_machine
from ftlib.track.redact import HIDDEN, redact_address
from ftlib.track.run_delivery import RunDelivery, classify_error, requeue
from ftlib.track.store import (
    TrackingError,
    client,
    ensure_store,
    first_line,
    is_same_store,
    reach,
    request_timeout,
    resolve_uri,
    sqlite_path,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("ftlib.track")

NOT_JOURNALS = ("checkpoints", "best", "report", "files", "models", "mlflow-artifacts", "data")
"""Folders below a home or a run in which no journals are looked for."""
TRY_SECONDS = (16, 32, 64, 120)
"""How long a request may take, try by try, when the server is slow."""
BACKGROUND_SECONDS = 600
"""How long the process that delivers in the background goes on."""


def deliver_folder(
    folder: Path,
    uri: str,
    mlflow: MlflowClient,
    *,
    any_uri: bool = False,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """Deliver what a driver left in a journal folder; runs it did not end are ended as killed.

    Args:
        any_uri: also journals that were written for another tracking address.
        is_interrupted: asked between two requests; True leaves the rest for later.

    Returns:
        The names of the runs delivered, or None where a living driver has the folder.
    """
    waiting = journals.undelivered(folder)
    if not waiting:
        return []
    if not journals.acquire(folder):
        return None
    names = []
    try:
        for path in waiting:
            start = opening(path)
            if start is None or not (any_uri or is_same_store(start.get("uri", ""), uri)):
                continue
            delivery = RunDelivery(path, uri)
            while delivery.is_pending and not is_interrupted():
                delivery.deliver(mlflow)
            if delivery.is_pending or delivery.is_gone:
                continue
            if not delivery.state.ended and is_this_machine(start.get("machine", "")):
                _append_end(path)
                delivery.deliver(mlflow)
            close_journal(path)
            names.append(start["name"])
    finally:
        journals.release(folder)
    return names


def _append_end(path: Path) -> None:
    """End a run whose driver died, at the time of its last record."""
    times = [record["t"] for record in read_all(path) if "t" in record]
    record = {
        "op": "end",
        "outcome": "killed",
        "tags": {"reason": "the driver process died"},
        "t": max(times, default=now_ms()),
    }
    journal_at(path).append(encode(record))


def deliver_patiently(
    folder: Path,
    uri: str,
    mlflow: MlflowClient,
    *,
    any_uri: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[str] | None:
    """`deliver_folder`, giving a slow server more time with every try.

    Raises:
        TrackingError: the server fails at every try; what was delivered stays delivered.
    """
    for number, seconds in enumerate(TRY_SECONDS):
        try:
            with request_timeout(seconds):
                return deliver_folder(folder, uri, mlflow, any_uri=any_uri)
        except Exception as error:
            if number == len(TRY_SECONDS) - 1 or classify_error(error) == "reject":
                left = sum(describe(path).waiting for path in journals.undelivered(folder))
                raise TrackingError(
                    f"{redact_address(uri)} fails ({first_line(error, 200)}). {left:,} records are "
                    f"kept in {folder}; give the same command again when it answers"
                ) from None
            say(f"{redact_address(uri)} is slow or fails ({first_line(error, 120)}); trying again")
            time.sleep(min(5.0, 2.0**number))
    return None


# --- for a run whose command is given again, and for other jobs -----------------------------------


def deliver_run(journal_folder: Path, uri: str = "") -> str:
    """Deliver the journal of a run that is finished; for when its command is given again.

    Never raises. Returns what happened, in one line for the screen; empty if nothing waited.

    Args:
        uri: the run's own tracking address, if its recipe names one.
    """
    background.stop()  # it may be delivering this very journal
    try:
        waiting = journals.undelivered(journal_folder)
        if not waiting:
            return ""
        recorded = (opening(waiting[0]) or {}).get("uri", "")
        address = _address(recorded, uri)
        if address is None:
            return f"MLflow: what waits is for {recorded}; set MLFLOW_TRACKING_URI to it"
        library_log.start(journal_folder)
        try:
            ensure_store(address)
            reach(address)
            names = deliver_folder(journal_folder, address, client(address))
        finally:
            library_log.stop(journal_folder)
    except Exception as error:
        why = first_line(error)
        return f"MLflow does not have all of this run yet: {why}. The same command tries again"
    if names is None:
        return ""
    return f"MLflow: delivered what waited of {', '.join(names)}" if names else ""


def _address(recorded: str, uri: str = "") -> str | None:
    """The address to deliver a journal to that was written for `recorded`; None if it is unknown.

    Journals hold no passwords, so an address with one must be given anew (by `uri` or by the
    environment). A SQLite store that was moved is the one of the present home.
    """
    given = resolve_uri(uri)
    if is_same_store(recorded, given):
        return given
    if HIDDEN in recorded:
        return None
    path = sqlite_path(recorded)
    if path is not None and not path.exists():
        return None
    return recorded or given


def deliver_home(root: Path, is_interrupted: Callable[[], bool] = lambda: False) -> list[str]:
    """Deliver all that waits below a home, to the stores it was written for.

    A store that cannot be reached keeps its journals waiting. Returns the names of the runs.
    """
    stores: dict[str, MlflowClient | None] = {}
    names: list[str] = []
    for folder in _waiting(root):
        for path in journals.undelivered(folder):
            address = _address((opening(path) or {}).get("uri", ""))
            if address is None or is_interrupted():
                continue
            if address not in stores:
                stores[address] = _client_if_up(address)
            mlflow = stores[address]
            if mlflow is None:
                continue
            try:
                done = deliver_folder(folder, address, mlflow, is_interrupted=is_interrupted)
                names += done or []
            except Exception as error:
                log.info("tracking: %s waits (%s)", folder, first_line(error))
                stores[address] = None
    return names


def _client_if_up(uri: str) -> MlflowClient | None:
    try:
        ensure_store(uri)
        reach(uri)
        return client(uri)
    except TrackingError as error:
        log.info("%s", error)
        return None


def _waiting(root: Path) -> list[Path]:
    """The journal folders of the runs below a home that hold something undelivered."""
    folders = sorted((Path(root) / "runs").glob(f"*/{journals.FOLDER}"))
    folders += sorted((Path(root) / "runs").glob(f"*/*/{journals.FOLDER}"))
    return [folder for folder in folders if journals.undelivered(folder)]


# --- for people -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class JournalStatus:
    """What a journal holds, for people."""

    name: str
    uri: str
    run_id: str
    ended: bool
    waiting: int
    """Records that MLflow does not have yet."""
    rejected: int
    """Records that MLflow did not take."""


def describe(journal: Path) -> JournalStatus:
    """What a journal holds."""
    start, state = opening(journal) or {}, State.load(journal)
    waiting = sum(1 for _ in journals.read(journal, state.offset, 1 << 30))
    return JournalStatus(
        name=start.get("name", journal.stem),
        uri=start.get("uri", ""),
        run_id=state.run_id,
        ended=state.ended,
        waiting=waiting,
        rejected=state.rejected,
    )


def journal_folders(root: Path) -> Iterator[Path]:
    """The folders at or below `root` that hold journals."""
    for where, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in NOT_JOURNALS and not f.startswith("."))
        if any(f.endswith(".jsonl") for f in files) and journals.find_journals(Path(where)):
            yield Path(where)


def requeue_folder(folder: Path) -> int:
    """Put the records that MLflow rejected back into a folder's journals, to be tried once more.

    Returns how many; 0 for a living driver's folder.
    """
    if not journals.acquire(folder):
        return 0
    try:
        return sum(requeue(path) for path in journals.find_journals(folder))
    finally:
        journals.release(folder)


def main(root: Path) -> None:
    """The background process."""
    started = time.monotonic()
    library_log.start(root)
    deliver_home(root, lambda: time.monotonic() - started > BACKGROUND_SECONDS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
