"""Addresses are resolved or refused with what to do; the store is made once and found again."""

import contextlib
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy.exc
from mlflow.exceptions import MlflowException

from ftlib.track import store
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


@pytest.mark.parametrize(
    "half_made",
    [
        sqlalchemy.exc.IntegrityError("CREATE TABLE", None, Exception("duplicate key value")),
        sqlalchemy.exc.ProgrammingError("CREATE TABLE", None, Exception("already exists")),
        MlflowException("Detected out-of-date database schema (found version a, but expected b)"),
    ],
)
def test_a_database_whose_tables_another_process_makes_is_asked_again(monkeypatch, half_made):
    answers = [half_made, half_made, []]

    def search_experiments(max_results):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(
        store, "client", lambda uri: SimpleNamespace(search_experiments=search_experiments)
    )
    monkeypatch.setattr(store.time, "sleep", lambda seconds: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        store.reach(f"postgresql://u:p@127.0.0.1:{server.getsockname()[1]}/mlflow")
    assert not answers


@pytest.mark.parametrize(
    "other",
    [
        sqlalchemy.exc.OperationalError("SELECT 1", None, Exception("password is wrong")),
        sqlalchemy.exc.ProgrammingError("CREATE TABLE", None, Exception("permission denied")),
    ],
)
def test_other_errors_of_a_database_are_said_at_once(monkeypatch, other):
    asked = []

    def search_experiments(max_results):
        asked.append(max_results)
        raise other

    monkeypatch.setattr(
        store, "client", lambda uri: SimpleNamespace(search_experiments=search_experiments)
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(TrackingError, match=str(other.orig)),
    ):
        store.reach(f"postgresql://u:p@127.0.0.1:{server.getsockname()[1]}/mlflow")
    assert asked == [1]


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
    """With MLflow alone they crash and leave a half migrated file."""
    uri = f"sqlite:///{tmp_path / 'deep' / 'mlflow.db'}"
    code = (
        "import os\nfrom ftlib.track.store import ensure_store, client\n"
        f"ensure_store({uri!r})\nclient({uri!r}).create_experiment(str(os.getpid()))\n"
    )
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


def test_a_users_own_client_settings_stay(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    store.set_client_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
    with store.request_timeout(60):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "60"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"


# --- services and registries ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "databricks://profile",
        "azureml://eastus.api.azureml.ms/mlflow/v1.0/subscriptions/s/resourceGroups/g",
        "arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/mine",
        "postgresql+psycopg2://user:pw@host/db",
        "mssql+pyodbc://user:pw@host/db?driver=x",
    ],
)
def test_addresses_that_mlflow_documents_are_taken_as_they_are(uri):
    assert resolve_uri(uri) == uri


def test_the_registry_is_where_the_runs_are_unless_the_variable_says_otherwise(monkeypatch):
    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    assert store.registry_uri("http://h:5000") == "http://h:5000"
    assert store.registry_uri("databricks") == "databricks-uc"
    assert store.registry_uri("databricks://p") == "databricks-uc://p"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://registry:5000/")
    assert store.registry_uri("databricks") == "http://registry:5000"
    assert client("http://h:5000")._registry_uri == "http://registry:5000"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "databricks-uc")
    assert store.registry_uri("http://h") == "databricks-uc"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "nonsense")
    with pytest.raises(TrackingError, match="MLFLOW_REGISTRY_URI = nonsense"):
        store.registry_uri("http://h")


def test_a_registry_given_for_tracking_is_explained():
    with pytest.raises(TrackingError, match="is a registry"):
        resolve_uri("databricks-uc")


def test_a_missing_plugin_is_named_before_anything_is_asked():
    with pytest.raises(TrackingError, match="pip install sagemaker-mlflow"):
        store.reach("arn:aws:sagemaker:us-east-1:123456789012:mlflow-tracking-server/mine")


# --- passwords ------------------------------------------------------------------------------------


NASTY = ("#", "/", "?", ":", "@", " ", "[", "'")


@pytest.mark.parametrize("password", ["#Qx", *(f"Qx{character}Zvwk" for character in NASTY)])
@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_no_part_of_a_password_is_in_any_message(password, scheme):
    uri = f"{scheme}://user:{password}@127.0.0.1:9/db"
    with pytest.raises(TrackingError) as error:
        store.reach(resolve_uri(uri))
    assert "Qx" not in str(error.value) and "Zvwk" not in str(error.value)


def test_a_password_that_no_parser_reads_is_answered_with_what_to_write():
    with pytest.raises(TrackingError, match="%23.*MLFLOW_TRACKING_PASSWORD"):
        resolve_uri("http://user:pa#ss@host:5000")
    with pytest.raises(TrackingError, match="host or port cannot be read"):
        resolve_uri("http://host:port")
    assert store.host_and_port("postgresql://user:pa#s/s@host:1234/db") == ("host", 1234)
    assert store.host_and_port("http://[::1]:5000/x") == ("::1", 5000)
    assert store.host_and_port("https://host") == ("host", 443)


# --- paths ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["per%20cent", "question?mark", "ha#sh", "a space", "ü", "a+b&c=d"]
)
def test_a_home_of_any_name_holds_a_store(name, empty_store, tmp_path, monkeypatch):
    home = tmp_path / name
    home.mkdir()
    monkeypatch.setenv("FTLIB_HOME", str(home))
    uri = resolve_uri()
    assert store.sqlite_path(uri) == home / "mlflow.db" == store.sqlite_path(resolve_uri(uri))
    shutil.copyfile(empty_store, home / "mlflow.db")
    ensure_store(uri)
    mlflow = client(uri)
    run = mlflow.create_run(ensure_experiment(mlflow, "e", uri))
    mlflow.log_text(run.info.run_id, "text", "file.txt")
    found = list(store.artifacts_root(home / "mlflow.db").rglob("file.txt"))
    assert [f.read_text() for f in found] == ["text"]


