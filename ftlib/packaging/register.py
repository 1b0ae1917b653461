"""A package gets a name: a version of a registered model in MLflow, with an alias that says what it is for."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ftlib.packaging.package import PackageError
from ftlib.track.logged_model import log_model
from ftlib.track.store import client, ensure_store, reach

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
    """Attach the package in `folder` to the MLflow run and make it the version of the registered model `name` that `alias` (such as
    candidate or champion) points at. The same package is not registered twice. Returns models:/NAME@ALIAS.

    Raises PackageError for a name or folder that cannot be, TrackingError where the server does not answer.
    """
    for what, value in (("name", name), ("alias", alias)):
        if not NAME.fullmatch(value) or (
            what == "alias" and re.fullmatch(r"(?i)latest|v\d+", value)
        ):
            raise PackageError(
                f"{what} {value!r}: use letters, digits, '.', '_' and '-'"
                + (", and neither latest nor v1" if what == "alias" else "")
            )
    folder = Path(folder)
    if not (folder / "MLmodel").is_file():
        raise PackageError(
            f"{folder} is no package (it has no MLmodel). Make one with jobs/export.py RUN --out DIR --formats mlflow"
        )
    digest = hashlib.sha256(
        (folder / "artifacts" / "model.safetensors").read_bytes()
        + (folder / "artifacts" / "meta.json").read_bytes()
    ).hexdigest()
    ensure_store(uri)
    reach(uri)
    log_model(
        client(uri),
        run_id,
        experiment_id,
        {
            "path": str(folder),
            "key": f"package-{digest[:24]}",
            "name": "model",
            "step": step,
            "registered_name": name,
            "alias": alias,
        },
    )
    return f"models:/{name}@{alias}"
