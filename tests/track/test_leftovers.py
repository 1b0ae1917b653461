"""Journals that were left behind are delivered by the next job on the home, to the right store.

Modules: leftovers, background.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.config import Track
from ftlib.track import background, leftovers
from ftlib.track import tracking as tracking_module
from ftlib.track.journal import acquire, release, undelivered
from ftlib.track.store import TrackingError, artifacts_root, client, sqlite_path
from ftlib.track.tracking import open_tracking

ROOT = Path(__file__).parents[2]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 0.5)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")


@pytest.fixture
def home_store(empty_store, home):
    """The address of a store in the home, where jobs look for it."""
    shutil.copyfile(empty_store, home / "mlflow.db")
    return f"sqlite:///{home / 'mlflow.db'}"


def ended_undelivered(uri, folder, experiment="e"):
    """A run that ended while its store could not be reached."""
    with open_tracking(
        Track(uri=uri, offline=True), experiment=experiment, journal_dir=folder
    ) as tracking:
        tracking.delivery.stop(5)
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        run.writer().metrics({"m": 1}, 1)
        run.finish("completed")
    assert undelivered(folder)


def only_run(uri, experiment="e"):
    mlflow = client(uri)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id])
    return run


def test_the_same_command_delivers_a_finished_run(home_store, home, quick):
    folder = home / "runs" / "r" / "journal"
    assert leftovers.deliver_run(folder) == ""
    ended_undelivered(home_store, folder)
    assert leftovers.deliver_run(folder) == "MLflow: delivered what waited of r"
    run = only_run(home_store)
    assert run.info.status == "FINISHED" and run.data.metrics == {"m": 1.0}
    assert leftovers.deliver_run(folder) == ""


def test_a_run_that_went_running_in_an_outage_ends_when_the_server_is_back(
    proxy, server, home, experiment, quick, capsys
):
    folder = home / "runs" / "r" / "journal"
    with open_tracking(Track(uri=proxy.uri), experiment=experiment, journal_dir=folder) as tracking:
        run = tracking.start_run("r", tags={}, params={})
        proxy.mode = "error"
        run.finish("completed")
    assert only_run(server.uri, experiment).info.status == "RUNNING"
    said = leftovers.deliver_run(folder, proxy.uri)
    assert "does not have all of this run yet" in said and "\n" not in said
    proxy.mode = "pass"
    assert "delivered" in leftovers.deliver_run(folder, proxy.uri)
    assert only_run(server.uri, experiment).info.status == "FINISHED"
    assert "Traceback" not in capsys.readouterr().err


def test_an_address_with_a_password_must_be_given_again(home, quick):
    folder = home / "runs" / "r" / "journal"
    ended_undelivered("http://user:hunter2@127.0.0.1:9", folder)
    said = leftovers.deliver_run(folder)
    assert "set MLFLOW_TRACKING_URI" in said and "hunter2" not in said


def test_any_job_on_the_home_delivers_in_a_process_of_its_own(home_store, home, quick):
    folder = home / "runs" / "r" / "journal"
    ended_undelivered(home_store, folder)
    code = (
        "import time; from ftlib.track import background\n"
        "with background.delivery(0.1): time.sleep(2)\n"
        "process = background._process\n"
        "print(process.wait(100))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == ("0", "")
    assert only_run(home_store).info.status == "FINISHED"


def test_a_short_job_and_a_home_without_runs_start_no_delivery(home, monkeypatch):
    monkeypatch.setattr(background, "_process", None)
    with background.delivery(0.01):
        background._start()
    assert background._process is None
    (home / "runs" / "r" / "journal").mkdir(parents=True)
    with background.delivery(60):
        pass
    background._start()
    assert background._process is None


def test_leftovers_go_to_the_stores_they_were_written_for(
    home_store, home, empty_store, tmp_path, quick
):
    other = tmp_path / "other.db"
    shutil.copyfile(empty_store, other)
    ended_undelivered(home_store, home / "runs" / "a" / "journal", "mine")
    ended_undelivered(f"sqlite:///{other}", home / "runs" / "b" / "journal", "theirs")
    ended_undelivered("http://127.0.0.1:9", home / "runs" / "c" / "journal", "nobody")
    assert leftovers.deliver_home(home) == ["r", "r"]
    assert only_run(home_store, "mine").info.status == "FINISHED"
    assert only_run(f"sqlite:///{other}", "theirs").info.status == "FINISHED"
    assert undelivered(home / "runs" / "c" / "journal")


def test_a_home_that_was_moved_delivers_to_its_own_store(home_store, home, tmp_path, quick):
    ended_undelivered(home_store, home / "runs" / "r" / "journal")
    moved = tmp_path / "moved"
    home.rename(moved)
    os.environ["FTLIB_HOME"] = str(moved)  # restored by the fixture `home`
    assert leftovers.deliver_home(moved) == ["r"]
    run = only_run(f"sqlite:///{moved}/mlflow.db")
    assert run.info.status == "FINISHED"
    assert run.info.artifact_uri.startswith(artifacts_root(moved / "mlflow.db").as_uri())
    assert sqlite_path(home_store) == home / "mlflow.db"  # nothing was made in the old place
    assert not home.exists()


def test_a_slow_server_is_tried_longer_and_a_failing_one_is_one_sentence(
    proxy, server, home, experiment, quick, monkeypatch
):
    folder = home / "runs" / "r" / "journal"
    ended_undelivered(proxy.uri, folder, experiment)
    monkeypatch.setattr(leftovers, "TRY_SECONDS", (2, 2))
    proxy.mode = "error"
    said = []
    with pytest.raises(TrackingError, match=r"fails \(.*records are kept in .*same command"):
        leftovers.deliver_patiently(folder, proxy.uri, client(proxy.uri), say=said.append)
    assert len(said) == 1 and "trying again" in said[0]
    monkeypatch.setattr(leftovers, "TRY_SECONDS", (1, 8))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.mode, proxy.delay = "slow", 1.2
    names = leftovers.deliver_patiently(folder, proxy.uri, client(proxy.uri), say=said.append)
    assert names == ["r"] and len(said) == 2
    assert only_run(server.uri, experiment).info.status == "FINISHED"


def test_a_folder_with_a_living_driver_is_left_alone(home_store, home, quick):
    folder = home / "runs" / "r" / "journal"
    ended_undelivered(home_store, folder)
    assert acquire(folder)
    try:
        assert leftovers.deliver_folder(folder, home_store, client(home_store)) is None
    finally:
        release(folder)
