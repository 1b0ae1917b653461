"""The journal: what a run wants to tell MLflow, as JSON lines in a local file, written before anything is sent.

A record is one line, appended with one `write` to a file opened with O_APPEND, so several processes of one machine may append to
the same file, and what was written survives a kill -9 of the process. Power cuts cost at most what came after the last fsync
(`sync`, called by the delivering thread every second and at a run's start and end). A line torn by a crash or by a full disk is
recognised and skipped; while the disk is full, lines wait in memory.

`<name>.jsonl` holds the records, `<name>.state.json` how far they have been delivered and the run's ids. Losing the state only means
delivering again, which changes nothing on the server: records carry their own times, and the run is found by its key.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger("ftlib.track")

LOCK = ".lock"


def now_ms() -> int:
    """Milliseconds since 1970, MLflow's unit of time."""
    return time.time_ns() // 1_000_000


@lru_cache(maxsize=1)
def machine() -> str:
    """Names this machine (or container) until its next boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()}:{boot[:8]}"


def file_of(folder: Path, name: str) -> Path:
    """The journal of the run called `name`."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    if safe != name:
        safe = f"{safe or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(folder) / f"{safe}.jsonl"


def encode(record: dict[str, Any]) -> bytes:
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"


class Journal:
    """Appends to one run's file. Never raises; safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd = -1
        self._late: deque[bytes] = deque()
        self._torn = False
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        """One encoded record, its newline included."""
        with self._lock:
            self._late.append(line)
            self._write()

    def retry(self) -> None:
        """Another try for lines that a full or failing disk refused."""
        if self._late:
            with self._lock:
                self._write()

    @property
    def waiting(self) -> int:
        """Lines that are only in memory."""
        return len(self._late)

    def _write(self) -> None:
        try:
            if self._fd < 0:
                self._open()
            while self._late:
                line = self._late[0]
                data = b"\n" + line if self._torn else line
                written = os.write(self._fd, data)
                if written < len(data):
                    self._torn = True
                    raise OSError(errno.ENOSPC, "the disk is full")
                self._torn = False
                self._late.popleft()
        except OSError as error:
            if len(self._late) == 1:
                log.warning(
                    "tracking: cannot write %s (%s); what comes is kept in memory and tried again",
                    self.path,
                    error,
                )

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def sync(self) -> None:
        """To the disk itself, not just to the operating system. May take as long as the disk likes: never call it while training."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.fsync(self._fd)

    def close(self) -> None:
        with self._lock:
            self._write()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def read(
    path: Path, offset: int = 0, limit: int = 1 << 20
) -> Iterator[tuple[dict[str, Any] | None, int]]:
    """(record, offset behind it) of the complete lines from `offset` on, about `limit` bytes of them; None for a line that is no record."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(limit)
            if b"\n" not in data:
                data += file.readline()  # a line longer than the limit
    except FileNotFoundError:
        return
    *lines, _unfinished = data.split(b"\n")
    for line in lines:
        offset += len(line) + 1
        if not line.strip(b"\0\r "):
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield (record if isinstance(record, dict) and "op" in record else None), offset


def first(path: Path) -> dict[str, Any] | None:
    """The record that opens the journal, or None if it has none."""
    return next((record for record, _ in read(path) if record and record["op"] == "run"), None)


@dataclass
class State:
    """How far a journal has been delivered, and where to."""

    offset: int = 0
    run_id: str = ""
    experiment_id: str = ""
    ended: bool = False
    rejected: int = 0
    """Records that MLflow will never take; they are kept in `<name>.rejected.jsonl`."""

    @classmethod
    def load(cls, journal: Path) -> State:
        try:
            return cls(**json.loads(state_file(journal).read_text()))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, journal: Path) -> None:
        path = state_file(journal)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, path)


def state_file(journal: Path) -> Path:
    return journal.with_suffix(".state.json")


def journals(folder: Path, leave_out: Container[Path] = ()) -> list[Path]:
    """The journals in a folder that hold a run, oldest first: a parent's comes before its children's."""
    found: list[tuple[int, Path]] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        paths = [
            Path(e.path)
            for e in entries
            if e.name.endswith(".jsonl") and not e.name.endswith(".rejected.jsonl")
        ]
        found = [
            (opening.get("t", 0), path)
            for path in paths
            if path not in leave_out and (opening := first(path)) is not None
        ]
    return [path for _, path in sorted(found)]


def is_open(path: Path) -> bool:
    """Whether the last word in a journal is not the run's end."""
    last = ""
    offset = 0
    while True:
        block = list(read(path, offset))
        if not block:
            return last in ("run", "open")
        last = next(
            (r["op"] for r, _ in reversed(block) if r and r["op"] in ("run", "open", "end")), last
        )
        offset = block[-1][1]


def undelivered(folder: Path) -> list[Path]:
    """The journals in a folder that hold something MLflow has not got."""
    return [
        p
        for p in journals(folder)
        if not (state := State.load(p)).ended or any(True for _ in read(p, state.offset))
    ]


_held: dict[str, Any] = {}
_held_lock = threading.Lock()


def own(folder: Path) -> bool:
    """Take the right to deliver a folder's journals, for the life of this process or until `disown`. False if another has it.

    A POSIX record lock: it goes with the process, however that ends, and forked children do not keep it.
    """
    folder = Path(folder)
    with _held_lock:
        where = str(folder.resolve())
        if where in _held:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")  # noqa: SIM115 - it stays open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            return error.errno not in (
                errno.EAGAIN,
                errno.EACCES,
            )  # others: a file system without locks
        _held[where] = file
        return True


def disown(folder: Path) -> None:
    with _held_lock:
        file = _held.pop(str(Path(folder).resolve()), None)
    if file is not None:
        file.close()
