"""A process that turns picture files into a model's input, for a server that does not trust them.

Started by `ftlib.deploy.decoding` as `python -I decoder_process.py SOCKET_FD`. It imports numpy,
Pillow and the package's own `picture.py`, and neither torch nor ftlib. A picture that needs too
much memory gets an error; one that needs too many CPU seconds, or crashes the decoder, costs this
process only.

Messages have a length (4 bytes, big-endian) in front. The first one is JSON: picture_code, meta,
memory_bytes, cpu_seconds, niceness. Each further one is a file; the answer is `+` and the pixels
uint8[S, S, 3], or `-` and JSON with reason and detail.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any


def main(fd: int) -> None:
    connection = socket.socket(fileno=fd)
    settings = json.loads(receive(connection) or b"{}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to stop
    preprocess, refused = load(settings["picture_code"], settings["meta"])
    one_thread_per_picture()
    os.nice(settings["niceness"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit_memory(settings["memory_bytes"])
    send(connection, b"+")
    while (data := receive(connection)) is not None:
        signal.setitimer(signal.ITIMER_PROF, settings["cpu_seconds"])  # ends the process
        try:
            answer = b"+" + preprocess(bytes(data)).tobytes()
        except refused as error:
            answer = refusal(error.reason, error.detail)
        except MemoryError:
            answer = refusal("out_of_memory", "decoding it needs too much memory")
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(connection, answer)


def load(code: str, meta: dict[str, Any]) -> tuple[Callable[[bytes], Any], Any]:
    """(preprocessing, its PictureError) of a `picture.py`."""
    spec = importlib.util.spec_from_file_location("picture", code)
    assert spec is not None and spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    sys.modules["picture"] = picture
    spec.loader.exec_module(picture)
    return picture.Preprocessing(meta), picture.PictureError


def limit_memory(n: int) -> None:
    """Let this process take `n` bytes more than it has now; without effect outside Linux."""
    if sys.platform == "linux":
        with open("/proc/self/statm") as statm:
            most = int(statm.read().split()[0]) * resource.getpagesize() + n
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def one_thread_per_picture() -> None:
    """Decoders with threads of their own would take the CPUs of other clients' pictures."""
    from PIL import AvifImagePlugin

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = 1


def refusal(reason: str, detail: str) -> bytes:
    return b"-" + json.dumps({"reason": reason, "detail": detail}).encode()


def receive(connection: socket.socket) -> bytearray | None:
    """The next message, or None where the other side is gone."""
    size = exactly(connection, 4)
    return None if size is None else exactly(connection, int.from_bytes(size, "big"))


def exactly(connection: socket.socket, n: int) -> bytearray | None:
    data = bytearray(n)
    view, got = memoryview(data), 0
    while got < n:
        count = connection.recv_into(view[got:])
        if not count:
            return None
        got += count
    return data


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(len(message).to_bytes(4, "big") + message)


if __name__ == "__main__":
    main(int(sys.argv[1]))
