"""Start the loader's processes from a fork server, and remove what killed ones left behind.

A fork server rather than a fork: the training process runs threads of Ray and CUDA, which a
fork would break. The server has already imported the loader, so a process starts in a few
hundredths of a second and shares those pages.

Sockets and semaphores get names that tell the process they belong to. Should that be killed
together with Python's own resource tracker, the next loader on the machine removes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import multiprocessing.synchronize
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, popen_forkserver, process, util
from pathlib import Path
from types import ModuleType
from typing import Any

from ftlib.paths import environment_variables
from ftlib.process_identity import machine_id, start_ticks

LONGEST_SOCKET_FOLDER = 70
"""Bytes. A socket's path may have about 100 (92 to 107, by system), and multiprocessing appends up
to 30."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
SEMAPHORES = "/dev/shm"
"""Where Linux keeps named semaphores, each in a file `sem.NAME`."""
PREFIX = "ftlib-loader"


class LoaderProcessError(RuntimeError):
    """Loader processes die again and again. A restart of the worker may help."""


class _Popen(popen_forkserver.Popen):
    """Starts a process that does not import the training process's main module.

    Loading needs nothing of it, and in a Ray worker it would bring all of Ray into each process.
    """

    def _launch(self, process_obj: process.BaseProcess) -> None:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super()._launch(process_obj)  # type: ignore[misc]  # typeshed does not know it
        finally:
            sys.modules["__main__"] = main


class _Process(multiprocessing.context.ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _Popen:
        return _Popen(process_obj)


class _Event:
    """An event that is read and set without a lock.

    A process that is killed while it reads multiprocessing.Event keeps that one's lock, and all
    others wait for ever: torch's DataLoader reads one every 5 s in each of its processes.
    """

    def __init__(self, semaphore: multiprocessing.synchronize.Semaphore) -> None:
        self._semaphore = semaphore

    def is_set(self) -> bool:
        # Semaphore.get_value() is not there on macOS.
        return not self._semaphore._semlock._is_zero()  # type: ignore[attr-defined]

    def set(self) -> None:
        self._semaphore.release()


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process

    def Event(self) -> _Event:  # type: ignore[override]
        return _Event(self.Semaphore(0))


def context(module: str) -> multiprocessing.context.ForkServerContext:
    """The fork server's context, with the server running and `module` imported in it.

    Raises OSError where no folder can hold its sockets.
    """
    remove_leftovers(tempfile.gettempdir(), *SHORT_FOLDERS)
    found = _Context()
    found.set_forkserver_preload(["ftlib.data.own_session", module])
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with environment_variables(PYTHONPATH=path):
        _use_own_socket_folder()
        forkserver.ensure_running()
    return found


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Let the names of semaphores that are made within tell this process."""
    settings = _process_settings()
    before = settings["semprefix"]
    settings["semprefix"] = f"/{_owner()}"
    try:
        yield
    finally:
        settings["semprefix"] = before


def remove_leftovers(*folders: str) -> None:
    """Remove semaphores, and socket folders below `folders`, whose process is gone.

    Those of processes that this one cannot see (another boot or process namespace) stay.
    """
    start = f"{PREFIX}-{_machine()}-"
    for folder, prefix in ((SEMAPHORES, f"sem.{start}"), *((folder, start) for folder in folders)):
        with contextlib.suppress(OSError):
            for entry in list(os.scandir(folder)):
                if entry.name.startswith(prefix) and _is_dead(entry.name.removeprefix(prefix)):
                    _remove(entry)


def _is_dead(rest: str) -> bool:
    """`rest`: PID-TICKS-..."""
    pid, ticks, *_ = [*rest.split("-"), "", ""]
    return pid.isdigit() and ticks.isdigit() and start_ticks(int(pid)) != int(ticks)


def _remove(entry: os.DirEntry[str]) -> None:
    if entry.is_dir(follow_symlinks=False):
        shutil.rmtree(entry.path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(entry.path)


def _owner() -> str:
    """A name for what belongs to this process: PREFIX-MACHINE-PID-TICKS."""
    pid = os.getpid()
    ticks = start_ticks(pid)
    return f"{PREFIX}-{_machine()}-{pid}-{'x' if ticks is None else ticks}"


def _machine() -> str:
    return hashlib.sha256(machine_id().encode()).hexdigest()[:8]


def _process_settings() -> dict[str, Any]:
    """multiprocessing's settings of this process, which its children inherit."""
    return process.current_process()._config  # type: ignore[attr-defined, no-any-return]


def _use_own_socket_folder() -> None:
    """Have multiprocessing keep its sockets in a folder of ours, whose name is short enough for
    them.

    A long TMPDIR gives 'AF_UNIX path too long' otherwise. Raises OSError where no folder will
    do.
    """
    settings = _process_settings()
    if settings.get("tempdir") and _is_short(settings["tempdir"]):
        return
    for folder in (tempfile.gettempdir(), *SHORT_FOLDERS):
        if _is_short(folder):
            with contextlib.suppress(OSError):
                made = tempfile.mkdtemp(prefix=f"{_owner()}-", dir=folder)
                util.Finalize(None, shutil.rmtree, (made, True), exitpriority=-100)
                settings["tempdir"] = made
                return
    raise OSError(
        f"{tempfile.gettempdir()} is too long a name for the sockets of the loader's processes "
        f"(at most {LONGEST_SOCKET_FOLDER} bytes), and none of {', '.join(SHORT_FOLDERS)} can be "
        "written. Set TMPDIR to a folder with a short name, or data.loader_workers to 0"
    )


def _is_short(folder: str) -> bool:
    return len(os.fsencode(folder)) <= LONGEST_SOCKET_FOLDER
