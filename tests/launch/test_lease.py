"""The lease of a run: one writer at a time, whatever clocks, suspensions and storage do."""

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftlib import storage
from ftlib.launch import lease
from ftlib.launch.errors import LaunchError, LeaseLostError
from ftlib.launch.lease import Fence, Lease, heartbeat_file
from ftlib.process_identity import ProcessIdentity, is_suspended
from ftlib.storage import StorageError

ROOT = str(Path(lease.__file__).parents[2])
HOLD = """
import sys
sys.path.insert(0, {root!r})
from ftlib.launch import lease
lease.RENEW_SECONDS = 0.1
with lease.Lease({folder!r}, "r") as held:
    print("held", flush=True)
    for line in sys.stdin:
        if line == "write\\n":
            try:
                held.fence()
                print("written", flush=True)
            except Exception as error:
                print(f"{{type(error).__name__}}: {{error}}", flush=True)
"""


def start_holder(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(root=ROOT, folder=str(folder))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lease of tmp_path and tries to write when it is told to."""
    process = start_holder(tmp_path)
    yield process
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGCONT)
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def ask_to_write(holder):
    holder.stdin.write("write\n")
    holder.stdin.flush()
    return holder.stdout.readline()


def of_another_machine(token="t"):
    """The contents of a lease whose holder cannot be looked up here."""
    me = dataclasses.replace(ProcessIdentity.of_this_process(), machine="another", host="another")
    return {"token": token, **me.to_dict()}


@pytest.fixture
def quick(monkeypatch):
    """Terms of a second instead of a minute."""
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 0.6)
    monkeypatch.setattr(lease, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.3)


# --- on one machine ---


def test_a_second_writer_is_refused_and_told_who_holds_the_run(tmp_path, holder):
    with pytest.raises(LaunchError, match=f"trained already, by process {holder.pid} on"):
        Lease(str(tmp_path), "r").take()


def test_a_trial_waits_for_a_late_process_of_an_earlier_launch(tmp_path, holder, monkeypatch):
    """One that ends on its own, a little later; one that does not is named in the end."""
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            holder.kill()
            holder.wait()

    monkeypatch.setattr(lease.time, "sleep", sleep)
    with Lease(str(tmp_path), "r", patience=600):
        assert len(looks) == 3
        with pytest.raises(LaunchError, match=f"by process {os.getpid()} on"):
            Lease(str(tmp_path), "r", patience=0.1).take()


def test_the_lease_of_a_killed_process_is_taken_without_waiting(tmp_path, holder, monkeypatch):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", float("inf"))  # waiting would never end
    with Lease(str(tmp_path), "r"):
        assert json.loads((tmp_path / "lease.json").read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_a_reused_process_number_is_not_the_holder(tmp_path):
    values = {"token": "old", **ProcessIdentity.of_this_process().to_dict(), "ticks": 1}
    (tmp_path / "lease.json").write_text(json.dumps(values))
    with Lease(str(tmp_path), "r"):
        pass


def test_a_clock_that_steps_does_not_make_a_live_holder_dead(tmp_path, holder, monkeypatch):
    """psutil's create_time and time.time move with the clock; neither is asked."""
    import psutil

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real() + 3600)
    with pytest.raises(LaunchError, match="trained already"):
        Lease(str(tmp_path), "r").take()


