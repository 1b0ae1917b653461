"""Messages between driver and workers (driver_actor, worker), and their display (progress)."""

import io
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from ftlib.config import Data, Run, Train
from ftlib.launch import worker
from ftlib.launch.driver_actor import (
    DriverActor,
    DriverLogHandler,
    LocalChannel,
    StopSignals,
    ignore_errors,
)
from ftlib.launch.errors import LaunchError
from ftlib.launch.progress import ProgressDisplay, duration, sentence
from ftlib.launch.source_version import source_version
from ftlib.launch.worker import is_final, processes_and_threads
from ftlib.settings import ConfigError
from ftlib.storage import StorageError

POINT = {
    "epoch": 1,
    "epochs": 3,
    "step": 4,
    "steps": 12,
    "loss": 1.25,
    "top1": 50.0,
    "lr": 0.1,
    "images_per_s": 1234.5,
    "seconds_left": 200.0,
}


def test_a_drain_is_one_notice_and_a_stop_stays():
    actor = DriverActor()
    notices = StopSignals(LocalChannel(actor))
    actor.register_node("a")
    assert notices() == ""
    actor.mark_draining(["elsewhere"])
    assert notices() == ""
    for _ in range(3):
        actor.mark_draining(["a"])
    assert [notices(), notices()] == ["checkpoint", ""]
    actor.register_node("b")
    actor.mark_draining(["a", "b"])
    assert [notices(), notices()] == ["checkpoint", ""]
    actor.request_stop()
    assert [notices(), notices()] == ["stop", "stop"]


def test_the_first_error_counts_and_points_are_taken_once():
    actor = DriverActor()
    actor.report_failure("ConfigError", "first")
    actor.report_failure("ConfigError", "second")
    assert actor.failure() == ("ConfigError", "first")
    actor.add_progress(POINT)
    actor.add_message("careful")
    assert actor.take_output() == [POINT, "careful"] and actor.take_output() == []


def test_warnings_of_a_worker_reach_the_driver():
    actor = DriverActor()
    log = logging.Logger("ftlib.x")
    log.addHandler(DriverLogHandler(LocalChannel(actor)))
    log.info("not this")
    log.warning("checkpoint %s is damaged", 3)
    assert actor.take_output() == ["warning: checkpoint 3 is damaged"]


def test_errors_of_a_lost_driver_are_ignored():
    assert ignore_errors(lambda: 1 / 0) is None and ignore_errors(lambda: 3) == 3


def test_only_errors_that_would_come_again_are_final():
    assert is_final(ConfigError("x"))
    assert (
        not is_final(StorageError("full"))
        and not is_final(RuntimeError("gloo"))
        and not is_final(MemoryError())
    )


class TwentyPictures:
    """Of two classes: 16 to train on, 4 to score."""

    def split(self, name):
        return self

    labels = np.arange(16) % 2

    def __len__(self):
        return 4


@pytest.mark.parametrize(
    ("asked", "epochs", "expected"),
    [
        (-1, 101, [(0, 1), (1, 1), (7, 1)]),
        (-1, 100, [(0, 1), (0, 1), (0, 1)]),  # 2,000 pictures: a thread, and no other sums
        (0, 1, [(0, 1), (0, 2), (0, 8)]),
        (3, 1, [(3, 1), (3, 1), (3, 5)]),
    ],
)
def test_loader_processes_and_threads_of_a_worker(asked, epochs, expected):
    run = Run(data=Data(path="x", loader_workers=asked), train=Train(epochs=epochs))
    assert [processes_and_threads(run, TwentyPictures(), cpus) for cpus in (1, 2, 8)] == expected


@pytest.mark.parametrize(
    ("data", "read"), [({}, 20), ({"subset": 0.5}, 12), ({"tuning_fraction": 0.25}, 16)]
)
def test_loader_processes_are_for_the_pictures_that_the_run_reads(data, read):
    for epochs, processes in ((2000 // read, 0), (2000 // read + 1, 1)):
        run = Run(data=Data(path="x", **data), train=Train(epochs=epochs))
        assert processes_and_threads(run, TwentyPictures(), 2) == (processes, 1)


def test_plain_lines_epoch_ends_and_restarts():
    out = io.StringIO()
    with ProgressDisplay("r", out) as screen:
        screen.show({**POINT, "step": 3})
        screen.show({**POINT, "step": 4})  # the epoch's own line follows
        screen.show({**POINT, "step": 4, "val_top1": 61.0, "best": 61.0})
        screen.show({**POINT, "step": 5, "epoch": 2})
        screen.show({**POINT, "step": 4, "epoch": 1})
        screen.say("a word")
    lines = out.getvalue().splitlines()
    assert (
        lines[0] == "epoch 1/3  step 3/12  loss 1.250  top-1 50.0 %  1,234 images/s  0:03:20 left"
    )
    assert lines[1] == (
        "epoch 1/3  loss 1.250  top-1 50.0 %  val 61.00 % (best 61.00)  1,234 images/s  "
        "0:03:20 left"
    )
    assert lines[2:] == ["r  goes on from step 4", "a word"]


def test_a_terminal_gets_a_bar():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    with ProgressDisplay("r", out) as screen:
        screen.show(POINT)
        screen.show({**POINT, "val_top1": 61.0, "best": 61.0})
    assert "val 61.00 %" in out.getvalue()


def test_durations_and_progress_lines():
    assert (
        duration(3661) == "1:01:01" and duration(-5) == "0:00:00" and duration(float("inf")) != ""
    )
    assert "left" not in sentence({**POINT, "step": 12})


def test_a_worker_with_another_ftlib_is_refused_but_on_the_driver_s_own_node(monkeypatch):
    """There, somebody may write code while a run trains."""
    here = SimpleNamespace(get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: here)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.2")
    monkeypatch.setattr(logging.getLogger("ftlib"), "handlers", [])
    channel = LocalChannel()
    worker._join(channel, "here", "0.1.0 (12345678)")
    worker._join(channel, "elsewhere", source_version())
    assert channel.actor.nodes == {"here"}
    with pytest.raises(
        LaunchError, match=r"10.0.0.2 runs ftlib .* the driver ftlib 0.1"
    ) as refused:
        worker._join(channel, "elsewhere", "0.1.0 (12345678)")
    assert is_final(refused.value)
