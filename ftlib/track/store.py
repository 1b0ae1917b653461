"""Where runs are kept: resolving the tracking URI, making the SQLite store safely, reaching a server in bounded time, links into its UI.

MLflow's own first use of a SQLite file is a race (several processes migrate it at once and corrupt it), its default URI depends on the
working directory, and its client retries an unreachable server for four minutes; hence this file.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import os
import re
import shlex
import socket
import sqlite3
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from ftlib.paths import home
from ftlib.track.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

REACH_SECONDS = 9.0
"""A server that has not answered after this is unreachable."""
SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")

_QUIET = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the journal retries; MLflow's default is 7, with growing pauses
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}

T = TypeVar("T")


class TrackingError(ValueError):
    """Tracking cannot start; the message says what to do."""


def _offline_hint() -> str:
    return "or start with --track.offline to journal everything now and deliver it later"


def resolve_uri(uri: str = "") -> str:
    """The tracking URI to use: `uri`, or $MLFLOW_TRACKING_URI, or the SQLite database below $FTLIB_HOME. SQLite paths become absolute.

    Raises:
        TrackingError: for what is no tracking URI, or is the file store that MLflow has given up.
    """
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip()
    if not uri:
        return f"sqlite:///{home() / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme.split("+")[0].lower()
    if scheme == "sqlite":
        path = uri.split(":///", 1)[1] if ":///" in uri else ""
        if not path or path == ":memory:":
            raise TrackingError(
                f"track.uri = {redact(uri)}: needs a file. Write sqlite:////absolute/path/mlflow.db"
            )
        return f"sqlite:///{Path(path).expanduser().absolute()}"
    if scheme in SERVER_SCHEMES:
        if not urlsplit(uri).hostname:
            raise TrackingError(
                f"track.uri = {redact(uri)}: has no host. Write it like http://mlflow.example.org:5000"
            )
        return uri.rstrip("/")
    if scheme in DATABASE_SCHEMES or scheme == "databricks":
        return uri
    plain = (
        ""
        if scheme not in ("", "file")
        else f" For a folder, use a database in it: sqlite:///{Path(uri.removeprefix('file://')).expanduser().absolute()}/mlflow.db"
    )
    raise TrackingError(
        f"track.uri = {redact(uri)}: needs http://, https://, sqlite:/// or another database's address.{plain}"
    )


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI, or None for other URIs."""
    return Path(uri.split(":///", 1)[1]) if uri.startswith("sqlite") else None


def quiet_client_settings() -> None:
    """MLflow's client settings that keep it from waiting long; those that the user has set stay."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def request_seconds() -> float:
    """How long one request may take, as MLflow's client is set."""
    return float(
        os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT") or _QUIET["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    )


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Requests in this block may take longer (uploads, a server that is slow)."""
    name, before = "MLFLOW_HTTP_REQUEST_TIMEOUT", request_seconds()
    if before >= seconds:
        yield
        return
    os.environ[name] = str(int(seconds))
    try:
        yield
    finally:
        os.environ[name] = str(int(before))


def ensure_store(uri: str) -> None:
    """Make the SQLite store if it is not there yet: under a lock, in a temporary file that is renamed when complete, in WAL mode.

    Raises:
        TrackingError: the folder cannot be written, or the file is no MLflow database of this MLflow's version.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(path.name + ".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists() or path.stat().st_size == 0:
                _build(path)
        _check_file(path)
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking database {path} cannot be made or opened ({error}). Free space or permissions there, set track.uri "
            f"to another place, {_offline_hint()}"
        ) from None


def artifacts_root(database: Path) -> Path:
    return database.with_name("mlflow-artifacts")


def _build(path: Path) -> None:
    import_mlflow(f"sqlite:///{path}")
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    alembic = logging.getLogger("alembic")
    level, alembic_level = logging.getLogger("mlflow").level, alembic.level
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    alembic.setLevel(logging.WARNING)
    try:
        store = SqlAlchemyStore(f"sqlite:///{temporary}", (artifacts_root(path)).as_uri())
        store.engine.dispose()
        SqlAlchemyStore._engine_map.pop(f"sqlite:///{temporary}", None)
        with contextlib.closing(sqlite3.connect(temporary)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(temporary, path)
    finally:
        logging.getLogger("mlflow").setLevel(level)
        alembic.setLevel(alembic_level)
        for rest in path.parent.glob(temporary.name + "*"):
            rest.unlink(missing_ok=True)


def _check_file(path: Path) -> None:
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=20)
    ) as db:
        try:
            tables = {
                row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type='table'")
            }
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise
            raise TrackingError(
                f"track.uri: {path} is no SQLite database ({error}). Move it away, or set track.uri to another file"
            ) from None
    if "experiments" not in tables or any(t.startswith("_alembic_tmp_") for t in tables):
        raise TrackingError(
            f"track.uri: {path} is not a complete MLflow database. Move it away, or set track.uri to another file"
        )


