"""Decode pictures in a process of their own, so that a decoder that crashes costs one file.

`DecoderSandbox` starts `python -m ftlib.preparation.sandbox` and sends it file names or bytes. The
child reads, checks and converts the picture and sends back what it found. When the child dies or
takes too long, that file is refused and the next one gets a new child.
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

from ftlib.preparation.options import ImageRejectedError, PrepareOptions, ValidatedImage

SECONDS_PER_FILE = 120.0
SECONDS_TO_START = 120.0
MAX_BYTES = 1 << 30
"""Larger files are refused unread."""


class DecoderSandbox:
    """One child process.

    Its methods raise ImageRejectedError for the picture, and OSError for the storage.
    """

    def __init__(self, rules: PrepareOptions, seconds_per_file: float = SECONDS_PER_FILE) -> None:
        self._rules = rules
        self._seconds = seconds_per_file
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._log: IO[bytes] | None = None

    def examine(self, file: str | bytes, name: str = "") -> ValidatedImage:
        """The picture in a file, as it will be stored.

        `file` is a path, or a whole file's bytes, whose `name` then shows a wrong extension.
        """
        return self._ask("examine", file, name)

    def used_bits(self, file: str | bytes) -> int | None:
        """Bits that a picture of more than 8 bits uses, see `ftlib.picture.used_bits`."""
        return self._ask("used_bits", file, "")

    def _ask(self, what: str, file: str | bytes, name: str) -> Any:
        if self._child is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((what, file, name))
            if not self._pipe.poll(self._seconds):
                self.close()
                raise ImageRejectedError(
                    "decoder_hung", f"decoding took over {self._seconds:g} seconds"
                )
            answer = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise ImageRejectedError(
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
        package = str(Path(__file__).resolve().parents[2])
        search_path = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "ftlib.preparation.sandbox", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(search_path),
                "OMP_NUM_THREADS": "1",
            },
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

    import ftlib.preparation.validate  # noqa: F401 - loaded before the child says that it is ready

    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    rules: PrepareOptions = pipe.recv()
    pipe.send("ready")
    while True:
        try:
            what, file, name = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(rules, what, file, name))


def _answer(rules: PrepareOptions, what: str, file: str | bytes, name: str) -> Any:
    """A ValidatedImage or a number of bits; or the exception to raise in the parent."""
    from ftlib.picture import PictureError, used_bits
    from ftlib.preparation.validate import admit

    try:
        data = _read(file)
        if what == "used_bits":
            return used_bits(data)
        return admit(data, name or (os.path.basename(file) if isinstance(file, str) else ""), rules)
    except (ImageRejectedError, OSError) as error:
        return error
    except PictureError as error:
        return ImageRejectedError(error.reason, error.detail)
    except MemoryError:
        return ImageRejectedError("out_of_memory", "there was not enough memory to decode it")
    except Exception as error:
        return ImageRejectedError("decoder_failed", f"{type(error).__name__}: {error}")


def _read(file: str | bytes) -> bytes:
    size = len(file) if isinstance(file, bytes) else os.path.getsize(file)
    if size > MAX_BYTES:
        raise ImageRejectedError(
            "too_large", f"a file of {size:,} bytes; the limit is {MAX_BYTES:,}"
        )
    return file if isinstance(file, bytes) else Path(file).read_bytes()


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
