"""The result of a launch: what the caller of `launch` gets, and what training returns to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ftlib.launch.gates import Gate
from ftlib.report.metrics import TestSplit


class TrainingResult(TypedDict):
    """What training returns (`ftlib.training.loop.train`)."""

    metrics: dict[str, float]
    """best/* and final/* in percent, and the loss."""
    history: list[dict[str, float]]
    """One row of metrics per epoch."""
    split: str
    """The scored split: val or tuning."""
    step: int
    """Optimizer steps taken."""
    best_step: int
    """The step of the best model's weights; 0 where nothing was scored."""
    best_epoch: int


@dataclass(frozen=True)
class Outcome:
    """A run that was launched and has ended well, or was finished before."""

    name: str
    status: str
    """completed; or `finished`, if the run had been completed before."""
    metrics: dict[str, float]
    """best/* and final/* in percent, and the loss."""
    run_dir: str
    best_dir: str
    """Folder of the best model's weights; empty where none was kept."""
    mlflow_run_id: str = ""
    mlflow_url: str = ""
    """The run's page, with its note."""
    mlflow_opened_by: str = ""
    """The command that starts MLflow's UI; empty where a server shows the page."""
    compare_url: str = ""
    """The charts of all training runs on this data set; empty for others, which are not in it."""
    gates: Sequence[Gate] = ()
    start_top1: float | None = None
    """Validation top-1 of the model that the run started from."""
    test: TestSplit | None = None
    """Scores of the best model on the `test` split; None where the set has none."""
    figures: list[str] = field(default_factory=list)
    """Files of the report: PNG, HTML, CSV."""
    seconds: float = 0.0
    """Duration of this launch."""

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)