def client(uri: str) -> MlflowClient:
    """An MlflowClient for the URI. The fluent API and its globals are never used."""
    import_mlflow(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def import_mlflow(uri: str) -> None:
    """Import what of MLflow this store needs, with its settings in place and without the deprecation warnings that its own imports cause."""
    quiet_client_settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(
            "mlflow"
            if urlsplit(uri).scheme in SERVER_SCHEMES
            else "mlflow.store.tracking.sqlalchemy_store"
        )


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()` in a thread of its own; TimeoutError if it has not answered in time (the thread is left to itself)."""
    result: list[Any] = []

    def target() -> None:
        try:
            result.append((True, work()))
        except BaseException as error:
            result.append((False, error))

    thread = threading.Thread(target=target, daemon=True, name="ftlib-track-probe")
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer within {seconds:g} s")
    ok, value = result[0]
    if not ok:
        raise value
    return value


def reach(uri: str, seconds: float = REACH_SECONDS) -> None:
    """Ask the server something small.

    Raises:
        TrackingError: it cannot be reached, refuses, or answers nothing within `seconds`.
    """
    try:
        mlflow = client(
            uri
        )  # importing MLflow takes seconds of its own, which are not the server's
        if sqlite_path(uri) is not None:
            mlflow.search_experiments(max_results=1)
            return
        started = time.monotonic()
        parts = urlsplit(uri)
        port = parts.port or {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}.get(
            parts.scheme.split("+")[0]
        )
        if parts.hostname and port:
            socket.create_connection((parts.hostname, port), timeout=min(5.0, seconds)).close()
        left = max(1.0, seconds - (time.monotonic() - started))
        within(left, lambda: mlflow.search_experiments(max_results=1))
    except Exception as error:
        raise TrackingError(_why_unreachable(uri, error)) from None


def _why_unreachable(uri: str, error: Exception) -> str:
    text = redact(str(error)).strip().splitlines()
    why = text[0][:300] if text else type(error).__name__
    where = redact(uri)
    code = getattr(error, "get_http_status_code", lambda: 0)()
    if "schema" in why.lower() and ("out-of-date" in why or "out of date" in why.lower()):
        return f"the tracking database {where} was made by another MLflow version. Make a backup, then run: mlflow db upgrade {where}"
    if code in (401, 403):
        return (
            f"the tracking server {where} refuses access ({why}). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN); "
            "if it says that the host is not allowed, start it with --allowed-hosts"
        )
    if isinstance(error, ModuleNotFoundError):
        return f"the tracking database {where} needs a driver that is not installed ({why}). Install it, or name another in the address, such as postgresql+psycopg2://"
    start = (
        " Start it (python jobs/track.py ui prints how), correct track.uri or MLFLOW_TRACKING_URI,"
        if urlsplit(uri).scheme in SERVER_SCHEMES
        else " Correct track.uri or MLFLOW_TRACKING_URI,"
    )
    return f"the tracking server {where} cannot be reached ({why}).{start} {_offline_hint()}"


def ensure_experiment(mlflow: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment, made if need be; with SQLite its artifacts go below the database's folder.

    Raises:
        TrackingError: it has been deleted.
    """
    from mlflow.exceptions import MlflowException

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        location = None
        if path is not None:
            location = (
                artifacts_root(path)
                / (re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "experiment")
            ).as_uri()
        try:
            made = mlflow.create_experiment(name, artifact_location=location)
            for key, value in {
                "mlflow.experimentKind": "custom_model_development",
                "mlflow.note.content": "Start here: **Views** (above the table) has the columns and charts set up.",
            }.items():
                mlflow.set_experiment_tag(made, key, value)
            return made
        except MlflowException:
            found = mlflow.get_experiment_by_name(name)  # another process was faster
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name} has been deleted. Restore it (mlflow experiments restore --experiment-id {found.experiment_id}) "
            "or set track.experiment to another name"
        )
    return str(found.experiment_id)


# --- links ------------------------------------------------------------------------------------------------------------------------


def ui_base(uri: str, port: int = 5000) -> str:
    """Address of the UI: the server's own (without user and password), or that of the server which `ui_command` starts."""
    if urlsplit(uri).scheme in SERVER_SCHEMES:
        parts = urlsplit(uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    return f"http://127.0.0.1:{port}"


def run_link(uri: str, experiment_id: str, run_id: str) -> str:
    return (
        f"{ui_base(uri)}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
    )


def artifact_link(uri: str, experiment_id: str, run_id: str, path: str) -> str:
    return f"{ui_base(uri)}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(path)}?workflowType=machine_learning"


def experiment_link(uri: str, experiment_id: str, view_key: str = "", mode: str = "CHART") -> str:
    """The experiment's page, opened on a saved view if one is named. (Without workflowType, MLflow opens its page about traces.)"""
    view = f"viewStateShareKey={quote(view_key)}&compareRunsMode={mode}&" if view_key else ""
    return f"{ui_base(uri)}/#/experiments/{experiment_id}/runs?{view}workflowType=machine_learning"


def ui_arguments(uri: str, port: int = 5000) -> list[str]:
    """Command line of a server for a store that has none of its own; empty for a server's URI."""
    if urlsplit(uri).scheme in SERVER_SCHEMES:
        return []
    script = Path(sys.executable).with_name("mlflow")
    path = sqlite_path(uri)
    arguments = [
        str(script) if script.exists() else "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    return arguments + (
        ["--default-artifact-root", artifacts_root(path).as_uri()] if path is not None else []
    )


UI_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
}
"""Without the job consumers a server takes 0.5 GB and 9 s to start instead of 2.3 GB and 23 s."""


def ui_command(uri: str, port: int = 5000) -> str:
    """The command that opens the UI, for a person to copy."""
    arguments = ui_arguments(uri, port)
    if not arguments:
        return f"open {ui_base(uri)}"
    shown = [
        '"$MLFLOW_TRACKING_URI"' if a == uri and redact(a) != a else shlex.quote(a)
        for a in arguments
    ]
    return " ".join(["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", *shown])
