"""Epochs of a trial that trains in workers of its own: from Ray Train's controller to the Tune trial that started it."""

from __future__ import annotations

import time
from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback

from ftlib.tune.trial import point


class TrainReportCallback(TuneReportCallback):
    """Hands each scored epoch's metrics of rank 0 to Tune. Made in the trial's process, called in the controller's."""

    def __init__(self, score: str) -> None:
        super().__init__()
        self.score, self.clock = score, time.time()

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        try:
            values = metrics[0]
            if self.score not in values:
                return
            now = time.time()
            split = self.score.split("/")[0]
            self._training_actor_item_queue.put(
                {**point(values, split), "epoch": int(values["epoch"]), "seconds": now - self.clock}
            )
            self.clock = now
        except Exception:  # in Ray's controller an exception would end the run for good; an epoch that the search missed does not matter
            return
