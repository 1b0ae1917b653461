"""Addresses are resolved or refused with what to do; the SQLite store is made once whoever comes first; links and commands are right."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.track import store
from ftlib.track.links import absolute, experiment_page, run_page, ui_command
from ftlib.track.store import (
    TrackingError,
    client,
    ensure_experiment,
    ensure_store,
    resolve_uri,
)

ROOT = Path(__file__).parents[2]


def test_the_default_is_a_database_below_the_home(home, monkeypatch):
    assert resolve_uri() == f"sqlite:///{home}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://u:p@h:5000/")
    assert resolve_uri() == "http://u:p@h:5000"
    assert resolve_uri("sqlite:////x/y.db") == "sqlite:////x/y.db"


def test_relative_sqlite_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("mlruns", "sqlite:///"),
        ("file:///x", "sqlite:////x/mlflow.db"),
        ("ftp://h", "http://"),
        ("sqlite://", "needs a file"),
        ("http://", "no host"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_wrong_addresses_say_what_to_write(uri, says):
    with pytest.raises(TrackingError, match=says):
        resolve_uri(uri)


def test_no_password_in_an_error():
    with pytest.raises(TrackingError) as error:
        store.reach("http://user:hunter2@127.0.0.1:9")
    assert "hunter2" not in str(error.value)


@pytest.mark.slow
def test_several_first_openers_make_one_sound_database(tmp_path):
    """With MLflow alone, several processes that open a new SQLite file at once crash and leave it half migrated."""
    uri = f"sqlite:///{tmp_path / 'deep' / 'mlflow.db'}"
    code = f"from ftlib.track.store import ensure_store, client\nensure_store({uri!r})\nclient({uri!r}).create_experiment(str(__import__('os').getpid()))\n"
    openers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(4)]
    assert [p.wait() for p in openers] == [0] * 4
    assert len(client(uri).search_experiments()) == 5


def test_the_store_is_in_wal_mode_and_leaves_no_temporary_files(empty_store):
    with sqlite3.connect(empty_store) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    db.close()
    assert {p.name for p in empty_store.parent.iterdir()} <= {
        "mlflow.db",
        "mlflow.db.lock",
        "mlflow.db-wal",
        "mlflow.db-shm",
    }
    ensure_store(f"sqlite:///{empty_store}")


def test_files_that_are_no_store_are_refused_untouched(tmp_path):
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database, but somebody's file" * 100)
    before = path.read_bytes()
    with pytest.raises(TrackingError, match="no SQLite database"):
        ensure_store(f"sqlite:///{path}")
    assert path.read_bytes() == before
    other = tmp_path / "y.db"
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE _alembic_tmp_experiments (x)")
    db.close()
    with pytest.raises(TrackingError, match="not a complete MLflow database"):
        ensure_store(f"sqlite:///{other}")


def test_a_place_that_cannot_be_written_is_an_error_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        TrackingError, match=r"cannot be made or opened.*track\.uri.*--track\.offline"
    ):
        ensure_store(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}")


def test_experiments_keep_artifacts_beside_the_database_and_deleted_ones_are_refused(
    store, mlflow, tmp_path
):
    made = ensure_experiment(mlflow, "img net/v2", store)
    assert ensure_experiment(mlflow, "img net/v2", store) == made
    assert (
        mlflow.get_experiment(made).artifact_location
        == f"file://{tmp_path}/mlflow-artifacts/img-net-v2"
    )
    mlflow.delete_experiment(made)
    with pytest.raises(TrackingError, match="has been deleted"):
        ensure_experiment(mlflow, "img net/v2", store)


def test_links_open_the_pages_for_training_and_hide_passwords():
    assert (
        absolute("http://u:pw@h:5000", experiment_page("3", "ftlib-phases"))
        == "http://h:5000/#/experiments/3/runs?workflowType=machine_learning"
        "&compareRunsMode=CHART&viewStateShareKey=ftlib-phases"
    )
    assert (
        absolute("sqlite:////x.db", run_page("3", "abc"))
        == "http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    )
    assert ui_command("https://u:pw@h") == "open https://h"
    command = ui_command("sqlite:////x y/mlflow.db")
    assert (
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false" in command
        and "'sqlite:////x y/mlflow.db'" in command
    )
    assert "pw" not in ui_command("postgresql://u:pw@h/d")


def test_a_users_own_client_settings_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    store.set_client_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    with store.request_timeout(60):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
