"""Where runs are kept: the tracking address, the SQLite store, reaching a server in bounded time.

MLflow's own first use of a SQLite file is a race (several processes migrate it at once and corrupt
it), its default address depends on the working directory, and its client retries an unreachable
server for four minutes; hence this module. `ftlib.track.links` has the addresses of its pages.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import random
import re
import socket
import sqlite3
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock, Timeout

from ftlib.gc_pause import lasting_objects
from ftlib.paths import home, job_command
from ftlib.track import library_log
from ftlib.track.redact import HIDDEN, redact, redact_address

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("ftlib.track")

REACH_SECONDS = 9.0
"""A server that has not answered after this is unreachable."""
TABLES_SECONDS = 60.0
"""How long MLflow may take to make its tables in an empty database, or wait for who makes them."""
LOCK_SECONDS = 120.0
"""How long one process waits for another that makes the store."""
SERVER_SCHEMES = ("http", "https")
DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
SERVICES = {"databricks": "", "azureml": "azureml-mlflow", "arn": "sagemaker-mlflow"}
"""Schemes of services that MLflow reaches, and the package that each needs beside MLflow."""
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}

_CLIENT_SETTINGS = {
    # The journal retries; MLflow's default is 7 tries, with growing pauses.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_OFFLINE_HINT = "or start with --track.offline to journal everything now and deliver it later"

T = TypeVar("T")


class TrackingError(ValueError):
    """Tracking cannot start; the message says what to do."""


# --- addresses ------------------------------------------------------------------------------------


def scheme(uri: str) -> str:
    """The address's scheme without a driver: postgresql for postgresql+psycopg2://..."""
    if uri in ("databricks", "databricks-uc"):
        return uri
    found = re.match(r"([A-Za-z][A-Za-z0-9.-]*)(?:\+[A-Za-z0-9_]+)?:", uri)
    return found[1].lower() if found else ""


def resolve_uri(uri: str = "") -> str:
    """The tracking address to use.

    The first of these that is given: `uri`, $MLFLOW_TRACKING_URI, the SQLite database below
    $FTLIB_HOME. Paths of SQLite databases become absolute.

    Raises:
        TrackingError: for what is no tracking address, or is the file store that MLflow gave up.
    """
    uri = (uri or os.environ.get("MLFLOW_TRACKING_URI", "")).strip()
    return _checked(uri, "track.uri") if uri else sqlite_uri(home() / "mlflow.db")


def registry_uri(tracking_uri: str) -> str:
    """The address of the model registry: $MLFLOW_REGISTRY_URI, or where the runs are.

    For runs on Databricks it is Unity Catalog, as MLflow itself has it.

    Raises:
        TrackingError: for what is no address.
    """
    uri = os.environ.get("MLFLOW_REGISTRY_URI", "").strip()
    if uri:
        return _checked(uri, "MLFLOW_REGISTRY_URI")
    if scheme(tracking_uri) == "databricks":
        return tracking_uri.replace("databricks", "databricks-uc", 1)
    return tracking_uri


def _checked(uri: str, name: str) -> str:
    kind = scheme(uri)
    given = f"{name} = {redact_address(uri)}"
    if kind == "sqlite":
        path = sqlite_path(uri)
        if path is None or str(path) in (".", ":memory:"):
            raise TrackingError(f"{given}: needs a file. Write sqlite:////absolute/path/mlflow.db")
        return sqlite_uri(path.expanduser().absolute())
    if kind in SERVER_SCHEMES:
        _check_server(uri, given)
        return uri.rstrip("/")
    if kind in DATABASE_SCHEMES or kind in ("databricks", "azureml"):
        return uri
    if kind == "databricks-uc":
        if name == "MLFLOW_REGISTRY_URI":
            return uri
        raise TrackingError(
            f"{given}: is a registry. Write databricks here, and set MLFLOW_REGISTRY_URI to it"
        )
    if re.match(r"arn:aws[a-z-]*:sagemaker:", uri):
        return uri
    hint = ""
    if kind in ("", "file"):
        folder = Path(uri.removeprefix("file://")).expanduser().absolute()
        hint = f" For a folder, use a database in it: {sqlite_uri(folder / 'mlflow.db')}"
    raise TrackingError(
        f"{given}: needs http://, https://, sqlite:///, another database's address, databricks, "
        f"azureml:// or the ARN of a SageMaker tracking server.{hint}"
    )


