"""Holds the tests of train_trial.py: the three jobs end to end on scikit-learn's digits."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from ftlib.config import Run
from ftlib.settings import from_json

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "stage": "phase2",
    "data": {"path": "digits"},
    "augment": {"size": 16, "crop_scale": [0.5, 1.0], "flip": 0.0},
    "mix": {"mixup_alpha": 0.2},
    "model": {"arch": "shufflenet_v2_x0_5"},
    "optimizer": {"type": "AdamW", "lr": 0.002},
    "train": {"epochs": 3, "batch_size": 64, "microbatch_size": 32, "precision": "fp32"},
    "cluster": {"allow_open": True, "gpus_per_worker": 0},
}


@pytest.fixture
def job(home, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))

    def run(name, *arguments):
        done = subprocess.run(
            [sys.executable, str(ROOT / "jobs" / f"{name}.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=tmp_path,
            env={**os.environ, "FTLIB_HOME": str(home)},
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_sweep_then_promotion_then_comparison(job, home, tmp_path):
    job("prepare", "--source", "digits")
    out = job(
        "sweep",
        "--recipe",
        "recipe.json",
        "--space",
        "quick",
        "--trials",
        "5",
        "--grace",
        "1",
        "--name",
        "q",
    )
    assert "5 trials (" in out and "pruned" in out
    out = job("promote", "q", "--top", "1", "--seeds", "2")
    out = " ".join(out.split())  # lines are wrapped
    assert "points (95 % interval" in out and ("promoted" in out or "keep it" in out)
    if ": promoted" in out:
        assert from_json(
            Run, (tmp_path / "recipes" / "q.json").read_text()
        ).promoted_from.startswith("q/")
    runs = sorted((home / "runs" / "q" / "promotion" / "trials").iterdir())
    assert len(runs) == 4 and all((r / "predictions.npz").exists() for r in runs)
    out = job("compare", *map(str, runs))
    assert "x2" in out and "points (95 % interval" in out
    with sqlite3.connect(home / "mlflow.db") as db:
        statuses = dict(db.execute("select name, status from runs").fetchall())
    assert "RUNNING" not in statuses.values() and {
        "sweep q",
        "promotion q",
        "recipe s42",
        "recipe s43",
    } <= set(statuses)


@pytest.mark.slow
@pytest.mark.timeout(2000)
def test_trials_with_workers_of_their_own(job, home):
    """Nested trainers: epochs reach the search, and a stopped trial leaves no placement group that
    would starve the next one, and no open MLflow run."""
    job("prepare", "--source", "digits")
    out = job(
        "sweep",
        "--recipe",
        "recipe.json",
        "--set",
        'cluster.workers="2"',
        "--space",
        "quick",
        "--trials",
        "3",
        "--grace",
        "1",
        "--reduction",
        "1.01",
        "--name",
        "n",
    )
    assert "per worker" in out and "3 trials (" in out and "0 failed" in out
    with sqlite3.connect(home / "mlflow.db") as db:
        assert "RUNNING" not in {s for (s,) in db.execute("select status from runs")}
