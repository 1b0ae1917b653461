"""Tracking as the driver sees it: open it, start runs, hand out writers, finish runs, close.

    with open_tracking(run.track, experiment="imagenette", journal_dir=folder / "journal") as tracking:
        tracked = tracking.start_run("phase2", tags=run_tags(run), params=params_of(run))
        ... tracked.writer() goes to rank 0 ...
        tracked.finish("completed")

Everything goes to a journal first (`ftlib.track.journal`); one thread of the driver delivers it (`ftlib.track.deliver`), so that one process
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
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftlib.config import Track
from ftlib.track import journal as journals
from ftlib.track.deliver import Feed, belongs_to, verdict
from ftlib.track.journal import State, encode, file_of, first, now_ms
from ftlib.track.reap import HEARTBEAT_SECONDS, heartbeat_tags, reap
from ftlib.track.redact import redact
from ftlib.track.store import TrackingError, client, ensure_experiment, ensure_store, experiment_link, patient, reach, resolve_uri, run_link, sqlite_path
from ftlib.track.views import View
from ftlib.track.writer import Place, Writer, clean_params, clean_tags, forget_journal, journal_at

log = logging.getLogger("ftlib.track")

COLLECT_SECONDS = 0.25
"""Time in which lines gather before they are sent together."""
LOOK_SECONDS = 1.0
"""Longest time until lines of other processes are noticed."""
LONGEST_PAUSE = 30.0
FINISH_SECONDS = 6.0
"""What finishing waits for a server that fails or is slow, over all runs of a `Tracking`. What is left stays in the journal."""
FINISH_HEALTHY_SECONDS = 600.0
"""What finishing waits for a server that keeps taking what it gets."""
SLOW_SECONDS = 1.5
"""A request that takes longer makes a server slow."""


class Delivery(threading.Thread):
    """The one thread that talks to MLflow."""

    def __init__(self, uri: str, folder: Path, experiment: str, leftovers: Iterable[Path] = ()) -> None:
        super().__init__(name="ftlib-track", daemon=True)
        self.uri, self.folder, self.experiment = uri, Path(folder), experiment
        self.leftovers = list(leftovers)
        self.wake = threading.Event()
        self.failures = 0
        self.slow = False
        self.last_error: Exception | None = None
        self._feeds: dict[Path, Feed] = {}
        self._adopted: set[Path] = set()
        self._client: Any = None
        self._halt = threading.Event()
        self._urgent = threading.Event()
        self._changed = threading.Condition()
        self._beat = 0.0
        self._tidied = False

    # --- for other threads ---

    def feed(self, path: Path) -> Feed:
        with self._changed:
            if path not in self._feeds:
                self._feeds[path] = Feed(path, self.uri)
            return self._feeds[path]

    def forget(self, path: Path) -> None:
        with self._changed:
            self._feeds.pop(path, None)

    def hurry(self) -> None:
        self._urgent.set()
        self.wake.set()

    def wait(self, condition: Callable[[], bool], deadline: Callable[[], float]) -> bool:
        """Until `condition()` holds, or time.monotonic() passes `deadline()`."""
        while not condition():
            if time.monotonic() >= deadline() or not self.is_alive():
                return condition()
            self.hurry()
            with self._changed:
                self._changed.wait(0.1)
        return True

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
                    log.warning("tracking: %s answers again; the journal is being delivered", redact(self.uri))
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
            log.warning("tracking: %s does not take what it is sent (%s). Training goes on; everything stays in %s and is sent again", redact(self.uri), why, self.folder)

    def _connected(self) -> Any:
        if self._client is None:
            ensure_store(self.uri)
            self._client = client(self.uri)
        return self._client

    def _round(self) -> None:
        for path in journals.journals(self.folder):
            self.feed(path)
        problem: Exception | None = None
        for feed in list(self._feeds.values()):
            while feed.pending and problem is None:
                try:
                    self._timed(feed)
                except Exception as error:
                    if verdict(error) == "down" or self._halt.is_set():
                        raise
                    problem = error
                    break
            if problem is not None:
                break
        self._heartbeat()
        if problem is not None:
            raise problem
        self._tidy()

    def _timed(self, feed: Feed) -> None:
        appender = journal_at(feed.path)
        appender.retry()
        appender.sync()
        started = time.monotonic()

        def done() -> None:
            nonlocal started
            self.slow = time.monotonic() - started > SLOW_SECONDS
            started = time.monotonic()
            with self._changed:
                self._changed.notify_all()

        with patient(min(120.0, 8.0 * 2 ** min(self.failures, 4))):
            feed.deliver(self._connected(), done)

    def _heartbeat(self) -> None:
        if time.monotonic() - self._beat < HEARTBEAT_SECONDS:
            return
        self._beat = time.monotonic()
        for path, feed in list(self._feeds.items()):
            if feed.state.run_id and not feed.state.ended and not feed.gone and path not in self._adopted:
                for key, value in heartbeat_tags().items():
                    self._connected().set_tag(feed.state.run_id, key, value)
                if self.failures:  # another driver may have taken this one for dead in the meantime
                    self._connected().update_run(feed.state.run_id, status="RUNNING")

    def _tidy(self) -> None:
        """Once, when the server is known to answer: what earlier, dead drivers have left."""
        if self._tidied:
            return
        self._tidied = True
        try:
            for folder in self.leftovers:
                if folder.resolve() != self.folder.resolve() and not self._halt.is_set():
                    deliver_folder(folder, self.uri, self._connected())
            experiment = self._connected().get_experiment_by_name(self.experiment)
            if experiment is not None:
                reap(self._connected(), [experiment.experiment_id])
        except Exception as error:
            log.info("tracking: leftovers of earlier runs wait for the next start (%s)", error)


def deliver_folder(folder: Path, uri: str, mlflow: Any) -> int:
    """Deliver what a dead driver left in a journal folder, and end its runs as killed. Leaves a living driver's folder alone.

    Returns the number of journals delivered.
    """
    if not journals.undelivered(folder) or not journals.own(folder):
        return 0
    count = 0
    try:
        for path in journals.undelivered(folder):
            if not belongs_to(path, uri):
                continue
            feed = Feed(path, uri)
            while feed.pending:
                feed.deliver(mlflow)
            opening = first(path) or {}
            if not feed.state.ended and not feed.gone and opening.get("machine") == journals.machine():
                journal_at(path).append(encode({"op": "end", "outcome": "killed", "tags": {"reason": "the driver process died"}, "t": _last_time(path)}))
                feed.deliver(mlflow)
            forget_journal(path)
            count += 1
    finally:
        journals.disown(folder)
    return count


def _last_time(path: Path) -> int:
    times = [record["t"] for record, _ in journals.read(path, 0, 1 << 30) if record and "t" in record]
    return max(times, default=now_ms())


@dataclass
class TrackedRun:
    """One run. Its MLflow id is empty until the server has made it (offline: after delivery)."""

    name: str
    key: str
    place: Place
    uri: str
    tracking: Tracking | None = field(default=None, repr=False)
    """None in a process that only writes (a trial); the driver delivers."""

    @property
    def path(self) -> Path:
        return file_of(Path(self.place.folder), self.name)

    @property
    def state(self) -> State:
        if self.tracking is not None:
            return self.tracking.delivery.feed(self.path).state
        if self.place.here:
            return State.load(self.path)
        from ftlib.track.actor import state

        return state(self.place.actor, self.path.name, 5.0)

    @property
    def run_id(self) -> str:
        return self.state.run_id

    @property
    def experiment_id(self) -> str:
        return self.state.experiment_id

    @property
    def reference(self) -> str:
        """What to give as `parent` of other runs: the run's id, or its key while it has none."""
        return self.run_id or f"key:{self.key}"

    @property
    def url(self) -> str:
        state = self.state
        return run_link(self.uri, state.experiment_id, state.run_id) if state.run_id else ""

    def writer(self) -> Writer:
        """For training code, in any process of the job."""
        place = self.tracking.place() if self.tracking is not None else self.place
        return Writer(place, self.path.name, self.tracking.delivery.wake if self.tracking is not None else None)

    def save_view(self, view: View) -> None:
        """Put a saved view into the experiment's Views menu (best effort)."""
        self.writer().put({"op": "view", "key": view.key, "name": view.name, "state": dict(view.state)})

    def view_link(self, view: View) -> str:
        """Address of the experiment's page with that view; empty while the experiment's id is unknown."""
        experiment = self.experiment_id
        return experiment_link(self.uri, experiment, view.key) if experiment else ""

    def log_model(self, model: Path | str | Callable[[Path], Any], *, name: str = "model", registered_name: str | None = None, alias: str | None = None,
                  step: int = 0, tags: Mapping[str, Any] | None = None) -> None:
        """Attach an MLflow model to the run, with the run's metrics at `step` and its `best/*`.

        Args:
            model: a folder that holds a complete MLflow model (its MLmodel file), which must stay until it has been delivered; or a
                function that writes one into the folder it is given.
            registered_name: also make it a version of this registered model.
            alias: point this alias of the registered model at the version.
        """
        from ftlib.track.writer import warn_once

        try:
            if callable(model):
                folder = Path(self.place.folder) / "models" / uuid.uuid4().hex[:8] / name
                folder.parent.mkdir(parents=True)
                model(folder)
            else:
                folder = Path(model).absolute()
            if not (folder / "MLmodel").is_file():
                raise FileNotFoundError(f"{folder} holds no MLmodel file")
            self.writer().put({"op": "model", "path": str(folder), "name": name, "registered_name": registered_name, "alias": alias, "step": int(step),
                               "key": uuid.uuid4().hex, "tags": clean_tags(tags or {})})
        except Exception as error:
            warn_once(f"tracking: the model {name} could not be logged (%s: %s)", type(error).__name__, error)

    def finish(self, outcome: str = "completed", note: str | None = None) -> bool:
        """End the run and wait until MLflow has everything, but not for a server that is down. Returns whether it has.

        Args:
            outcome: completed, pruned, failed or killed.
            note: for completed runs the description on the run's page (markdown); otherwise also its first line as tag `reason`.
        """
        if outcome not in ("completed", "pruned", "failed", "killed"):
            raise ValueError(f"outcome {outcome!r}: needs completed, pruned, failed or killed")
        tags = {"mlflow.note.content": note} if note else {}
        if note and outcome != "completed":
            tags["reason"] = note.strip().splitlines()[0][:250]
        writer = self.writer()
        writer.put({"op": "end", "outcome": outcome, "tags": clean_tags(tags)})
        if self.tracking is None:
            writer.flush()
            return False
        return self.tracking.drain([self.path])


