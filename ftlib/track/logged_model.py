"""A ready MLflow model folder becomes a logged model of a run, and a version of a registered model if asked.

MLflow's own `log_model` wants a flavour, an active run and the process that trained; this wants a folder, so that it can be repeated later.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

METRICS_PER_REQUEST = 900


def log_model(
    mlflow: MlflowClient, run_id: str, experiment_id: str, record: dict[str, Any]
) -> None:
    """A ready MLflow model folder as a logged model of the run, with the run's metrics at `step`; registered if a name is given."""
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    folder = Path(record["path"])
    description = Model.load(str(folder))
    same = mlflow.search_logged_models(
        [experiment_id], filter_string=f"tags.`ftlib.key` = '{record['key']}'", max_results=1
    )
    run = mlflow.get_run(run_id)
    model = (
        same[0]
        if same
        else mlflow.create_logged_model(
            experiment_id,
            name=record["name"],
            source_run_id=run_id,
            model_type=record.get("model_type") or "image classifier",
            params=run.data.params,
            tags={**record.get("tags", {}), "ftlib.key": record["key"]},
        )
    )
    if str(model.status) != "READY":
        mlflow.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=record["step"])])
        points = [
            m
            for key in run.data.metrics
            if not key.startswith(("system/", "step/"))
            for m in mlflow.get_metric_history(run_id, key)
            if m.step == record["step"] or (m.step == 0 and key.startswith(("best/", "test/")))
        ]
        for start in range(0, len(points), METRICS_PER_REQUEST):
            mlflow.log_batch(
                run_id,
                metrics=[
                    Metric(
                        p.key, p.value, p.timestamp, p.step, model_id=model.model_id, run_id=run_id
                    )
                    for p in points[start : start + METRICS_PER_REQUEST]
                ],
            )
        with tempfile.TemporaryDirectory(prefix="ftlib-model-") as temporary:
            copy = Path(temporary) / "model"
            shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
            (
                description.run_id,
                description.model_id,
                description.model_uuid,
                description.artifact_path,
            ) = run_id, model.model_id, model.model_id, model.artifact_location
            description.save(str(copy / "MLmodel"))
            mlflow.log_model_artifacts(model.model_id, str(copy))
        mlflow.finalize_logged_model(model.model_id, "READY")
    name = record.get("registered_name")
    if name:
        try:
            mlflow.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # A server resolves models:/ itself; without one MLflow would look the model up in the process's default store.
        source = (
            f"models:/{model.model_id}"
            if mlflow.tracking_uri.startswith("http")
            else model.artifact_location
        )
        versions = [
            v
            for v in mlflow.search_model_versions(f"name = '{name}'")
            if v.run_id == run_id and (v.tags or {}).get("ftlib.key") == record["key"]
        ]
        version = (
            versions[0]
            if versions
            else mlflow.create_model_version(
                name,
                source=source,
                run_id=run_id,
                model_id=model.model_id,
                tags={**record.get("tags", {}), "ftlib.key": record["key"]},
            )
        )
        if record.get("alias"):
            mlflow.set_registered_model_alias(name, record["alias"], version.version)
