"""Delivering journals: the thread that does it while a driver runs, and what does it afterwards for drivers that died."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib.track import journal as journals
from ftlib.track.journal import State, encode, first, now_ms, read
from ftlib.track.orphans import HEARTBEAT_SECONDS, heartbeat_tags, reap
from ftlib.track.redact import redact
from ftlib.track.run_delivery import RunDelivery, put_back, verdict
from ftlib.track.store import client, ensure_store, patient, request_seconds
from ftlib.track.writer import forget_journal, journal_at

log = logging.getLogger("ftlib.track")

COLLECT_SECONDS = 0.4
"""Time in which lines gather before they are sent together."""
LOOK_SECONDS = 1.0
"""Longest time until lines of other processes are noticed."""
LONGEST_PAUSE = 30.0
SLOW_SECONDS = 1.5
"""A request that takes longer makes a server slow."""
UPLOAD_SLOW_SECONDS = 120.0
"""The same for a file or model."""
NOT_JOURNALS = ("checkpoints", "best", "report", "files", "models", "mlflow-artifacts", "data")
"""Folders below a home or a run in which no journals are looked for."""


class DeliveryThread(threading.Thread):
    """The one thread that talks to MLflow."""

    def __init__(
        self, uri: str, folder: Path, experiment: str, leftovers: Iterable[Path] = ()
    ) -> None:
        super().__init__(name="ftlib-track", daemon=True)
        self.uri, self.folder, self.experiment = uri, Path(folder), experiment
        self.leftovers = list(leftovers)
        self.wake = threading.Event()
        self.failures = 0
        self.last_error: Exception | None = None
        self._feeds: dict[Path, RunDelivery] = {}
        self._client: Any = None
        self._halt = threading.Event()
        self._urgent = threading.Event()
        self._changed = threading.Condition()
        self._beat = 0.0
        self._slow = False
        self._busy: tuple[float, RunDelivery] | None = None
        self._reaped = False

    # --- for other threads ---

    def feed(self, path: Path) -> RunDelivery:
        with self._changed:
            if path not in self._feeds:
                self._feeds[path] = RunDelivery(path, self.uri)
            return self._feeds[path]

    def forget(self, path: Path) -> None:
        with self._changed:
            self._feeds.pop(path, None)

    def hurry(self) -> None:
        self._urgent.set()
        self.wake.set()

    def wait(self, condition: Callable[[], bool], deadline: Callable[[], float]) -> bool:
        """Until `condition()` holds, or time.monotonic() passes `deadline()`."""
        hurried = float("-inf")
        while not condition():
            if time.monotonic() >= deadline() or not self.is_alive():
                return condition()
            if time.monotonic() >= hurried + 1:
                hurried = time.monotonic()
                self.hurry()
            with self._changed:
                self._changed.wait(0.05)
        return True

    @property
    def trouble(self) -> bool:
        """Whether the server fails or is slow, the request that is on its way included."""
        busy = self._busy
        return (
            self.failures > 0
            or self._slow
            or (
                busy is not None
                and time.monotonic() - busy[0]
                > (UPLOAD_SLOW_SECONDS if busy[1].uploading else SLOW_SECONDS)
            )
        )

    def stop(self, seconds: float) -> None:
        self._halt.set()
        self.hurry()
        self.join(seconds)

    # --- the thread ---

    def run(self) -> None:
        while True:
            self.wake.wait(LOOK_SECONDS)
            self.wake.clear()
            if not self._halt.is_set() and not self._urgent.is_set():
                self._urgent.wait(COLLECT_SECONDS)
            if self._halt.is_set() and not self._urgent.is_set():
                return
            self._urgent.clear()
            try:
                self._round()
                if self.failures:
                    log.warning(
                        "tracking: %s answers again; the journal is being delivered",
                        redact(self.uri),
                    )
                self.failures, self.last_error = 0, None
            except Exception as error:
                self._failed(error)
            with self._changed:
                self._changed.notify_all()
            if self._halt.is_set():
                return
            if self.failures:
                self._urgent.clear()
                self._urgent.wait(min(LONGEST_PAUSE, 0.5 * 2 ** min(self.failures, 10)))

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        self.last_error = error
        if self.failures == 1:
            why = (redact(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]
            log.warning(
                "tracking: %s does not take what it is sent (%s). Training goes on; everything stays in %s and is sent again",
                redact(self.uri),
                why,
                self.folder,
            )

    def _connected(self) -> Any:
        if self._client is None:
            ensure_store(self.uri)
            self._client = client(self.uri)
        return self._client

    def _round(self) -> None:
        """Whatever waits, run by run. What fails for one run only (a file that cannot be stored) does not hold up the others."""
        for path in journals.journals(self.folder, leave_out=self._feeds):
            self.feed(path)
        problem: Exception | None = None
        for feed in list(self._feeds.values()):
            try:
                while feed.pending:
                    self._timed(feed)
            except Exception as error:
                if verdict(error) == "down":
                    raise
                problem = error
        self._heartbeat()
        if problem is not None:
            raise problem
        self._tidy()

    def _timed(self, feed: RunDelivery) -> None:
        appender = journal_at(feed.path)
        appender.retry()
        appender.sync()
        self._busy = (time.monotonic(), feed)

        def done() -> None:
            assert self._busy is not None
            self._slow = not feed.uploading and time.monotonic() - self._busy[0] > SLOW_SECONDS
            self._busy = (time.monotonic(), feed)
            with self._changed:
                self._changed.notify_all()

        try:
            # A server that is slow rather than dead gets more time with every try.
            with patient(min(120.0, request_seconds() * 2 ** min(self.failures, 4))):
                feed.deliver(self._connected(), done)
        finally:
            self._busy = None

    def _heartbeat(self) -> None:
        from mlflow.entities import RunTag

        if time.monotonic() - self._beat < HEARTBEAT_SECONDS:
            return
        self._beat = time.monotonic()
        for feed in list(self._feeds.values()):
            if feed.state.run_id and not feed.state.ended and not feed.gone:
                self._connected().log_batch(
                    feed.state.run_id,
                    tags=[RunTag(k, v) for k, v in heartbeat_tags().items()],
                    synchronous=True,
                )
                if self.failures:  # another driver may have taken this one for dead in the meantime
                    self._connected().update_run(feed.state.run_id, status="RUNNING")

    def _tidy(self) -> None:
        """When the server is known to answer and nothing else waits: what earlier, dead drivers have left, a folder at a time."""
        try:
            if self._urgent.is_set() or self._halt.is_set():
                return
            if self.leftovers:
                folder = self.leftovers.pop(0)
                if folder.resolve() != self.folder.resolve():
                    deliver_folder(
                        folder, self.uri, self._connected(), interrupted=self._urgent.is_set
                    )
                    if self._urgent.is_set():
                        self.leftovers.append(folder)
            elif not self._reaped:
                self._reaped = True
                experiment = self._connected().get_experiment_by_name(self.experiment)
                if experiment is not None:
                    reap(self._connected(), [experiment.experiment_id])
        except Exception as error:
            log.info("tracking: leftovers of earlier runs wait for the next start (%s)", error)


def deliver_folder(
    folder: Path,
    uri: str,
    mlflow: Any,
    *,
    any_uri: bool = False,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[str] | None:
    """Deliver what a dead driver left in a journal folder, and end its runs as killed.

    Args:
        any_uri: also journals that were written for another tracking URI.
        interrupted: asked between two requests; True leaves the rest for later.

    Returns:
        The names of the runs delivered, or None where a living driver has the folder.
    """
    waiting = journals.undelivered(folder)
    if not waiting:
        return []
    if not journals.own(folder):
        return None
    names = []
    try:
        for path in waiting:
            opening = first(path)
            if opening is None or not (any_uri or opening.get("uri") == redact(uri)):
                continue
            feed = RunDelivery(path, uri)
            while feed.pending and not interrupted():
                feed.deliver(mlflow)
            if feed.pending or feed.gone:
                continue
            if not feed.state.ended and opening.get("machine") == journals.machine():
                journal_at(path).append(
                    encode(
                        {
                            "op": "end",
                            "outcome": "killed",
                            "tags": {"reason": "the driver process died"},
                            "t": _last_time(path),
                        }
                    )
                )
                feed.deliver(mlflow)
            forget_journal(path)
            names.append(opening["name"])
    finally:
        journals.disown(folder)
    return names


def _last_time(path: Path) -> int:
    times = [
        record["t"] for record, _ in journals.read(path, 0, 1 << 30) if record and "t" in record
    ]
    return max(times, default=now_ms())


@dataclass(frozen=True)
class Leftover:
    """What a journal holds, for people."""

    name: str
    uri: str
    run_id: str
    ended: bool
    waiting: int
    """Records that MLflow has not got."""
    rejected: int
    """Records that MLflow did not take."""


def describe(journal: Path) -> Leftover:
    opening, state = first(journal) or {}, State.load(journal)
    waiting = sum(1 for _ in read(journal, state.offset, 1 << 30))
    return Leftover(
        opening.get("name", journal.stem),
        opening.get("uri", ""),
        state.run_id,
        state.ended,
        waiting,
        state.rejected,
    )


def journal_folders(root: Path) -> Iterator[Path]:
    """The folders at or below `root` that hold journals."""
    for where, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in NOT_JOURNALS and not f.startswith("."))
        if any(f.endswith(".jsonl") for f in files) and journals.journals(Path(where)):
            yield Path(where)


def again(folder: Path) -> int:
    """Put what MLflow did not take back into the journals of a folder, to be tried once more. Returns the number of records;
    0 for a living driver's folder."""
    if not journals.own(folder):
        return 0
    try:
        return sum(put_back(path) for path in journals.journals(folder))
    finally:
        journals.disown(folder)
