"""Saved views: MLflow's tables and charts set up for a purpose before anybody clicks.

MLflow keeps a named view as an experiment tag `mlflow.sharedViewState.<key>` that holds the page's
state, deflated. There is no public interface for it, so views are written only for versions whose
format is known, and a failure to write one never matters. A view that a person has changed in the
browser ("Override saved view") is left alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

TAG = "mlflow.sharedViewState."
OLDEST, NEWEST = (3, 15), (3, 99)
"""MLflow versions whose pages read this format."""
LARGEST_TAG = 20000
COLUMN_WIDTH = 110
"""Pixels; MLflow's own width shows half as many columns."""
PHASES = "ftlib-phases"
OBSOLETE = ("ftlib-phases-tuning",)
"""Keys of views that older versions wrote; they are removed."""


@dataclass(frozen=True)
class View:
    """A saved view: its key (in links), its name (in the Views menu) and the page's state."""

    key: str
    name: str
    state: Mapping[str, Any]


def is_known_version(version: str) -> bool:
    """Whether pages of this MLflow version read the views written here."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST


def metric(key: str) -> str:
    return f"metrics.`{key}`"


def param(key: str) -> str:
    return f"params.`{key}`"


def tag(key: str) -> str:
    return f"tags.`{key}`"


# --- charts ---------------------------------------------------------------------------------------


def _chart(kind: str, section: str, **settings: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        **settings,
    }


def line(section: str, *metrics: str, title: str = "", log_scale: bool = False) -> dict[str, Any]:
    return _chart(
        "LINE",
        section,
        metricKey=metrics[0],
        selectedMetricKeys=list(metrics),
        displayName=title or " and ".join(metrics),
        xAxisKey="step",
        yAxisKey="metric",
        scaleType="log" if log_scale else "linear",
        xAxisScaleType="linear",
        lineSmoothness=0,
        useGlobalLineSmoothing=True,
        useGlobalXaxisKey=True,
        selectedXAxisMetricKey="",
        yAxisExpressions=[],
        range={},
        ignoreOutliers=False,
    )


def bar(section: str, key: str) -> dict[str, Any]:
    return _chart("BAR", section, metricKey=key)


def scatter(section: str, setting: str, score: str) -> dict[str, Any]:
    return _chart(
        "SCATTER",
        section,
        xaxis={"key": setting, "type": "PARAM"},
        yaxis={"key": score, "type": "METRIC"},
        runsCountToCompare=100,
    )


def parallel(section: str, settings: Sequence[str], score: str) -> dict[str, Any]:
    return _chart(
        "PARALLEL",
        section,
        selectedParams=list(settings),
        selectedMetrics=[score],
        showAllRuns=False,
        runsCountToCompare=100,
    )


def table(section: str, title: str) -> dict[str, Any]:
    return _chart(
        "DIFFERENCE",
        section,
        compareGroups=["Model metrics", "Parameters"],
        chartName=title,
        showChangeFromBaseline=True,
        showDifferencesOnly=True,
        baselineColumnUuid="",
    )


def _state(
    search: str,
    order_by: str,
    columns: Sequence[str],
    sections: Sequence[tuple[str, int, int, Sequence[dict[str, Any]]]],
    ascending: bool = False,
) -> dict[str, Any]:
    """The page's state. Sections are (title, charts per row, height in pixels, charts)."""
    charts = []
    for number, (_, _, _, members) in enumerate(sections):
        charts += [
            {"uuid": f"s{number}c{position}", **chart, "metricSectionId": f"s{number}"}
            for position, chart in enumerate(members)
        ]
    return {
        "searchFilter": search,
        "orderByKey": order_by,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": list(columns),  # otherwise each group is in alphabetical order
        "columnWidths": dict.fromkeys(columns, COLUMN_WIDTH),
        "runsHiddenMode": "SHOW_ALL",
        "runsHidden": [],
        "runsVisibilityMap": {},
        "runsPinned": [],
        "runsExpanded": {},
        "compareRunSections": [
            {
                "uuid": f"s{n}",
                "name": title,
                "columns": columns_,
                "cardHeight": height,
                "display": True,
                "isReordered": True,
                "deleted": False,
                "isGenerated": False,
            }
            for n, (title, columns_, height, _) in enumerate(sections)
        ],
        "compareRunCharts": charts,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "autoRefreshEnabled": False,
        "globalLineChartConfig": {
            "xAxisKey": "step",
            "lineSmoothness": 0,
            "selectedXAxisMetricKey": "",
        },
    }


# --- the views ------------------------------------------------------------------------------------


