"""The lease of a run: only one launch at a time writes to it.

`<run>/lease.json` names the holder by a random token; `<run>/.lease-TOKEN` is the holder's
heartbeat, a counter. Nobody but the holder writes that file, so a holder that was suspended and
lost its lease cannot overwrite its successor's: it finds another token in lease.json and stops
(`Fence`).

No clock of another machine is ever compared. On the holder's own machine its process is looked up
(boot id, process number, start ticks). On another one the heartbeat is watched: a lease is dead
when it has not moved for EXPIRE_SECONDS of the watcher's own monotonic clock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftlib import storage
from ftlib.launch.errors import LaunchError, LeaseLostError
from ftlib.process_identity import ProcessIdentity, is_suspended
from ftlib.storage import StorageError, join

log = logging.getLogger("ftlib.launch")

RENEW_SECONDS = 10.0
"""Seconds between two heartbeats."""
EXPIRE_SECONDS = 45.0
"""A lease on another machine is dead when its heartbeat stood still for this long."""
LOOK_SECONDS = 1.0
"""Seconds between two looks at another machine's heartbeat."""
SETTLE_SECONDS = 1.0
"""On an object store: time from writing a lease to reading back who holds it."""
MISSING_LOOKS = 4
"""A lease file that is missing at this many looks in a row is lost; somebody who takes a dead lease
away may move a live one for a moment."""


@dataclass(frozen=True)
class Fence:
    """Checks that the launch with `token` still owns the run. Picklable; call it before a write."""

    file: str
    token: str
    name: str

    def __call__(self) -> None:
        """Raise LeaseLostError if another launch owns the run, StorageError if that is unknown."""
        holder: dict[str, Any] = {}
        for look in range(MISSING_LOOKS):
            if look:
                time.sleep(0.25)
            holder = read_holder(self.file)
            if holder:
                break
        if holder.get("token") == self.token:
            return
        folder = self.file.removeprefix("file://").rpartition("/")[0]
        if not holder and not storage.is_remote(self.file) and not os.path.isdir(folder):
            raise StorageError(
                f"{folder}: the folder is gone, so nobody can tell who owns the run "
                f"{self.name!r}. Was the disk unmounted?"
            )
        who = (
            f"process {holder.get('pid')} on {holder.get('host')} has taken it over"
            if holder
            else f"its lease ({self.file}) was removed"
        )
        raise LeaseLostError(
            f"the run {self.name!r} does not belong to this process any more: {who} while this "
            "one was suspended or cut off. This process stops and writes nothing more"
        )


