"""What a run leaves beside its checkpoints: its recipe, scores, figures and packaged model."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.config import Run
from ftlib.data.shards import Dataset
from ftlib.gc_pause import gc_resumed
from ftlib.launch import gates
from ftlib.launch.outcome import Outcome
from ftlib.paths import home, job_command, local_run_folder, run_words
from ftlib.settings import ConfigError, to_dict
from ftlib.storage import join
from ftlib.track.tracking import TrackedRun
from ftlib.track.writer import Writer
from ftlib.training import checkpoint
from ftlib.training.initial_weights import InitialWeights, LoadedModel, load_run_model

if TYPE_CHECKING:
    from ftlib.report.evaluation_report import EvaluationReport
    from ftlib.report.metrics import TestSplit

log = logging.getLogger("ftlib.launch")

REPORT_IMAGES = 2000
"""Images scored for the report at a run's end: enough for its figures and for the temperature, and
the driver's node may have no GPU. `jobs/evaluate.py RUN` scores all of them."""
MOST_WITHOUT_GPU = 10_000
"""Test pictures that a driver without a GPU scores at a run's end."""
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


def log_start(writer: Writer, run: Run, dataset: Dataset, kind: str = "train") -> None:
    """At the run's start: the whole recipe, the data set and the saved view of all phases.

    `kind` is the MLflow tag. Trials are not in that view; their sweep has views of its own.
    """
    from ftlib.track.views import phases_view

    writer.json(to_dict(run), "run.json")
    writer.dataset(dataset.name, dataset.digest, dataset.path, "training")
    if kind != "train":
        return
    view = phases_view()
    writer.put({"op": "view", "key": view.key, "name": view.name, "state": dict(view.state)})


@contextlib.contextmanager
def system_metrics(run: Run, writer: Writer) -> Iterator[None]:
    """Record CPU, memory, disk and GPU use of the driver's machine while it is entered."""
    if not run.track.system_metrics:
        yield
        return
    from ftlib.track.system_metrics import SystemSampler

    with SystemSampler(writer, disk=str(home().anchor)):
        yield


def figures(
    run_dir: str,
    history: Sequence[Mapping[str, float]],
    *,
    run: Run,
    dataset: Dataset,
    source: InitialWeights | None,
) -> list[str]:
    """Draw the training curves, beside those of the run it started from. Returns the files."""
    from ftlib.report.curves import compared, curves

    folder = local_run_folder(run_dir) / "report"
    drawn: list[str] = []
    with _log_failure("the training curves could not be drawn"):
        folder.mkdir(parents=True, exist_ok=True)
        imagenet = len(dataset.classes) == 1000 and "imagenet" in dataset.name
        expected = EXPECTED.get(run.stage) if imagenet else None
        curves(history, folder / "curves.png", title=run.name, expected=expected)
        drawn.append(str(folder / "curves.png"))
        before = source.result.get("history") if source is not None else None
        if source is not None and before:
            name = source.run_name or "before"
            compared({name: before, run.name: history}, folder / "phases.png")
            drawn.append(str(folder / "phases.png"))
    return drawn


@contextlib.contextmanager
def _log_failure(what: str) -> Iterator[None]:
    """Log an error of what is made from a finished run, and go on: the run itself is not lost."""
    try:
        yield
    except Exception as error:
        log.warning("%s (%s: %s)", what, type(error).__name__, error)


def log_end(
    tracked: TrackedRun, writer: Writer, run: Run, dataset: Dataset, outcome: Outcome
) -> list[str]:
    """At the run's end: final scores at step 0, gates, figures, report and packaged model.

    Returns the report's files.
    """
    writer.metrics({**outcome.metrics, **_start_scores(outcome)}, step=0)
    if outcome.test:
        writer.metrics(outcome.test.metrics, step=0)
    writer.tags(gates.tags(outcome.gates))
    if outcome.gates:
        table = {
            "columns": ["gate", "wanted", "got", "passed"],
            "data": [[g.name, g.wanted, g.got, g.passed] for g in outcome.gates],
        }
        writer.json(table, "gates.json")
    for figure in outcome.figures:
        writer.artifact(figure, "figures")
    if not (run.track.log_model and outcome.best_dir):
        return []
    again = job_command("evaluate", run_words(outcome.run_dir))
    loaded = None
    with _log_failure(f"the best model could not be read for report and package; later: {again}"):
        loaded = load_run_model(outcome.run_dir)
    if loaded is None:
        return []
    written: list[str] = []
    temperature, fitted_on = 1.0, "nothing: it could not be fitted"
    with _log_failure(f"the report of errors could not be written; later: {again}"):
        report = _report(loaded, dataset, outcome)
        calibration = report.scored.calibration
        temperature, fitted_on = calibration.temperature, calibration.fitted_on
        writer.metrics({f"report/{k}": v for k, v in report.scored.plain.items()}, step=0)
        for file in report.files:
            writer.artifact(file, "report")
        written = [str(file) for file in report.files]
    again = job_command("export", f"{run_words(outcome.run_dir)} --out FOLDER --formats mlflow")
    with _log_failure(f"the model could not be packaged; once there is room: {again}"):
        out = _package(loaded, dataset, outcome, temperature=temperature, fitted_on=fitted_on)
        tracked.log_model(out, step=int(outcome.metrics.get("best/epoch", 0)))
    return written


