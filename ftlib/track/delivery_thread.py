"""The thread of the driver that delivers journals to MLflow while it runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.track import journal as journals
from ftlib.track.journal import journal_at
from ftlib.track.leftovers import deliver_folder
from ftlib.track.library_log import FILE
from ftlib.track.orphans import HEARTBEAT_SECONDS, OrphanFinder, heartbeat_tags
from ftlib.track.redact import redact_address
from ftlib.track.run_delivery import RunDelivery, classify_error
from ftlib.track.store import (
    client,
    ensure_store,
    first_line,
    request_seconds,
    request_timeout,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("ftlib.track")

COLLECT_SECONDS = 0.4
"""How long records gather before they are sent together."""
POLL_SECONDS = 1.0
"""Longest time until records of other processes are noticed."""
MAX_PAUSE_SECONDS = 30.0
"""Longest pause between two tries while the server fails."""
SLOW_SECONDS = 1.5
"""A server is slow if a request takes longer."""
SLOW_UPLOAD_SECONDS = 120.0
"""The same for a file or model."""
WARNING_SECONDS = 300.0
"""Shortest time between two warnings about the same server."""
ORPHAN_POLL_SECONDS = 60.0
"""How often RUNNING runs of other drivers are looked at."""


class DeliveryThread(threading.Thread):
    """The one thread that talks to MLflow.

    Args:
        folder: the driver's journal folder.
        experiment: name of the experiment in which runs of dead drivers are looked for.
        leftovers: other journal folders, delivered when nothing else waits.
    """

    def __init__(
        self, uri: str, folder: Path, experiment: str, leftovers: Iterable[Path] = ()
    ) -> None:
        super().__init__(name="ftlib-track", daemon=True)
        self.uri, self.folder, self.experiment = uri, Path(folder), experiment
        self.leftovers = list(leftovers)
        self.wake = threading.Event()
        self.failures = 0
        self.last_error: Exception | None = None
        self._deliveries: dict[Path, RunDelivery] = {}
        self._client: MlflowClient | None = None
        self._halt = threading.Event()
        self._urgent = threading.Event()
        self._changed = threading.Condition()
        self._last_beat = float("-inf")
        self._last_warning = float("-inf")
        self._has_warned = False
        self._is_slow = False
        self._busy: tuple[float, RunDelivery] | None = None
        self._orphans: OrphanFinder | None = None
        self._last_orphan_poll = float("-inf")

    # --- for other threads ---

    def run_delivery(self, path: Path) -> RunDelivery:
        """The delivery of a journal, which begins with this call."""
        with self._changed:
            if path not in self._deliveries:
                self._deliveries[path] = RunDelivery(path, self.uri)
            return self._deliveries[path]

    def forget(self, path: Path) -> None:
        """Stop delivering a journal."""
        with self._changed:
            self._deliveries.pop(path, None)

    def flush_now(self) -> None:
        """Deliver at once, also while the thread pauses after a failure."""
        self._urgent.set()
        self.wake.set()

    def wait(self, condition: Callable[[], bool], deadline: Callable[[], float]) -> bool:
        """Wait until `condition()` holds or time.monotonic() passes `deadline()`.

        Returns whether it holds.
        """
        last_flush = float("-inf")
        while not condition():
            if time.monotonic() >= deadline() or not self.is_alive():
                return condition()
            if time.monotonic() >= last_flush + 1:
                last_flush = time.monotonic()
                self.flush_now()
            with self._changed:
                self._changed.wait(0.05)
        return True

    @property
    def in_trouble(self) -> bool:
        """Whether the server fails or is slow; counts the request that is on its way."""
        if self.failures > 0 or self._is_slow:
            return True
        busy = self._busy
        if busy is None:
            return False
        since, delivery = busy
        limit = SLOW_UPLOAD_SECONDS if delivery.is_uploading else SLOW_SECONDS
        return time.monotonic() - since > limit

    def stop(self, seconds: float) -> None:
        """Deliver once more, then end; waits at most `seconds`."""
        self._halt.set()
        self.flush_now()
        self.join(seconds)

    # --- the thread ---

    def run(self) -> None:
        while True:
            self.wake.wait(POLL_SECONDS)
            self.wake.clear()
            if not self._halt.is_set() and not self._urgent.is_set():
                self._urgent.wait(COLLECT_SECONDS)
            if self._halt.is_set() and not self._urgent.is_set():
                return
            self._urgent.clear()
            try:
                self._deliver_all()
                self._succeeded()
            except Exception as error:
                self._failed(error)
            with self._changed:
                self._changed.notify_all()
            if self._halt.is_set():
                return
            if self.failures:
                self._urgent.clear()
                self._urgent.wait(min(MAX_PAUSE_SECONDS, 0.5 * 2 ** min(self.failures, 10)))

    def _succeeded(self) -> None:
        if self._has_warned:
            log.warning(
                "tracking: %s answers again; delivering the journal", redact_address(self.uri)
            )
        self._has_warned = False
        self.failures, self.last_error = 0, None

    def _failed(self, error: Exception) -> None:
        """Warn once per outage, and at most every WARNING_SECONDS if the server comes and goes."""
        self.failures += 1
        self.last_error = error
        now = time.monotonic()
        if self.failures > 1 or now - self._last_warning < WARNING_SECONDS:
            return
        self._last_warning, self._has_warned = now, True
        log.warning(
            "tracking: %s fails (%s). Training goes on; everything is kept in %s and sent again. "
            "Details: %s",
            redact_address(self.uri),
            first_line(error, 200),
            self.folder,
            self.folder / FILE,
        )

    def _connected(self) -> MlflowClient:
        if self._client is None:
            ensure_store(self.uri)
            self._client = client(self.uri)
        return self._client

    def _deliver_all(self) -> None:
        """Deliver what waits, run by run.

        What fails for one run only (a file that cannot be stored) does not hold up the others.
        """
        for path in journals.find_journals(self.folder, exclude=self._deliveries):
            self.run_delivery(path)
        problem: Exception | None = None
        for delivery in list(self._deliveries.values()):
            try:
                while delivery.is_pending:
                    self._deliver(delivery)
            except Exception as error:
                if classify_error(error) == "down":
                    raise
                problem = error
        self._heartbeat()
        if problem is not None:
            raise problem
        self._tidy()

    def _deliver(self, delivery: RunDelivery) -> None:
        journal = journal_at(delivery.path)
        journal.retry()
        journal.sync()
        self._busy = (time.monotonic(), delivery)

        def done() -> None:
            assert self._busy is not None
            seconds = time.monotonic() - self._busy[0]
            self._is_slow = seconds > SLOW_SECONDS and not delivery.is_uploading
            self._busy = (time.monotonic(), delivery)
            with self._changed:
                self._changed.notify_all()

        try:
            # A server that is slow rather than dead gets more time with every try.
            seconds = min(120.0, request_seconds() * 2 ** min(self.failures, 4))
            with request_timeout(seconds):
                delivery.deliver(self._connected(), done)
        finally:
            self._busy = None

    def _heartbeat(self) -> None:
        """Show that the driver lives, and reopen runs that another one may have taken for dead."""
        from mlflow.entities import RunTag

        silent = time.monotonic() - self._last_beat
        if silent < HEARTBEAT_SECONDS:
            return
        first_beat = self._last_beat == float("-inf")
        was_silent = self.failures > 0 or (not first_beat and silent > 3 * HEARTBEAT_SECONDS)
        self._last_beat = time.monotonic()
        tags = [RunTag(k, v) for k, v in heartbeat_tags().items()]
        for delivery in list(self._deliveries.values()):
            state = delivery.state
            if not state.run_id or state.ended or delivery.is_gone:
                continue
            self._connected().log_batch(state.run_id, tags=tags, synchronous=True)
            if was_silent:
                self._connected().update_run(state.run_id, status="RUNNING")

    def _tidy(self) -> None:
        """While the server answers and nothing else waits: deliver and end what dead drivers left.

        One journal folder at a time.
        """
        if self._urgent.is_set() or self._halt.is_set():
            return
        try:
            if self.leftovers:
                folder = self.leftovers.pop(0)
                if folder.resolve() != self.folder.resolve():
                    deliver_folder(
                        folder, self.uri, self._connected(), is_interrupted=self._urgent.is_set
                    )
                    if self._urgent.is_set():
                        self.leftovers.append(folder)
            elif time.monotonic() - self._last_orphan_poll > ORPHAN_POLL_SECONDS:
                self._last_orphan_poll = time.monotonic()
                self._poll_orphans()
        except Exception as error:
            log.info("tracking: leftovers of earlier runs wait for the next start (%s)", error)

    def _poll_orphans(self) -> None:
        if self._orphans is None:
            found = self._connected().get_experiment_by_name(self.experiment)
            if found is None:
                return
            self._orphans = OrphanFinder(self._connected(), [found.experiment_id])
        self._orphans.poll()
