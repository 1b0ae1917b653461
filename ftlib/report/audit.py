"""Find what is wrong with a data set: duplicates, odd sizes, labels that look mistaken.

Pure functions on hashes, features and labels; `ftlib.report.audit_page` makes the page. A duplicate
within a split counts twice in training. A duplicate across splits inflates the validation score. Of
two labels on one picture, one is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

NEAR = 4
"""Most bits of 64 in which two near duplicates differ, in each of the two hashes."""
BANDS = 8
"""Bands of 8 bits. Hashes that differ in fewer than 8 bits agree in at least one band, so no pair
within NEAR is missed."""
FLAT = 4.0
"""Standard deviation of the gray values below which a picture is too uniform for its hashes to
mean anything."""
FOLDS = 5
"""Folds of the cross-validation that checks labels."""


@dataclass(frozen=True)
class Fingerprint:
    """What duplicates are recognized by."""

    exact: bytes
    """Digest of the decoded pixels: equal for the same picture, whatever its file's metadata
    say."""
    gradient: int
    """64-bit dHash (Krawetz 2013): is each of 8 x 8 cells darker than its right neighbour?"""
    frequency: int
    """64-bit pHash: are the 8 x 8 lowest DCT coefficients above their median?"""
    flat: bool
    """Too uniform for the perceptual hashes to mean anything."""
    features: NDArray[np.float32]
    """float32[F]: small descriptors (coarse colors, edges) for a linear model."""


@dataclass(frozen=True)
class Pair:
    """Two pictures that are the same or nearly. `a` < `b`: positions in the list that was
    searched."""

    a: int
    b: int
    distance: int
    """0 for the same pixels, else 1 plus the bits in which the hashes differ."""


@dataclass(frozen=True)
class Suspect:
    """A picture whose label looks mistaken, by a model trained without it."""

    position: int
    said: int
    """The predicted class."""
    own: float
    """Probability of the label."""
    confidence: float
    """Probability of the predicted class."""


def fingerprint(image: np.ndarray) -> Fingerprint:
    """The hashes and descriptors of a picture, uint8[H, W, 3]."""
    import hashlib

    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    digest = hashlib.sha256(
        np.asarray(image.shape, "<i4").tobytes() + np.ascontiguousarray(image).tobytes()
    ).digest()[:16]
    cells = cv2.resize(gray, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    small = cv2.resize(gray, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:8, :8].ravel()
    return Fingerprint(
        exact=digest,
        gradient=_bits(cells[:, :-1] > cells[:, 1:]),
        frequency=_bits(low > np.median(low)),
        flat=bool(gray.std() < FLAT),
        features=features(image),
    )


def _bits(flags: np.ndarray) -> int:
    return int.from_bytes(np.packbits(flags.ravel()).tobytes(), "big")


def features(image: np.ndarray) -> NDArray[np.float32]:
    """float32[F]: small descriptors of a picture at 32 px.

    They are 8 x 8 colors, and histograms of gradient directions over 4 x 4 cells (Dalal and Triggs
    2005).
    """
    small = cv2.resize(image, (32, 32), interpolation=cv2.INTER_AREA)
    colors = (
        cv2.resize(small, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32).ravel() / 255
    )
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(gray, cv2.CV_32F, 1, 0, ksize=1), cv2.Sobel(gray, cv2.CV_32F, 0, 1, ksize=1)
    strength, direction = np.hypot(dx, dy), (np.arctan2(dy, dx) % np.pi) * (8 / np.pi)
    cell = (np.arange(32) // 8)[:, None] * 4 + (np.arange(32) // 8)[None, :]
    histogram = np.bincount(
        (cell * 8 + np.minimum(direction.astype(int), 7)).ravel(),
        weights=strength.ravel(),
        minlength=128,
    ).reshape(16, 8)
    histogram = histogram / (np.linalg.norm(histogram, axis=1, keepdims=True) + 8.0)
    return np.concatenate([colors, histogram.ravel().astype(np.float32)])


def exact_pairs(digests: Sequence[bytes]) -> list[Pair]:
    """Each repeat, paired with the first picture that has the same pixels."""
    first: dict[bytes, int] = {}
    pairs = []
    for i, digest in enumerate(digests):
        if digest in first:
            pairs.append(Pair(first[digest], i, 0))
        else:
            first[digest] = i
    return pairs


def near_pairs(
    gradient: Hashes, frequency: Hashes, near: int = NEAR, skip: Iterable[Pair] = ()
) -> list[Pair]:
    """Pairs whose hashes of both kinds differ in at most `near` bits, except those in `skip`.

    Candidates agree in a band of the gradient hash: no pair is missed, and one in 32 is compared.
    """
    if near >= BANDS:
        raise ValueError(f"near = {near}: at most {BANDS - 1} bits, or pairs would be missed")
    known = {(p.a, p.b) for p in skip}
    found: dict[tuple[int, int], int] = {}
    for band in range(BANDS):
        key = (gradient >> np.uint64(8 * band)) & np.uint64(0xFF)
        order = np.argsort(key, kind="stable")
        for members in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            _compare(members, gradient, frequency, near, found)
    return [Pair(a, b, 1 + bits) for (a, b), bits in sorted(found.items()) if (a, b) not in known]


def _compare(
    members: NDArray[np.int64],
    gradient: Hashes,
    frequency: Hashes,
    near: int,
    found: dict[tuple[int, int], int],
) -> None:
    """Add the near pairs among `members` to `found`."""
    members = np.sort(members)
    for place, a in enumerate(members[:-1]):
        others = members[place + 1 :]
        bits = np.bitwise_count(gradient[others] ^ gradient[a])
        close = others[bits <= near]
        if len(close):
            both = np.maximum(bits[bits <= near], np.bitwise_count(frequency[close] ^ frequency[a]))
            for b, distance in zip(close[both <= near], both[both <= near]):
                found[int(a), int(b)] = int(distance)


def suspects(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    least_margin: float = 0.75,
    seed: int = 0,
) -> tuple[list[Suspect], float]:
    """(pictures whose label looks mistaken, the surest first; share of labels agreed with, 0..1).

    Logistic regressions, each trained on the other folds, predict every picture. A label is suspect
    where they predict another class, at least as confidently as they usually predict that class for
    its own pictures (confident learning, Northcutt et al. 2021, section 3.1), and by `least_margin`
    more confidently than the label. The share of agreement tells how far to trust them.

    Args:
        features: float[n, F]
        labels: int64[n]

    Classes with fewer than FOLDS pictures are left out; with fewer than two classes left, nothing
    is found.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    kept = np.flatnonzero(np.bincount(labels)[labels] >= FOLDS)
    present = np.unique(labels[kept])
    if len(present) < 2:
        return [], 0.0
    x, y = features[kept], np.searchsorted(present, labels[kept])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.02, max_iter=200))
    p = cross_val_predict(
        model,
        x,
        y,
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=seed),
        method="predict_proba",
    )
    usual = np.array([p[y == c, c].mean() for c in range(len(present))])
    said = p.argmax(axis=1)
    rows = np.arange(len(y))
    doubtful = np.flatnonzero(
        (said != y) & (p[rows, said] >= usual[said]) & (p[rows, said] - p[rows, y] >= least_margin)
    )
    order = doubtful[
        np.argsort(p[doubtful, y[doubtful]] - p[doubtful, said[doubtful]], kind="stable")
    ]
    return [
        Suspect(int(kept[i]), int(present[said[i]]), float(p[i, y[i]]), float(p[i, said[i]]))
        for i in order
    ], float((said == y).mean())


def odd_sizes(sizes: NDArray[np.int32], limit: int) -> NDArray[np.int64]:
    """Positions of the pictures of the most unusual sizes, int32[n, 2] (height, width).

    Unusual is an area or aspect ratio more than eight interquartile ranges from the median, on a
    log scale. At most `limit` are returned, the most unusual first.
    """
    logs = np.stack([np.log(sizes.prod(axis=1)), np.log(sizes[:, 0] / sizes[:, 1])], axis=1)
    low, middle, high = np.quantile(logs, [0.25, 0.5, 0.75], axis=0)
    away = (np.abs(logs - middle) / np.maximum(high - low, 0.1)).max(axis=1)
    odd = np.flatnonzero(away > 8)
    return odd[np.argsort(-away[odd], kind="stable")][:limit]


def scan(
    count: int,
    image: Callable[[int], np.ndarray],
    tick: Callable[[], None] = lambda: None,
    workers: int = 2,
) -> list[Fingerprint]:
    """Fingerprints of pictures 0..count-1, in threads: decoding and OpenCV release the GIL."""
    from concurrent.futures import ThreadPoolExecutor

    def one(i: int) -> Fingerprint:
        found = fingerprint(image(i))
        tick()
        return found

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, range(count)))
