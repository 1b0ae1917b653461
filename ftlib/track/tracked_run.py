"""One run as its owner sees it, in the driver or in a process that the driver started."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ftlib.track import links
from ftlib.track.journal import State, journal_at, journal_file, opening
from ftlib.track.orphans import heartbeat_tags
from ftlib.track.redact import redact_address
from ftlib.track.views import View
from ftlib.track.writer import JournalLocation, Writer, clean_params, clean_tags, warn_once

OUTCOMES = ("completed", "pruned", "failed", "killed")
MAX_REASON_LENGTH = 250


class Deliverer(Protocol):
    """What a run needs of the driver's `Tracking`."""

    @property
    def wake(self) -> threading.Event:
        """Set to have the journal delivered at once."""

    def location(self) -> JournalLocation:
        """Where the journals are."""

    def state_of(self, path: Path) -> State:
        """How far a journal has been delivered."""

    def drain(self, paths: Iterable[Path] | None = None) -> bool:
        """Wait until the journals are delivered, within bounds. Returns whether they are."""


@dataclass
class TrackedRun:
    """One run. Its MLflow id is empty until the server has made it (offline: after delivery)."""

    name: str
    key: str
    location: JournalLocation
    """Where the run's journal was begun."""
    uri: str
    """The tracking address, without secrets."""
    deliverer: Deliverer | None = field(default=None, repr=False)
    """None in a process that only writes (a trial's); the driver delivers."""

    @property
    def path(self) -> Path:
        """The run's journal."""
        return journal_file(Path(self.location.folder), self.name)

    @property
    def state(self) -> State:
        """What is known of the run in MLflow."""
        if self.deliverer is not None:
            return self.deliverer.state_of(self.path)
        if self.location.is_local or self.location.remote is None:
            return State.load(self.path)
        return self.location.remote.state(self.path.name, 5.0)

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
        """Address of the run's page; empty while the run's id is unknown."""
        return links.absolute(self.uri, self._page())

    @property
    def charts_url(self) -> str:
        """Address of the run's charts; empty while the run's id is unknown."""
        return links.absolute(self.uri, self._page("model-metrics"))

    @property
    def opened_by(self) -> str:
        """The command that starts the UI of these pages; empty where there is nothing to start."""
        return links.opened_by(self.uri) if self.run_id else ""

    def _page(self, tab: str = "") -> str:
        state = self.state
        return links.run_page(state.experiment_id, state.run_id, tab) if state.run_id else ""

    def view_link(self, view: View) -> str:
        """The experiment's charts in that view, for notes (`#/...`, good on any host and port).

        Empty while the experiment's id is unknown.
        """
        experiment = self.experiment_id
        return links.experiment_page(experiment, view.key) if experiment else ""

    def view_url(self, view: View) -> str:
        """The same as a whole address, for the screen."""
        return links.absolute(self.uri, self.view_link(view))

    def artifact_link(self, path: str) -> str:
        """An artifact, opened on its run's page, for notes. Empty while the run's id is unknown."""
        state = self.state
        if not state.run_id:
            return ""
        return links.artifact_page(state.experiment_id, state.run_id, path)

    def writer(self) -> Writer:
        """For training code, in any process of the job."""
        if self.deliverer is None:
            return Writer(self.location, self.path.name)
        return Writer(self.deliverer.location(), self.path.name, self.deliverer.wake)

    def save_view(self, view: View) -> None:
        """Put a saved view into the experiment's Views menu, where MLflow's version allows it."""
        self.writer().put(
            {"op": "view", "key": view.key, "name": view.name, "state": dict(view.state)}
        )

    def log_model(
        self,
        model: Path | str | Callable[[Path], object],
        *,
        name: str = "model",
        registered_name: str | None = None,
        alias: str | None = None,
        step: int = 0,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach an MLflow model to the run, with its metrics at `step`, its `best/*`, `report/*`
        and `test/*`.

        Args:
            model: a folder that holds a complete MLflow model (its MLmodel file), which must stay
                until it has been delivered; or a function that writes one into the folder it is
                given.
            registered_name: also make it a version of this registered model.
            alias: point this alias of the registered model at the version.
        """
        try:
            if callable(model):
                folder = Path(self.location.folder) / "models" / uuid.uuid4().hex[:8] / name
                folder.parent.mkdir(parents=True)
                model(folder)
            else:
                folder = Path(model).absolute()
            if not (folder / "MLmodel").is_file():
                raise FileNotFoundError(f"{folder} holds no MLmodel file")
            self.writer().put(
                {
                    "op": "model",
                    "path": str(folder),
                    "name": name,
                    "registered_name": registered_name,
                    "alias": alias,
                    "step": int(step),
                    "key": uuid.uuid4().hex,
                    "tags": clean_tags(tags or {}),
                }
            )
        except Exception as error:
            warn_once(
                f"tracking: the model {name} could not be logged (%s: %s)",
                type(error).__name__,
                error,
            )

    def finish(self, outcome: str = "completed", note: str | None = None) -> bool:
        """End the run and wait until MLflow has everything, but not for a server that is down.

        Returns whether it has.

        Args:
            outcome: completed, pruned, failed or killed.
            note: for completed runs the description on the run's page (Markdown); for others also
                the tag `reason`, by its first line.

        Raises:
            ValueError: for another outcome.
        """
        if outcome not in OUTCOMES:
            raise ValueError(f"outcome {outcome!r}: needs {', '.join(OUTCOMES)}")
        tags = {"mlflow.note.content": note} if note else {}
        if note and outcome != "completed":
            tags["reason"] = reason_of(note)
        writer = self.writer()
        if self.deliverer is not None and writer.location.remote is not None:
            writer.location.remote.flush(5.0)  # what workers elsewhere have sent precedes the end
        writer.put({"op": "end", "outcome": outcome, "tags": clean_tags(tags)})
        if self.deliverer is None:
            writer.flush()
            return False
        return self.deliverer.drain([self.path])


def reason_of(note: str) -> str:
    """A note as the tag `reason` shows it: its first line, cut."""
    return note.strip().splitlines()[0][:MAX_REASON_LENGTH]


@dataclass(frozen=True)
class RunStart:
    """What a run begins with."""

    name: str
    """Shown in the UI; identifies the run within its journal folder."""
    experiment: str
    uri: str
    tags: Mapping[str, Any]
    params: Mapping[str, Any]
    parent: str | None = None
    """The parent's MLflow id, or its `reference`."""
    run_id: str | None = None
    """The MLflow run to reopen, as kept by an earlier start."""


def begin(start: RunStart, location: JournalLocation) -> TrackedRun:
    """Write into the journal that a run begins or goes on. The driver delivers it."""
    path = journal_file(Path(location.folder), start.name)
    writer = Writer(location, path.name)
    known = opening(path) if location.is_local else None
    if known is not None:
        key = known["key"]
        writer.put({"op": "open"})
        writer.tags({**start.tags, **heartbeat_tags()})
        writer.params(start.params)
        return TrackedRun(start.name, key, location, redact_address(start.uri))
    if location.is_local:
        key = uuid.uuid4().hex
    else:
        place = f"{location.machine}{location.folder}{start.name}"
        key = uuid.uuid5(uuid.NAMESPACE_URL, place).hex
    writer.put(
        {
            "op": "run",
            "key": key,
            "name": start.name,
            "experiment": start.experiment,
            "uri": redact_address(start.uri),
            "machine": location.machine,
            "run_id": start.run_id or "",
            "parent": start.parent or "",
            "tags": clean_tags({**start.tags, **heartbeat_tags()}),
            "params": clean_params(start.params),
        }
    )
    if location.is_local:
        journal_at(path).sync()
    return TrackedRun(start.name, key, location, redact_address(start.uri))


@dataclass(frozen=True)
class TrackerHandle:
    """Starts runs from any process of the job; picklable. The driver's `Tracking` delivers them."""

    uri: str
    experiment: str
    location: JournalLocation

    def start_run(
        self,
        name: str,
        *,
        tags: Mapping[str, Any],
        params: Mapping[str, Any],
        parent: str | None = None,
        run_id: str | None = None,
        wait_seconds: float = 0.0,
    ) -> TrackedRun:
        """As `Tracking.start_run`, but never fails.

        The run's id may come a little later; `wait_seconds` waits for it.
        """
        start = RunStart(
            name=name,
            experiment=self.experiment,
            uri=self.uri,
            tags=tags,
            params=params,
            parent=parent,
            run_id=run_id,
        )
        tracked = begin(start, self.location)
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline and not tracked.run_id:
            time.sleep(0.2)
        return tracked
