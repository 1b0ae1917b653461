"""The server's own bounds: refused bodies, idle connections, taken ports, floods of refusals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ftlib.deploy.errors import RequestError
from ftlib.deploy.http_server import bound_socket, close_idle, server
from ftlib.deploy.request_body import BodyLimits, read_picture
from ftlib.deploy.serving import RefusalPacer


async def respond(request: Request) -> Response:
    try:
        data = await read_picture(request, BodyLimits(500_000, seconds=0.5))
    except RequestError as error:
        return JSONResponse(str(error), error.status, {"connection": "close"})
    return JSONResponse(len(data))


@contextlib.contextmanager
def running(idle_seconds: float = 60.0) -> Iterator[int]:
    """The port of a server in a thread."""
    bound, ready, stop = bound_socket("127.0.0.1", 0), threading.Event(), threading.Event()

    async def main() -> None:
        made = server(SimpleNamespace(respond=respond))  # type: ignore[arg-type]
        idle = asyncio.create_task(close_idle(made, idle_seconds))
        task = asyncio.create_task(made.serve(sockets=[bound]))
        while not made.started:
            await asyncio.sleep(0.01)
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        made.should_exit = True
        await task
        idle.cancel()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(30)
    try:
        yield bound.getsockname()[1]
    finally:
        stop.set()
        thread.join(30)
        bound.close()


def test_a_client_that_sends_too_much_reads_the_413() -> None:
    """The answer comes when the body was read, so that no client meets a broken pipe."""
    body = bytes(20_000_000)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with running() as port:
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), 30) as connection:
                connection.sendall(head)
                connection.sendall(body)
                answer = b"".join(iter(lambda: connection.recv(1000), b""))
            assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()


def test_curl_sends_files_both_ways(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8" + bytes(range(256)) * 100)
    with running() as port:
        for how in (["--data-binary", "@a.jpg"], ["-F", "file=@a.jpg"]):
            done = subprocess.run(
                ["curl", "-s", *how, f"http://127.0.0.1:{port}/predict"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.stdout == str(2 + 25_600)


def test_idle_connections_are_closed_and_busy_ones_are_not() -> None:
    with running(idle_seconds=0.4) as port:
        idle = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(20)]
        half = socket.create_connection(("127.0.0.1", port), 30)
        half.sendall(b"POST /predict HTTP/1.1\r\nHost")
        slow = socket.create_connection(("127.0.0.1", port), 30)
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")
        for connection in (*idle, half):
            assert connection.recv(100) == b""
            connection.close()
        answer = slow.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408"), "it was sending, so it is told"
        slow.close()


def test_a_taken_port_is_found_before_a_model_is_loaded() -> None:
    with bound_socket("127.0.0.1", 0) as first:
        first.listen()
        with pytest.raises(OSError, match="in use"):
            bound_socket("127.0.0.1", first.getsockname()[1])


def test_a_flood_of_refusals_is_slowed_down_and_a_few_are_not() -> None:
    async def work() -> tuple[float, float]:
        pacer = RefusalPacer(per_second=100, burst=5, longest=0.2)
        started = time.monotonic()
        for _ in range(5):
            await pacer.wait()
        few = time.monotonic() - started
        for _ in range(20):
            await pacer.wait()
        return few, time.monotonic() - started

    few, many = asyncio.run(work())
    assert many >= 0.19 and few < many