def phases_view() -> View:
    """All training runs side by side: scores, gain over the starting model, curves and settings."""
    score = "best/val_top1"
    columns = [
        metric(score),
        metric("best/gain"),
        metric("best/epoch"),
        param("epochs"),
        tag("dataset"),
        metric("best/val_top5"),
        metric("best/gap"),
        tag("stage"),
        tag("outcome"),
        param("arch"),
        param("size"),
        param("subset"),
        param("lr"),
        param("optimizer"),
        param("dropout"),
        param("mixup_alpha"),
        param("cutmix_alpha"),
        param("randaugment_m"),
        param("init_from"),
        param("seed"),
    ]
    # In one section, of which MLflow leaves out what is empty: results come with a run's end.
    charts = [
        bar("", score),
        bar("", "best/gain"),
        bar("", "best/val_top5"),
        line("", "val/top1"),
        line("", "train/top1"),
        line("", "train/gap"),
        line("", "val/loss"),
        line("", "train/loss"),
        line("", "train/lr", log_scale=True),
        line("", "step/loss"),  # drawn from the first steps on
    ]
    speed = [line("", "train/images_per_s"), line("", "step/lr")]
    sections = [
        ("Results and curves", 3, 320, charts),
        ("What differs", 1, 480, [table("", "Settings and results")]),
        ("Speed", 3, 280, speed),
    ]
    search = "tags.kind = 'train'"
    state = _state(search, "attributes.start_time", columns, sections, ascending=True)
    return View(PHASES, "Phases side by side", state)


def sweep_view(
    sweep: str, params: Sequence[str], split: str = "tuning", finished_only: bool = False
) -> View:
    """A sweep's trials: scores against settings, learning curves, leaderboard.

    Args:
        params: short names of the swept parameters.
        split: the split that trials are scored on.
        finished_only: leave out trials that were stopped early or failed, which squash the axes.
    """
    score = f"best/{split}_top1"
    search = f"tags.sweep = '{sweep}' and tags.kind = 'trial'"
    if finished_only:
        search += " and tags.outcome = 'completed'"
    columns = [
        metric(score),
        *[param(p) for p in params],
        metric("best/epoch"),
        metric("train/top1"),
        tag("outcome"),
        tag("reason"),
        param("seed"),
    ]
    columns_per_row = 2 if len(params) in (2, 4) else 3
    scatters = [scatter("", p, score) for p in params]
    curves = [
        line("", f"{split}/best_top1", title="best so far"),
        line("", f"{split}/top1"),
        line("", f"{split}/loss"),
    ]
    sections = [
        ("Which settings win", 1, 400, [parallel("", params, score)]),
        ("Score against each setting", columns_per_row, 300, scatters),
        ("Learning curves", 3, 340, curves),
        ("Leaderboard", 1, 400, [bar("", score)]),
        ("What differs", 1, 480, [table("", "Trials compared")]),
    ]
    key, name = view_key(sweep), f"Sweep {sweep}"
    if finished_only:
        name += ", finished trials"
    else:
        key += "-all"
    return View(key, name, _state(search, metric(score), columns, sections))


def view_key(sweep: str) -> str:
    return "ftlib-" + re.sub(r"[^A-Za-z0-9-]+", "-", sweep)


# --- reading and writing --------------------------------------------------------------------------


def encode(view: View, created: int, updated: int) -> str:
    """The tag's value. Times in milliseconds."""
    packed = base64.b64encode(zlib.compress(json.dumps(dict(view.state)).encode(), 9)).decode()
    return json.dumps(
        {
            "name": view.name,
            "createdAt": created,
            "updatedAt": updated,
            "state": f"deflate;{packed}",
        }
    )


def decode(key: str, value: str) -> View:
    """The reverse of `encode`."""
    outer = json.loads(value)
    packed = outer["state"]
    state = (
        json.loads(zlib.decompress(base64.b64decode(packed.removeprefix("deflate;"))))
        if packed.startswith("deflate;")
        else json.loads(packed)
    )
    return View(key, outer["name"], state)


def server_version(uri: str) -> str:
    """Version of the MLflow that shows the pages: the server's, or this one's without a server."""
    if uri.startswith(("http://", "https://")):
        import requests

        user = os.environ.get("MLFLOW_TRACKING_USERNAME")
        login = (user, os.environ.get("MLFLOW_TRACKING_PASSWORD", "")) if user else None
        answer = requests.get(f"{uri}/version", timeout=5, auth=login)
        return answer.text.strip() if answer.status_code == 200 else ""
    import mlflow

    return mlflow.__version__


def save(mlflow: MlflowClient, experiment_id: str, view: View) -> bool:
    """Write a view, unless a person has changed it since. Returns whether it was written."""
    tags = mlflow.get_experiment(experiment_id).tags
    for key in OBSOLETE:
        if TAG + key in tags:
            mlflow.delete_experiment_tag(experiment_id, TAG + key)
    value, mark = tags.get(TAG + view.key), tags.get(f"ftlib.view.{view.key}")
    now = int(time.time() * 1000)
    created = now
    if value is not None:
        if mark is not None and mark != _digest(value):
            return False
        old = decode(view.key, value)
        if old.state == dict(view.state) and old.name == view.name:
            return False
        created = json.loads(value).get("createdAt", now)
    new = encode(view, created, now)
    if len(new) > LARGEST_TAG:
        return False
    mlflow.set_experiment_tag(experiment_id, TAG + view.key, new)
    mlflow.set_experiment_tag(experiment_id, f"ftlib.view.{view.key}", _digest(new))
    return True


def _digest(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]
