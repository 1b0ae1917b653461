"""Scores of a classifier from its logits, each with a 95 % interval. Pure numpy.

Shapes: `logits` float[n, C], `labels` int[n] in 0..C-1. Top-k scores are in percent, everything
else in its natural unit (nats, 0..1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BINS = 15
"""Bins of the calibration error (Guo et al. 2017 use 15)."""
RESAMPLES = 1000
"""Bootstrap resamples per interval: its ends are the 25th and the 975th of them."""


class ScoreError(ValueError):
    """Predictions that cannot be scored; the message says what is wrong with them."""


@dataclass(frozen=True)
class IntervalEstimate:
    """A score and the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def show(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class TestSplit:
    """Scores on the split that chose nothing."""

    __test__ = False  # for pytest: no class of tests

    images: int
    scores: Mapping[str, IntervalEstimate]
    """What `scores` gives."""

    def __str__(self) -> str:
        top5 = f", top-5 {self.scores['top5'].show()} %" if "top5" in self.scores else ""
        top1 = self.scores["top1"].show()
        return f"top-1 {top1} %{top5}, of {self.images:,} pictures, scored once"

    @property
    def metrics(self) -> dict[str, float]:
        """Metric -> value, with the ends of top-1's interval."""
        top1 = self.scores["top1"]
        values = {f"test/{name}": estimate.value for name, estimate in self.scores.items()}
        return {**values, "test/top1_low": top1.low, "test/top1_high": top1.high}

    def to_dict(self) -> dict[str, object]:
        """As result.json keeps it: score -> [value, low, high]."""
        found = {name: [e.value, e.low, e.high] for name, e in self.scores.items()}
        return {"images": self.images, **found}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TestSplit:
        scores = {k: IntervalEstimate(*v) for k, v in values.items() if k != "images"}
        return TestSplit(values["images"], scores)


@dataclass(frozen=True)
class PerClass:
    """One entry per class, each 0..1 except `support`, the number of images of the class."""

    precision: Floats
    recall: Floats
    f1: Floats
    support: Ints


@dataclass(frozen=True)
class Reliability:
    """Per bin of confidence: mean confidence, share of right predictions, images."""

    confidence: Floats
    accuracy: Floats
    count: Ints

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, eq. 3).

        It is the mean over images of |accuracy - confidence| of their bin.
        """
        return float(
            np.sum(self.count * np.abs(self.accuracy - self.confidence)) / np.sum(self.count)
        )


def check(logits: Floats, labels: Ints) -> None:
    """Raise ScoreError for predictions that cannot be scored."""
    if logits.ndim != 2 or labels.shape != (len(logits),):
        raise ScoreError(
            f"logits of shape {logits.shape} do not fit labels of shape {labels.shape}: "
            "one row of logits per label is needed"
        )
    if len(labels) == 0:
        raise ScoreError("there are no predictions to score: the split is empty")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ScoreError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has "
            f"{logits.shape[1]} classes (0 to {logits.shape[1] - 1})"
        )
    broken = int((~np.isfinite(logits)).any(axis=1).sum())
    if broken:
        raise ScoreError(
            f"{broken} of {len(logits)} predictions are NaN or infinite: the model's weights are "
            "damaged, or its precision overflowed (try --train.precision fp32)"
        )


def log_softmax(logits: Floats) -> Floats:
    """float64[n, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def softmax(logits: Floats) -> Floats:
    """float64[n, C], rows sum to 1."""
    return np.exp(log_softmax(logits))


def hits(logits: Floats, labels: Ints, k: int = 1) -> NDArray[np.bool_]:
    """bool[n]: whether the label is among the k highest logits.

    Ties go to the lower class, as in argmax: a model that gives every class the same logit gets no
    credit for it.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1])[None, :] < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return before.sum(axis=1) < k


def nll(logits: Floats, labels: Ints) -> Floats:
    """float64[n]: negative log-likelihood of the label, in nats."""
    return -log_softmax(logits)[np.arange(len(labels)), labels]


def bin_of(confidence: Floats, bins: int = BINS) -> Ints:
    """int[n]: the equal-mass bin of each confidence.

    Edges are quantiles: images of equal confidence share a bin, whatever their order.
    """
    edges = np.quantile(confidence, np.linspace(0, 1, bins + 1)[1:-1])
    return np.searchsorted(edges, confidence)


def reliability(confidence: Floats, right: NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """Accuracy against confidence in equal-mass bins (Nixon et al. 2019); empty bins are left
    out."""
    where = bin_of(confidence, bins)
    count = np.bincount(where, minlength=bins)
    kept = count > 0

    def mean(values: Floats) -> Floats:
        return np.bincount(where, weights=values, minlength=bins)[kept] / count[kept]

    return Reliability(mean(confidence), mean(right.astype(np.float64)), count[kept])


def confusion(predicted: Ints, labels: Ints, classes: int) -> Ints:
    """int64[C, C]: rows are true classes, columns predicted ones."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(
        classes, classes
    )