def test_a_suspended_holder_keeps_its_lease_and_the_message_says_how_to_wake_it(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    while not is_suspended(holder.pid):
        time.sleep(0.01)
    with pytest.raises(LaunchError, match=f"It is suspended: resume it .kill -CONT {holder.pid}"):
        Lease(str(tmp_path), "r").take()
    holder.send_signal(signal.SIGCONT)
    assert ask_to_write(holder) == "written\n"


@pytest.mark.parametrize("text", ["{", "", "[1]"])
def test_a_torn_lease_file_does_not_block_a_run(tmp_path, text):
    (tmp_path / "lease.json").write_text(text)
    with Lease(str(tmp_path), "r"):
        pass


def test_of_many_launches_on_a_dead_lease_one_gets_it(tmp_path):
    dead = {"token": "old", **ProcessIdentity.of_this_process().to_dict(), "ticks": 1}
    (tmp_path / "lease.json").write_text(json.dumps(dead))
    go, got, refused = threading.Barrier(12), [], []

    def start():
        one = Lease(str(tmp_path), "r")
        go.wait()
        try:
            one.take()
            got.append(one.token)
        except LaunchError:
            refused.append(one.token)

    threads = [threading.Thread(target=start) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 11
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == got[0]


# --- on two machines ---


def test_a_lease_that_does_not_move_is_taken_after_its_term(tmp_path, quick):
    (tmp_path / "lease.json").write_text(json.dumps(of_another_machine()))
    started = time.monotonic()
    with Lease(str(tmp_path), "r"):
        assert time.monotonic() - started >= lease.EXPIRE_SECONDS


@pytest.mark.parametrize("skew", [-600.0, 600.0])
def test_a_live_holder_is_refused_whatever_its_clock_says(tmp_path, quick, skew):
    """Its heartbeat moves; when it says that it moved is not looked at."""
    file = tmp_path / "lease.json"
    file.write_text(json.dumps({**of_another_machine(), "renewed": time.time() + skew}))
    beat = Path(heartbeat_file(str(file), "t"))
    end = threading.Event()

    def live():
        count = 0
        while not end.wait(0.05):
            count += 1
            storage.write_file(str(beat), json.dumps({"beat": count}).encode())
            os.utime(beat, (time.time() + skew, time.time() + skew))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(LaunchError, match="on another"):
            Lease(str(tmp_path), "r").take()
    finally:
        end.set()
        thread.join()


def test_a_lease_written_by_an_older_version_is_watched(tmp_path, quick):
    """It has no start ticks and renews lease.json itself."""
    file = tmp_path / "lease.json"
    old = {"token": "t", "host": "h", "machine": "m", "pid": 1, "started": 1.0, "renewed": 1.0}
    file.write_text(json.dumps(old))
    threading.Timer(0.2, lambda: file.write_text(json.dumps({**old, "renewed": 2.0}))).start()
    with pytest.raises(LaunchError, match="by process 1 on h"):
        Lease(str(tmp_path), "r").take()


def test_a_watcher_that_was_suspended_itself_does_not_count_what_it_missed(
    tmp_path, quick, monkeypatch
):
    (tmp_path / "lease.json").write_text(json.dumps(of_another_machine()))
    clock, looks = [0.0], []

    def sleep(seconds):
        looks.append(seconds)
        clock[0] += 1000.0  # suspended for a long time at each look

    monkeypatch.setattr(lease.time, "sleep", sleep)
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    assert lease.is_dead(str(tmp_path / "lease.json"), of_another_machine())
    assert len(looks) >= 3


def test_a_suspended_holder_that_was_replaced_writes_nothing_more(tmp_path, holder):
    """SIGSTOP, a successor as on another machine, SIGCONT: the first stops before it writes."""
    assert ask_to_write(holder) == "written\n"
    holder.send_signal(signal.SIGSTOP)
    successor = Lease(str(tmp_path), "r")
    successor._evict(json.loads((tmp_path / "lease.json").read_text()))
    assert successor._create()
    holder.send_signal(signal.SIGCONT)
    said = ask_to_write(holder)
    assert said.startswith("LeaseLostError: the run 'r' does not belong to this process any more")
    assert f"process {os.getpid()} on" in said
    time.sleep(0.3)  # several heartbeats of the first
    successor.fence()
    holder.stdin.close()
    holder.wait(30)
    successor.fence()  # the first one's end did not remove the successor's lease


def test_the_heartbeat_notices_a_lost_lease(tmp_path, quick):
    with Lease(str(tmp_path), "r") as first:
        second = Lease(str(tmp_path), "r")
        second._evict(json.loads((tmp_path / "lease.json").read_text()))
        assert second._create()
        deadline = time.monotonic() + 30
        while first.lost is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LeaseLostError, match="has taken it over"):
            first.check()
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == second.token


def test_a_lease_that_is_moved_aside_for_a_moment_is_not_lost(tmp_path, quick):
    with Lease(str(tmp_path), "r") as held:
        os.rename(tmp_path / "lease.json", tmp_path / "aside")
        threading.Timer(0.3, os.rename, (tmp_path / "aside", tmp_path / "lease.json")).start()
        held.fence()


def test_a_removed_lease_is_lost(tmp_path, quick):
    with Lease(str(tmp_path), "r") as held:
        os.unlink(tmp_path / "lease.json")
        with pytest.raises(LeaseLostError, match="was removed"):
            held.fence()


def test_a_folder_that_is_unmounted_is_not_a_lost_lease(tmp_path, quick):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with Lease(str(run_dir), "r") as held:
        os.rename(run_dir, tmp_path / "away")
        with pytest.raises(StorageError, match="the folder is gone"):
            held.fence()
        with pytest.raises(StorageError, match="the folder is gone"):
            held.fence()
        os.rename(tmp_path / "away", run_dir)
        held.fence()


def test_storage_that_is_away_is_not_a_lost_lease(tmp_path, quick, monkeypatch):
    with Lease(str(tmp_path), "r") as held:

        def away(uri):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(storage, "read_file", away)
        with pytest.raises(StorageError, match="cannot be read"):
            held.fence()
        time.sleep(0.3)
        monkeypatch.undo()
        held.fence()
        held.check()


def test_a_fence_travels_to_workers(tmp_path):
    with Lease(str(tmp_path), "r") as held:
        fence = pickle.loads(pickle.dumps(held.fence))
        assert fence == held.fence and isinstance(fence, Fence)
        fence()


# --- on an object store, where nothing is created exclusively or renamed ---


class ObjectStore:
    """Files by address; a write replaces, a late write may land after others."""

    def __init__(self):
        self.files, self.lock = {}, threading.Lock()
        self.late, self.sent, self.lands = "", threading.Event(), threading.Event()
        """The name of the thread whose writes land late; it has sent one; they land now."""

    def read_file(self, uri):
        with self.lock:
            return self.files.get(uri)

    def write_file(self, uri, data):
        if threading.current_thread().name == self.late:
            self.sent.set()
            assert self.lands.wait(60)
        with self.lock:
            self.files[uri] = data

    def delete_file(self, uri):
        with self.lock:
            self.files.pop(uri, None)


@pytest.fixture
def store(monkeypatch):
    store = ObjectStore()
    for name in ("read_file", "write_file", "delete_file"):
        monkeypatch.setattr(storage, name, getattr(store, name))
    return store


def test_of_two_writers_on_an_object_store_one_gets_the_lease(store, quick, monkeypatch):
    # What a writer sends within this time, however busy the machine, is not late.
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 2.0)
    got = []

    def start():
        with contextlib.suppress(LaunchError):
            one = Lease("s3://b/r", "r")
            one.take()
            got.append(one)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1
    got[0].fence()


def test_a_write_that_lands_late_on_an_object_store_leaves_one_owner(store, quick):
    """Both see no lease; the late writer's lands after the other was sure of its own."""
    got = {}

    def start():
        one = Lease("s3://b/r", "r")
        with contextlib.suppress(LaunchError):
            one.take()
            got[threading.current_thread().name] = one

    store.late = "late"
    late, early = (threading.Thread(target=start, name=name) for name in ("late", "early"))
    late.start()
    assert store.sent.wait(60)
    early.start()
    early.join()
    store.lands.set()
    late.join()
    got["late"].fence()
    with pytest.raises(LeaseLostError):
        got["early"].fence()


def test_a_lease_on_an_object_store_is_released(store, quick):
    with Lease("s3://b/r", "r") as held:
        time.sleep(0.2)
        assert set(store.files) == {held.file, heartbeat_file(held.file, held.token)}
    assert store.files == {}
