"""jobs/track.py says what waits, delivers it and ends dead runs.

Modules: commands.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.config import Track
from ftlib.track import tracking as tracking_module
from ftlib.track.tracking import open_tracking

ROOT = Path(__file__).parents[2]


@pytest.fixture
def job():
    spec = importlib.util.spec_from_file_location("jobs_track", ROOT / "jobs" / "track.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_status_deliver_and_reap(job, store, mlflow, home, capsys, monkeypatch):
    monkeypatch.setattr(tracking_module, "FINISH_SECONDS", 0.5)
    with open_tracking(
        Track(uri="http://127.0.0.1:9", offline=True),
        experiment="e",
        journal_dir=home / "runs" / "r" / "journal",
    ) as tracking:
        run = tracking.start_run("r", tags={}, params={"lr": 1})
        run.writer().metrics({"m": 1}, 1)
        run.writer().artifact(home / "missing")
        run.finish("completed")
    job(["status"])
    assert (
        "r: 4 records wait for http://127.0.0.1:9 (MLflow does not know the run yet)"
        in capsys.readouterr().out
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    job(["deliver"])
    assert "Name that server with --uri" in capsys.readouterr().out
    job(["deliver", "--uri", store])
    assert f"r: delivered to {store}" in capsys.readouterr().out
    (got,) = mlflow.search_runs([mlflow.get_experiment_by_name("e").experiment_id])
    assert got.info.status == "FINISHED" and got.data.metrics == {"m": 1.0}
    job(["status"])
    assert "1 not taken" in capsys.readouterr().out
    (home / "missing").write_text("here now")
    job(["deliver", "--again", "--uri", store])
    assert [a.path for a in mlflow.list_artifacts(got.info.run_id)] == ["missing"]
    dead = mlflow.create_run(
        got.info.experiment_id,
        tags={"ftlib.driver": "elsewhere 1 1", "ftlib.heartbeat": "1000"},
        run_name="lost",
    )
    capsys.readouterr()
    job(["reap", "--uri", store, "--stale", "0.01"])
    assert f"lost ({dead.info.run_id})" in capsys.readouterr().out
    assert mlflow.get_run(dead.info.run_id).info.status == "KILLED"
    job(["ui", "--print", "--uri", store])
    assert f"--backend-store-uri {store}" in capsys.readouterr().out


def test_mistakes_are_answered(home):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "track.py", "deliver", str(home / "nowhere")],
        capture_output=True,
        text=True,
        cwd=home,
    )
    assert (
        done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr
    )