def _check_server(uri: str, given: str) -> None:
    """Refuse an address that no client reads as it is meant. Messages hold nothing of a password.

    A `#`, `/` or `?` in a password ends the host for every parser, whose errors then quote a part
    of the password; so it is judged here first.
    """
    rest = uri.split("://", 1)[1]
    credentials, at, _ = rest.rpartition("@")
    if at and re.search(r"[#/?\s]", credentials):
        raise TrackingError(
            f"{given}: the user name or password holds '#', '/', '?' or a space. Write %23, %2F, "
            "%3F or %20 for it, or set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    try:
        parts = urlsplit(uri)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise TrackingError(
            f"{given}: its host or port cannot be read. Write it like "
            "http://mlflow.example.org:5000, with a port from 1 to 65535"
        ) from None
    if not host:
        raise TrackingError(f"{given}: has no host. Write it like http://mlflow.example.org:5000")


def _quotes_paths() -> bool:
    """Whether SQLAlchemy reads %XX in the path of a SQLite address (since 2.1)."""
    try:
        major, minor = importlib.metadata.version("sqlalchemy").split(".")[:2]
        return (int(major), int(minor)) >= (2, 1)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return True


def sqlite_uri(path: Path) -> str:
    """The address of a SQLite file. Only `%` and `?` in the path have to be written as %XX."""
    text = str(path)
    if _quotes_paths():
        text = text.replace("%", "%25").replace("?", "%3F")
    return f"sqlite:///{text}"


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite address, or None for other addresses."""
    if scheme(uri) != "sqlite":
        return None
    text = uri.split(":///", 1)[1] if ":///" in uri else ""
    return Path(unquote(text.partition("?")[0]) if _quotes_paths() else text)


def store_of_run(recorded: str, run_id: str, run_dir: str) -> str:
    """The store that holds a run: `recorded` (from its run.json) unless its home was moved.

    The database of the home that the run's folder lies in comes first, if it knows the run. So a
    home that was moved or copied stays in one piece.

    Raises:
        TrackingError: no address is known, or it makes no sense.
    """
    path = sqlite_path(recorded)
    if path is not None:
        beside = Path(run_dir).absolute().parent.parent / path.name
        for candidate in (beside, path):
            if _knows_run(candidate, run_id):
                return sqlite_uri(candidate)
    return resolve_uri("" if HIDDEN in recorded else recorded)


def _knows_run(database: Path, run_id: str) -> bool:
    if not database.is_file():
        return False
    try:
        with contextlib.closing(_open_read_only(database)) as db:
            found = db.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone()
    except sqlite3.Error:
        return False
    return found is not None


def is_same_store(recorded: str, uri: str) -> bool:
    """Whether a journal written for `recorded` (without secrets) is meant for the store `uri`.

    A database that is no longer where it was is the one of the same name: its home was moved.
    """
    if recorded in (redact_address(uri), redact(uri)):  # older journals used `redact`
        return True
    before, now = sqlite_path(recorded), sqlite_path(uri)
    if before is None or now is None:
        return False
    return before == now or (before.name == now.name and not before.exists())


# --- MLflow's client ------------------------------------------------------------------------------


def set_client_defaults() -> None:
    """Settings that keep MLflow's client from waiting long; those that the user has set stay."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)


def request_seconds() -> float:
    """How long one request may take, in seconds, as MLflow's client is set."""
    return float(os.environ.get(_TIMEOUT) or _CLIENT_SETTINGS[_TIMEOUT])


@contextlib.contextmanager
def request_timeout(seconds: float) -> Iterator[None]:
    """Let requests in this block take up to `seconds` (uploads, a slow server)."""
    before = request_seconds()
    if before >= seconds:
        yield
        return
    os.environ[_TIMEOUT] = str(int(seconds))
    try:
        yield
    finally:
        os.environ[_TIMEOUT] = str(int(before))


def client(uri: str) -> MlflowClient:
    """An MlflowClient for the address. MLflow's fluent functions and their globals are not used."""
    import_mlflow(uri)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=registry_uri(uri))


def import_mlflow(uri: str) -> None:
    """Import what this store needs of MLflow, with its settings in place.

    Hides the deprecation warnings that MLflow's own imports cause.
    """
    set_client_defaults()
    is_database = scheme(uri) in DATABASE_SCHEMES
    name = "mlflow.store.tracking.sqlalchemy_store" if is_database else "mlflow"
    first = name not in sys.modules
    with lasting_objects() if first else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(name)
    library_log.apply()


