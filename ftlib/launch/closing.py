"""What a run leaves behind beside its checkpoints: its recipe, scores, figures and the packaged model in MLflow, and how such a run is found again."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ftlib.config import Run
from ftlib.data.loader import eval_batches
from ftlib.data.shards import Dataset
from ftlib.home import home
from ftlib.launch import gates
from ftlib.learn import checkpoint
from ftlib.learn.evaluate import predict
from ftlib.learn.weights import LoadedModel, load_run_model
from ftlib.storage import is_remote, join
from ftlib.tree import ConfigError, to_dict

log = logging.getLogger("ftlib.launch")

CALIBRATION_IMAGES = 2000
"""Images on which the packaged model's temperature is fitted: one number needs no more, and the driver's node may have no GPU."""


def best_folder(run_dir: str) -> str:
    """Address of the newest best model; empty where none was kept."""
    steps = checkpoint.steps(join(run_dir, "best"))
    return join(run_dir, "best", checkpoint.step_name(steps[0])) if steps else ""


def open_run(writer: Any, run: Run, dataset: Dataset) -> None:
    """The whole recipe and the data set, at the run's start."""
    from ftlib.track.views import phases_view

    writer.json(to_dict(run), "run.json")
    writer.dataset(dataset.name, dataset.digest, dataset.path, "training")
    view = phases_view("tuning" if run.data.tuning_fraction else "val")
    writer.put({"op": "view", "key": view.key, "name": view.name, "state": dict(view.state)})


@contextlib.contextmanager
def system_metrics(run: Run, writer: Any) -> Iterator[None]:
    """CPU, memory, disk and GPU use of the driver's machine while it is entered."""
    if not run.track.system_metrics:
        yield
        return
    from ftlib.track.system import SystemSampler

    with SystemSampler(writer, disk=str(home().anchor)):
        yield


def figures(run_dir: str, result: Mapping[str, Any], run: Run) -> list[str]:
    """Draw the training curves into <run>/report. Returns the files; a figure that fails is no reason to lose a finished run."""
    try:
        from ftlib.report.curves import curves
    except ImportError:
        return []
    folder = local_folder(run_dir) / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "curves.png"
        curves(result["history"], path)
        return [str(path)]
    except Exception as error:
        log.warning("the training curves could not be drawn (%s: %s)", type(error).__name__, error)
        return []


def local_folder(run_dir: str) -> Path:
    """Where this machine keeps files of the run: with it, or below $FTLIB_HOME where the run is on an object store."""
    return home() / "runs" / run_dir.rstrip("/").rsplit("/", 1)[-1] if is_remote(run_dir) else Path(run_dir)


def close_run(tracked: Any, writer: Any, run: Run, dataset: Dataset, outcome: Any, metrics: Mapping[str, float], checked: list[gates.Gate]) -> None:
    """Final scores at step 0, gates as tags and as a table, figures, and the packaged model."""
    start = {} if outcome.start_top1 is None else {"start/top1": outcome.start_top1, "best/gain": metrics.get("best/val_top1", metrics.get("best/tuning_top1", 0.0)) - outcome.start_top1}
    writer.metrics({**metrics, **start}, step=0)
    writer.tags(gates.tags(checked))
    if checked:
        writer.json({"columns": ["gate", "wanted", "got", "passed"], "data": [[g.name, g.wanted, g.got, g.passed] for g in checked]}, "gates.json")
    for figure in outcome.figures:
        writer.artifact(figure, "figures")
    if run.track.log_model and outcome.best_dir:
        log_model(tracked, run, dataset, outcome, metrics)


def log_model(tracked: Any, run: Run, dataset: Dataset, outcome: Any, metrics: Mapping[str, float]) -> None:
    """Package the best model, with a temperature fitted on scored images, and attach it to the run."""
    from ftlib.track.package import package

    out = local_folder(outcome.run_dir) / "model"
    try:
        loaded = load_run_model(outcome.run_dir)
        temperature, on = fit_temperature(loaded, run, dataset)
        shutil.rmtree(out, ignore_errors=True)
        package(loaded.model, run, loaded.classes, metrics, temperature, out, {"name": dataset.name, "digest": dataset.digest}, on)
        tracked.log_model(out)
    except Exception as error:  # the model itself is safe in best/
        log.warning("the model could not be packaged (%s: %s); its weights are in %s", type(error).__name__, error, outcome.best_dir)


def fit_temperature(loaded: LoadedModel, run: Run, dataset: Dataset) -> tuple[float, str]:
    """(temperature, what it was fitted on, in words)."""
    from ftlib.report.calibration import cross_fitted

    split = dataset.split("val") if len(dataset.split("val")) else dataset.split("train")
    rows = np.unique(np.linspace(0, len(split) - 1, min(len(split), CALIBRATION_IMAGES)).round().astype(np.int64))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.closing(eval_batches(split, rows, run.eval_size, run.evaluate.crop, run.evaluate.batch_size, 0)) as batches:
        found = predict(loaded.model.to(device), batches, device, run.data.mean, run.data.std)
    loaded.model.cpu()
    return cross_fitted(found.logits, found.labels).temperature, f"{len(rows):,} images of the {split.name} split"


def fetch(run: Run, root: str) -> Callable[[str], str]:
    """For `resolve_init`: turns mlflow:RUN_ID and models:/NAME@ALIAS (or models:/NAME/VERSION) into the folder of that run's best model."""
    def find(wanted: str) -> str:
        from ftlib.track.store import client, ensure_store, reach, resolve_uri

        uri = resolve_uri(run.track.uri)
        ensure_store(uri)
        reach(uri)
        mlflow = client(uri)
        try:
            if wanted.startswith("mlflow:"):
                run_id = wanted.removeprefix("mlflow:")
            elif "@" in wanted:
                name, alias = wanted.removeprefix("models:/").split("@", 1)
                run_id = mlflow.get_model_version_by_alias(name, alias).run_id
            else:
                name, version = wanted.removeprefix("models:/").split("/", 1)
                run_id = mlflow.get_model_version(name, version).run_id
            tags = mlflow.get_run(run_id).data.tags
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"model.init_from = {wanted}: MLflow does not know it ({reason}). Use mlflow:RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION") from None
        folder = best_folder(tags.get("run_dir", "")) or best_folder(join(root, tags.get("run_name", "?")))
        if not folder:
            raise ConfigError(f"model.init_from = {wanted}: its run keeps its models in {tags.get('run_dir', 'an unknown place')}, which cannot be read here. "
                              "Copy that folder here and name it with file:PATH")
        return folder

    return find
