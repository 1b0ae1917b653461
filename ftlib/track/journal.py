"""The journal: a local file of JSON lines with what a run sends to MLflow, written before sending.

A record is one line, appended with one `write` to a file opened with O_APPEND. Several processes of
one machine may therefore append to the same file, and a written line survives a kill -9 of its
process. A power cut costs at most what came after the last fsync (`sync`, called by the delivery
thread every second and when a run starts or ends). A line torn by a crash or a full disk is
recognized and skipped; while the disk is full, lines wait in memory.

`<name>.jsonl` holds the records. `<name>.state.json` holds how far they have been delivered, and
the run's ids. Losing the state only means delivering again, which changes nothing on the server:
records carry their own times, and the run is found by its key.
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
import threading
from collections import deque
from collections.abc import Container, Iterator
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

log = logging.getLogger("ftlib.track")

LOCK = ".lock"
FOLDER = "journal"
"""Name of the journal's folder within a run's folder."""
_BLOCK = 1 << 20
"""Bytes that one call of `read` takes from a file."""

Record = dict[str, Any]
"""One line of a journal: `op` says what it is, `t` when it was written (ms since 1970), `owner`
which launch wrote it (see `Owners`)."""


def journal_file(folder: Path, name: str) -> Path:
    """The journal of the run called `name`. Names that are no file names get a digest."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    if safe != name:
        safe = f"{safe or 'run'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return Path(folder) / f"{safe}.jsonl"


def encode(record: Record) -> bytes:
    """The record as a line, with its newline."""
    return json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"


# --- writing --------------------------------------------------------------------------------------


class Journal:
    """Appends to one run's file. Never raises; safe from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._fd = -1
        self._buffer: deque[bytes] = deque()
        self._torn = False
        self._lock = threading.Lock()

    def append(self, line: bytes) -> None:
        """Append one encoded record."""
        with self._lock:
            self._buffer.append(line)
            self._write()

    def retry(self) -> None:
        """Try again to write the lines that a full or failing disk refused."""
        if self._buffer:
            with self._lock:
                self._write()

    @property
    def buffered(self) -> int:
        """How many lines are only in memory."""
        return len(self._buffer)

    def _write(self) -> None:
        try:
            if self._fd < 0:
                self._open()
            while self._buffer:
                line = self._buffer[0]
                data = b"\n" + line if self._torn else line
                written = os.write(self._fd, data)
                if written < len(data):
                    self._torn = True
                    raise OSError(errno.ENOSPC, "the disk is full")
                self._torn = False
                self._buffer.popleft()
        except OSError as error:
            if len(self._buffer) == 1:
                log.warning(
                    "tracking: cannot write %s (%s). New records wait in memory; free space or "
                    "permissions there",
                    self.path,
                    error.strerror or error,
                )

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def sync(self) -> None:
        """Write to the disk itself. Blocks as long as the disk does: never call it in training."""
        with contextlib.suppress(OSError):
            if self._fd >= 0:
                os.fsync(self._fd)

    def close(self) -> None:
        with self._lock:
            self._write()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


_journals: dict[str, Journal] = {}
_journals_lock = threading.Lock()


def journal_at(path: Path) -> Journal:
    """This process's `Journal` of a file.

    All writers share it, so that lines waiting in memory keep their order.
    """
    with _journals_lock:
        return _journals.setdefault(f"{os.getpid()}:{path}", Journal(path))


def close_journal(path: Path) -> None:
    """Close this process's `Journal` of a file."""
    with _journals_lock:
        journal = _journals.pop(f"{os.getpid()}:{path}", None)
    if journal is not None:
        journal.close()


# --- reading --------------------------------------------------------------------------------------


def read(path: Path, offset: int = 0, limit: int = _BLOCK) -> Iterator[tuple[Record | None, int]]:
    """(record, offset behind it) of the complete lines in about `limit` bytes from `offset` on.

    The record is None for a line that is none.
    """
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


def read_all(path: Path, end: int | None = None) -> Iterator[Record]:
    """The records of a whole file, or of its first `end` bytes. Memory stays at one block."""
    offset = 0
    while end is None or offset < end:
        before = offset
        for record, behind in read(path, before):
            if end is not None and behind > end:
                return
            offset = behind
            if record is not None:
                yield record
        if offset == before:
            return


