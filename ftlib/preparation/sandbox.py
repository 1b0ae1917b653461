"""Pictures are decoded in a process of their own, so that a decoder that crashes or never ends costs one file and not the job.

`DecoderSandbox` starts `python -m ftlib.preparation.sandbox` and sends it file names; the child reads and admits the file and sends back what it
found. When the child dies or takes too long, that file is refused and the next one gets a new child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from ftlib.preparation.options import PrepareOptions, RejectedImage, ValidatedImage

SECONDS_PER_FILE = 120.0
SECONDS_TO_START = 120.0
MAX_BYTES = 1 << 30
"""Larger files are refused unread."""


class DecoderSandbox:
    """`examine(path)` gives a `ValidatedImage`, or raises RejectedImage (the picture) or OSError (the storage)."""

    def __init__(self, rules: PrepareOptions, seconds_per_file: float = SECONDS_PER_FILE) -> None:
        self._rules = rules
        self._seconds = seconds_per_file
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._log: IO[bytes] | None = None

    def examine(self, path: str) -> ValidatedImage:
        if self._child is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(path)
            if not self._pipe.poll(self._seconds):
                self.close()
                raise RejectedImage("decoder_hung", f"decoding took over {self._seconds:g} seconds")
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RejectedImage(
                "decoder_crashed", f"the decoder died on it ({self._end()})"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the child, at once."""
        if self._child is not None:
            self._child.kill()
            self._end()

    def _start(self) -> None:
        ours, theirs = Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [
                    str(Path(__file__).resolve().parents[2]),
                    *filter(None, [os.environ.get("PYTHONPATH")]),
                ]
            ),
            "OMP_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ftlib.preparation.sandbox", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._pipe = ours
        try:
            ours.send(self._rules)
            if not ours.poll(SECONDS_TO_START):
                raise EOFError
            ours.recv()
        except (EOFError, OSError):
            self._child.kill()
            self._child.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace")[-2000:]
            self._end()
            raise RuntimeError(f"the decoding process did not start: {said}") from None

    def _end(self) -> str:
        """Reap the child; how it ended, in words."""
        assert self._child is not None and self._pipe is not None
        self._pipe.close()
        code = self._child.wait()
        self._child, self._pipe = None, None
        if self._log is not None:
            self._log.close()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _serve(pipe: Connection) -> None:
    import cv2

    from ftlib.preparation.validate import admit

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rules: PrepareOptions = pipe.recv()
    pipe.send("ready")
    while True:
        try:
            path = pipe.recv()
        except EOFError:
            return
        answer: Any
        try:
            if (size := os.path.getsize(path)) > MAX_BYTES:
                raise RejectedImage(
                    "too_large", f"a file of {size:,} bytes; the limit is {MAX_BYTES:,}"
                )
            answer = admit(Path(path).read_bytes(), os.path.basename(path), rules)
        except (RejectedImage, OSError) as error:
            answer = error
        except MemoryError:
            answer = RejectedImage("out_of_memory", "there was not enough memory to decode it")
        except Exception as error:
            answer = RejectedImage("decoder_failed", f"{type(error).__name__}: {error}")
        pipe.send(answer)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
