"""Learning-rate schedules as pure functions of the step.

Nothing of a schedule is saved but the step, and a resumed run cannot drift from an undisturbed one.
Plateau depends on scores too, so its three numbers are a small value that lives in the training
state.

Values agree with torch.optim.lr_scheduler stepped once per optimizer step
(tests/training/test_schedule.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from typing_extensions import assert_never

from ftlib import config


@dataclass(frozen=True)
class PlateauState:
    """What Plateau remembers; plain numbers, so it can be saved anywhere."""

    best: float | None = None
    """Highest score so far; None before the first."""
    bad_epochs: int = 0
    """Epochs since the best score or the last drop."""
    factor: float = 1.0
    """Product of all drops."""


def plateau_update(cfg: config.Plateau, state: PlateauState, score: float) -> PlateauState:
    """After an epoch with this score (higher is better; NaN counts as no rise): as
    ReduceLROnPlateau(mode="max", threshold=0)."""
    if score > (-math.inf if state.best is None else state.best):
        return replace(state, best=float(score), bad_epochs=0)
    if state.bad_epochs + 1 > cfg.patience:
        return replace(state, bad_epochs=0, factor=state.factor * cfg.factor)
    return replace(state, bad_epochs=state.bad_epochs + 1)


def learning_rate(
    cfg: config.Schedule,
    base_lr: float,
    step: int,
    total_steps: int,
    steps_per_epoch: int,
    plateau: PlateauState | None = None,
) -> float:
    """Learning rate of the optimizer step number `step`, 0 <= step < total_steps.

    Pass `plateau` for Plateau only.
    """
    match cfg:
        case config.Cosine():
            warmup = warmup_steps(cfg.warmup_epochs, steps_per_epoch)
            if step < warmup:
                return base_lr * warmup_factor(step, warmup)
            return cosine(base_lr, cfg.min_lr, step - warmup, total_steps - warmup)
        case config.OneCycle():
            return one_cycle(
                base_lr * cfg.peak,
                step,
                steps=total_steps,
                up=cfg.up,
                div=cfg.div,
                final_div=cfg.final_div,
            )
        case config.Step():
            drops = step // steps_per_epoch // cfg.every_epochs
            return (
                base_lr
                * cfg.gamma**drops
                * warmup_factor(step, warmup_steps(cfg.warmup_epochs, steps_per_epoch))
            )
        case config.Plateau():
            return max(base_lr * (plateau or PlateauState()).factor, cfg.min_lr)
        case config.Constant():
            return base_lr * warmup_factor(step, warmup_steps(cfg.warmup_epochs, steps_per_epoch))
    assert_never(cfg)


def warmup_steps(warmup_epochs: float, steps_per_epoch: int) -> int:
    """Whole steps of warm-up."""
    return round(warmup_epochs * steps_per_epoch)


def warmup_factor(step: int, steps: int) -> float:
    """1/(n+1), 2/(n+1) ... n/(n+1), then 1: the line that is 0 one step before the first, so
    that no step is wasted on a rate of 0."""
    return min(1.0, (step + 1) / (steps + 1))


def cosine(base_lr: float, min_lr: float, step: float, steps: float) -> float:
    """Half a cosine from base_lr at step 0 to min_lr at step `steps` (Loshchilov and Hutter
    2017, eq. 5, without restarts)."""
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * step / steps)) / 2


def one_cycle(
    max_lr: float, step: int, steps: int, up: float, div: float, final_div: float
) -> float:
    """From max_lr/div to max_lr at step up*steps - 1, then to max_lr/div/final_div at the last
    step; both parts half cosines (Smith and Topin 2018, in the shape of torch's OneCycleLR).
    Momentum stays constant."""
    first, top = max_lr / div, up * steps - 1
    if step <= top and top > 0:
        return cosine(first, max_lr, step, top)
    return cosine(max_lr, first / final_div, step - top, steps - 1 - top)