def score_test(outcome: Outcome, dataset: Dataset, say: Callable[[str], None]) -> TestSplit | None:
    """Scores of the best model on `test`; None where there is none, or too much for this CPU."""
    if "test" not in dataset.splits or not outcome.best_dir:
        return None
    import torch

    count = len(dataset.split("test"))
    if count > MOST_WITHOUT_GPU and not torch.cuda.is_available():
        again = job_command("evaluate", run_words(outcome.run_dir))
        say(
            f"{outcome.name}: {count:,} test pictures are many for a machine without a GPU. Score "
            f"them where there is one: {again} --split test"
        )
        return None
    from ftlib.report.evaluation import load, score_test

    with _log_failure("the test split could not be scored"), gc_resumed():
        return score_test(load(outcome.run_dir), dataset)
    return None


def _start_scores(outcome: Outcome) -> dict[str, float]:
    """The score of the starting model and the gain over it; empty for a run from scratch."""
    if outcome.start_top1 is None:
        return {}
    metrics = outcome.metrics
    best = metrics.get("best/val_top1", metrics.get("best/tuning_top1", 0.0))
    return {"start/top1": outcome.start_top1, "best/gain": round(best - outcome.start_top1, 4)}


def _report(loaded: LoadedModel, dataset: Dataset, outcome: Outcome) -> EvaluationReport:
    """Confusions, worst mistakes and calibration of the best model on REPORT_IMAGES at most."""
    from ftlib.report.evaluation_report import report_run

    return report_run(
        loaded,
        outcome.run_dir,
        dataset,
        out=local_run_folder(outcome.run_dir) / "report",
        split="tuning" if loaded.run.data.tuning_fraction else "val",
        limit=REPORT_IMAGES,
        test=outcome.test,
    )


def _package(
    loaded: LoadedModel,
    dataset: Dataset,
    outcome: Outcome,
    *,
    temperature: float,
    fitted_on: str,
) -> Path:
    """Package the best model with its temperature. Returns the folder."""
    from ftlib.packaging.package import package

    out = local_run_folder(outcome.run_dir) / "model"
    shutil.rmtree(out, ignore_errors=True)
    return package(
        loaded.model,
        loaded.run,
        loaded.classes,
        scores=outcome.metrics,
        temperature=temperature,
        out=out,
        data={
            "name": dataset.name,
            "digest": dataset.digest,
            "rules": dataset.manifest["made"].get("rules"),
        },
        calibrated_on=fitted_on,
    )


def model_finder(run: Run, root: str) -> Callable[[str], str]:
    """For `resolve_init`: a function from an MLflow address to the folder of its run's best model.

    Addresses are mlflow:RUN_ID, models:/NAME@ALIAS and models:/NAME/VERSION.
    """

    def find(wanted: str) -> str:
        tags = _mlflow_run_tags(wanted, run.track.uri)
        run_dir, run_name = tags.get("run_dir", ""), tags.get("run_name", "?")
        folder = best_folder(run_dir) or best_folder(join(root, run_name))
        if not folder:
            raise ConfigError(
                f"model.init_from = {wanted}: its run keeps its models in "
                f"{run_dir or 'an unknown place'}, which cannot be read here. "
                "Copy that folder here and name it with file:PATH"
            )
        return folder

    return find


def _mlflow_run_tags(wanted: str, tracking_uri: str) -> dict[str, str]:
    """Tags of the MLflow run that `wanted` names. Raises ConfigError or TrackingError."""
    from ftlib.track.store import client, ensure_store, reach, resolve_uri

    uri = resolve_uri(tracking_uri)
    ensure_store(uri)
    reach(uri)
    mlflow = client(uri)
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
        return dict(mlflow.get_run(str(run_id)).data.tags)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.init_from = {wanted}: MLflow does not know it ({reason}). "
            "Use mlflow:RUN_ID, models:/NAME@ALIAS or models:/NAME/VERSION"
        ) from None
