"""Temperature scaling (Guo et al. 2017): divide all logits by one number, so that confidence
means accuracy.

It changes no prediction, only the probabilities. The temperature must be fitted on images that are
not scored with it: on the tuning split where a run has one, else by two-fold cross-fitting on the
scored images, each half scaled by the temperature of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np
from scipy.optimize import minimize_scalar

from ftlib.report.metrics import Floats, Ints, check, log_softmax

LOWEST, HIGHEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the scored logits divided by temperatures fitted without them."""

    temperature: float
    """What a deployed model divides its logits by."""
    scaled: Floats
    """float64[n, C]: each image's logits, divided by a temperature that was fitted without it."""
    fitted_on: str
    """On which images, in words."""


def temperature(logits: Floats, labels: Ints) -> float:
    """The temperature with the least negative log-likelihood, between 0.05 and 20.

    A standard normal prior on log T, worth about one image, keeps it finite where every prediction
    is right: the likelihood alone would send T to 0. With a few hundred images and some mistakes it
    makes no difference.
    """
    check(logits, labels)
    rows = np.arange(len(labels))

    def objective(log_t: float) -> float:
        return float(-log_softmax(logits / exp(log_t))[rows, labels].sum() + 0.5 * log_t**2)

    found = minimize_scalar(
        objective, bounds=(log(LOWEST), log(HIGHEST)), method="bounded", options={"xatol": 1e-5}
    )
    return exp(found.x)


def held_out(
    logits: Floats,
    labels: Ints,
    tuning_logits: Floats,
    tuning_labels: Ints,
    split: str = "tuning",
) -> Calibration:
    """Fit on another split, named `split`, and apply to the scored images."""
    t = temperature(tuning_logits, tuning_labels)
    return Calibration(
        t, logits.astype(np.float64) / t, f"{len(tuning_labels):,} images of the {split} split"
    )


def cross_fitted(logits: Floats, labels: Ints, seed: int = 0) -> Calibration:
    """Scale two random halves, each by the temperature of the other.

    The deployed temperature is fitted on all images. With a single image nothing can be held out,
    and the temperature is 1.
    """
    check(logits, labels)
    n = len(labels)
    if n < 2:
        return Calibration(1.0, logits.astype(np.float64), "nothing: there is a single image")
    order = np.random.default_rng(seed).permutation(n)
    scaled = logits.astype(np.float64)
    for fit, apply in ((order[: n // 2], order[n // 2 :]), (order[n // 2 :], order[: n // 2])):
        scaled[apply] = logits[apply] / temperature(logits[fit], labels[fit])
    return Calibration(
        temperature(logits, labels), scaled, f"the {n:,} scored images by two-fold cross-fitting"
    )
