"""Whether one recipe is better than another: a paired bootstrap over images and seeds, and Holm's
correction.

Runs of the same seed are paired, and so are their predictions for the same validation image: an
image that both get wrong says nothing about their difference. The bootstrap has two sources of
variation, the images (would other images show the same?) and the seeds (would other runs?), and
adds them up as crossed random effects (Owen 2007, The pigeonhole bootstrap).

Resampling a handful of seeds understates their spread: with five, a difference is found in up to a
tenth of the cases where there is none. The seeds' part is therefore widened by sqrt(S / (S-1)), the
bias of a variance of S values, and each draw is divided by sqrt(chi2(S-1) / (S-1)), which turns the
bootstrap's normal distribution into Student's t with S-1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REPLICATES = 20_000


@dataclass(frozen=True)
class Difference:
    """How much better `a` is than `b`, in points of top-1 (percent)."""

    points: float
    low: float
    high: float
    """Ends of the interval with the asked coverage."""
    p_better: float
    """One-sided p-value of "a is no better than b"."""
    p_different: float
    """Two-sided p-value of "a and b are equally good"."""
    seeds: int
    images: int
    se_images: float
    """Standard error from the choice of images, in points."""
    se_seeds: float
    """Standard error from the choice of seeds, in points; NaN with one seed."""
    coverage: float = 0.95

    def __str__(self) -> str:
        return (
            f"{self.points:+.2f} points, {100 * self.coverage:g} % interval {self.low:+.2f} to "
            f"{self.high:+.2f}, p = {self.p_better:.3g}"
        )


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    *,
    coverage: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Difference:
    """Difference of two correctness matrices bool[seeds, images], paired by row and column.

    With one row the interval covers the choice of images only. Raises ValueError where the shapes
    differ.
    """
    a, b = np.atleast_2d(np.asarray(a)), np.atleast_2d(np.asarray(b))
    if a.shape != b.shape or a.ndim != 2 or 0 in a.shape:
        raise ValueError(
            f"cannot pair predictions of shape {a.shape} with {b.shape}: both need the same seeds "
            "and the same images"
        )
    d = a.astype(np.int8) - b.astype(np.int8)
    seeds, images = d.shape
    rng = np.random.default_rng(seed)
    mean = float(d.mean())

    # Images: the sum over seeds takes at most 2S+1 values, so a resample of 50,000 images is one
    # multinomial draw of their counts.
    values, counts = np.unique(d.sum(axis=0, dtype=np.int64), return_counts=True)
    drawn = rng.multinomial(images, counts / images, size=replicates) @ values / (images * seeds)
    image_part = drawn - mean
    seed_part = np.zeros(replicates)
    se_seeds = float("nan")
    if seeds > 1:
        of_seed = d.mean(axis=1) - mean
        # The variation of single predictions (one seed, one image) is in both parts. It is taken
        # out of the images' part, so that it counts once.
        residual = d - d.mean(axis=1, keepdims=True) - d.mean(axis=0, keepdims=True) + mean
        single = float((residual**2).sum() / ((seeds - 1) * max(images - 1, 1))) / (seeds * images)
        image_part *= np.sqrt(max(0.0, 1 - single / max(float(image_part.var()), 1e-300)))
        se_seeds = float(of_seed.std(ddof=1) / np.sqrt(seeds))
        resampled = of_seed[rng.integers(0, seeds, size=(replicates, seeds))].mean(axis=1)
        seed_part = (
            resampled
            * np.sqrt(seeds / (seeds - 1))
            / np.sqrt(rng.chisquare(seeds - 1, replicates) / (seeds - 1))
        )
    centred = image_part + seed_part
    tail = (1 - coverage) / 2
    # The basic (reflected) interval: the bootstrap's spread above the estimate says how far the
    # truth may lie below it.
    low, high = mean - np.quantile(centred, [1 - tail, tail])
    return Difference(
        points=100 * mean,
        low=100 * float(low),
        high=100 * float(high),
        p_better=float((1 + np.sum(centred >= mean)) / (replicates + 1)),
        p_different=float((1 + np.sum(np.abs(centred) >= abs(mean))) / (replicates + 1)),
        seeds=seeds,
        images=images,
        se_images=100 * float(image_part.std()),
        se_seeds=100 * se_seeds,
        coverage=coverage,
    )


def standard_error(top1: float, images: int) -> float:
    """Of a top-1 in percent, measured on `images`; in points. One error is counted at least."""
    error = max(1 - top1 / 100, 1 / images)
    return 100 * math.sqrt(error * (1 - error) / images)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979, step-down).

    Rejecting those below alpha keeps the chance of any false rejection at alpha.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return [float(p) for p in adjusted]
