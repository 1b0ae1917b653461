"""The learning-rate range test (Smith 2017, section 3.3): raise the rate from tiny to huge over
some hundred steps of the real recipe and watch the loss.

The steps are the recipe's own: its data, augmentation, mixing, optimizer, clipping, starting
weights. Nothing of it is kept, and nothing of a run is read or written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ftlib.config import OneCycle, Run
from ftlib.data.loader import train_batches
from ftlib.data.shards import Dataset
from ftlib.settings import override
from ftlib.training.initial_weights import InitialWeights
from ftlib.training.loop import Training, WorkerContext

DIVERGED = 4.0
"""The test ends when the loss is this many times the lowest one so far."""
SMOOTH = 0.03
"""Width of the smoothing, as a share of the steps."""
LEAST = 20
"""Fewest steps that can be read."""


class RangeTestError(ValueError):
    """A curve from which no rate can be read; the message says what to change."""


@dataclass(frozen=True)
class Curve:
    """Learning rates, rising by a constant factor, and the training loss (nats) at each, before
    that step's update."""

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def smooth(self) -> NDArray[np.float64]:
        """The losses without their noise: a symmetric average over neighbours, so that nothing
        is moved along the rates."""
        return gaussian_filter1d(self.losses, max(1.0, SMOOTH * len(self.losses)), mode="nearest")


@dataclass(frozen=True)
class Reading:
    """What the curve says."""

    steepest: float
    """Where the loss falls fastest per factor of the rate."""
    minimum: float
    """Where it is lowest; beyond, training falls apart."""

    @property
    def suggestion(self) -> float:
        """The highest rate for a schedule to reach: the steepest place, at most a third of the
        minimum's."""
        return min(self.steepest, self.minimum / 3)


def range_test(
    step: Callable[[float], float], low: float = 1e-7, high: float = 10.0, steps: int = 100
) -> Curve:
    """Call `step(rate)` -> loss with rates from `low` to `high`, a constant factor apart, until
    the loss has diverged."""
    if not 0 < low < high or steps < LEAST:
        raise RangeTestError(
            f"rates from {low:g} to {high:g} in {steps} steps: "
            f"needs 0 < lowest < highest and at least {LEAST} steps"
        )
    rates = np.geomspace(low, high, steps)
    losses: list[float] = []
    for rate in rates:
        loss = step(float(rate))
        if not math.isfinite(loss) or (losses and loss > DIVERGED * min(losses)):
            break
        losses.append(loss)
    return Curve(rates[: len(losses)], np.array(losses))


def read(curve: Curve) -> Reading:
    """Raises RangeTestError where the loss never fell."""
    if len(curve.losses) < LEAST:
        last = float(curve.rates[-1]) if len(curve.rates) else 0.0
        raise RangeTestError(
            f"the loss diverged after {len(curve.losses)} steps, at a rate of {last:.2g}. "
            "Start lower with --low"
        )
    smooth = curve.smooth
    lowest = int(smooth.argmin())
    slope = np.gradient(smooth, np.log(curve.rates))[: lowest + 1]
    fall = smooth[: lowest + 1].max() - smooth[lowest]
    if lowest < 2 or slope.min() >= 0 or fall < 0.01 * abs(smooth[lowest]):
        raise RangeTestError(
            f"the loss never fell between rates of {curve.rates[0]:.2g} and "
            f"{curve.rates[-1]:.2g}. Widen the range (--low, --high), take more --steps, or look "
            "at the recipe"
        )
    return Reading(float(curve.rates[int(slope.argmin())]), float(curve.rates[lowest]))


@contextlib.contextmanager
def recipe_step(
    run: Run,
    dataset: Dataset,
    source: InitialWeights | None = None,
    steps: int = 100,
    device: torch.device | None = None,
    workers: int = 0,
) -> Iterator[Callable[[float], float]]:
    """A `step(rate)` -> mean training loss that carries out the recipe's own optimizer steps,
    one after the other."""
    epochs = max(
        run.train.epochs,
        steps // max(1, len(dataset.split("train")) // run.train.batch_size)
        + 2
        + run.mix.off_epochs,
    )
    run = override(
        run, {"train.ema_decay": 0.0, "train.epochs": epochs}
    )  # more epochs only so that the data suffice
    training = _RangeTraining(
        WorkerContext(
            run,
            dataset,
            run_dir="",
            device=device or torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            source=source,
            loader_workers=workers,
        )
    )
    training.update_frozen(0)
    with contextlib.closing(
        train_batches(
            dataset,
            training.rows,
            run,
            rank=0,
            world=1,
            start_step=0,
            stop_step=steps,
            workers=workers,
        )
    ) as batches:

        def step(rate: float) -> float:
            training.rate_now = rate
            training.train_step(batches, ask=False)
            training.state.step += 1
            assert training.buffer is not None
            loss, _, images = training.buffer.step_sums[:3].tolist()
            return loss / max(images, 1.0)

        yield step


class _RangeTraining(Training):
    """Training whose learning rate is set from outside."""

    rate_now = 0.0

    def learning_rate(self, step: int) -> float:
        return self.rate_now


def applied(run: Run, reading: Reading) -> Run:
    """The recipe with the suggestion as the highest rate its schedule reaches, rounded to two
    digits."""
    peak = run.schedule.peak if isinstance(run.schedule, OneCycle) else 1.0
    rate = float(f"{reading.suggestion / peak:.1e}")
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, lr=rate))