# --- the SQLite store -----------------------------------------------------------------------------


def ensure_store(uri: str) -> None:
    """Make the SQLite store if there is none yet; other addresses are left alone.

    It is made under a lock, in a temporary file that is renamed when complete, in WAL mode. One
    that was moved or copied with its artifacts gets their present place, and that of its runs.

    Raises:
        TrackingError: the folder cannot be written, or the file is no MLflow database that the
            installed MLflow can read.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=LOCK_SECONDS):
            if not path.exists() or path.stat().st_size == 0:
                _build(path)
            _check_file(path)
            _relocate(path)
    except Timeout:
        raise TrackingError(
            f"the tracking database {path} is locked by another process for {LOCK_SECONDS:g} s. "
            f"End that process, {_OFFLINE_HINT}"
        ) from None
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the tracking database {path} cannot be made or opened ({error}). Free space or "
            f"permissions there, set track.uri to another place, {_OFFLINE_HINT}"
        ) from None


def artifacts_root(database: Path) -> Path:
    """The folder of a SQLite store's artifacts, beside its file."""
    return database.with_name("mlflow-artifacts")


def _build(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    uri = sqlite_uri(temporary)
    import_mlflow(uri)
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    alembic, mlflow = logging.getLogger("alembic"), logging.getLogger("mlflow")
    levels = alembic.level, mlflow.level
    alembic.setLevel(logging.WARNING)
    mlflow.setLevel(logging.WARNING)
    try:
        with lasting_objects():  # migrations make as many as imports
            store = SqlAlchemyStore(uri, artifacts_root(path).as_uri())
        store.engine.dispose()
        SqlAlchemyStore._engine_map.pop(uri, None)
        with contextlib.closing(sqlite3.connect(temporary)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.replace(temporary, path)
    finally:
        alembic.setLevel(levels[0])
        mlflow.setLevel(levels[1])
        for rest in path.parent.iterdir():
            if rest.name.startswith(temporary.name):
                rest.unlink(missing_ok=True)


def _open_read_only(path: Path) -> sqlite3.Connection:
    """An existing file; opening never makes one."""
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=20)


def _check_file(path: Path) -> None:
    """Refuse a file that is no MLflow database, or that a newer MLflow has made."""
    with contextlib.closing(_open_read_only(path)) as db:
        try:
            names = db.execute("SELECT name FROM sqlite_master WHERE type='table'")
            tables = {row[0] for row in names}
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                raise
            raise TrackingError(
                f"track.uri: {path} is no SQLite database ({error}). Move it away, or set "
                "track.uri to another file"
            ) from None
        if "experiments" not in tables or any(t.startswith("_alembic_tmp_") for t in tables):
            raise TrackingError(
                f"track.uri: {path} is not a complete MLflow database. Move it away, or set "
                "track.uri to another file"
            )
        row = db.execute("SELECT version_num FROM alembic_version").fetchone()
    if row is not None and not _knows_revision(row[0]):
        raise TrackingError(_newer_database(str(path), row[0]))


def _knows_revision(revision: str) -> bool:
    """Whether the installed MLflow has this revision of its database's schema."""
    found = importlib.util.find_spec("mlflow")
    if found is None or not found.submodule_search_locations:
        return True
    versions = Path(found.submodule_search_locations[0], "store", "db_migrations", "versions")
    return not versions.is_dir() or any(versions.glob(f"{revision}_*.py"))


def _newer_database(where: str, revision: str) -> str:
    mine = importlib.metadata.version("mlflow")
    return (
        f"the tracking database {where} was made by a newer MLflow (schema {revision}; the "
        f"installed MLflow {mine} does not know it). Install that version or a later one: "
        "pip install --upgrade mlflow. Or set track.uri to another database"
    )


_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Columns of MLflow's tables that hold absolute addresses of artifacts."""


def _relocate(path: Path) -> None:
    """After the database was moved or copied together with its artifacts: name their present place.

    MLflow stores absolute addresses. Experiment 0, which each store has from the start, tells where
    the store was made. Nothing happens to artifacts that stayed where they were.
    """
    new = artifacts_root(path)
    with contextlib.closing(_open_read_only(path)) as db:
        row = db.execute(
            "SELECT artifact_location FROM experiments WHERE experiment_id = 0"
        ).fetchone()
        old = (row[0] if row else "").removesuffix("/0")
        if not old.startswith("file://") or not old.endswith("/" + new.name) or old == new.as_uri():
            return
        was = Path(unquote(old.removeprefix("file://")))
        if was.exists() and (not new.exists() or was.samefile(new)):
            return
        with db:
            for table, column in _LOCATIONS:
                db.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                    f"WHERE substr({column}, 1, ?) = ?",
                    (new.as_uri(), len(old) + 1, len(old) + 1, old + "/"),
                )
            _relocate_runs(db, was.parent, new.parent)
    log.warning(
        "tracking: the store %s was moved or copied from %s; its artifacts are now read from %s",
        path.name,
        was.parent,
        new,
    )


