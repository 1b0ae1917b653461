"""Processes are told apart without clocks."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ftlib.process_identity import (
    ProcessIdentity,
    is_suspended,
    machine_id,
    start_ticks,
)


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def identity(pid):
    return ProcessIdentity("host", machine_id(), pid, start_ticks(pid))


def test_this_process_is_alive_and_reads_back():
    me = ProcessIdentity.of_this_process()
    assert me.pid == os.getpid() and me.is_alive() is True
    assert ProcessIdentity.from_dict(me.to_dict()) == me


def test_start_ticks_agree_with_the_time_since_boot():
    since_boot = start_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")
    assert abs(psutil.boot_time() + since_boot - psutil.Process().create_time()) < 2


def test_a_killed_process_is_dead_before_and_after_it_is_reaped(sleeper):
    known = identity(sleeper.pid)
    assert known.is_alive() is True
    sleeper.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while known.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert known.is_alive() is False, "a zombie counts as dead"
    sleeper.wait()
    assert known.is_alive() is False


def test_a_reused_number_is_another_process(sleeper):
    assert dataclasses.replace(identity(sleeper.pid), ticks=1).is_alive() is False


def test_a_stopped_process_is_alive_and_suspended(sleeper):
    sleeper.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 30
    while not is_suspended(sleeper.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_suspended(sleeper.pid) and identity(sleeper.pid).is_alive() is True
    sleeper.send_signal(signal.SIGCONT)


def test_another_machine_cannot_be_judged(sleeper):
    assert dataclasses.replace(identity(sleeper.pid), machine="other").is_alive() is None


@pytest.mark.parametrize("values", [{}, {"host": "h"}, {"host": "h", "machine": "m", "pid": "x"}])
def test_incomplete_values_are_no_identity(values):
    assert ProcessIdentity.from_dict(values) is None
