"""What passes between the driver and its workers, beside Ray Train's own reports.

Workers send progress points, warnings and their last error to the driver; the driver sends stop
requests and node-drain notices. A `DriverActor` without a CPU share on the driver's node holds both
until they are fetched. In local mode the same class is a plain object.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

POLL_SECONDS = 0.5
"""How often a worker fetches the driver's requests."""
KEPT_ITEMS = 1000
"""Progress points and lines that wait at most for the driver to fetch them."""

T = TypeVar("T")


class DriverActor:
    """Holds messages between a driver and its workers until the other side fetches them."""

    def __init__(self) -> None:
        self.output: list[dict[str, float] | str] = []
        self.stop = False
        self.drain_notices = 0
        self.error: tuple[str, str] | None = None
        self.nodes: set[str] = set()
        self.draining: set[str] = set()

    # --- called by workers ---

    def add_progress(self, values: dict[str, float]) -> None:
        """A progress point of rank 0."""
        self.output.append(values)
        del self.output[:-KEPT_ITEMS]

    def add_message(self, text: str) -> None:
        """A line for the user."""
        self.output.append(text)
        del self.output[:-KEPT_ITEMS]

    def register_node(self, node: str) -> None:
        """The node that a worker runs on."""
        self.nodes.add(node)

    def report_failure(self, kind: str, message: str) -> None:
        """An error that a restart would only repeat. The first one counts."""
        self.error = self.error or (kind, message)

    def requests(self) -> tuple[bool, int]:
        """(whether to stop, number of drain notices so far)."""
        return self.stop, self.drain_notices

    # --- called by the driver and its controller ---

    def failure(self) -> tuple[str, str] | None:
        """(kind, message) of the error that ended training for good."""
        return self.error

    def request_stop(self) -> None:
        self.stop = True

    def mark_draining(self, nodes: list[str]) -> None:
        """These nodes are about to go. May be called repeatedly; each is passed on once."""
        new = (self.nodes & set(nodes)) - self.draining
        self.draining |= new
        self.drain_notices += len(new)

    def take_output(self) -> list[dict[str, float] | str]:
        """Progress points and lines since the last call."""
        output, self.output = self.output, []
        return output


class Channel(Protocol):
    """Calls methods of a `DriverActor`, wherever it lives."""

    def send(self, method: str, *args: Any) -> None:
        """Call without waiting for an answer."""

    def call(self, method: str, *args: Any) -> Any:
        """Call and return the answer."""


class LocalChannel:
    """To a DriverActor in this process."""

    def __init__(self, actor: DriverActor | None = None) -> None:
        self.actor = actor or DriverActor()

    def send(self, method: str, *args: Any) -> None:
        getattr(self.actor, method)(*args)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self.actor, method)(*args)


class ActorChannel:
    """To a DriverActor in a Ray actor; picklable."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    @classmethod
    def start(cls) -> ActorChannel:
        """Start the actor on this process's node, so that it lives as long as the driver."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        return cls(
            ray.remote(DriverActor)
            .options(num_cpus=0, max_restarts=3, scheduling_strategy=here)
            .remote()
        )

    def send(self, method: str, *args: Any) -> None:
        getattr(self.actor, method).remote(*args)

    def call(self, method: str, *args: Any) -> Any:
        """The answer, within 10 s. Raises ray.exceptions.RayError."""
        import ray

        return ray.get(getattr(self.actor, method).remote(*args), timeout=10)


class StopSignals:
    """A worker's view of the driver's requests; a thread fetches them, so that asking is free."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._stop, self._drain_notices, self._seen = False, 0, 0
        self._end = threading.Event()
        self._polled = not isinstance(channel, LocalChannel)
        if self._polled:
            threading.Thread(target=self._poll, name="stop-signals", daemon=True).start()

    def __call__(self) -> str:
        """'stop', 'checkpoint' once per notice that a node will go, or ''."""
        if not self._polled:
            self._stop, self._drain_notices = self._channel.call("requests")
        if self._stop:
            return "stop"
        if self._drain_notices > self._seen:
            self._seen = self._drain_notices
            return "checkpoint"
        return ""

    def close(self) -> None:
        self._end.set()

    def _poll(self) -> None:
        while not self._end.wait(POLL_SECONDS):
            try:
                self._stop, self._drain_notices = self._channel.call("requests")
            except Exception:  # the actor ended with its driver, and this worker will follow
                return


class DriverLogHandler(logging.Handler):
    """Sends a worker's warnings to the driver."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(logging.WARNING)
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        ignore_errors(lambda: self.channel.send("add_message", text))


def ignore_errors(call: Callable[[], T]) -> T | None:
    """The call's result, or None where it failed: losing a progress point must not end a run."""
    try:
        return call()
    except Exception:
        return None
