"""Runs whose driver died without ending them are ended as killed, so that none stays RUNNING.

A driver writes its process identity and a heartbeat into its runs' tags. On the driver's own
machine the identity decides at once. From elsewhere a driver counts as dead when its heartbeat has
not changed for STALE_SECONDS on this process's monotonic clock: two machines' clocks are never
compared.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftlib.process_identity import ProcessIdentity, machine_id

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HEARTBEAT_SECONDS = 30.0
STALE_SECONDS = 300.0
"""A driver whose heartbeat stands still for this long is dead (or cannot reach the server; it
reopens its runs when it can)."""

DRIVER_TAG, HEARTBEAT_TAG = "ftlib.driver", "ftlib.heartbeat"


def driver_tag() -> str:
    """This process, so that another one on the same machine can tell whether it still lives."""
    return json.dumps(ProcessIdentity.of_this_process().to_dict())


def heartbeat_tags() -> dict[str, str]:
    """The tags that say who drives a run, and that it is alive."""
    return {DRIVER_TAG: driver_tag(), HEARTBEAT_TAG: f"{time.time():.0f}"}


def is_this_machine(recorded: str) -> bool:
    """Whether a journal's `machine` is this one. Journals of older versions name it `host:boot`."""
    host, _, rest = machine_id().partition(" ")
    return recorded in (machine_id(), f"{host}:{rest[:8]}")


def is_driver_alive(tag: str) -> bool | None:
    """Whether the process in a driver tag lives; None if that cannot be seen from here."""
    try:
        values = json.loads(tag)
    except ValueError:
        return _is_old_driver_alive(tag)
    identity = ProcessIdentity.from_dict(values) if isinstance(values, dict) else None
    return identity.is_alive() if identity else None


def _is_old_driver_alive(tag: str) -> bool | None:
    """The same for tags of older versions: `host:boot pid start`, the start by the wall clock."""
    machine, pid, _start = [*tag.rsplit(" ", 2), "", ""][:3]
    if not is_this_machine(machine) or not pid.isdigit():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    return None  # the number is in use, perhaps by another process: the heartbeat decides


@dataclass(frozen=True)
class _Heartbeat:
    """A run's heartbeat as this process has seen it."""

    value: str
    since: float
    """When it was first seen to be `value`, on the watcher's clock."""
    has_moved: bool


class OrphanFinder:
    """Watches RUNNING runs and ends those of dead drivers as KILLED.

    Args:
        experiments: ids to look in; None looks in all.
        stale_seconds: how long a heartbeat may stand still.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        mlflow: MlflowClient,
        experiments: Sequence[str] | None = None,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._mlflow, self._stale_seconds, self._clock = mlflow, stale_seconds, clock
        self._experiments = experiments
        self._seen: dict[str, _Heartbeat] = {}
        """Run id -> what was last seen of it."""

    @property
    def watched(self) -> int:
        """How many runs of other machines have neither moved nor been silent for long enough."""
        return sum(not heartbeat.has_moved for heartbeat in self._seen.values())

    def poll(self) -> list[Run]:
        """Look once. Ends the runs of drivers that are known to be dead, and returns them."""
        ended = []
        seen: dict[str, _Heartbeat] = {}
        for run in self._running():
            is_alive = is_driver_alive(run.data.tags[DRIVER_TAG])
            if is_alive is None:
                heartbeat = self._look(run)
                is_alive = self._clock() - heartbeat.since < self._stale_seconds
                if is_alive:
                    seen[run.info.run_id] = heartbeat
            if not is_alive:
                self._end(run)
                ended.append(run)
        self._seen = seen
        return ended

    def _look(self, run: Run) -> _Heartbeat:
        """What is known of the run's heartbeat, this look included."""
        value = run.data.tags.get(HEARTBEAT_TAG, "")
        before = self._seen.get(run.info.run_id)
        if before is None:
            return _Heartbeat(value, self._clock(), has_moved=False)
        if before.value == value:
            return before
        return _Heartbeat(value, self._clock(), has_moved=True)

    def _running(self) -> list[Run]:
        """The RUNNING runs that ftlib made."""
        experiments = self._experiments
        if experiments is None:
            experiments = [e.experiment_id for e in self._mlflow.search_experiments()]
        found: list[Run] = []
        token = None
        while experiments:
            page = self._mlflow.search_runs(
                list(experiments),
                filter_string="attributes.status = 'RUNNING'",
                max_results=500,
                page_token=token,
            )
            found += [run for run in page if DRIVER_TAG in run.data.tags]
            token = page.token
            if not token:
                break
        return found

    def _end(self, run: Run) -> None:
        """End a run as KILLED at its last heartbeat."""
        run_id = run.info.run_id
        try:
            last_ms = int(float(run.data.tags.get(HEARTBEAT_TAG, "0")) * 1000) or None
        except ValueError:
            last_ms = None
        self._mlflow.set_tag(run_id, "outcome", "killed")
        self._mlflow.set_tag(run_id, "reason", "the driver process died")
        self._mlflow.set_terminated(run_id, "KILLED", end_time=last_ms)


def reap(
    mlflow: MlflowClient,
    experiments: Sequence[str] | None = None,
    stale_seconds: float = STALE_SECONDS,
    say: Callable[[str], None] = lambda text: None,
) -> list[Run]:
    """End the RUNNING runs of dead drivers; waits up to `stale_seconds` for those elsewhere."""
    finder = OrphanFinder(mlflow, experiments, stale_seconds)
    ended = finder.poll()
    if finder.watched:
        say(
            f"{finder.watched} runs belong to other machines; watching their heartbeats for "
            f"{stale_seconds / 60:g} minutes (Ctrl-C leaves them as they are)"
        )
    while finder.watched:
        time.sleep(min(HEARTBEAT_SECONDS / 3, max(0.1, stale_seconds / 3)))
        ended += finder.poll()
    return ended
