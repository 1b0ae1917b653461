"""Where the loader's processes come from: long TMPDIRs, and what killed processes leave behind.

Modules: fork_server, own_session.
"""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ftlib.data import fork_server
from ftlib.data.fork_server import PREFIX, remove_leftovers
from ftlib.process_identity import start_ticks

ROOT = Path(__file__).parents[2]


def script(tmp_path, text):
    file = tmp_path / "use.py"
    file.write_text(textwrap.dedent(text))
    return [sys.executable, str(file)]


USE = """
    import os, sys, time
    from multiprocessing import process, resource_tracker
    from ftlib.data.fork_server import context, own_names

    if __name__ == "__main__":
        fork_server = context("json")
        with own_names():
            queue = fork_server.Queue()
        worker = fork_server.Process(target=int)
        worker.start()
        worker.join()
        print(worker.exitcode, process.current_process()._config["tempdir"], flush=True)
        print(os.getpid(), resource_tracker._resource_tracker._pid, flush=True)
        if "wait" in sys.argv:
            time.sleep(60)
"""


def test_loader_processes_start_below_a_long_tmpdir(tmp_path):
    folder = tmp_path / ("x" * 80) / ("y" * 80)
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    done = subprocess.run(
        script(tmp_path, USE), env=environment, capture_output=True, text=True, timeout=120
    )
    exit_code, used = done.stdout.split()[:2]
    assert exit_code == "0" and len(used) < 100, done.stderr
    assert not Path(used).exists() and not list(folder.iterdir())  # removed at the end


def test_without_a_short_folder_the_error_says_what_to_set(monkeypatch):
    monkeypatch.setattr(fork_server, "LONGEST_SOCKET_FOLDER", 3)
    monkeypatch.setattr(fork_server, "_process_settings", dict)
    with pytest.raises(OSError, match=r"too long a name .* Set TMPDIR .* or data\.loader_workers"):
        fork_server._use_own_socket_folder()


def ours():
    return {p for p in Path("/dev/shm").iterdir() if p.name.startswith(f"sem.{PREFIX}")}


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="named semaphores lie elsewhere")
def test_the_next_loader_removes_what_a_killed_process_left(tmp_path):
    """Killed together with Python's resource tracker, which would remove it otherwise."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*script(tmp_path, USE), "wait"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        _, folder = process.stdout.readline().split()
        pids = [int(p) for p in process.stdout.readline().split()]
        left = {p for p in ours() if f"-{pids[0]}-" in p.name}
        assert left and f"-{pids[0]}-" in folder
        remove_leftovers(str(Path(folder).parent))
        assert left <= ours() and Path(folder).is_dir()  # it lives
        os.kill(pids[1], signal.SIGKILL)
        process.kill()
        process.wait()
        assert left <= ours() and Path(folder).is_dir()
        remove_leftovers(str(Path(folder).parent))
        assert not left & ours() and not Path(folder).exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for path in ours():
            if f"-{process.pid}-" in path.name:
                with contextlib.suppress(OSError):
                    path.unlink()


def test_only_leftovers_of_dead_processes_of_this_machine_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "SEMAPHORES", str(tmp_path))
    here, ticks = fork_server._machine(), start_ticks(os.getpid())
    pid = os.getpid()
    stay = {
        f"sem.{PREFIX}-{here}-{pid}-{ticks}-a",  # this process
        f"sem.{PREFIX}-00000000-{pid}-{ticks + 1}-a",  # of another machine
        f"sem.{PREFIX}-{here}-{pid}-x-a",  # start unknown
        f"sem.{PREFIX}-{here}-",
        f"sem.{PREFIX}-{here}-..-..",
        "sem.mp-abc",
    }
    go = {f"sem.{PREFIX}-{here}-{pid}-{ticks + 1}-a", f"sem.{PREFIX}-{here}-{2**22 + 1}-5-a"}
    for name in stay | go:
        (tmp_path / name).touch()
    remove_leftovers()
    assert {p.name for p in tmp_path.iterdir()} == stay


def test_loader_processes_are_in_another_session_than_the_job():
    """A signal to the job's process group must not reach them."""
    from multiprocessing import forkserver

    started = fork_server.context("ftlib.data.loader").Process(target=time.sleep, args=(60,))
    started.start()
    try:
        server = forkserver._forkserver._forkserver_pid
        assert os.getsid(started.pid) == os.getsid(server) != os.getsid(0)
        assert os.getpgid(started.pid) != os.getpgid(0)
    finally:
        started.kill()
        started.join()


def ask_for_ever(event, asking):
    asking.release()
    while True:
        event.is_set()


def test_processes_killed_while_they_read_an_event_keep_no_lock_of_it():
    """multiprocessing.Event: in most of the rounds the next reader waits for ever."""
    context = fork_server.context("json")
    event, asking = context.Event(), context.Semaphore(0)
    for _ in range(10):
        reader = context.Process(target=ask_for_ever, args=(event, asking), daemon=True)
        reader.start()
        assert asking.acquire(timeout=60)
        time.sleep(0.01)
        reader.kill()
        reader.join()
    found = []
    asked = threading.Thread(target=lambda: found.append(event.is_set()), daemon=True)
    asked.start()
    asked.join(60)
    assert found == [False]
    event.set()
    assert event.is_set()
