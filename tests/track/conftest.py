"""A real MLflow server on a SQLite store, and a proxy before it that fails as servers do."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ftlib.track.links import UI_ENVIRONMENT
from ftlib.track.store import client, ensure_store


def free_port() -> int:
    with contextlib.closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """An MLflow database without runs: making one takes seconds, copying it nothing."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    ensure_store(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store, tmp_path) -> str:
    """URI of a fresh SQLite store."""
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def mlflow(store):
    return client(store)


class Server:
    """`mlflow server`, started and killed by its process id."""

    def __init__(self, folder: Path, empty_store: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        shutil.copyfile(empty_store, folder / "mlflow.db")
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            f"sqlite:///{self.folder / 'mlflow.db'}",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **UI_ENVIRONMENT},
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return
            time.sleep(0.2)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def kill(self) -> None:
        """kill -9 of the server and its workers, which are a process group of their own."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory, empty_store):
    server = Server(tmp_path_factory.mktemp("server"), empty_store)
    server.start()
    yield server
    server.kill()


class Proxy:
    """Passes requests on to a server, or fails.

    Modes: pass, error (500), hang (accepts, never answers), slow (`delay` seconds), auth (401
    unless the user is `me` with the password `s3same`).
    """

    def __init__(self, target: str) -> None:
        self.mode, self.delay, self.requests = "pass", 2.0, 0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                proxy.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.mode == "hang":
                    proxy.released.wait(60)
                    self.close_connection = True
                    return
                if proxy.mode == "slow":
                    time.sleep(proxy.delay)
                login = "Basic " + base64.b64encode(b"me:s3same").decode()
                if proxy.mode == "auth" and self.headers.get("Authorization") != login:
                    self.reply(401, b"You are not authenticated.")
                    return
                if proxy.mode == "error":
                    self.reply(500, b"the database is on fire")
                    return
                request = urllib.request.Request(
                    target + self.path,
                    data=body or None,
                    method=self.command,
                    headers={
                        k: v
                        for k, v in self.headers.items()
                        if k.lower() not in ("host", "connection")
                    },
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as got:
                        self.reply(got.status, got.read(), got.headers.get("Content-Type", ""))
                except urllib.error.HTTPError as error:
                    self.reply(error.code, error.read(), error.headers.get("Content-Type", ""))
                except urllib.error.URLError:  # the server is gone
                    self.close_connection = True

            def reply(self, status: int, body: bytes, kind: str = "text/plain") -> None:
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = answer

            def log_message(self, *_args: object) -> None:
                pass

        self.released = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def proxy(server):
    proxy = Proxy(server.uri)
    yield proxy
    proxy.close()


@pytest.fixture
def experiment(request) -> str:
    """An experiment name of the test's own, as the server is shared."""
    return request.node.name.replace("[", "-").replace("]", "")
