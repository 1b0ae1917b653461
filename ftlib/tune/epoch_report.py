"""What the search keeps of an epoch, and how a trial's own workers report it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback

EPOCH_METRICS = ("loss", "top1", "top5")
"""Metrics of an epoch that the trial store keeps, of the scored split and of training."""


def epoch_point(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """The part of an epoch's metrics that the trial store keeps, with `score`."""
    names = [f"{part}/{name}" for part in (split, "train") for name in EPOCH_METRICS]
    kept = {name: metrics[name] for name in names if name in metrics}
    return {"score": metrics[f"{split}/top1"], **kept}


def epoch_seconds(row: Mapping[str, float], split: str) -> float:
    """Seconds of an epoch's training and evaluation."""
    return row.get("train/epoch_s", 0.0) + row.get(f"{split}/seconds", 0.0)


class TrainReportCallback(TuneReportCallback):
    """For a trial that trains in workers of its own: passes rank 0's epochs on to Tune.

    Made in the trial's process, called in the process of Ray Train's controller.
    """

    def __init__(self, split: str) -> None:
        super().__init__()
        self.split, self.last = split, time.time()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        # An exception here would end the run for good. A missed epoch does not matter.
        with contextlib.suppress(Exception):
            values = metrics[0]
            if f"{self.split}/top1" not in values:
                return
            now = time.time()
            point = epoch_point(values, self.split)
            epoch = {"epoch": int(values["epoch"]), "seconds": now - self.last}
            self._training_actor_item_queue.put({**point, **epoch})
            self.last = now
