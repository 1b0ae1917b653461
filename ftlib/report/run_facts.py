"""What a run's report says beside its scores: curves, settings off the recipe, its MLflow page."""

from __future__ import annotations

from dataclasses import dataclass

from ftlib import recipes, settings, storage
from ftlib.config import NOT_IN_FINGERPRINT, Run
from ftlib.paths import local_run_folder
from ftlib.track.links import absolute, run_page


@dataclass(frozen=True)
class RunFacts:
    """Each is empty where the run has none."""

    curves: bytes = b""
    """Training curves, PNG."""
    changed: tuple[tuple[str, str, str], ...] = ()
    """(setting, the recipe's value, the run's), of what decides the result."""
    mlflow: str = ""
    """Address of its page in MLflow, on the port that `make ui` takes."""


def run_facts(run: Run, run_dir: str) -> RunFacts:
    """The facts of the run in `run_dir`; `run` is its recipe."""
    drawn = local_run_folder(run_dir) / "report" / "curves.png"
    return RunFacts(
        curves=drawn.read_bytes() if drawn.is_file() else b"",
        changed=_changed(run),
        mlflow=_mlflow_page(run_dir),
    )


def _changed(run: Run) -> tuple[tuple[str, str, str], ...]:
    """What differs from the recipe of the run's stage; nothing where there is no such recipe."""
    if run.stage not in recipes.available():
        return ()
    found = settings.differences(recipes.load(run.stage), run)
    return tuple(
        (path, str(recipe), str(own))
        for path, (recipe, own) in found.items()
        if not any(path == out or path.startswith(f"{out}.") for out in NOT_IN_FINGERPRINT)
    )


def _mlflow_page(run_dir: str) -> str:
    known = (storage.read_json(storage.join(run_dir, "run.json")) or {}).get("mlflow") or {}
    if not known.get("run_id"):
        return ""
    return absolute(known.get("uri", ""), run_page(known["experiment_id"], known["run_id"]))