def per_class(matrix: Ints) -> PerClass:
    """Precision, recall and F1 of each class from a confusion matrix, int64[C, C].

    A ratio of 0/0 counts as 0: a class that was never predicted, or has no image.
    """
    right, support, predicted = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)

    def ratio(part: Ints, whole: Ints) -> Floats:
        return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)

    return PerClass(
        precision=ratio(right, predicted),
        recall=ratio(right, support),
        f1=ratio(2 * right, support + predicted),
        support=support,
    )


def confused_pairs(matrix: Ints, limit: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the most frequent mistakes, most frequent first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    rows, columns = np.unravel_index(order, wrong.shape)
    return [(int(r), int(c), int(wrong[r, c])) for r, c in zip(rows, columns) if wrong[r, c] > 0]


def most_confused_classes(matrix: Ints, limit: int) -> Ints:
    """The `limit` classes with the most mistakes (made of them or into them), in class order."""
    wrong = matrix - np.diag(np.diag(matrix))
    order = np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1)), kind="stable")[:limit]
    return np.sort(order)


# --- intervals ---


def weights(n: int, seed: int = 0, resamples: int = RESAMPLES) -> Iterator[Floats]:
    """Blocks, float64[r, n], of bootstrap weights.

    A weight is how often the image was drawn in a resample of n images, divided by n.
    """
    rng = np.random.default_rng(seed)
    block = max(1, min(resamples, 4_000_000 // n))
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(0, n, (rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) / n


def bootstrap(n: int, statistic: Callable[[Floats], Floats], seed: int = 0) -> Floats:
    """float64[RESAMPLES, q]: the statistic of every resample.

    `statistic` maps weights, float64[r, n], to float64[r, q].
    """
    return np.concatenate([statistic(block) for block in weights(n, seed)])


def interval(
    value: float, resampled: Floats, low: float = 0.0, high: float = inf
) -> IntervalEstimate:
    """The central 95 % of the resampled values, corrected by their bias, within `low` to `high`.

    Resampling noise always enlarges a calibration error: without the correction its interval may
    miss the value itself.
    """
    bias = float(resampled.mean()) - value
    ends = np.quantile(resampled, [0.025, 0.975]) - bias
    return IntervalEstimate(
        value,
        float(np.clip(min(ends[0], value), low, high)),
        float(np.clip(max(ends[1], value), low, high)),
    )


def share(right: NDArray[np.bool_], resampled: Floats) -> IntervalEstimate:
    """A percentage.

    Where all or none are right, resampling shows no spread. The open end is then the exact binomial
    bound (Clopper and Pearson 1934).
    """
    n, value = len(right), float(right.mean()) * 100
    found = interval(value, resampled * 100, 0, 100)
    tail = 0.025 ** (1 / n)  # P(no success in n) = 2.5 %
    if right.all():
        return IntervalEstimate(value, 100 * tail, 100.0)
    if not right.any():
        return IntervalEstimate(value, 0.0, 100 * (1 - tail))
    return found


def scores(logits: Floats, labels: Ints, seed: int = 0) -> dict[str, IntervalEstimate]:
    """top1, top5 (percent), nll (nats) and ece (0..1), with 95 % bootstrap intervals over images.

    Five classes or fewer have no top5: it is always 100. The bins of the ece stay those of the
    full set while resampling.
    """
    check(logits, labels)
    top1, top5 = hits(logits, labels, 1), hits(logits, labels, 5)
    losses = nll(logits, labels)
    confidence = softmax(logits).max(axis=1)
    member = (bin_of(confidence)[:, None] == np.arange(BINS)).astype(np.float64) * (
        top1 - confidence
    )[:, None]
    columns = np.stack([top1, top5, losses], axis=1).astype(np.float64)

    def statistic(weight: Floats) -> Floats:
        return np.concatenate(
            [weight @ columns, np.abs(weight @ member).sum(axis=1, keepdims=True)], axis=1
        )

    drawn = bootstrap(len(labels), statistic, seed)
    return {
        "top1": share(top1, drawn[:, 0]),
        **({"top5": share(top5, drawn[:, 1])} if logits.shape[1] > 5 else {}),
        "nll": interval(float(losses.mean()), drawn[:, 2], 0),
        "ece": interval(reliability(confidence, top1).error, drawn[:, 3], 0, 1),
    }
