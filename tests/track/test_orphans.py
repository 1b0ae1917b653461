"""Runs of dead drivers are ended as killed; no clock of another machine decides about it."""

import json
import socket
import subprocess
import sys
import time

import pytest

from ftlib.process_identity import ProcessIdentity, machine_id
from ftlib.track import orphans
from ftlib.track.orphans import DRIVER_TAG, HEARTBEAT_TAG, OrphanFinder


class Clock:
    """Seconds that a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def start(mlflow):
    """start(driver, heartbeat): the id of a RUNNING run with these tags."""
    experiment = mlflow.create_experiment("e")

    def run(driver, heartbeat=0.0):
        tags = {DRIVER_TAG: driver, HEARTBEAT_TAG: f"{heartbeat:.0f}"} if driver else {}
        return mlflow.create_run(experiment, tags=tags).info.run_id

    return run


def elsewhere():
    return json.dumps({**ProcessIdentity.of_this_process().to_dict(), "machine": "other boot ns"})


def ended_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_driver_on_this_machine_is_judged_by_its_process_alone(mlflow, start, clock):
    me = ProcessIdentity.of_this_process().to_dict()
    alive = start(orphans.driver_tag(), time.time() - 9999)
    ended = start(json.dumps({**me, "pid": ended_pid()}), time.time())
    reused = start(json.dumps({**me, "ticks": me["ticks"] - 1}), time.time())
    foreign = start("")
    finder = OrphanFinder(mlflow, clock=clock)
    assert {r.info.run_id for r in finder.poll()} == {ended, reused}
    assert finder.watched == 0
    for run_id, status in ((alive, "RUNNING"), (ended, "KILLED"), (foreign, "RUNNING")):
        assert mlflow.get_run(run_id).info.status == status
    assert mlflow.get_run(ended).data.tags["outcome"] == "killed"


@pytest.mark.parametrize("hours_off", [-10, 0, 10])
def test_a_driver_elsewhere_is_dead_when_its_heartbeat_stands_still(
    mlflow, start, clock, hours_off
):
    heartbeat = float(int(time.time() + hours_off * 3600))
    silent, alive = start(elsewhere(), heartbeat), start(elsewhere(), heartbeat)
    finder = OrphanFinder(mlflow, stale_seconds=300, clock=clock)
    for second in range(0, 300, 60):
        clock.now = 1000.0 + second
        mlflow.set_tag(alive, HEARTBEAT_TAG, f"{heartbeat + second:.0f}")
        assert finder.poll() == []
    clock.now = 1300.0
    assert [r.info.run_id for r in finder.poll()] == [silent]
    assert mlflow.get_run(silent).info.end_time == int(heartbeat) * 1000
    assert mlflow.get_run(alive).info.status == "RUNNING"
    assert finder.watched == 0


def test_tags_of_older_versions_are_read(mlflow, start, clock):
    boot = machine_id().split()[1][:8]
    here = f"{socket.gethostname()}:{boot}"
    dead = start(f"{here} {ended_pid()} 1700000000", time.time())
    start(f"{here} 1 1700000000", time.time())
    start("other:12345678 1 1700000000", time.time())
    finder = OrphanFinder(mlflow, clock=clock)
    assert [r.info.run_id for r in finder.poll()] == [dead]
    assert finder.watched == 2


def test_reap_waits_for_runs_elsewhere_and_says_so(mlflow, start):
    silent = start(elsewhere(), 5)
    said = []
    assert [r.info.run_id for r in orphans.reap(mlflow, None, 0.3, said.append)] == [silent]
    assert "1 runs belong to other machines" in said[0]
    assert orphans.reap(mlflow, None, 0.3, said.append) == [] and len(said) == 1


def test_this_machine_is_recognized_in_journals_of_older_versions():
    host, boot, *_ = machine_id().split()
    assert orphans.is_this_machine(machine_id())
    assert orphans.is_this_machine(f"{host}:{boot[:8]}")
    assert not orphans.is_this_machine(f"{host}:00000000")
