"""Tracking as the driver sees it: open it, start runs, hand out writers, finish runs, close.

    with open_tracking(run.track, experiment="imagenette", journal_dir=folder / "journal") as tracking:
        tracked = tracking.start_run("phase2", tags=run_tags(run), params=params_of(run))
        ... tracked.writer() goes to rank 0 ...
        tracked.finish("completed")

Everything goes to a journal first (`ftlib.track.journal`); one thread of the driver delivers it (`ftlib.track.delivery_thread`), so that one process
writes to the store whatever the number of workers. Only two things can fail: a server that cannot be reached when a run is about to
exist for the first time, and a store that cannot be made. Once a run exists, nothing about tracking stops it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ftlib.config import Track
from ftlib.track import journal as journals
from ftlib.track.delivery_thread import DeliveryThread
from ftlib.track.journal import State, file_of, first
from ftlib.track.redact import redact
from ftlib.track.store import (
    TrackingError,
    client,
    ensure_experiment,
    ensure_store,
    import_mlflow,
    patient,
    reach,
    resolve_uri,
    sqlite_path,
)
from ftlib.track.tracked_run import TrackedRun, TrackerHandle, begin
from ftlib.track.writer import JournalLocation, Writer, clean_tags, forget_journal

__all__ = ["TrackedRun", "TrackerHandle", "Tracking", "open_tracking"]

log = logging.getLogger("ftlib.track")

FINISH_SECONDS = 5.0
"""What finishing waits for a server that fails or is slow, over all runs of a `Tracking`. What is left stays in the journal."""
FINISH_HEALTHY_SECONDS = 600.0
"""What finishing waits for a server that keeps taking what it gets."""


class Tracking:
    """An open connection between a journal folder and an experiment. Made by `open_tracking`."""

    def __init__(
        self, uri: str, experiment: str, folder: Path, offline: bool, leftovers: Iterable[Path] = ()
    ) -> None:
        self.uri, self.experiment, self.folder, self.offline = (
            uri,
            experiment,
            Path(folder),
            offline,
        )
        self.delivery = DeliveryThread(uri, self.folder, experiment, leftovers)
        self._actor: Any = None
        self._finish_left = FINISH_SECONDS
        self._closed = False
        self.delivery.start()
        atexit.register(self.close)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        note = None if error is None or killed else f"{type(error).__name__}: {error}"
        self.close("killed" if error is None or killed else "failed", note)

    def place(self) -> JournalLocation:
        """The journal's place, with a tracker actor if processes of this job may run on other machines."""
        if self._actor is None and "ray" in sys.modules:
            from ftlib.track import tracker_actor

            if tracker_actor.several_machines():
                self._actor = tracker_actor.start(self.folder)
        return JournalLocation(str(self.folder), journals.machine(), self._actor)

    def handle(self) -> TrackerHandle:
        """For processes that start and finish runs of their own under this tracking, such as trials."""
        return TrackerHandle(self.uri, self.experiment, self.place())

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
    ) -> TrackedRun:
        """Make the run, or continue the one that this journal folder knows by this name (or that `run_id` names).

        Args:
            name: shown in the UI; identifies the run within the journal folder.
            parent: the parent's MLflow id, or its `reference`.
            run_id: the MLflow run to reopen, as kept by an earlier start. If it no longer exists, it is made again.

        Raises:
            TrackingError: a new run could not be made within 10 s (never with `offline`).
        """
        path = file_of(self.folder, name)
        existed = first(path) is not None
        tracked = begin(self.place(), self.uri, self.experiment, name, tags, params, parent, run_id)
        tracked.tracking = self
        feed = self.delivery.feed(path)
        if run_id and not feed.state.run_id:
            feed.state.run_id = run_id
        if feed.state.run_id or self.offline:
            self.delivery.hurry()
            return tracked
        deadline = time.monotonic() + 9.0
        if not self.delivery.wait(lambda: bool(feed.state.run_id), lambda: deadline):
            error = self.delivery.last_error
            if not existed:
                self.delivery.forget(path)
                forget_journal(path)
                path.unlink(missing_ok=True)
            why = (
                redact(str(error)).splitlines()[0][:300]
                if error is not None and str(error)
                else "no answer within 9 s"
            )
            raise TrackingError(
                f"MLflow at {redact(self.uri)} did not make the run {name} ({why}). Look at the server's log, or start with --track.offline "
                "to journal everything now and deliver it later"
            )
        return tracked

    def drain(self, paths: Iterable[Path] | None = None) -> bool:
        """Wait until everything is delivered, or the server turns out to fail or to be slow and the patience for that is used up."""
        wanted = [self.delivery.feed(p) for p in (paths or journals.journals(self.folder))]
        started = time.monotonic()

        def deadline() -> float:
            trouble = self.delivery.trouble or not any(f.state.run_id for f in wanted)
            return started + (self._finish_left if trouble else FINISH_HEALTHY_SECONDS)

        done = self.delivery.wait(lambda: not any(f.pending for f in wanted), deadline)
        if self.delivery.trouble or not done:
            self._finish_left = max(0.5, self._finish_left - (time.monotonic() - started))
        if not done:
            log.warning(
                "tracking: %s has not taken everything yet. The rest is kept in %s; it goes out at the next start, or with: python jobs/track.py deliver",
                redact(self.uri),
                self.folder,
            )
        return done

    def end_orphan(self, name: str, outcome: str, note: str | None = None) -> None:
        """End the run of a process that died (a trial's), if it is still open."""
        path = file_of(self.folder, name)
        opening = first(path)
        if opening is not None and journals.is_open(path):
            TrackedRun(name, opening["key"], self.place(), self.uri, self).finish(outcome, note)

    def close(self, outcome: str = "killed", note: str | None = None) -> None:
        """End what is still open as `outcome`, deliver, and stop. May be called twice."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        with contextlib.suppress(Exception):
            for path in journals.journals(self.folder):
                opening = first(path)
                if opening is not None and journals.is_open(path):
                    tags = (
                        clean_tags({"reason": note.strip().splitlines()[0][:250]}) if note else {}
                    )
                    Writer(JournalLocation(str(self.folder), journals.machine()), path.name).put(
                        {"op": "end", "outcome": outcome, "tags": tags}
                    )
            self.drain()
        self.delivery.stop(2.0)
        for path in journals.journals(self.folder):
            forget_journal(path)
        if self._actor is not None:
            from ftlib.track import tracker_actor

            tracker_actor.stop(self._actor)
        journals.disown(self.folder)


def ahead(cfg: Track) -> threading.Thread:
    """Start to import MLflow and to make the store, which take seconds, while something else is waited for. `open_tracking` does the same
    and reports what is wrong."""

    def work() -> None:
        with contextlib.suppress(TrackingError):
            uri = resolve_uri(cfg.uri)
            import_mlflow(uri)
            if not cfg.offline:
                ensure_store(uri)

    thread = threading.Thread(target=work, name="tracking-ahead", daemon=True)
    thread.start()
    return thread


def open_tracking(
    cfg: Track,
    *,
    experiment: str,
    journal_dir: Path,
    resuming: bool = False,
    leftovers: Iterable[Path] | None = None,
) -> Tracking:
    """Resolve where to track to, make sure that it is there, and start delivering.

    Args:
        cfg: the run's tracking settings; `cfg.experiment` wins over `experiment`.
        journal_dir: a local folder of this driver's own; what an earlier driver left in it is delivered.
        resuming: a run that is to be continued exists already, so a server that cannot be reached is no reason to fail.
        leftovers: journal folders of other runs to deliver on the side; by default those beside this one (RUNS/*/journal).

    Raises:
        TrackingError: the URI makes no sense, the store cannot be made, or the server does not answer within 10 s.
    """
    folder = Path(journal_dir).absolute()
    uri = resolve_uri(cfg.uri)
    if leftovers is None:
        leftovers = sorted(folder.parent.parent.glob(f"*/{folder.name}"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owned = journals.own(folder)
    except OSError as error:
        raise TrackingError(
            f"the tracking journal cannot be kept in {folder} ({error}). Free space or permissions there, or set checkpoint.storage to another place"
        ) from None
    if not owned:
        raise TrackingError(
            f"another process is tracking into {folder}. Wait until it has ended, or give this run another name"
        )
    try:
        known = resuming or any(State.load(p).run_id for p in journals.journals(folder))
        name = cfg.experiment or experiment
        if not cfg.offline and not known:
            ensure_store(uri)
            reach(uri)
            with patient(8):
                ensure_experiment(client(uri), name, uri)
        elif sqlite_path(uri) is not None and not cfg.offline:
            with contextlib.suppress(
                TrackingError
            ):  # the run exists: what is wrong will be reported by the delivery
                ensure_store(uri)
    except BaseException:
        journals.disown(folder)
        raise
    return Tracking(uri, name, folder, cfg.offline, leftovers)
