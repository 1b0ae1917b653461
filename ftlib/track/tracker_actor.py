"""The tracker actor: the journal's door for processes on other machines than the driver's.

It costs no CPU share, sits on the driver's node, belongs to the driver (so it goes with it) and only appends to files: delivering is
the driver's thread's work. Calls to it are fire-and-forget.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ftlib.track.journal import State, encode
from ftlib.track.writer import journal_at


class TrackerActor:
    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def append(self, name: str, line: bytes) -> None:
        journal_at(self.folder / name).append(line)

    def store(self, name: str, file: str, data: bytes, folder: str, t: int) -> None:
        """An artifact's bytes, from a machine that shares no disk with this one."""
        kept = self.folder / "files" / uuid.uuid4().hex[:12] / file
        kept.parent.mkdir(parents=True)
        kept.write_bytes(data)
        self.append(
            name,
            encode({"op": "artifact", "path": str(kept), "name": file, "folder": folder, "t": t}),
        )

    def state(self, name: str) -> State:
        return State.load(self.folder / name)

    def ready(self) -> bool:
        return True


def several_machines() -> bool:
    """Whether processes of this job may be on other machines than this one: it joined a cluster, or its cluster has several nodes."""
    return ray.is_initialized() and (
        bool(os.environ.get("RAY_ADDRESS")) or sum(node["Alive"] for node in ray.nodes()) > 1
    )


def start(folder: Path) -> Any:
    """A tracker actor on this node. Returns its handle without waiting for it to be up."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote = ray.remote(TrackerActor)
    return remote.options(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
    ).remote(str(folder))


def stop(actor: Any) -> None:
    with contextlib.suppress(Exception):
        ray.kill(actor)


def wait_for(actor: Any, seconds: float) -> None:
    """Until all calls made so far by this process have been carried out, or the time is over."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(actor.ready.remote(), timeout=seconds)


def state(actor: Any, name: str, seconds: float) -> State:
    """A run's state as the driver's machine knows it."""
    with contextlib.suppress(ray.exceptions.RayError):
        return ray.get(actor.state.remote(name), timeout=seconds)
    return State()
