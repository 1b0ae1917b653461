"""The tracker actor: lets processes on other machines than the driver's append to the journals.

It takes no CPU share, runs on the driver's node, is owned by the driver (so it ends with it) and
only appends to files; the driver's thread delivers them. Calls do not wait for an answer.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftlib.track.journal import State, encode, journal_at


class TrackerActor:
    """Runs on the driver's node; see `ActorJournal` for the calls."""

    def __init__(self, folder: str, owner: str) -> None:
        self.folder, self.owner = Path(folder), owner

    def append(self, name: str, line: bytes) -> None:
        journal_at(self.folder / name).append(line)

    def store(self, name: str, file: str, data: bytes, folder: str, time_ms: int) -> None:
        kept = self.folder / "files" / uuid.uuid4().hex[:12] / file
        kept.parent.mkdir(parents=True)
        kept.write_bytes(data)
        record = {"op": "artifact", "path": str(kept), "name": file, "folder": folder, "t": time_ms}
        self.append(name, encode({**record, "owner": self.owner}))

    def state(self, name: str) -> State:
        return State.load(self.folder / name)

    def ready(self) -> bool:
        return True


@dataclass(frozen=True)
class ActorJournal:
    """A picklable `ftlib.track.writer.RemoteJournal` over the actor's handle."""

    actor: Any
    """Ray's handle, which has no type."""

    def append(self, name: str, line: bytes) -> None:
        self.actor.append.remote(name, line)

    def store(self, name: str, file: str, data: bytes, folder: str, time_ms: int) -> None:
        self.actor.store.remote(name, file, data, folder, time_ms)

    def state(self, name: str, seconds: float) -> State:
        with contextlib.suppress(ray.exceptions.RayError):
            found: State = ray.get(self.actor.state.remote(name), timeout=seconds)
            return found
        return State()

    def flush(self, seconds: float) -> None:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self.actor.ready.remote(), timeout=seconds)

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            ray.kill(self.actor)


def is_connected() -> bool:
    """Whether this process is connected to a Ray cluster."""
    return bool(ray.is_initialized())


def may_span_machines() -> bool:
    """Whether processes of this job may run on other machines.

    True if it joined a cluster, or its own cluster has several nodes.
    """
    if not ray.is_initialized():
        return False
    return bool(os.environ.get("RAY_ADDRESS")) or sum(n["Alive"] for n in ray.nodes()) > 1


def start(folder: Path, owner: str) -> ActorJournal:
    """Start a tracker actor on this node; does not wait until it is up."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(TrackerActor)
    return ActorJournal(
        remote.options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        ).remote(str(folder), owner)
    )
