"""A Ray of this process's own: what is checked before it, and that nothing is left of it.

Modules: cluster, signals.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest

from ftlib.launch import own_ray
from ftlib.launch.errors import LaunchError

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
FORK = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEP!r})"]


class SlowRay:
    """Stands in for Ray on a machine that is too busy for it: `late` starts time out.

    Each start leaves a process behind, as Ray's do, which has a child of its own.
    """

    def __init__(self, late, says="The current node timed out during startup"):
        self.late, self.says, self.calls, self.left = late, says, [], []

    def init(self, **settings):
        from ray._private import services

        self.calls.append("init")
        process = services.ConsolePopen(FORK)
        self.left.append(process)
        while not psutil.Process(process.pid).children():
            time.sleep(0.01)
        if self.calls.count("init") <= self.late:
            raise Exception(self.says)

    def shutdown(self):
        self.calls.append("shutdown")

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="127.0.0.1:1")


@pytest.fixture(autouse=True)
def no_processes():
    yield
    own_ray.end_processes()


def children():
    return psutil.Process().children(recursive=True)


def test_a_start_that_times_out_is_tried_again_and_leaves_no_process():
    before = len(children())
    ray = SlowRay(late=2)
    own_ray.start(ray, include_dashboard=False)
    assert ray.calls == ["init", "shutdown", "init", "shutdown", "init"]
    assert [p.poll() is None for p in ray.left] == [False, False, True]
    assert len(children()) == before + 2, "the last start's process and its child"


def test_a_start_that_never_succeeds_leaves_no_process():
    before = len(children())
    with pytest.raises(LaunchError, match="did not start on this machine in 3 attempts"):
        own_ray.start(SlowRay(late=3), include_dashboard=False)
    assert len(children()) == before


def test_another_error_of_the_start_is_not_tried_again_and_leaves_no_process():
    before = len(children())
    ray = SlowRay(late=1, says="no such option")
    with pytest.raises(Exception, match="no such option"):
        own_ray.start(ray, include_dashboard=False)
    assert ray.calls == ["init", "shutdown"] and len(children()) == before


def test_ray_s_processes_are_in_sessions_of_their_own():
    ray = SlowRay(late=0)
    own_ray.start(ray, include_dashboard=False)
    assert os.getsid(ray.left[0].pid) == ray.left[0].pid != os.getsid(0)


def test_a_ray_of_one_s_own_starts_nothing_that_nobody_uses():
    """No monitor, log monitor or API server, and none of the trainer's actors for Ray Datasets and
    for resources that a dead controller has left."""
    # Not in tmp_path: the paths of Ray's sockets have to be short.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(STARTS)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "RAY_TMPDIR": folder},
        )
    assert done.returncode == 0, done.stderr
    commands, left_out = json.loads(done.stdout.splitlines()[-1])
    words = " ".join(commands)
    assert "gcs_server" in words and "raylet" in words
    assert not [name for name in ("monitor.py", "dashboard.py") if name in words], words
    assert left_out == ["DatasetsCallback", "PlacementGroupCleanerCallback"]


STARTS = """
    import json
    import psutil
    from ray.train.torch import TorchTrainer
    from ftlib.launch import cluster, executor

    cluster.connect()
    made, ours = (
        {type(c).__name__ for c in trainer(lambda: None)._create_default_callbacks()}
        for trainer in (TorchTrainer, executor._without_helpers(TorchTrainer))
    )
    commands = [" ".join(c.cmdline()) for c in psutil.Process().children(recursive=True)]
    print(json.dumps([commands, sorted(made - ours)]))
"""


def test_a_ray_that_was_left_for_another_is_not_missed():
    own_ray.start(SlowRay(late=0), include_dashboard=False)
    own_ray.end_processes()
    own_ray.start(SlowRay(late=0), include_dashboard=False)
    own_ray.forget_unless("127.0.0.1:1")
    assert own_ray.is_here() and own_ray.gone() == ""
    left = list(own_ray._processes)
    own_ray.forget_unless("10.0.0.1:1")
    assert not own_ray.is_here()
    own_ray._processes.extend(left)  # for the fixture to end


def test_agents_whose_raylet_is_gone_are_ended_too(monkeypatch):
    agent = subprocess.Popen(SLEEP)
    monkeypatch.setattr(own_ray, "_agents", [psutil.Process(agent.pid)])
    own_ray.end_processes()
    assert agent.wait(10) == -signal.SIGKILL and own_ray._agents == []


def test_a_ray_process_that_ended_is_named(monkeypatch):
    live = subprocess.Popen(SLEEP)
    live.args = ["/x/gcs_server", "--flag"]
    other = subprocess.Popen(SLEEP)
    other.args = ["/x/dashboard"]
    monkeypatch.setattr(own_ray, "_processes", [live, other])
    other.kill()
    other.wait()
    assert own_ray.gone() == "", "nobody needs the dashboard"
    live.send_signal(signal.SIGTERM)
    live.wait()
    assert own_ray.gone() == "gcs_server"


# --- what is checked before Ray starts ---


@pytest.fixture
def temporary(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    return lambda folder: monkeypatch.setenv("TMPDIR", str(folder))


def test_a_short_temporary_folder_is_left_to_ray(temporary):
    temporary("/tmp")
    assert own_ray.temporary_folder() is None


def test_a_folder_that_is_too_long_for_sockets_is_replaced(temporary, tmp_path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    temporary(long)
    assert own_ray.temporary_folder() == "/tmp/ray"


def test_a_temporary_folder_that_is_not_there_is_named(temporary):
    temporary("/no-such")
    with pytest.raises(LaunchError, match="TMPDIR = /no-such: no file can be written there .No su"):
        own_ray.temporary_folder()


def test_shared_memory_that_is_missing_or_closed_is_named(tmp_path, monkeypatch):
    with pytest.raises(LaunchError, match="is not there .*--shm-size"):
        own_ray.check_shared_memory(str(tmp_path / "shm"))
    monkeypatch.setattr(own_ray, "os", SimpleNamespace(**{**vars(os), "access": lambda *_: False}))
    with pytest.raises(LaunchError, match="cannot be written by this user.*chmod 1777"):
        own_ray.check_shared_memory(str(tmp_path))
