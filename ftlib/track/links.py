"""Addresses of MLflow's pages, and the command that starts its server for a store without one.

Without `workflowType=machine_learning` MLflow opens its pages about language models, so every link
carries it. Links in notes begin with `#/`: they hold on any host and port.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

from ftlib.paths import job_command
from ftlib.track.redact import redact_address
from ftlib.track.store import (
    DATABASE_SCHEMES,
    SERVER_SCHEMES,
    artifacts_root,
    resolve_uri,
    scheme,
    sqlite_path,
)

_TRAINING = "workflowType=machine_learning"


def ui_base(uri: str, port: int = 5000) -> str:
    """Address of the UI, without user and password.

    It is the server's own, or that of the server which `ui_command` starts; empty for services
    whose pages have addresses of their own (Databricks, Azure ML, SageMaker).
    """
    if scheme(uri) in SERVER_SCHEMES:
        parts = urlsplit(uri)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")
    return f"http://127.0.0.1:{port}" if scheme(uri) in DATABASE_SCHEMES else ""


def opened_by(uri: str) -> str:
    """The command that starts the UI of the store `uri`; empty where a server shows it already."""
    if scheme(uri) not in DATABASE_SCHEMES:
        return ""
    shown = redact_address(uri)
    is_default = shown == redact_address(resolve_uri())
    return job_command("track", "ui" if is_default else f"ui --uri {shlex.quote(shown)}")


def place_lines(places: Mapping[str, str], command: str) -> list[str]:
    """What a job prints of where its results are: a line for each name and its path or address.

    Places without an address are left out. `command` starts the UI of MLflow's (`opened_by`).
    """
    shown = {**places, "start UI": command}
    return [f"  {name:<10}  {place}" for name, place in shown.items() if place]


def absolute(uri: str, page: str) -> str:
    """The address of a page that begins with `#/`; empty where the UI has none."""
    base = ui_base(uri)
    return f"{base}/{page}" if base and page else ""


def run_page(experiment_id: str, run_id: str, tab: str = "") -> str:
    """A run's page. `tab` is empty for the overview with its note, or model-metrics for charts."""
    below = f"/{tab}" if tab else ""
    return f"#/experiments/{experiment_id}/runs/{run_id}{below}?{_TRAINING}"


def artifact_page(experiment_id: str, run_id: str, path: str) -> str:
    """An artifact, opened beside the list of its run's files."""
    return f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{quote(path)}?{_TRAINING}"


def experiment_page(experiment_id: str, view_key: str = "", mode: str = "CHART") -> str:
    """The experiment's runs, opened on the charts of a saved view if one is named."""
    view = f"&compareRunsMode={mode}&viewStateShareKey={quote(view_key)}" if view_key else ""
    return f"#/experiments/{experiment_id}/runs?{_TRAINING}{view}"


def ui_arguments(uri: str, port: int = 5000) -> list[str]:
    """Command line of a server for a database; empty for what has a UI already."""
    if scheme(uri) not in DATABASE_SCHEMES:
        return []
    script = Path(sys.executable).with_name("mlflow")
    arguments = [
        str(script) if script.exists() else "mlflow",
        "server",
        *("--backend-store-uri", uri),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]
    path = sqlite_path(uri)
    if path is not None:
        arguments += ["--default-artifact-root", artifacts_root(path).as_uri()]
    return arguments


UI_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "PYTHONWARNINGS": "ignore",
}
"""Without its job consumers a server takes 0.5 GB and 9 s to start instead of 2.3 GB and 23 s. Its
warnings are for its own authors."""


def ui_command(uri: str, port: int = 5000) -> str:
    """The command that opens the UI, for a person to copy; without passwords."""
    arguments = ui_arguments(uri, port)
    if not arguments:
        return f"open {ui_base(uri) or redact_address(uri)}"
    hidden = redact_address(uri) != uri
    shown = [
        '"$MLFLOW_TRACKING_URI"' if hidden and word == uri else shlex.quote(word)
        for word in arguments
    ]
    return " ".join(["MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false", *shown])
