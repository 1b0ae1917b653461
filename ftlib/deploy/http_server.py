"""One process that serves a model over HTTP, without Ray.

Idle connections and slow senders are bounded: a connection that has no request in hand for
`IDLE_SECONDS` is closed, and no more than `MAX_CONNECTIONS` are open at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.requests import Request

from ftlib.deploy.serving import Service

IDLE_SECONDS = 20.0
MAX_CONNECTIONS = 2000
SPARE_FILES = 100
"""Open files that are kept for other things than connections."""

try:
    from uvloop import run
except ImportError:  # it comes with Ray Serve, and not on Windows
    from asyncio import run  # type: ignore[assignment]

Say = Callable[[str], None]
App = Callable[[dict[str, Any], Callable[..., Any], Callable[..., Any]], Awaitable[None]]


def application(service: Service) -> App:
    """The service as an ASGI application."""

    async def app(
        scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]
    ) -> None:
        if scope["type"] == "http":
            response = await service.respond(Request(scope, receive))
            await response(scope, receive, send)

    return app


class Server(uvicorn.Server):
    """Without uvicorn's signal handlers: `serve` has its own, and ends with exit code 0."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server(service: Service) -> Server:
    """A server that `serve(sockets=[...])` runs."""
    config = uvicorn.Config(
        application(service),
        access_log=False,
        log_level="error",
        ws="none",
        lifespan="off",
        timeout_keep_alive=int(IDLE_SECONDS),
        timeout_graceful_shutdown=10,
        limit_concurrency=connections_allowed(),
    )
    return Server(config)


def connections_allowed() -> int:
    """`MAX_CONNECTIONS`, or fewer where this process may not open that many files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_CONNECTIONS + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else min(wanted, soft) - SPARE_FILES


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at this address. Raises OSError where it is taken, before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError:
        made.close()
        raise
    return made


def serve_model(
    model: str, tracking: str, *, host: str, port: int, replicas: int, max_megabytes: float
) -> None:
    """Serve a package until SIGINT or SIGTERM: one copy in this process, several on Ray Serve."""
    if replicas == 1:
        load = partial(Service, model, tracking, max_megabytes)
        return serve(load, host, port, say_on_stderr)
    from ftlib.deploy.ray_server import deployment, serve_on_ray

    application = deployment(model, tracking, replicas=replicas, max_megabytes=max_megabytes)
    return serve_on_ray(application, host, port, say_on_stderr)


def serve(load: Callable[[], Service], host: str, port: int, say: Say) -> None:
    """Serve until SIGINT or SIGTERM. `load` makes the service; `say` is told of progress.

    Raises OSError where the address cannot be used.
    """
    bound = bound_socket(host, port)
    with bound:
        started = time.perf_counter()
        say("loading the model ...")
        service = load()
        run(_serve(service, bound, lambda text: say(_timed(text, started))))


def _timed(text: str, started: float) -> str:
    return f"{text} (ready after {time.perf_counter() - started:.1f} s; Ctrl-C ends it)"


async def _serve(service: Service, bound: socket.socket, say: Say) -> None:
    running = server(service)

    def stop() -> None:
        if running.should_exit:
            running.force_exit = True
        running.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    try:
        await service.start()
    except BaseException:
        await service.close()
        raise
    task = asyncio.create_task(running.serve(sockets=[bound]))
    idle = asyncio.create_task(close_idle(running))
    while not running.started and not task.done():
        await asyncio.sleep(0.01)
    if running.started:
        say(f"serving at http://{shown}:{port}")
    try:
        await task
    finally:
        idle.cancel()
        await service.close()


async def close_idle(running: uvicorn.Server, seconds: float = IDLE_SECONDS) -> None:
    """Close connections that have had no request in hand for so long.

    uvicorn itself bounds only the time between two requests, not before the first nor within a
    request's headers.
    """
    since: dict[Any, float] = {}
    while True:
        await asyncio.sleep(seconds / 4)
        now = time.monotonic()
        idle = [c for c in running.server_state.connections if not _has_request(c)]
        since = {connection: since.get(connection, now) for connection in idle}
        for connection, start in since.items():
            transport = getattr(connection, "transport", None)
            if now - start >= seconds and transport is not None:
                transport.close()


def _has_request(connection: Any) -> bool:
    cycle = getattr(connection, "cycle", None)
    return cycle is not None and not cycle.response_complete


def say_on_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":  # what the benchmark starts: MODEL PORT
    serve(lambda: Service(sys.argv[1]), "127.0.0.1", int(sys.argv[2]), say_on_stderr)
