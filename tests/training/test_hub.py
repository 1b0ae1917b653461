"""Published weights from caches and from a server on this machine."""

import contextlib
import hashlib
import http.server
import io
import socket
import threading

import pytest
import torch

from ftlib.training import hub
from ftlib.training.weight_files import WeightFileError
from tests import weights

STATE = {"w": torch.arange(4.0)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


def pickled():
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def server(data):
    """A server that answers every request with `data`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    found = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_port}"
    finally:
        found.shutdown()
        found.server_close()
        thread.join()


def test_a_file_is_fetched_once_and_then_taken_from_the_cache(home):
    data = pickled()
    name = f"net-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    with server(data) as address:
        path = hub.url_file(f"{address}/{name}")
    assert path == home / name and path.read_bytes() == data
    assert hub.url_file(f"{address}/{name}") == path  # the server is gone
    assert [p.name for p in home.iterdir()] == [name]


def test_a_fetched_file_with_another_hash_is_not_kept(home):
    with (
        server(pickled()) as address,
        pytest.raises(WeightFileError, match="its name says 0aa007d2"),
    ):
        hub.url_file(f"{address}/net-0aa007d2.pth")
    assert not list(home.iterdir())


def test_a_network_that_hangs_is_given_up(home, monkeypatch):
    """The server takes the connection and never answers."""
    monkeypatch.setattr(hub, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        with pytest.raises(WeightFileError, match=rf"could not be fetched.*put it at {home}/net"):
            hub.url_file(f"http://127.0.0.1:{port}/net.pth")


def test_a_name_server_that_hangs_is_given_up(home, monkeypatch):
    """Timeouts of sockets do not cover it."""
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    released = threading.Event()

    def download(url, path, progress):
        released.wait(20)

    monkeypatch.setattr(hub, "_download", download)
    try:
        with pytest.raises(WeightFileError, match="no answer for 0.2 s"):
            hub.url_file("https://nowhere.invalid/net.pth")
    finally:
        released.set()


def test_a_slow_download_that_moves_is_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    pause = threading.Event()

    def slow(progress):
        for _ in range(8):
            pause.wait(0.1)
            progress()
        return "done"

    assert hub._patiently(slow) == "done"


def test_the_hub_that_nobody_answers_for_is_given_up(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    released = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: released.wait(20))
    try:
        with pytest.raises(WeightFileError, match=rf"acme/net is not in {tmp_path}.*no answer"):
            hub.hub_weights("acme/net")
    finally:
        released.set()


def test_weights_from_the_hubs_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = weights.hub_cache(tmp_path, "acme/net", STATE, {"architecture": "resnet18"})
    assert hub.hub_weights("acme/net") == path
    assert hub.hub_weights("acme/net", weights.COMMIT) == path
    assert hub.hub_config("acme/net") == {"architecture": "resnet18"}
    with pytest.raises(WeightFileError, match="acme/net@v1"):
        hub.hub_weights("acme/net", "v1")
    path.resolve().write_bytes(b"something else")
    with pytest.raises(WeightFileError, match="the cache says"):
        hub.hub_weights("acme/net")
