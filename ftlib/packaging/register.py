"""Gives a package a name: a version of a registered model in MLflow, with an alias."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ftlib.packaging.package import PackageError
from ftlib.track.logged_model import ModelFolder, log_model
from ftlib.track.store import client, ensure_store, reach

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)


def register(
    folder: str | Path,
    name: str,
    alias: str,
    *,
    uri: str,
    run_id: str,
    experiment_id: str,
    step: int = 0,
) -> str:
    """Attach a package to its MLflow run and make it a version of a registered model.

    The same package is not registered twice; the alias moves to it.

    Args:
        folder: the package.
        name: of the registered model.
        alias: that points at the version, such as candidate or champion.
        uri: the tracking address of the store that holds the run.
        step: the epoch whose metrics the logged model carries.

    Returns:
        models:/NAME@ALIAS.

    Raises:
        PackageError: for a name, alias or folder that cannot be.
        TrackingError: the store does not answer.
    """
    _check_name("name", name)
    _check_name("alias", alias)
    if _RESERVED_ALIAS.fullmatch(alias):
        raise PackageError(f"alias {alias!r}: latest, v1, v2 ... have a meaning in MLflow already")
    folder = Path(folder)
    if not (folder / "MLmodel").is_file():
        raise PackageError(
            f"{folder} is no package (it has no MLmodel). Make one with jobs/export.py RUN --out "
            "DIR --formats mlflow"
        )
    model = ModelFolder(
        path=folder,
        key=f"package-{_digest(folder)[:24]}",
        step=step,
        registered_name=name,
        alias=alias,
    )
    ensure_store(uri)
    reach(uri)
    log_model(client(uri), run_id, experiment_id, model)
    return f"models:/{name}@{alias}"


def _check_name(what: str, value: str) -> None:
    if not NAME.fullmatch(value):
        raise PackageError(
            f"{what} {value!r}: use letters, digits, '.', '_' and '-', at most 128, and begin with "
            "a letter or digit"
        )


def _digest(folder: Path) -> str:
    """sha256 over what decides the package's answers: weights and description."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "meta.json"):
        digest.update((folder / "artifacts" / name).read_bytes())
    return digest.hexdigest()