def opening(path: Path) -> Record | None:
    """The record that opens the journal, or None if it has none."""
    return next((record for record, _ in read(path) if record and record["op"] == "run"), None)


def is_open(path: Path) -> bool:
    """Whether the run was started after it was last ended."""
    last, owners = "", Owners()
    for record in read_all(path):
        if not owners.is_late(record) and record["op"] in ("run", "open", "end"):
            last = record["op"]
    return last in ("run", "open")


class Owners:
    """Tells the lines of a launch that lost the run to another one, given the journal in order.

    A machine that was paused or cut off may write after its successor has begun. Each line carries
    the token of its launch; once a new token has appeared, lines with an earlier one are late.
    Lines without a token (of earlier versions, or repairs) always count.
    """

    def __init__(self) -> None:
        self.late = 0
        """Late lines so far."""
        self._current = ""
        self._earlier: set[str] = set()

    def is_late(self, record: Record) -> bool:
        owner = record.get("owner") or self._current
        if owner in self._earlier:
            self.late += 1
            return True
        if owner != self._current:
            self._earlier.add(self._current)
            self._current = owner
        return False


# --- how far a journal has been delivered ---------------------------------------------------------


@dataclass
class State:
    """How far a journal has been delivered, and where to."""

    offset: int = 0
    run_id: str = ""
    experiment_id: str = ""
    ended: bool = False
    rejected: int = 0
    """Records that MLflow will never take; they are kept in `<name>.rejected.jsonl`."""
    late: int = 0
    """Records that were not sent, because their launch had lost the run (see `Owners`)."""

    @classmethod
    def load(cls, journal: Path) -> State:
        """The saved state; a fresh one where there is none or it cannot be read."""
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


def rejected_file(journal: Path) -> Path:
    return journal.with_suffix(".rejected.jsonl")


def find_journals(folder: Path, exclude: Container[Path] = ()) -> list[Path]:
    """The journals of runs in a folder, oldest first: a parent comes before its children."""
    found: list[tuple[int, Path]] = []
    for path in _files(folder):
        if path not in exclude and (record := opening(path)) is not None:
            found.append((record.get("t", 0), path))
    return [path for _, path in sorted(found)]


def _files(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        names = [Path(e.path) for e in entries if e.name.endswith(".jsonl")]
        return [path for path in names if not path.name.endswith(".rejected.jsonl")]
    return []


def undelivered(folder: Path) -> list[Path]:
    """The journals in a folder that hold something MLflow does not have yet, oldest first."""
    waiting = {path for path in _files(folder) if not _is_delivered(path)}
    return [path for path in find_journals(folder) if path in waiting] if waiting else []


def _is_delivered(path: Path) -> bool:
    state = State.load(path)
    with contextlib.suppress(OSError):
        if path.stat().st_size <= state.offset:
            return state.ended
    return state.ended and not any(True for _ in read(path, state.offset))


# --- who may deliver a folder ---------------------------------------------------------------------

_held: dict[str, TextIOWrapper] = {}
_held_lock = threading.Lock()


def acquire(folder: Path) -> bool:
    """Take the right to deliver a folder's journals, for this process's life or until `release`.

    Returns False if another process has it. The lock is a POSIX record lock: it ends with the
    process, however that ends, and forked children do not keep it.
    """
    folder = Path(folder)
    with _held_lock:
        key = str(folder.resolve())
        if key in _held:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")  # noqa: SIM115 - stays open as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            is_taken = error.errno in (errno.EAGAIN, errno.EACCES)
            return not is_taken  # other errors: a file system without locks
        _held[key] = file
        return True


def is_held_here(folder: Path) -> bool:
    """Whether this very process has the right to deliver a folder's journals."""
    with _held_lock:
        return str(Path(folder).resolve()) in _held


def release(folder: Path) -> None:
    """Give up the right to deliver a folder's journals."""
    with _held_lock:
        file = _held.pop(str(Path(folder).resolve()), None)
    if file is not None:
        file.close()
