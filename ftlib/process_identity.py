"""Which process on which machine: names that neither a clock nor a reused process number changes.

A process is known by its number, the kernel's boot id, its process namespace and its start time in
clock ticks since boot (`/proc/PID/stat`). psutil's `create_time` is not used: it moves with the
system's clock.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


@lru_cache(maxsize=1)
def machine_id() -> str:
    """This boot of this machine and this process namespace: where a process number means one."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def start_ticks(pid: int) -> int | None:
    """Clock ticks from boot to the start of process `pid`; None for none, or for a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def is_suspended(pid: int) -> bool:
    """Whether the process is stopped by a signal (SIGSTOP, Ctrl-Z) or a debugger."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("T", "t")


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; the name before them may hold anything."""
    try:
        text = Path(f"/proc/{int(pid)}/stat").read_text(errors="replace")
    except (OSError, ValueError):
        return None
    return text.rpartition(")")[2].split()


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, in plain values that can be written to a file or a tag."""

    host: str
    machine: str
    pid: int
    ticks: int
    """Start time in clock ticks since boot; -1 where the system does not tell."""

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        pid = os.getpid()
        ticks = start_ticks(pid)
        return cls(socket.gethostname(), machine_id(), pid, -1 if ticks is None else ticks)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ProcessIdentity | None:
        """The identity in `values`; None where something is missing or is of another kind."""
        try:
            return cls(
                host=str(values["host"]),
                machine=str(values["machine"]),
                pid=int(values["pid"]),
                ticks=int(values["ticks"]),
            )
        except (KeyError, TypeError, ValueError):
            return None

    def is_alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be seen from this machine."""
        if self.machine != machine_id() or self.ticks < 0:
            return None
        return start_ticks(self.pid) == self.ticks
