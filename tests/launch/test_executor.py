"""Training on a cluster from the driver's side, with a trainer that fails as Ray's does.

With Ray itself: tests/launch/test_ray.py, tests/test_cluster_hosts.py.
"""

import errno
import io
import os
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import ray
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from ftlib.config import Cluster, Run
from ftlib.launch import executor
from ftlib.launch.cluster import Placement
from ftlib.launch.driver_actor import LocalChannel
from ftlib.launch.errors import RunFailedError, StoppedError
from ftlib.launch.progress import ProgressDisplay

READ_ONLY = ControllerError(OSError(errno.EROFS, "Read-only file system", "snapshot.json"))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains with a trainer whose starts end as in a list, which loses those that were made.

    Returns (result, what was printed).
    """

    def train(ends, max_failures=3):
        def fit():
            end = ends.pop(0)
            if isinstance(end, Exception):
                raise end
            return SimpleNamespace(return_value=end)

        monkeypatch.setattr(executor.ActorChannel, "start", LocalChannel)
        for asks_ray in ("_pass_on_drains", "_kill"):
            monkeypatch.setattr(executor, asks_ray, lambda channel: None)
        monkeypatch.setattr(executor, "_trainer", lambda *_: SimpleNamespace(fit=fit))
        run = Run(name="r", cluster=Cluster(max_failures=max_failures))
        task = executor.TrainingTask(
            run=run,
            dataset=None,
            run_dir=str(tmp_path),
            source=None,
            writer=None,
            lease=SimpleNamespace(check=lambda: None),
            placement=Placement(1, 1, 0, 1),
        )
        printed = io.StringIO()
        with ProgressDisplay("r", printed) as display:
            result = executor.run_on_cluster(task, display)
        assert not ray.is_initialized()
        return result, printed.getvalue()

    return train


def test_training_starts_again_after_ray_could_not_write_its_record(train):
    result, printed = train([READ_ONLY, READ_ONLY, {"step": 8}])
    assert result == {"step": 8}
    assert printed.count("Read-only file system") == 2


@pytest.mark.parametrize(
    ("failure", "starts"),
    [
        (READ_ONLY, 3),
        (ControllerError(ConnectionError("Ray is gone")), 1),
        (ControllerError(RuntimeError("of another kind")), 1),
        (WorkerGroupError("workers failed", {0: OSError("disk full")}), 1),
    ],
)
def test_only_storage_that_failed_the_controller_is_tried_again_and_not_for_ever(
    train, failure, starts
):
    ends = [failure] * 5
    with pytest.raises(RunFailedError):
        train(ends, max_failures=2)
    assert len(ends) == 5 - starts


def test_a_run_whose_storage_is_away_waits_for_it_and_can_be_stopped(train, tmp_path):
    moved = tmp_path.with_name("away")
    shutil.move(tmp_path, moved)
    tmp_path.write_text("no folder")
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(StoppedError) as stopped:
        train([READ_ONLY, {"step": 8}])
    assert "while its storage was away" in stopped.value.message
