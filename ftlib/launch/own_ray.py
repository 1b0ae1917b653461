"""A Ray that this process starts for itself on this machine, and what becomes of its processes.

Each of Ray's processes gets a session of its own, so that a signal to the job's process group
(Ctrl-C in a terminal, `timeout`, Slurm, a container's stop) reaches the job alone, which then stops
with a checkpoint. Ray's processes still end with this one: the kernel kills them when it dies.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from ftlib.launch.errors import LaunchError, RayGoneError

START_ATTEMPTS = 3
"""Times Ray may time out while it starts on this machine."""
LONGEST_FOLDER = 40
"""Characters of the folder for temporary files at most. Ray's sockets lie below it, and a socket's
path may have 107."""
NEEDED_TO_TRAIN = ("gcs_server", "raylet")
"""Processes without which a job cannot go on."""
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Children of the raylet that take it with them when they end."""

_processes: list[subprocess.Popen[bytes]] = []
"""Of the Ray that this process started last."""
_agents: list[psutil.Process] = []
"""Of that Ray, as `announcing` found them."""
_address = ""
"""Of that Ray's GCS."""
_announced = ""
"""The process of that Ray whose end was printed."""


def start(ray: ModuleType, *, include_dashboard: bool, **settings: Any) -> None:
    """Start Ray on this machine alone.

    On a busy machine the first attempt may time out, and the second finds Ray's files in memory.
    What a failed attempt has started is ended before the next. Raises LaunchError.
    """
    folder = temporary_folder()
    global _address, _announced
    _announced = ""
    if folder is not None:
        settings["_temp_dir"] = folder
    for attempt in range(START_ATTEMPTS):
        try:
            with (
                _in_sessions_of_their_own(),
                _without_helpers(include_dashboard),
                keeping_sigterm_handler(),
            ):
                ray.init(address="local", include_dashboard=include_dashboard, **settings)
            _address = ray.get_runtime_context().gcs_address
            return
        except BaseException as error:
            ray.shutdown()
            end_processes()
            if not isinstance(error, Exception) or "timed out" not in str(error):
                raise
            if attempt + 1 == START_ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise LaunchError(
                    f"Ray did not start on this machine in {START_ATTEMPTS} attempts ({reason}). "
                    "Other programs may be taking all of its CPU or memory: wait for them, or see "
                    "the newest folder of /tmp/ray for Ray's own logs"
                ) from None


def is_here() -> bool:
    """Whether this process has started a Ray of its own, and not left it for another."""
    return bool(_processes)


def forget_unless(address: str) -> None:
    """Forget the Ray started here where this process is connected to another one by now, whose GCS
    is at `address`: `ray.shutdown` has ended it, which is no fault."""
    if address != _address:
        _forget()


def _forget() -> None:
    _agents.clear()
    _processes.clear()


@contextlib.contextmanager
def keeping_sigterm_handler() -> Iterator[None]:
    """Keep this process's handler of SIGTERM while Ray is initialized.

    Ray's would end the process with exit code 15 where jobs end with 143.
    """
    import ray._private.utils

    utils: Any = ray._private.utils
    original = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = original


def gone() -> str:
    """The name of a Ray process started here that has ended and is needed; '' while all live."""
    if _announced:
        return _announced
    for process in _processes:
        name = Path(str(process.args[0] if isinstance(process.args, list) else process.args)).name
        if name in NEEDED_TO_TRAIN and process.poll() is not None:
            return name
    return ""


def gone_error(process: str, during: str) -> RayGoneError:
    return RayGoneError(process, during, said=bool(_announced))