class Lease:
    """Keeps two launches from writing one run; a context manager held by the launching process.

    On a file system the lease is taken by an exclusive create, on an object store by writing it and
    reading it back. patience: seconds to wait for a holder that is alive.
    """

    def __init__(self, run_dir: str, name: str, patience: float = 0.0) -> None:
        self.file, self.name, self.patience = join(run_dir, "lease.json"), name, patience
        self.token = uuid.uuid4().hex
        self.fence = Fence(self.file, self.token, name)
        self.lost: LeaseLostError | None = None
        """Set once another launch has taken the run over."""
        self._heartbeat = heartbeat_file(self.file, self.token)
        self._beats = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.take()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError, StorageError):
            if read_holder(self.file).get("token") == self.token:
                storage.delete_file(self.file)
        with contextlib.suppress(OSError, StorageError):
            storage.delete_file(self._heartbeat)

    def check(self) -> None:
        """Raise LeaseLostError once the lease is known to be lost; costs nothing."""
        if self.lost is not None:
            raise self.lost

    def take(self) -> None:
        """Take the lease. Raises LaunchError when somebody alive holds it, beyond `patience`.

        Waits up to EXPIRE_SECONDS to tell a dead holder on another machine from a live one.
        """
        until = time.monotonic() + self.patience
        while not self._create():
            holder = read_holder(self.file)
            if is_dead(self.file, holder):
                self._evict(holder)
                continue
            if time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
                continue
            pid, host = holder.get("pid"), holder.get("host")
            identity = ProcessIdentity.from_dict(holder)
            suspended = identity is not None and identity.is_alive() and is_suspended(identity.pid)
            advice = "Wait for it, stop it, or give this one another --name"
            if suspended:
                advice = f"It is suspended: resume it (kill -CONT {pid}) or end it (kill -9 {pid})"
            raise LaunchError(
                f"the run {self.name!r} is being trained already, by process {pid} on {host}. "
                f"{advice}"
            )

    def _mine(self) -> bytes:
        return json.dumps(
            {"token": self.token, **ProcessIdentity.of_this_process().to_dict()}
        ).encode()

    def _create(self) -> bool:
        if storage.is_remote(self.file):
            if storage.read_file(self.file) is not None:
                return False
            storage.write_file(self.file, self._mine())
            time.sleep(SETTLE_SECONDS)  # the later of two writers wins; both see who that was
            return bool(read_holder(self.file).get("token") == self.token)
        path = Path(self.file)
        temporary = path.with_name(f".tmp-lease-{self.token}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(self._mine())
            # Fails if it exists; whole at once, unlike open(O_EXCL) and then write.
            os.link(temporary, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            raise StorageError(storage.explain(self.file, error)) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _evict(self, holder: dict[str, Any]) -> None:
        """Take the dead lease of `holder` away, and no other one."""
        token = holder.get("token")
        if storage.is_remote(self.file):
            storage.delete_file(self.file)
        else:
            path = Path(self.file)
            try:
                with _locked(path.parent):
                    if read_holder(self.file).get("token") == token:
                        path.unlink(missing_ok=True)
            except OSError:  # a file system without locks
                _move_away(path, token, path.with_name(f".tmp-lease-dead-{self.token}"))
        if token:
            with contextlib.suppress(OSError, StorageError):
                storage.delete_file(heartbeat_file(self.file, str(token)))

    def _keep(self) -> None:
        """Send heartbeats, and notice when the lease is lost."""
        while not self._end.wait(RENEW_SECONDS):
            try:
                self.fence()
                self._beats += 1
                storage.write_file(self._heartbeat, json.dumps({"beat": self._beats}).encode())
            except LeaseLostError as error:
                self.lost = error
                return
            except (StorageError, OSError):
                continue  # storage that is away for a while must not end the run


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder. Raises OSError where the file system has none."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _move_away(path: Path, token: object, aside: Path) -> None:
    """Remove the lease with `token` by a rename, of which only one of two launches succeeds.

    If another launch was faster, the lease that was moved is its own: it is given back, unless a
    third has taken the place by now; the fence then stops the second.
    """
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        if _parse(aside.read_bytes()).get("token") != token:
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def heartbeat_file(lease_file: str, token: str) -> str:
    """The file that only the holder with `token` writes."""
    return join(lease_file.rsplit("/", 1)[0], f".lease-{token}")


def read_holder(lease_file: str) -> dict[str, Any]:
    """What the lease says of its holder; empty where there is none, or nothing that can be read.

    Raises StorageError where the storage does not answer.
    """
    try:
        return _parse(storage.read_file(lease_file))
    except OSError as error:
        raise StorageError(f"{lease_file} cannot be read ({error})") from error


def is_dead(lease_file: str, holder: dict[str, Any]) -> bool:
    """Whether the holder has ended. Watches its heartbeat where its process cannot be seen."""
    if not holder:
        return read_holder(lease_file) == {}
    identity = ProcessIdentity.from_dict(holder)
    alive = identity.is_alive() if identity is not None else None
    if alive is not None:
        return not alive
    log.warning(
        "process %s on %s held this run; waiting %.0f s to see whether it still lives",
        holder.get("pid"),
        holder.get("host"),
        EXPIRE_SECONDS,
    )
    first, still = _movement(lease_file, holder), 0.0
    before = time.monotonic()
    while still < EXPIRE_SECONDS:
        time.sleep(LOOK_SECONDS)
        if _movement(lease_file, holder) != first:
            return False
        now = time.monotonic()
        # This process may be suspended itself: what it did not watch does not count.
        still += min(now - before, 2 * LOOK_SECONDS)
        before = now
    return True


def _movement(lease_file: str, holder: dict[str, Any]) -> tuple[bytes | None, bytes | None]:
    """What changes while the holder lives: its heartbeat, and the lease itself."""
    heartbeat = heartbeat_file(lease_file, str(holder.get("token", "")))
    return storage.read_file(lease_file), storage.read_file(heartbeat)


def _parse(data: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(data or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
