"""Makes a ready MLflow model folder a logged model of a run, and a version of a registered model.

MLflow's own `log_model` needs a flavor, an active run and the process that trained. This needs
only a folder and can be repeated later, which is what delivering a journal does.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

METRICS_PER_REQUEST = 900


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that is to be logged."""

    path: Path
    """The folder, which holds an MLmodel file."""
    key: str
    """Identifies the model: the same key is logged and registered once."""
    name: str = "model"
    step: int = 0
    """The epoch whose metrics the logged model carries."""
    registered_name: str | None = None
    """Also make it a version of this registered model."""
    alias: str | None = None
    """Point this alias of the registered model at the version."""
    tags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ModelFolder:
        """From a line of a journal."""
        return cls(
            path=Path(record["path"]),
            key=record["key"],
            name=record["name"],
            step=int(record["step"]),
            registered_name=record.get("registered_name"),
            alias=record.get("alias"),
            tags=record.get("tags") or {},
        )


def log_model(
    mlflow: MlflowClient, run_id: str, experiment_id: str, folder: ModelFolder
) -> LoggedModel:
    """Log the folder as a model of the run; register it if it has a registered name.

    The logged model carries the run's metrics at `folder.step`, its `best/*`, `report/*` and
    `test/*`.
    """
    same = mlflow.search_logged_models(
        [experiment_id], filter_string=f"tags.`ftlib.key` = '{folder.key}'", max_results=1
    )
    model = same[0] if same else _create(mlflow, run_id, experiment_id, folder)
    if str(model.status) != "READY":
        _log_metrics(mlflow, run_id, model.model_id, folder.step)
        _upload(mlflow, run_id, model, folder.path)
        mlflow.finalize_logged_model(model.model_id, "READY")
    if folder.registered_name:
        _register(mlflow, run_id, model, folder, folder.registered_name)
    return model


def _create(
    mlflow: MlflowClient, run_id: str, experiment_id: str, folder: ModelFolder
) -> LoggedModel:
    return mlflow.create_logged_model(
        experiment_id,
        name=folder.name,
        source_run_id=run_id,
        model_type="image classifier",
        params=mlflow.get_run(run_id).data.params,
        tags={**folder.tags, "ftlib.key": folder.key},
    )


def _log_metrics(mlflow: MlflowClient, run_id: str, model_id: str, step: int) -> None:
    from mlflow.entities import LoggedModelOutput, Metric

    mlflow.log_outputs(run_id, [LoggedModelOutput(model_id, step=step)])
    points: list[Metric] = []
    for key in mlflow.get_run(run_id).data.metrics:
        if key.startswith(("system/", "step/")):
            continue
        is_final = key.startswith(("best/", "report/", "test/"))
        points += [
            p
            for p in mlflow.get_metric_history(run_id, key)
            if p.step == step or (p.step == 0 and is_final)
        ]
    copies = [
        Metric(p.key, p.value, p.timestamp, p.step, model_id=model_id, run_id=run_id)
        for p in points
    ]
    for start in range(0, len(copies), METRICS_PER_REQUEST):
        mlflow.log_batch(run_id, metrics=copies[start : start + METRICS_PER_REQUEST])


def _upload(mlflow: MlflowClient, run_id: str, model: LoggedModel, path: Path) -> None:
    """Store the folder's files, with the ids of run and model in MLmodel."""
    from mlflow.models import Model

    with tempfile.TemporaryDirectory(prefix="ftlib-model-") as temporary:
        copy = Path(temporary) / "model"
        shutil.copytree(path, copy, ignore=shutil.ignore_patterns("__pycache__"))
        description = Model.load(str(path))
        description.run_id = run_id
        description.model_id = description.model_uuid = model.model_id
        description.artifact_path = model.artifact_location
        description.save(str(copy / "MLmodel"))
        mlflow.log_model_artifacts(model.model_id, str(copy))


def _register(
    mlflow: MlflowClient, run_id: str, model: LoggedModel, folder: ModelFolder, name: str
) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    same = [
        version
        for version in mlflow.search_model_versions(f"name = '{name}'")
        if version.run_id == run_id and (version.tags or {}).get("ftlib.key") == folder.key
    ]
    if same:
        number = same[0].version
    else:
        # A server resolves models:/ itself; without one MLflow would ask the process's own store.
        is_server = mlflow.tracking_uri.startswith("http")
        number = mlflow.create_model_version(
            name,
            source=f"models:/{model.model_id}" if is_server else model.artifact_location,
            run_id=run_id,
            model_id=model.model_id,
            tags={**folder.tags, "ftlib.key": folder.key},
        ).version
    if folder.alias:
        mlflow.set_registered_model_alias(name, folder.alias, number)
