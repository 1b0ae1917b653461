"""Start the loader's processes from a fork server.

A fork server rather than a fork: the training process runs threads of Ray and CUDA, which a
fork would break. The server has already imported the loader, so a process starts in a few
hundredths of a second and shares those pages.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver, popen_forkserver, process, util
from pathlib import Path
from types import ModuleType

from ftlib.paths import environment

LONGEST_SOCKET_FOLDER = 70
"""Bytes. A socket's path may have about 100 (92 to 107, by system), and multiprocessing appends up
to 30."""
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


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


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


def context(module: str) -> multiprocessing.context.ForkServerContext:
    """The fork server's context, with the server running and `module` imported in it."""
    found = _Context()
    found.set_forkserver_preload([module])
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    with environment(PYTHONPATH=path):
        _keep_socket_paths_short()
        forkserver.ensure_running()
    return found


def _keep_socket_paths_short() -> None:
    """Move multiprocessing's sockets to a folder with a short name where TMPDIR is too long for
    them.

    Raises OSError where there is no such folder.
    """
    settings = process.current_process()._config  # type: ignore[attr-defined]
    folder = settings.get("tempdir") or tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_SOCKET_FOLDER:
        return
    short = next((f for f in SHORT_FOLDERS if os.access(f, os.W_OK | os.X_OK)), None)
    if short is None:
        raise OSError(
            f"{folder} is too long a name for the sockets of the loader's processes (at most "
            f"{LONGEST_SOCKET_FOLDER} bytes). Set TMPDIR to a folder with a shorter name, or "
            "data.loader_workers to 0"
        )
    settings.pop("tempdir", None)
    before, tempfile.tempdir = tempfile.tempdir, short
    try:
        util.get_temp_dir()  # makes it, and has it removed at the process's end
    finally:
        tempfile.tempdir = before