def _relocate_runs(db: sqlite3.Connection, old: Path, new: Path) -> None:
    """Bring the tag `run_dir` of the runs that lay below `old` and are below `new` up to date."""
    tags = db.execute("SELECT run_uuid, value FROM tags WHERE key = 'run_dir'").fetchall()
    for run, value in tags:
        if Path(value).is_relative_to(old):
            here = new / Path(value).relative_to(old)
            if here.is_dir():
                db.execute(
                    "UPDATE tags SET value = ? WHERE key = 'run_dir' AND run_uuid = ?",
                    (str(here), run),
                )


# --- reaching a server ----------------------------------------------------------------------------


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()` in a thread of its own.

    Raises:
        TimeoutError: it has not ended in time; the thread is left alone.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=target, daemon=True, name="ftlib-track-probe")
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def host_and_port(uri: str) -> tuple[str, int] | None:
    """The host and port behind an address; None for files and services.

    Passwords of databases may hold any character, so everything up to the last `@` is left out.
    """
    port = PORTS.get(scheme(uri))
    if port is None or "://" not in uri:
        return None
    place = uri.split("://", 1)[1].rpartition("@")[2]
    found = re.match(r"(\[[0-9A-Fa-f:.]+\]|[^/?#:\[\]]+)(?::(\d+))?(?:[/?#]|$)", place)
    if not found:
        return None
    return found[1].strip("[]"), int(found[2] or port)


def reach(uri: str, seconds: float = REACH_SECONDS) -> None:
    """Ask the store something small.

    Raises:
        TrackingError: it cannot be reached, refuses, or does not answer within `seconds`.
    """
    _require_plugin(uri)
    try:
        import_mlflow(uri)  # takes seconds, which are not the server's
        started = time.monotonic()
        place = host_and_port(uri)
        if place is not None:
            socket.create_connection(place, timeout=min(5.0, seconds)).close()
        if scheme(uri) in DATABASE_SCHEMES:
            _open_database(lambda: client(uri).search_experiments(max_results=1))
            return
        mlflow = client(uri)
        left = max(1.0, seconds - (time.monotonic() - started))
        within(left, lambda: mlflow.search_experiments(max_results=1))
    except Exception as error:
        raise TrackingError(why_unreachable(uri, error)) from None


def _open_database(ask: Callable[[], object]) -> None:
    """`ask()`, which makes MLflow's tables in an empty database.

    Where several processes start at once, one makes them and the others meet half of them
    ("relation already exists", "out-of-date database schema"): these ask again until it is done.
    """
    end = time.monotonic() + TABLES_SECONDS
    while True:
        try:
            within(max(1.0, end - time.monotonic()), ask)
            return
        except Exception as error:
            if not _half_made(error) or time.monotonic() > end:
                raise
        time.sleep(random.uniform(0.5, 1.5))


def _half_made(error: BaseException) -> bool:
    """Whether a database's error is one of tables, not of the connection or of rights."""
    from sqlalchemy import exc

    kinds = (exc.IntegrityError, exc.ProgrammingError, exc.InternalError)
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, kinds) or "out-of-date database schema" in str(chain):
            return "permission denied" not in str(chain)
        chain = chain.__cause__ or chain.__context__
    return False


def _require_plugin(uri: str) -> None:
    package = SERVICES.get(scheme(uri), "")
    if not package:
        return
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise TrackingError(
            f"track.uri = {redact_address(uri)}: MLflow needs a plugin for it. Run: "
            f"pip install {package}"
        ) from None


def first_line(error: BaseException | None, limit: int = 300) -> str:
    """The first line of an error's text, without secrets and a full stop; or its type's name."""
    text = redact(str(error)).strip().splitlines() if error is not None else []
    return text[0][:limit].rstrip(".") if text else type(error).__name__


def why_unreachable(uri: str, error: Exception) -> str:
    """One sentence about what is wrong with a store, and what to do."""
    why, where = first_line(error), redact_address(uri)
    status = getattr(error, "get_http_status_code", lambda: 0)()
    if found := re.search(r"Can't locate revision identified by '(\w+)'", str(error)):
        return _newer_database(where, found[1])
    if "schema" in why.lower() and re.search(r"out[- ]of[- ]date", why, re.IGNORECASE):
        return (
            f"the tracking database {where} was made by an older MLflow. Make a backup, then run: "
            f"mlflow db upgrade {where}"
        )
    if status in (401, 403):
        return (
            f"the tracking server {where} refuses access ({why}). Set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN); if it says that the host is not "
            "allowed, start the server with --allowed-hosts"
        )
    if isinstance(error, ModuleNotFoundError):
        return (
            f"the tracking database {where} needs a driver that is not installed ({why}). Install "
            "it, or name another in the address, such as postgresql+psycopg2://"
        )
    is_server = scheme(uri) in SERVER_SCHEMES
    command = job_command("track", "ui")
    start = f"Start it ({command} prints how), correct" if is_server else "Correct"
    return (
        f"the tracking server {where} cannot be reached ({why}). {start} track.uri or "
        f"MLFLOW_TRACKING_URI, {_OFFLINE_HINT}"
    )


# --- experiments ----------------------------------------------------------------------------------

NOTE_TAG = "mlflow.note.content"
FIRST_NOTE = (
    "[Open the charts of all runs]"
    "(#/experiments/{id}/runs?workflowType=machine_learning&compareRunsMode=CHART"
    "&viewStateShareKey=ftlib-phases)  \n"
    "**Views** (above the table) has the columns and charts for each purpose."
)
"""The note of an experiment without results; `experiment_note` writes the later ones."""
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    NOTE_TAG: FIRST_NOTE,
}


def ensure_experiment(mlflow: MlflowClient, name: str, uri: str) -> str:
    """The id of the experiment, which is made if need be.

    With SQLite its artifacts go below the database's folder.

    Raises:
        TrackingError: it has been deleted, or its artifacts would go to a disk of the server's that
            this machine cannot write.
    """
    from mlflow.exceptions import MlflowException

    found = mlflow.get_experiment_by_name(name)
    if found is None:
        path = sqlite_path(uri)
        location = None
        if path is not None:
            folder = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "experiment"
            location = (artifacts_root(path) / folder).as_uri()
        try:
            made = mlflow.create_experiment(name, artifact_location=location)
            for key, value in _EXPERIMENT_TAGS.items():
                mlflow.set_experiment_tag(made, key, value.replace("{id}", str(made)))
        except MlflowException:
            if mlflow.get_experiment_by_name(name) is None:  # no other process was faster
                raise
        found = mlflow.get_experiment_by_name(name)
        assert found is not None
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"the MLflow experiment {name} has been deleted. Restore it (mlflow experiments "
            f"restore --experiment-id {found.experiment_id}) or set track.experiment to another "
            "name"
        )
    if scheme(uri) in SERVER_SCHEMES:
        _check_artifacts(uri, name, found.artifact_location or "")
    return str(found.experiment_id)


def _check_artifacts(uri: str, experiment: str, location: str) -> None:
    """Refuse an artifact folder that only the server can see: clients write it themselves."""
    if scheme(location) not in ("", "file"):
        return
    folder = Path(unquote(location.removeprefix("file://")))
    place = host_and_port(uri)
    is_local = place is not None and place[0] in ("127.0.0.1", "::1", "localhost")
    if is_local:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
    else:
        existing = folder if folder.exists() else folder.parent
    if existing.is_dir() and os.access(existing, os.W_OK):
        return
    raise TrackingError(
        f"the MLflow server {redact_address(uri)} keeps the artifacts of the experiment "
        f"{experiment} in {folder}, a folder on its own disk that this machine cannot write. "
        "Start the server with --artifacts-destination FOLDER instead of "
        "--default-artifact-root, so that it takes artifacts over HTTP, and set track.experiment "
        "to a new name; or mount that folder here"
    )
