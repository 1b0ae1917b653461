"""One run as its owner sees it, in the driver or in a process that the driver started."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftlib.track.journal import State, file_of, first
from ftlib.track.orphans import heartbeat_tags
from ftlib.track.redact import redact
from ftlib.track.store import artifact_link, experiment_link, run_link
from ftlib.track.views import View
from ftlib.track.writer import (
    JournalLocation,
    Writer,
    clean_params,
    clean_tags,
    journal_at,
    warn_once,
)

if TYPE_CHECKING:
    from ftlib.track.tracking import Tracking


@dataclass
class TrackedRun:
    """One run. Its MLflow id is empty until the server has made it (offline: after delivery)."""

    name: str
    key: str
    place: JournalLocation
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
        from ftlib.track.tracker_actor import state

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
        return Writer(
            place,
            self.path.name,
            self.tracking.delivery.wake if self.tracking is not None else None,
        )

    def save_view(self, view: View) -> None:
        """Put a saved view into the experiment's Views menu (best effort)."""
        self.writer().put(
            {"op": "view", "key": view.key, "name": view.name, "state": dict(view.state)}
        )

    def view_link(self, view: View) -> str:
        """Address of the experiment's page with that view; empty while the experiment's id is unknown."""
        experiment = self.experiment_id
        return experiment_link(self.uri, experiment, view.key) if experiment else ""

    def artifact_link(self, path: str) -> str:
        """Address of an artifact, opened beside its run's page; empty while the run's id is unknown."""
        state = self.state
        return (
            artifact_link(self.uri, state.experiment_id, state.run_id, path) if state.run_id else ""
        )

    def log_model(
        self,
        model: Path | str | Callable[[Path], Any],
        *,
        name: str = "model",
        registered_name: str | None = None,
        alias: str | None = None,
        step: int = 0,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach an MLflow model to the run, with the run's metrics at `step`, its `best/*` and its `test/*`.

        Args:
            model: a folder that holds a complete MLflow model (its MLmodel file), which must stay until it has been delivered; or a
                function that writes one into the folder it is given.
            registered_name: also make it a version of this registered model.
            alias: point this alias of the registered model at the version.
        """
        try:
            if callable(model):
                folder = Path(self.place.folder) / "models" / uuid.uuid4().hex[:8] / name
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
        if self.tracking is not None and writer.place.actor is not None:
            from ftlib.track.tracker_actor import wait_for

            wait_for(
                writer.place.actor, 5.0
            )  # what workers on other machines have sent comes before the end
        writer.put({"op": "end", "outcome": outcome, "tags": clean_tags(tags)})
        if self.tracking is None:
            writer.flush()
            return False
        return self.tracking.drain([self.path])


@dataclass(frozen=True)
class TrackerHandle:
    """Picklable: starts runs from any process of the job. The driver's `Tracking` makes and delivers them."""

    uri: str
    experiment: str
    place: JournalLocation

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
        """As `Tracking.start_run`, but never fails, and its id may come a little later (`wait_seconds` waits for it)."""
        tracked = begin(self.place, self.uri, self.experiment, name, tags, params, parent, run_id)
        deadline = time.monotonic() + wait_seconds
        while time.monotonic() < deadline and not tracked.run_id:
            time.sleep(0.2)
        return tracked


def begin(
    place: JournalLocation,
    uri: str,
    experiment: str,
    name: str,
    tags: Mapping[str, Any],
    params: Mapping[str, Any],
    parent: str | None,
    run_id: str | None,
) -> TrackedRun:
    """Write a run's opening into its journal, or that it goes on. Delivering it is the driver's work."""
    path = file_of(Path(place.folder), name)
    writer = Writer(place, path.name)
    opening = first(path) if place.here else None
    key = (
        opening["key"]
        if opening
        else (
            uuid.uuid4().hex
            if place.here
            else uuid.uuid5(uuid.NAMESPACE_URL, f"{place.machine}{place.folder}{name}").hex
        )
    )
    if opening is None:
        writer.put(
            {
                "op": "run",
                "key": key,
                "name": name,
                "experiment": experiment,
                "uri": redact(uri),
                "machine": place.machine,
                "run_id": run_id or "",
                "parent": parent or "",
                "tags": clean_tags({**tags, **heartbeat_tags()}),
                "params": clean_params(params),
            }
        )
        if place.here:
            journal_at(path).sync()
    else:
        writer.put({"op": "open"})
        writer.tags({**tags, **heartbeat_tags()})
        writer.params(params)
    return TrackedRun(name, key, place, uri)