class Tracking:
    """An open connection between a journal folder and an experiment. Made by `open_tracking`."""

    def __init__(self, uri: str, experiment: str, folder: Path, offline: bool, leftovers: Iterable[Path] = ()) -> None:
        self.uri, self.experiment, self.folder, self.offline = uri, experiment, Path(folder), offline
        self.delivery = Delivery(uri, self.folder, experiment, leftovers)
        self._actor: Any = None
        self._finish_left = FINISH_SECONDS
        self._runs: dict[str, TrackedRun] = {}
        self._closed = False
        self.delivery.start()
        atexit.register(self.close)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        killed = isinstance(error, KeyboardInterrupt | SystemExit)
        note = None if error is None or killed else f"{type(error).__name__}: {error}"
        self.close("killed" if error is None or killed else "failed", note)

    def place(self) -> Place:
        """The journal's place, with a tracker actor if processes of this job may run on other machines."""
        if self._actor is None and "ray" in sys.modules:
            from ftlib.track import actor

            if actor.several_machines():
                self._actor = actor.start(self.folder)
        return Place(str(self.folder), journals.machine(), self._actor)

    def handle(self) -> Handle:
        """For processes that start and finish runs of their own under this tracking, such as trials."""
        return Handle(self.uri, self.experiment, self.place())

    def start_run(self, name: str, *, tags: Mapping[str, Any], params: Mapping[str, Any], parent: str | None = None, run_id: str | None = None) -> TrackedRun:
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
        tracked = _start(self.place(), self.uri, self.experiment, name, tags, params, parent, run_id)
        tracked.tracking = self
        self._runs[name] = tracked
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
                self._runs.pop(name, None)
            why = redact(str(error)).splitlines()[0][:300] if error is not None and str(error) else "no answer within 9 s"
            raise TrackingError(f"MLflow at {redact(self.uri)} did not make the run {name} ({why}). Look at the server's log, or start with --track.offline "
                                "to journal everything now and deliver it later")
        return tracked

    def drain(self, paths: Iterable[Path] | None = None) -> bool:
        """Wait until everything is delivered, or the server turns out to fail or to be slow and the patience for that is used up."""
        wanted = [self.delivery.feed(p) for p in (paths or journals.journals(self.folder))]
        started = time.monotonic()

        def deadline() -> float:
            trouble = self.delivery.failures > 0 or self.delivery.slow or not any(f.state.run_id for f in wanted)
            return started + (self._finish_left if trouble else FINISH_HEALTHY_SECONDS)

        done = self.delivery.wait(lambda: not any(f.pending for f in wanted), deadline)
        if self.delivery.failures or self.delivery.slow or not done:
            self._finish_left = max(0.5, self._finish_left - (time.monotonic() - started))
        if not done:
            log.warning("tracking: %s has not taken everything yet. The rest is kept in %s; it goes out at the next start, or with: python jobs/track.py deliver",
                        redact(self.uri), self.folder)
        return done

    def end_orphan(self, name: str, outcome: str, note: str | None = None) -> None:
        """End the run of a process that died (a trial's), if it is still open."""
        path = file_of(self.folder, name)
        opening = first(path)
        if opening is not None and _is_open(path):
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
                if opening is not None and _is_open(path):
                    tags = clean_tags({"reason": note.strip().splitlines()[0][:250]}) if note else {}
                    Writer(Place(str(self.folder), journals.machine()), path.name).put({"op": "end", "outcome": outcome, "tags": tags})
            self.drain()
        self.delivery.stop(2.0)
        for path in journals.journals(self.folder):
            forget_journal(path)
        if self._actor is not None:
            from ftlib.track import actor

            actor.stop(self._actor)
        journals.disown(self.folder)


