"""The desk between driver and workers: progress and last words come up, the wish to stop and notices of going nodes go down.

An actor without a CPU share on the driver's node, owned by the driver. In local mode the same class is used as a plain object.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.5
"""How often a worker looks for notices."""


class DriverActor:
    """All that is passed between a driver and its workers beside Ray Train's own reports."""

    def __init__(self) -> None:
        self.shown: list[dict[str, float] | str] = []
        self.stop = False
        self.drains = 0
        self.error: tuple[str, str] | None = None
        self.nodes: set[str] = set()
        self.leaving: set[str] = set()

    def show(self, values: dict[str, float]) -> None:
        """From rank 0: a progress point."""
        self.shown.append(values)
        del self.shown[:-1000]

    def say(self, text: str) -> None:
        """From a worker: a line for the user."""
        self.shown.append(text)

    def hello(self, node: str) -> None:
        """From a worker: the node it runs on."""
        self.nodes.add(node)

    def fail(self, kind: str, message: str) -> None:
        """From a worker: an error that a restart would only repeat. The first one counts."""
        self.error = self.error or (kind, message)

    def wanted(self) -> tuple[bool, int]:
        """For workers: (stop, number of drain notices so far)."""
        return self.stop, self.drains

    def failed(self) -> tuple[str, str] | None:
        """The error that ended training for good."""
        return self.error

    def ask_to_stop(self) -> None:
        self.stop = True

    def drain(self, nodes: list[str]) -> None:
        """From the driver, repeatedly: these nodes are about to go. Each is passed on once."""
        new = (self.nodes & set(nodes)) - self.leaving
        self.leaving |= new
        self.drains += len(new)

    def take(self) -> list[dict[str, float] | str]:
        """For the driver: new progress points and lines."""
        shown, self.shown = self.shown, []
        return shown


class LocalChannel:
    """A DriverActor in this process, with the calls of `ActorChannel`."""

    def __init__(self, desk: DriverActor | None = None) -> None:
        self.desk = desk or DriverActor()

    def tell(self, method: str, *args: Any) -> None:
        getattr(self.desk, method)(*args)

    def ask(self, method: str, *args: Any) -> Any:
        return getattr(self.desk, method)(*args)


class ActorChannel:
    """A DriverActor in an actor; picklable."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    @classmethod
    def start(cls) -> ActorChannel:
        """On this process's node, so that it goes when the driver goes and no earlier."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(
            ray.remote(DriverActor)
            .options(num_cpus=0, max_restarts=3, scheduling_strategy=here)
            .remote()
        )

    def tell(self, method: str, *args: Any) -> None:
        """Fire and forget."""
        getattr(self.actor, method).remote(*args)

    def ask(self, method: str, *args: Any) -> Any:
        """Answer within 10 s. Raises ray.exceptions.RayError."""
        import ray

        return ray.get(getattr(self.actor, method).remote(*args), timeout=10)


class StopSignals:
    """A worker's view of the desk, kept fresh by a thread, so that asking costs nothing."""

    def __init__(self, desk: LocalChannel | ActorChannel) -> None:
        self._desk, self._stop, self._drains, self._seen = desk, False, 0, 0
        self._end = threading.Event()
        if isinstance(desk, ActorChannel):
            threading.Thread(target=self._poll, name="notices", daemon=True).start()

    def __call__(self) -> str:
        """'stop', 'checkpoint' once per notice that a node will go, or ''."""
        if isinstance(self._desk, LocalChannel):
            self._stop, self._drains = self._desk.ask("wanted")
        if self._stop:
            return "stop"
        if self._drains > self._seen:
            self._seen = self._drains
            return "checkpoint"
        return ""

    def close(self) -> None:
        self._end.set()

    def _poll(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            try:
                self._stop, self._drains = self._desk.ask("wanted")
            except Exception:  # the desk went with its driver, and this worker will follow
                return


class DriverLogHandler(logging.Handler):
    """Sends a worker's warnings to the driver."""

    def __init__(self, desk: LocalChannel | ActorChannel) -> None:
        super().__init__(logging.WARNING)
        self.desk = desk

    def emit(self, record: logging.LogRecord) -> None:
        quietly(lambda: self.desk.tell("say", f"{record.levelname.lower()}: {record.getMessage()}"))


def quietly(call: Callable[[], Any]) -> Any:
    """Its result, or None where the desk is gone: losing a progress point must not end anything."""
    try:
        return call()
    except Exception:
        return None
