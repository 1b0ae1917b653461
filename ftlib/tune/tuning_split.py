"""Chooses the images that score a sweep's trials: training images that the starting weights have
not seen.

Trials that start from Phase 1 would otherwise be scored on images that their weights have learnt.
Such scores can be too high, and highest for the trials that forget least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ftlib.config import Data
from ftlib.data import sampler
from ftlib.settings import ConfigError
from ftlib.tune.statistics import standard_error
from ftlib.tune.train_trial import SweepInputs

FRACTION = 0.1
"""Default size of the tuning split, as a fraction of the images that the trials train on."""
ENOUGH = 10_000
"""Where the images lie outside the subset and cost no training, up to this many are taken: a score
of 10,000 images has a standard error of at most 0.5 points."""
SMALLEST = 0.02
"""Smallest default split, as a fraction of all training images."""
LARGE_ERROR = 2.0
"""Standard error of a score, in points, with which a search finds large effects only."""


@dataclass(frozen=True)
class TuningSplit:
    """Where a sweep's scores come from."""

    source: Literal["subset", "reserve"]
    """See `data.tuning_source`."""
    fraction: float
    images: int
    seen: int
    """Of its images those that the starting weights have seen; above 0 only in sweeps that an
    earlier version began."""

    @property
    def changes(self) -> dict[str, object]:
        """Settings of the recipe that make trials use it."""
        return {"data.tuning_fraction": self.fraction, "data.tuning_source": self.source}


def measure(
    data: Data, inputs: SweepInputs, source: Literal["subset", "reserve"], fraction: float
) -> TuningSplit:
    """The split of these settings, with its size and how much of it has been seen."""
    changed = replace(data, tuning_fraction=fraction, tuning_source=source)
    _, rows = sampler.run_rows(inputs.labels, changed)
    return TuningSplit(source, fraction, len(rows), int(inputs.seen[rows].sum()))


def choose(data: Data, inputs: SweepInputs, fraction: float = 0.0) -> TuningSplit:
    """A tuning split of unseen images.

    A recipe that has its own split keeps it. Otherwise the images come from the reserve (see
    `data.tuning_source`) or, where those have been seen, from the subset.

    fraction: as the user asked; 0 chooses it.
    Raises ConfigError where images of every such split have been seen.
    """
    if not 0 <= fraction <= 0.5:
        raise ConfigError(
            f"--tuning-fraction {fraction:g}: must lie between 0 and 0.5; 0 chooses a size"
        )
    first: TuningSplit | None = None
    for source, size in _candidates(data, inputs, fraction):
        split = measure(data, inputs, source, size)
        if split.images and not split.seen:
            return split
        first = first or split
    assert first is not None
    weights = " and before it ".join(inputs.seen_by) or inputs.init_uri
    raise ConfigError(
        f"of the {first.images:,} training images that would score the trials, the starting "
        f"weights ({weights}) have seen {first.seen:,}. Their scores would be too high. A sweep "
        "needs images that no run before it was trained on: train the run that it starts from "
        "again with --data.subset 0.9, which leaves a tenth aside; or start from other weights "
        "(--set model.init_from=scratch); or sweep the recipe of the earlier run"
    )


def _candidates(
    data: Data, inputs: SweepInputs, fraction: float
) -> Iterator[tuple[Literal["subset", "reserve"], float]]:
    """(source, fraction) to try, the preferred one first."""
    if data.tuning_fraction:
        yield data.tuning_source, data.tuning_fraction
    elif fraction:
        yield "reserve", fraction
        yield "subset", fraction
    else:
        free = min(FRACTION, ENOUGH / max(len(inputs.labels), 1))
        size = round(max(FRACTION * data.subset, free), 4)
        yield "reserve", size
        for smaller in np.arange(np.floor(100 * size), 100 * SMALLEST - 0.5, -1) / 100:
            if smaller < size:
                yield "reserve", float(smaller)
        yield "subset", FRACTION


def describe(split: TuningSplit, unchecked: Sequence[str] = ()) -> str:
    """Such as `scored on 144 training images that no weights have seen; a score has a standard
    error of up to 4.2 points (--tuning-fraction takes more images)`.

    unchecked: weights and data sets whose images are not known.
    """
    error = standard_error(50, split.images)
    worth = f"; a score has a standard error of up to {error:.1f} points"
    if error > LARGE_ERROR:
        worth += " (--tuning-fraction takes more images)"
    if not split.seen:
        text = f"scored on {split.images:,} training images that no weights have seen"
        if unchecked:
            text += f" (what {', '.join(unchecked)} saw is not known)"
        return text + worth
    return (
        f"scored on {split.images:,} training images, of which the starting weights have seen "
        f"{split.seen:,}: the scores are too high. Start a sweep under another --name for "
        "honest ones"
    )