@dataclass(frozen=True)
class Handle:
    """Picklable: starts runs from any process of the job. The driver's `Tracking` makes and delivers them."""

    uri: str
    experiment: str
    place: Place

    def start_run(self, name: str, *, tags: Mapping[str, Any], params: Mapping[str, Any], parent: str | None = None, run_id: str | None = None,
                  wait_seconds: float = 0.0) -> TrackedRun:
        """As `Tracking.start_run`, but never fails, and its id may come a little later (`wait_seconds` waits for it)."""
        tracked = _start(self.place, self.uri, self.experiment, name, tags, params, parent, run_id)
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline and not tracked.run_id:
            time.sleep(0.2)
        return tracked


def _is_open(path: Path) -> bool:
    """Whether the last word in a journal is not the run's end."""
    last = ""
    offset = 0
    while True:
        block = list(journals.read(path, offset))
        if not block:
            return last in ("run", "open")
        last = next((r["op"] for r, _ in reversed(block) if r and r["op"] in ("run", "open", "end")), last)
        offset = block[-1][1]


def _start(place: Place, uri: str, experiment: str, name: str, tags: Mapping[str, Any], params: Mapping[str, Any], parent: str | None, run_id: str | None) -> TrackedRun:
    path = file_of(Path(place.folder), name)
    writer = Writer(place, path.name)
    opening = first(path) if place.here else None
    key = opening["key"] if opening else (uuid.uuid4().hex if place.here else uuid.uuid5(uuid.NAMESPACE_URL, f"{place.machine}{place.folder}{name}").hex)
    if opening is None:
        writer.put({"op": "run", "key": key, "name": name, "experiment": experiment, "uri": redact(uri), "machine": place.machine, "run_id": run_id or "",
                    "parent": parent or "", "tags": clean_tags({**tags, **heartbeat_tags()}), "params": clean_params(params)})
        if place.here:
            journal_at(path).sync()
    else:
        writer.put({"op": "open"})
        writer.tags(tags)
        writer.params(params)
    return TrackedRun(name, key, place, uri)


def open_tracking(cfg: Track, *, experiment: str, journal_dir: Path, resuming: bool = False, leftovers: Iterable[Path] | None = None) -> Tracking:
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
        raise TrackingError(f"the tracking journal cannot be kept in {folder} ({error}). Free space or permissions there, or set checkpoint.storage to another place") from None
    if not owned:
        raise TrackingError(f"another process is tracking into {folder}. Wait until it has ended, or give this run another name")
    try:
        known = resuming or any(State.load(p).run_id for p in journals.journals(folder))
        name = cfg.experiment or experiment
        if not cfg.offline and not known:
            ensure_store(uri)
            reach(uri)
            with patient(8):
                ensure_experiment(client(uri), name, uri)
        elif sqlite_path(uri) is not None and not cfg.offline:
            with contextlib.suppress(TrackingError):  # the run exists: what is wrong will be reported by the delivery
                ensure_store(uri)
    except BaseException:
        journals.disown(folder)
        raise
    return Tracking(uri, name, folder, cfg.offline, leftovers)
