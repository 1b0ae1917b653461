"""Writers on other machines than the driver's reach the journal through the tracker actor."""

import dataclasses
import pickle
import tempfile
import time

import psutil
import pytest

from ftlib.config import Track
from ftlib.track.tracking import open_tracking

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster():
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            _temp_dir=folder,
            log_to_driver=False,
            configure_logging=False,
        )
        yield
        ray.shutdown()


def test_a_worker_elsewhere_writes_through_the_actor(cluster, store, mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "RAY_ADDRESS", "somewhere"
    )  # a joined cluster: workers may be on other machines
    (tmp_path / "figure.png").write_bytes(b"png")

    @ray.remote(num_cpus=1)
    def train(writer, figure):
        for step in range(200):
            writer.metrics({"m": step, "n": step}, step)
        writer.artifact(figure, "figures")
        writer.flush()

    with open_tracking(
        Track(uri=store), experiment="e", journal_dir=tmp_path / "journal"
    ) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        writer = run.writer()
        assert writer.location.remote is not None
        elsewhere = dataclasses.replace(
            writer, location=dataclasses.replace(writer.location, machine="another")
        )
        ray.get(train.remote(elsewhere, str(tmp_path / "figure.png")))
        handle = dataclasses.replace(tracking.handle(), location=elsewhere.location)
        child = handle.start_run(
            "child", tags={}, params={"lr": 1}, parent=run.reference, wait_seconds=20
        )
        child_id = child.run_id
        assert child_id
        child.finish("completed")
        assert run.finish("completed")
    assert [(m.step, m.value) for m in mlflow.get_metric_history(run.run_id, "m")] == [
        (s, s) for s in range(200)
    ]
    assert [a.path for a in mlflow.list_artifacts(run.run_id, "figures")] == ["figures/figure.png"]
    assert mlflow.get_run(child_id).info.status == "FINISHED"


def test_a_killed_actor_starts_again_and_loses_nothing(
    cluster, store, mlflow, tmp_path, monkeypatch
):
    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    first, go, arrived = (tmp_path / name for name in ("first", "go", "arrived"))

    @ray.remote(num_cpus=1)
    def train(writer):
        for step in range(200):
            if step == 100:
                first.touch()
                while not go.exists():
                    time.sleep(0.01)
            writer.metrics({"m": step}, step)
        while not arrived.exists():
            time.sleep(0.01)

    with open_tracking(
        Track(uri=store), experiment="e", journal_dir=tmp_path / "journal"
    ) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        writer = run.writer()
        location = dataclasses.replace(writer.location, machine="another")
        done = train.remote(dataclasses.replace(writer, location=location))
        until(lambda: first.exists() and actors())
        for actor in actors():
            actor.kill()
        go.touch()
        until(lambda: '"step":199' in run.path.read_text())
        arrived.touch()
        ray.get(done)
        assert run.finish("completed")
    points = mlflow.get_metric_history(run.run_id, "m")
    assert [(m.step, m.value) for m in points] == [(s, s) for s in range(200)]


def until(condition):
    """Wait for it; an actor takes many seconds to start again on a busy machine."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def actors():
    family = psutil.Process().children(recursive=True)
    return [p for p in family if "TrackerActor" in " ".join(p.cmdline())]


def test_on_one_machine_there_is_no_actor(cluster, store, tmp_path):
    with open_tracking(
        Track(uri=store), experiment="e", journal_dir=tmp_path / "journal"
    ) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        assert run.writer().location.remote is None
        assert pickle.loads(pickle.dumps(run.writer())) == run.writer()
