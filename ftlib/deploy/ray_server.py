"""Several copies of a model behind HTTP, on Ray Serve."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from ftlib.deploy.serving import MAX_MEGABYTES, Service

if TYPE_CHECKING:
    from ray.serve import Application

ONGOING_REQUESTS = 128
"""Most requests that one copy works on at once."""


def deployment(
    model: str, tracking: str = "", *, replicas: int = 1, max_megabytes: float = MAX_MEGABYTES
) -> Application:
    """A Ray Serve application of the service."""
    from ray import serve

    class Endpoint:
        def __init__(self) -> None:
            self.service = Service(model, tracking, max_megabytes)
            self.started: asyncio.Future[None] | None = None

        async def __call__(self, request: Request) -> Response:
            if self.started is None:
                self.started = asyncio.ensure_future(self.service.start())
            await asyncio.shield(self.started)
            return await self.service.respond(request)

    made = serve.deployment(
        Endpoint,
        name="ftlib",
        num_replicas=replicas,
        max_ongoing_requests=ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 1.0},
    )
    return made.bind()  # type: ignore[attr-defined]


def serve_on_ray(
    application: Application, host: str, port: int, say: Callable[[str], None]
) -> None:
    """Serve until SIGINT or SIGTERM, on the cluster at RAY_ADDRESS or on this machine."""
    from ftlib.launch.cluster import connect

    say("starting Ray Serve ...")
    started_here = connect()
    import ray
    from ray import serve

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        serve.start(http_options={"host": host, "port": port})
        say("loading the model ...")
        serve.run(application, name="ftlib", route_prefix="/")
        say(f"serving at http://{host}:{port} (Ctrl-C ends it)")
        ended.wait()
    finally:
        if started_here:
            serve.shutdown()
            ray.shutdown()
        else:
            serve.delete("ftlib")
