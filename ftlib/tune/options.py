"""The options of a sweep, as plain values. Imports no Ray, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ftlib.settings import ConfigError

Search = Literal["tpe", "random", "grid"]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """All of a sweep but its recipe and its space."""

    name: str = ""
    """Name of the sweep: the same name with the same settings goes on with it. By default
    SPACE-RECIPE."""
    trials: int = 32
    """Trials in all, the recipe's own and those of earlier starts included. May be raised later."""
    search: Search = "tpe"
    """tpe learns from the trials so far."""
    seed: int = 0
    """Seed of the search. The trials keep the recipe's seed."""
    epochs: int = 0
    """Epochs of a trial. 0: the recipe's, which promotion uses in any case."""
    tuning_fraction: float = 0.0
    """Share of the training images that scores the trials. A recipe that has its own keeps it. 0:
    about a tenth, of images that the starting weights have not seen."""
    early_stopping: bool = True
    """Stop weak trials early (asynchronous successive halving)."""
    grace: int = 0
    """Epochs before a trial may be stopped early. 0: a ninth of its length, at least 1."""
    reduction: float = 3
    """At each rung 1/reduction of the trials go on."""
    grid_points: int = 3
    """Values per continuous setting in a grid."""
    parallel: int = 0
    """Trials at once. 0: as many as the cluster holds, four on CPUs."""
    retry_failed: bool = False
    """Run trials again that failed in an earlier start."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ConfigError(f"--trials {self.trials}: at least 1, the recipe itself")
        if self.epochs < 0 or self.grace < 0 or self.parallel < 0:
            raise ConfigError("--epochs, --grace and --parallel must not be negative")
        if self.reduction <= 1:
            raise ConfigError(
                f"--reduction {self.reduction:g}: must be above 1; 3 lets a third of the trials "
                "go on"
            )
