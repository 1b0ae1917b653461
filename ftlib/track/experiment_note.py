"""The note above an experiment's runs: the best result, its report and the charts, in its first
line, because MLflow shows little more of it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from ftlib.track.links import artifact_page, experiment_page, run_page
from ftlib.track.store import FIRST_NOTE, NOTE_TAG
from ftlib.track.views import PHASES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MARK = "ftlib.note"
"""Tag with the digest of the note as it was written here. A note that a person changed stays."""
KINDS = ("train", "probe")
"""Kinds of runs that may be the best: models to be used, not trials."""
SCORE = "best/val_top1"
REPORT = "report/report.html"


def update(mlflow: MlflowClient, experiment_id: str) -> bool:
    """Name the best run of the experiment in its note. Returns whether the note was changed."""
    tags = mlflow.get_experiment(experiment_id).tags
    known = tags.get(NOTE_TAG, "")
    is_ours = known in ("", FIRST_NOTE.replace("{id}", experiment_id))
    best = _best(mlflow, experiment_id)
    if best is None or not (is_ours or tags.get(MARK) == _digest(known)):
        return False
    note = _text(mlflow, best)
    if note == known:
        return False
    mlflow.set_experiment_tag(experiment_id, NOTE_TAG, note)
    mlflow.set_experiment_tag(experiment_id, MARK, _digest(note))
    return True


def _best(mlflow: MlflowClient, experiment_id: str) -> Run | None:
    """The run of KINDS with the highest score; None where none has one."""
    found: list[Run] = []
    for kind in KINDS:
        found += mlflow.search_runs(
            [experiment_id],
            filter_string=f"tags.kind = '{kind}'",
            order_by=[f"metrics.`{SCORE}` DESC"],
            max_results=1,
        )
    scored = [run for run in found if SCORE in run.data.metrics]
    return max(scored, key=lambda run: run.data.metrics[SCORE], default=None)


def _text(mlflow: MlflowClient, best: Run) -> str:
    experiment, run = best.info.experiment_id, best.info.run_id
    links = [f"[Charts of all runs]({experiment_page(experiment, PHASES)})"]
    if any(file.path == REPORT for file in mlflow.list_artifacts(run, "report")):
        links.insert(0, f"[Report]({artifact_page(experiment, run, REPORT)})")
    score = best.data.metrics[SCORE]
    return (
        f"**Best: {score:.2f} %**, [{best.info.run_name}]({run_page(experiment, run)}). "
        f"{'. '.join(links)}.  \n"
        "**Views** (above the table) has the columns and charts for each purpose."
    )


def _digest(note: str) -> str:
    return hashlib.sha256(note.encode()).hexdigest()[:16]
