"""One trial, in the process that Ray Tune gave it: train, report each epoch, and come back with an outcome instead of an exception."""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, Protocol

UNWIND_SECONDS = 60
"""How long a stopped trial may take to close its loader and its MLflow run before its process is given up. Tune's own limit of 2 s would kill the
next trial of that process."""

SHOWN = ("loss", "top1", "top5")
"""Scores of an epoch that go into the ledger, of both splits."""


class Stopped(Exception):
    """Raised inside a trial's training by `report` when the trial shall end now: the search has seen enough of it, or the sweep is ending."""


Report = Callable[[int, Mapping[str, float]], None]
"""report(epoch, metrics with `score`): hands an epoch's result to the search. Raises Stopped."""


class Train(Protocol):
    """What runs a trial: `launch` behind `ftlib.tune.sweep.train_run`, or a stand-in."""

    def __call__(self, config: dict[str, Any], report: Report) -> dict[str, Any]:
        """Train `config["run"]` and return plain values: score, run_dir, mlflow_run_id ..."""


def point(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """The part of an epoch's metrics that the ledger keeps."""
    kept = {
        f"{part}/{name}": metrics[f"{part}/{name}"]
        for part in (split, "train")
        for name in SHOWN
        if f"{part}/{name}" in metrics
    }
    return {"score": metrics[f"{split}/top1"], **kept}


def run_trial(config: dict[str, Any], train: Train) -> None:
    """The Tune function. Failures of the training are a result of the trial; only a process that dies is Tune's to retry."""
    from ray import tune

    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(UNWIND_SECONDS)
    began = time.monotonic()
    clock = [began]

    def report(epoch: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        point = {k: float(v) for k, v in metrics.items()} | {
            "epoch": int(epoch),
            "seconds": now - clock[0],
        }
        clock[0] = now
        try:
            tune.report(point)
        except SystemExit:  # Tune's way to end this thread at its next report
            raise Stopped(
                "stopped early: others do better after the same number of epochs, or the sweep is ending"
            ) from None

    try:
        final = {
            "outcome": "completed",
            "result": {**train(config, report), "wall_seconds": time.monotonic() - began},
        }
    except Stopped:
        sys.exit(0)
    except Exception as error:
        final = {
            "outcome": "failed",
            "reason": reason(error),
            "result": {"traceback": traceback.format_exc(limit=-20)},
        }
    free_memory()
    tune.report({"ended": True, **final})


def reason(error: BaseException) -> str:
    """One line that says why a trial failed."""
    text = str(error).strip().splitlines()
    kind = type(error).__name__
    if kind == "OutOfMemoryError" or "out of memory" in str(error).lower():
        kind = "out of memory"
    return f"{kind}: {text[0][:300]}" if text else kind


def free_memory() -> None:
    """Give back what a trial held, since its process goes on with the next one."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
