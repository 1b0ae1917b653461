"""The options of a sweep, as plain values. Imports no Ray, so that `--help` answers at once."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from ftlib.flags import Common
from ftlib.settings import ConfigError

Search = Literal["tpe", "random", "grid"]


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """All of a sweep but its recipe and its space."""

    name: str = ""
    """Name of the sweep: the same name with the same settings goes on with it. By default
    SPACE-RECIPE."""
    trials: Annotated[int, Common] = 32
    """Trials in all, the recipe's own and those of earlier starts included. May be raised later."""
    budget: Annotated[str, Common] = ""
    """Time for all starts of the sweep together, such as 2h, 90m or 1h30m. A trial starts only if
    it is expected to end within it. Empty: no limit. May be raised later."""
    search: Search = "tpe"
    """tpe learns from the trials so far."""
    seed: int = 0
    """Seed of the search. The trials keep the recipe's seed."""
    epochs: Annotated[int, Common] = 0
    """Epochs of a trial. 0: the recipe's, which promotion uses in any case."""
    tuning_fraction: float = 0.0
    """Share of the training images that scores the trials. A recipe that has its own keeps it. 0:
    about a tenth, of images that the starting weights have not seen."""
    early_stopping: bool = True
    """Stop weak trials early (asynchronous successive halving)."""
    grace: int = 0
    """Epochs before a trial may be stopped early. 0: a ninth of its length, at least 2."""
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
        seconds(self.budget)
        if self.reduction <= 1:
            raise ConfigError(
                f"--reduction {self.reduction:g}: must be above 1; 3 lets a third of the trials "
                "go on"
            )

    @property
    def budget_seconds(self) -> float:
        """Infinite without a budget."""
        return seconds(self.budget)


def seconds(text: str) -> float:
    """`1h30m` in seconds; infinite for an empty text. Raises ConfigError."""
    if not text:
        return math.inf
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text.strip().lower())
    try:
        parts = [float(part or 0) for part in found.groups()] if found else []
    except ValueError:
        parts = []
    total = sum(part * unit for part, unit in zip(parts, (3600, 60, 1)))
    if not total:
        raise ConfigError(f"--budget {text}: needs a time such as 2h, 90m or 1h30m")
    return total