@contextlib.contextmanager
def announcing(during: str) -> Iterator[None]:
    """While entered, the end of a process of Ray's that is needed is printed at once (Linux).

    Ray's client ends this process with exit code 1 and without a word, from C++, as soon as it
    finds its raylet gone: 0.2 s after one of the raylet's agents was killed. `during`: what the job
    was doing, for the message.
    """
    fds = _process_fds() if hasattr(os, "pidfd_open") else {}
    left, leave = os.pipe()
    thread = threading.Thread(target=_announce, args=(fds, left, during), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(leave, b".")
        thread.join()
        for fd in (*fds, left, leave):
            os.close(fd)


def _process_fds() -> dict[int, str]:
    """A pidfd for each living process that is needed -> its name. Remembers the agents."""
    found: list[psutil.Process] = []
    _agents.clear()
    for started in _processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(started.pid)
            if process.name() in NEEDED_TO_TRAIN:
                found.append(process)
                _agents.extend(child for child in process.children() if child.name() in AGENTS)
    fds = {}
    for process in (*found, *_agents):
        with contextlib.suppress(OSError, psutil.Error):
            name = process.name().removeprefix("ray::")
            fds[os.pidfd_open(process.pid)] = name
    return fds


def _announce(fds: dict[int, str], left: int, during: str) -> None:
    global _announced
    poll = select.poll()
    for fd in (*fds, left):
        poll.register(fd, select.POLLIN)
    ready = {fd for fd, _ in poll.poll()}
    if left not in ready and _processes:
        _announced = fds[min(ready)]
        print(f"error: {RayGoneError(_announced, during)}", file=sys.stderr, flush=True)


def end_processes() -> None:
    """Kill what is left of the Ray that this process started, with its children.

    Where Ray has lost a process, its own shutdown then takes seconds instead of a minute. Agents
    whose raylet is gone are nobody's children, and may wait for a dead Ray before they end.
    """
    family, processes = _agents.copy(), _processes.copy()
    _forget()
    for started in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(started.pid)
            family += [*process.children(recursive=True), process]
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    for started in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.wait(5)


@contextlib.contextmanager
def _in_sessions_of_their_own() -> Iterator[None]:
    """Have Ray start its processes as leaders of sessions, and remember them."""
    import ray._private.services

    services: Any = ray._private.services
    original = services.ConsolePopen
    _forget()

    @functools.wraps(original, updated=())
    def popen(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = original(*args, **kwargs, start_new_session=True)
        _processes.append(process)
        return process

    services.ConsolePopen = popen
    try:
        yield
    finally:
        services.ConsolePopen = original


@contextlib.contextmanager
def _without_helpers(dashboard: bool) -> Iterator[None]:
    """Have Ray start no process that nothing here uses.

    These are the autoscaler's monitor, which has no nodes to add, the log monitor, whose lines
    would go to a driver that shows none, and without `dashboard` its server, which then only
    reports usage statistics: a second of CPU each time.
    """
    import ray._private.parameter
    import ray._private.services

    parameter: Any = ray._private.parameter
    services: Any = ray._private.services
    params, api_server = parameter.RayParams, services.start_api_server
    parameter.RayParams = functools.partial(params, include_log_monitor=False, no_monitor=True)
    if not dashboard:
        services.start_api_server = lambda *_, **__: ("", None)  # no address, no process
    try:
        yield
    finally:
        parameter.RayParams, services.start_api_server = params, api_server


def temporary_folder() -> str | None:
    """Ray's folder for temporary files, or None to leave it to Ray.

    Checks the folder that Ray would take (RAY_TMPDIR, TMPDIR or /tmp) and takes /tmp/ray instead of
    one whose path is too long for sockets. Raises LaunchError where it cannot be written.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name) or "/tmp"
    if len(os.path.join(folder, "ray")) > LONGEST_FOLDER:
        _check_writable("/tmp", f"{name} = {folder} is too long for Ray's sockets, and /tmp")
        return "/tmp/ray"
    _check_writable(folder, f"{name} = {folder}" if name in os.environ else folder)
    return None


def check_shared_memory(folder: str = "/dev/shm") -> None:
    """Raise LaunchError where Ray and the loader cannot put their shared memory."""
    try:
        mode = os.stat(folder).st_mode
    except OSError as error:
        raise LaunchError(
            f"{folder} is not there ({error.strerror}): Ray and the loader keep pictures in shared "
            "memory. Mount it (in Docker: --shm-size 2g), or train with --cluster.workers 1"
        ) from None
    if not stat.S_ISDIR(mode) or not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(
            f"{folder} cannot be written by this user: Ray and the loader keep pictures in shared "
            f"memory. Make it writable (chmod 1777 {folder}), or train with --cluster.workers 1"
        )


def _check_writable(folder: str, what: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="ftlib-"):
            pass
    except OSError as error:
        raise LaunchError(
            f"{what}: no file can be written there ({error.strerror}). Ray keeps its sockets and "
            "logs in that folder: set TMPDIR to a short path that this user can write"
        ) from None