def test_a_new_store_is_made_in_a_home_with_a_percent_sign(tmp_path):
    path = tmp_path / "per%20cent?" / "mlflow.db"
    ensure_store(store.sqlite_uri(path))
    assert path.is_file() and not list(path.parent.glob(".mlflow.db.*"))


@pytest.mark.parametrize("keep_old", [False, True])
def test_a_home_that_was_moved_or_copied_finds_its_artifacts(empty_store, tmp_path, keep_old):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    shutil.copyfile(empty_store, old / "mlflow.db")
    uri = store.sqlite_uri(old / "mlflow.db")
    ensure_store(uri)
    mlflow = client(uri)
    run = mlflow.create_run(ensure_experiment(mlflow, "e", uri)).info
    mlflow.log_text(run.run_id, "text", "file.txt")
    (old / "runs" / "r").mkdir(parents=True)
    gone = mlflow.create_run(run.experiment_id, tags={"run_dir": str(old / "runs" / "gone")}).info
    mlflow.set_tag(run.run_id, "run_dir", str(old / "runs" / "r"))
    shutil.copytree(old, new)
    if not keep_old:
        shutil.rmtree(old)
    moved = store.sqlite_uri(new / "mlflow.db")
    ensure_store(moved)
    assert client(moved).get_run(run.run_id).info.artifact_uri.startswith(new.as_uri())
    assert [a.path for a in client(moved).list_artifacts(run.run_id)] == ["file.txt"]
    assert store.store_of_run(uri, run.run_id, str(new / "runs" / "r")) == moved
    tags = [client(moved).get_run(r.run_id).data.tags["run_dir"] for r in (run, gone)]
    assert tags == [str(new / "runs" / "r"), str(old / "runs" / "gone")]
    if keep_old:
        ensure_store(uri)
        assert client(uri).get_run(run.run_id).info.artifact_uri.startswith(old.as_uri())


def test_a_database_that_moved_without_its_artifacts_still_names_their_place(empty_store, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    shutil.copyfile(empty_store, old / "mlflow.db")
    uri = store.sqlite_uri(old / "mlflow.db")
    ensure_store(uri)
    mlflow = client(uri)
    run = mlflow.create_run(ensure_experiment(mlflow, "e", uri)).info
    mlflow.log_text(run.run_id, "text", "file.txt")
    for file in old.glob("mlflow.db*"):  # with its write-ahead log
        shutil.copyfile(file, new / file.name)
    moved = store.sqlite_uri(new / "mlflow.db")
    ensure_store(moved)
    assert [a.path for a in client(moved).list_artifacts(run.run_id)] == ["file.txt"]


def test_the_store_of_a_run_is_the_recorded_one_where_it_was_not_moved(tmp_path, monkeypatch):
    run_dir = str(tmp_path / "runs" / "r")
    assert store.store_of_run("http://h:5000", "id", run_dir) == "http://h:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:pw@h:5000")
    assert store.store_of_run("http://user:***@h:5000", "id", run_dir) == "http://user:pw@h:5000"


# --- versions and servers -------------------------------------------------------------------------


def test_a_database_of_a_newer_mlflow_is_answered_with_an_upgrade(empty_store, tmp_path):
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(TrackingError, match=r"newer MLflow.*pip install --upgrade mlflow"):
        ensure_store(f"sqlite:///{path}")
    error = Exception("Can't locate revision identified by 'ffffffffffff'")
    assert "newer MLflow" in store.why_unreachable("postgresql://u:pw@h/d", error)


def test_a_database_of_an_older_mlflow_is_answered_with_the_upgrade_command(empty_store, tmp_path):
    path = tmp_path / "mlflow.db"
    shutil.copyfile(empty_store, path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    ensure_store(f"sqlite:///{path}")
    with pytest.raises(TrackingError, match="mlflow db upgrade"):
        store.reach(f"sqlite:///{path}")


class Experiments:
    """A server with one experiment, whose artifacts are at `location`."""

    def __init__(self, location):
        self.location = location

    def get_experiment_by_name(self, name):
        return SimpleNamespace(
            experiment_id="1", lifecycle_stage="active", artifact_location=self.location
        )


@pytest.mark.parametrize("location", ["/srv/mlflow/artifacts/1", "file:///srv/mlflow/artifacts/1"])
def test_artifacts_on_the_servers_own_disk_are_found_at_launch(location):
    with pytest.raises(TrackingError, match=r"/srv/mlflow/artifacts/1.*--artifacts-destination"):
        ensure_experiment(Experiments(location), "e", "http://user:pw@mlflow.example.org:5000")


def test_artifacts_that_this_machine_can_reach_are_taken(tmp_path):
    for location in ("mlflow-artifacts:/1", "s3://bucket/1", "dbfs:/x", tmp_path.as_uri()):
        assert ensure_experiment(Experiments(location), "e", "http://mlflow.example.org") == "1"
    own_disk = str(tmp_path / "not" / "yet" / "there")
    assert ensure_experiment(Experiments(own_disk), "e", "http://127.0.0.1:5000") == "1"
