"""Tracking as the driver sees it: open it, start runs, hand out writers, finish runs, close.

    with open_tracking(run.track, experiment="pets", journal_dir=folder / "journal") as tracking:
        tracked = tracking.start_run("phase2", tags=run_tags(run), params=params_of(run))
        ... tracked.writer() goes to rank 0 ...
        tracked.finish("completed")

Everything is written to a journal first (`ftlib.track.journal`). One thread of the driver delivers
it (`ftlib.track.delivery_thread`), so one process writes to the store whatever the number of
workers. Only two things can fail: a server that cannot be reached when a run is about to exist for
the first time, and a store that cannot be made. Once a run exists, nothing about tracking stops
it.

The way of a metric: `writer` (training code) -> `journal` (a line in a file; `tracker_actor`
carries it there from other machines) -> `delivery_thread` -> `run_delivery` (one run's lines as
requests). `leftovers` does the last two steps for drivers that died, `orphans` ends their runs.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.config import Track
from ftlib.paths import job_command
from ftlib.process_identity import machine_id
from ftlib.track import background, library_log
from ftlib.track import journal as journals
from ftlib.track.delivery_thread import DeliveryThread
from ftlib.track.journal import State, close_journal, journal_file, opening
from ftlib.track.redact import redact_address
from ftlib.track.store import (
    TrackingError,
    client,
    ensure_experiment,
    ensure_store,
    first_line,
    import_mlflow,
    reach,
    registry_uri,
    request_timeout,
    resolve_uri,
    sqlite_path,
)
from ftlib.track.tracked_run import RunStart, TrackedRun, TrackerHandle, begin, reason_of
from ftlib.track.writer import JournalLocation, Writer, clean_tags

if TYPE_CHECKING:
    from ftlib.track.tracker_actor import ActorJournal

__all__ = ["TrackedRun", "TrackerHandle", "Tracking", "open_tracking"]

log = logging.getLogger("ftlib.track")

FINISH_SECONDS = 5.0
"""How long all runs of a `Tracking` together wait for a server that fails or is slow."""
FINISH_HEALTHY_SECONDS = 600.0
"""How long finishing waits for a server that keeps taking what it gets."""
ACQUIRE_SECONDS = 15.0
"""How long opening waits for another process that delivers the same folder."""
START_SECONDS = 9.0
"""How long starting waits until the server has made the run."""


class Tracking:
    """An open connection between a journal folder and an experiment. Made by `open_tracking`."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        folder: Path,
        offline: bool,
        *,
        leftovers: Iterable[Path] = (),
        owner: str = "",
    ) -> None:
        self.uri, self.experiment = uri, experiment
        self.owner = owner or uuid.uuid4().hex
        self.folder, self.offline = Path(folder), offline
        self.delivery = DeliveryThread(uri, self.folder, experiment, leftovers)
        self._remote: ActorJournal | None = None
        self._finish_left = FINISH_SECONDS
        self._has_warned = False
        self._one_machine = False
        self._is_closed = False
        library_log.start(self.folder)
        self.delivery.start()
        atexit.register(self.close)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None or isinstance(error, KeyboardInterrupt | SystemExit):
            self.close("killed")
        else:
            self.close("failed", f"{type(error).__name__}: {error}")

    @property
    def wake(self) -> threading.Event:
        """Set to have the journals delivered at once."""
        return self.delivery.wake

    def state_of(self, path: Path) -> State:
        """How far a journal has been delivered."""
        return self.delivery.run_delivery(path).state

    def location(self) -> JournalLocation:
        """Where the journals are; with a tracker actor if processes may run on other machines."""
        if self._remote is None and not self._one_machine and "ray" in sys.modules:
            from ftlib.track import tracker_actor

            if tracker_actor.may_span_machines():
                self._remote = tracker_actor.start(self.folder, self.owner)
            else:
                # Asked once: a Ray that has died by the run's end would not answer for a minute.
                self._one_machine = tracker_actor.is_connected()
        return JournalLocation(str(self.folder), machine_id(), self._remote, self.owner)

    def handle(self) -> TrackerHandle:
        """For processes that start and finish runs of their own under this tracking (trials)."""
        return TrackerHandle(redact_address(self.uri), self.experiment, self.location())

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
    ) -> TrackedRun:
        """Make the run, or continue the one that the journal knows by this name (or by `run_id`).

        Args:
            name: shown in the UI; identifies the run within the journal folder.
            parent: the parent's MLflow id, or its `reference`.
            run_id: the MLflow run to reopen, as kept by an earlier start. If it no longer exists,
                it is made again.

        Raises:
            TrackingError: a new run could not be made within 10 s (never with `offline`).
        """
        path = journal_file(self.folder, name)
        existed = opening(path) is not None
        start = RunStart(
            name=name,
            experiment=self.experiment,
            uri=self.uri,
            tags=tags,
            params=params,
            parent=parent,
            run_id=run_id,
        )
        tracked = begin(start, self.location())
        tracked.deliverer = self
        delivery = self.delivery.run_delivery(path)
        if run_id and not delivery.state.run_id:
            delivery.state.run_id = run_id
        if delivery.state.run_id or self.offline:
            self.delivery.flush_now()
            return tracked
        deadline = time.monotonic() + START_SECONDS
        if not self.delivery.wait(lambda: bool(delivery.state.run_id), lambda: deadline):
            if not existed:
                self.delivery.forget(path)
                close_journal(path)
                path.unlink(missing_ok=True)
            error = self.delivery.last_error
            why = first_line(error) if error else f"no answer within {START_SECONDS:g} s"
            raise TrackingError(
                f"MLflow at {redact_address(self.uri)} did not make the run {name} ({why}). Look "
                "at the server's log, or start with --track.offline to journal everything now and "
                "deliver it later"
            )
        return tracked

    def writer_of(self, name: str) -> Writer:
        """A writer for another run of this journal folder, such as a finished trial."""
        return Writer(self.location(), journal_file(self.folder, name).name, self.wake)

    def drain(self, paths: Iterable[Path] | None = None) -> bool:
        """Wait until the journals (default: all of the folder) are delivered; whether they are.

        A server that keeps taking records gets FINISH_HEALTHY_SECONDS; one that fails or is slow
        gets what is left of FINISH_SECONDS.
        """
        wanted = [
            self.delivery.run_delivery(path)
            for path in (paths or journals.find_journals(self.folder))
        ]
        started = time.monotonic()

        def deadline() -> float:
            is_unknown = not any(d.state.run_id for d in wanted)
            if self.delivery.in_trouble or is_unknown:
                return started + self._finish_left
            return started + FINISH_HEALTHY_SECONDS

        done = self.delivery.wait(lambda: not any(d.is_pending for d in wanted), deadline)
        if self.delivery.in_trouble or not done:
            self._finish_left = max(0.5, self._finish_left - (time.monotonic() - started))
        if not done and not self._has_warned:
            self._has_warned = True
            log.warning(
                "tracking: %s has not taken everything yet. The rest is kept in %s. The same "
                "command or any other job on this home delivers it, or: %s",
                redact_address(self.uri),
                self.folder,
                job_command("track", "deliver"),
            )
        return done

    def end_orphan(
        self,
        name: str,
        outcome: str,
        note: str | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """End the run of a process that died (a trial's), if it is still open.

        `metrics` are logged at step 0 before.
        """
        path = journal_file(self.folder, name)
        start = opening(path)
        if start is not None and journals.is_open(path):
            tracked = TrackedRun(
                name, start["key"], self.location(), redact_address(self.uri), self
            )
            if metrics:
                tracked.writer().metrics(metrics, step=0)
            tracked.finish(outcome, note)

    def close(self, outcome: str = "killed", note: str | None = None) -> None:
        """End what is still open as `outcome`, deliver, and stop. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        atexit.unregister(self.close)
        with contextlib.suppress(Exception):
            self._end_open_runs(outcome, note)
            self.drain()
        self._release()

    def _release(self) -> None:
        self.delivery.stop(2.0)
        for path in journals.find_journals(self.folder):
            close_journal(path)
        if self._remote is not None:
            self._remote.stop()
        library_log.stop(self.folder)
        journals.release(self.folder)

    def abandon(self) -> None:
        """Stop without ending any run: another process has taken them over."""
        if not self._is_closed:
            self._is_closed = True
            atexit.unregister(self.close)
            self._release()

    def _end_open_runs(self, outcome: str, note: str | None) -> None:
        tags = clean_tags({"reason": reason_of(note)}) if note else {}
        location = JournalLocation(str(self.folder), machine_id(), owner=self.owner)
        for path in journals.find_journals(self.folder):
            if journals.is_open(path):
                Writer(location, path.name).put({"op": "end", "outcome": outcome, "tags": tags})


def warm_up(cfg: Track) -> threading.Thread:
    """Import MLflow and make the store in the background, which takes seconds.

    `open_tracking` does the same and reports what is wrong.
    """

    def work() -> None:
        with contextlib.suppress(TrackingError):
            uri = resolve_uri(cfg.uri)
            import_mlflow(uri)
            if not cfg.offline:
                ensure_store(uri)

    thread = threading.Thread(target=work, name="tracking-warm-up", daemon=True)
    thread.start()
    return thread


def check_addresses(cfg: Track) -> None:
    """Refuse tracking and registry addresses that make no sense; asks no server.

    Raises:
        TrackingError: with what to write.
    """
    registry_uri(resolve_uri(cfg.uri))


def open_tracking(
    cfg: Track,
    *,
    experiment: str,
    journal_dir: Path,
    resuming: bool = False,
    leftovers: Iterable[Path] | None = None,
    owner: str = "",
) -> Tracking:
    """Resolve where to track to, make sure that it is there, and start delivering.

    Args:
        cfg: the run's tracking settings; `cfg.experiment` wins over `experiment`.
        journal_dir: a local folder of this driver's own; what an earlier driver left is delivered.
        resuming: the run exists already, so a server that cannot be reached is no reason to fail.
        leftovers: journal folders of other runs to deliver when nothing else waits; by default
            those beside this one (RUNS/*/journal).
        owner: token of the launch, carried by each line of the journal; by default a new one.

    Raises:
        TrackingError: the address makes no sense, the store cannot be made, or the server does not
            answer within 10 s.
    """
    folder = Path(journal_dir).absolute()
    background.stop()
    check_addresses(cfg)
    uri = resolve_uri(cfg.uri)
    name = cfg.experiment or experiment
    if leftovers is None:
        leftovers = sorted(folder.parent.parent.glob(f"*/{folder.name}"))
    _acquire(folder)
    try:
        library_log.start(folder)
        is_known = resuming or any(State.load(p).run_id for p in journals.find_journals(folder))
        if not cfg.offline and not is_known:
            ensure_store(uri)
            reach(uri)
            with request_timeout(8):
                ensure_experiment(client(uri), name, uri)
        elif sqlite_path(uri) is not None and not cfg.offline:
            with contextlib.suppress(TrackingError):  # the delivery will report what is wrong
                ensure_store(uri)
        return Tracking(uri, name, folder, cfg.offline, leftovers=leftovers, owner=owner)
    except BaseException:
        journals.release(folder)
        raise
    finally:
        library_log.stop(folder)


def _acquire(folder: Path) -> None:
    """Make the journal folder this process's own.

    Waits a little: another job may be delivering what an earlier driver left in it.
    """
    deadline = time.monotonic() + ACQUIRE_SECONDS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = journals.acquire(folder)
        while not is_ours and not journals.is_held_here(folder) and time.monotonic() < deadline:
            time.sleep(0.2)
            is_ours = journals.acquire(folder)
    except OSError as error:
        raise TrackingError(
            f"the tracking journal cannot be kept in {folder} ({error}). Free space or permissions "
            "there, or set checkpoint.storage to another place"
        ) from None
    if not is_ours:
        raise TrackingError(
            f"another process is tracking into {folder}. Wait until it has ended, or give this run "
            "another name"
        )
