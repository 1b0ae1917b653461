"""What a run leaves behind beside its checkpoints: its recipe, scores, figures and the packaged model in MLflow, and how such a run is found again."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ftlib.config import Run
from ftlib.data.shards import Dataset
from ftlib.launch import gates
from ftlib.paths import home
from ftlib.settings import ConfigError, to_dict
from ftlib.storage import is_remote, join
from ftlib.training import checkpoint
from ftlib.training.initial_weights import load_run_model

log = logging.getLogger("ftlib.launch")

REPORT_IMAGES = 2000
"""Images scored for the report at a run's end: enough for its figures and for the temperature, and the driver's node may have no GPU.
`jobs/evaluate.py RUN` scores all of them."""
EXPECTED = {
    "phase2": {
        10: (35.0, 30.0),
        20: (52.0, 48.0),
        30: (61.0, 57.0),
        40: (66.0, 63.0),
        50: (68.0, 67.0),
    }
}
"""Epoch -> (train, validation) top-1 in percent to be expected on a fifth of ImageNet."""


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
    from ftlib.track.system_metrics import SystemSampler

    with SystemSampler(writer, disk=str(home().anchor)):
        yield


def figures(
    run_dir: str,
    result: Mapping[str, Any],
    run: Run,
    dataset: Dataset,
    source: Mapping[str, Any] | None,
) -> list[str]:
    """Draw the training curves, beside those of the run it started from, into <run>/report. Returns the files."""
    from ftlib.report.curves import compared, curves

    folder = local_folder(run_dir) / "report"
    drawn: list[str] = []
    with _unharmed("the training curves could not be drawn"):
        folder.mkdir(parents=True, exist_ok=True)
        imagenet = len(dataset.classes) == 1000 and "imagenet" in dataset.name
        curves(
            result["history"],
            folder / "curves.png",
            title=run.name,
            expected=EXPECTED.get(run.stage) if imagenet else None,
        )
        drawn.append(str(folder / "curves.png"))
        before = (source or {}).get("result", {}).get("history")
        if before:
            compared(
                {
                    (source or {}).get("about", {}).get("run", "before"): before,
                    run.name: result["history"],
                },
                folder / "phases.png",
            )
            drawn.append(str(folder / "phases.png"))
    return drawn


@contextlib.contextmanager
def _unharmed(what: str) -> Iterator[None]:
    """A finished run is not lost because something drawn or packaged from it fails: that is logged, and the rest goes on."""
    try:
        yield
    except Exception as error:
        log.warning("%s (%s: %s)", what, type(error).__name__, error)


def local_folder(run_dir: str) -> Path:
    """Where this machine keeps files of the run: with it, or below $FTLIB_HOME where the run is on an object store."""
    return (
        home() / "runs" / run_dir.rstrip("/").rsplit("/", 1)[-1]
        if is_remote(run_dir)
        else Path(run_dir)
    )


def close_run(
    tracked: Any,
    writer: Any,
    run: Run,
    dataset: Dataset,
    outcome: Any,
    metrics: Mapping[str, float],
    checked: list[gates.Gate],
) -> list[str]:
    """Final scores at step 0, gates as tags and as a table, figures, the report of errors and the packaged model. Returns the report's files."""
    start = (
        {}
        if outcome.start_top1 is None
        else {
            "start/top1": outcome.start_top1,
            "best/gain": metrics.get("best/val_top1", metrics.get("best/tuning_top1", 0.0))
            - outcome.start_top1,
        }
    )
    writer.metrics({**metrics, **start}, step=0)
    writer.tags(gates.tags(checked))
    if checked:
        writer.json(
            {
                "columns": ["gate", "wanted", "got", "passed"],
                "data": [[g.name, g.wanted, g.got, g.passed] for g in checked],
            },
            "gates.json",
        )
    for figure in outcome.figures:
        writer.artifact(figure, "figures")
    if not (run.track.log_model and outcome.best_dir):
        return []
    written: list[str] = []
    temperature, fitted_on = 1.0, "nothing: it could not be fitted"
    with _unharmed("the report of errors could not be written"):
        report = _report(run, dataset, outcome)
        temperature, fitted_on = (
            report.scored.calibration.temperature,
            report.scored.calibration.fitted_on,
        )
        writer.metrics({f"test/{k}": v for k, v in report.scored.plain.items()}, step=0)
        for file in report.files:
            writer.artifact(file, "report")
        written = [str(f) for f in report.files]
    with _unharmed(f"the model could not be packaged; its weights are in {outcome.best_dir}"):
        _log_model(tracked, run, dataset, outcome, metrics, temperature, fitted_on)
    return written


def _report(run: Run, dataset: Dataset, outcome: Any) -> Any:
    """Confusions, worst mistakes and calibration of the best model on the validation images (at most REPORT_IMAGES of them)."""
    from ftlib.report.evaluation_report import report_run

    return report_run(
        outcome.run_dir,
        dataset,
        out=local_folder(outcome.run_dir) / "report",
        split="tuning" if run.data.tuning_fraction else "val",
        limit=REPORT_IMAGES,
    )


def _log_model(
    tracked: Any,
    run: Run,
    dataset: Dataset,
    outcome: Any,
    metrics: Mapping[str, float],
    temperature: float,
    fitted_on: str,
) -> None:
    """Package the best model with its temperature and attach it to the run."""
    from ftlib.packaging.package import package

    out = local_folder(outcome.run_dir) / "model"
    loaded = load_run_model(outcome.run_dir)
    shutil.rmtree(out, ignore_errors=True)
    package(
        loaded.model,
        run,
        loaded.classes,
        metrics,
        temperature,
        out,
        {
            "name": dataset.name,
            "digest": dataset.digest,
            "rules": dataset.manifest["made"].get("rules"),
        },
        fitted_on,
    )
    tracked.log_model(out, step=int(metrics.get("best/epoch", 0)))


def fetch(run: Run, root: str) -> Callable[[str], str]:
    """For `resolve_init`: turns mlflow:RUN_ID and models:/NAME@ALIAS (or models:/NAME/VERSION) into the folder of that run's best model."""

    def find(wanted: str) -> str:
        from ftlib.track.store import client, ensure_store, reach, resolve_uri

        uri = resolve_uri(run.track.uri)
        ensure_store(uri)
        reach(uri)
        mlflow: Any = client(uri)
        run_id: str | None
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
            raise ConfigError(
                f"model.init_from = {wanted}: MLflow does not know it ({reason}). Use mlflow:RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION"
            ) from None
        folder = best_folder(tags.get("run_dir", "")) or best_folder(
            join(root, tags.get("run_name", "?"))
        )
        if not folder:
            raise ConfigError(
                f"model.init_from = {wanted}: its run keeps its models in {tags.get('run_dir', 'an unknown place')}, which cannot be read here. "
                "Copy that folder here and name it with file:PATH"
            )
        return folder

    return find
