"""RandAugment and TrivialAugment over the ops of ftlib.data.ops."""

import io
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare
from sklearn.datasets import load_sample_image

from ftlib import config
from ftlib.data import ops
from ftlib.data.augment import TrainTransform, check
from ftlib.data.policy import RandAugment, TrivialAugment, build, grouped
from ftlib.data.rng import Randomness
from ftlib.settings import ConfigError, override

PLAIN = config.Augment(size=64, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0, color_jitter_p=0)


@pytest.fixture(scope="module")
def jpeg():
    out = io.BytesIO()
    Image.fromarray(load_sample_image("china.jpg")).save(out, "JPEG", quality=92)
    return out.getvalue()


@pytest.fixture
def applied(monkeypatch):
    """The transforms that policies apply, in place of applying them."""
    calls = []
    monkeypatch.setattr(
        "ftlib.data.policy.apply",
        lambda transform, image, randomness: calls.append(transform) or image,
    )
    return calls


def names_of(groups, calls):
    table = grouped(ops.OPS)
    where = {
        id(t): (table[g][i].group, table[g][i].name)
        for g, group in enumerate(groups)
        for i, t in enumerate(group)
    }
    return [where[id(t)] for t in calls]


@pytest.mark.parametrize(("n", "p"), [(1, 1.0), (2, 0.3), (3, 0.5), (2, 1.0)])
def test_randaugment_chooses_groups_and_ops_uniformly(applied, n, p):
    policy, randomness, images = RandAugment(ops.OPS, n, 9, p, 32), Randomness(3), 6000
    per_image = []
    for _ in range(images):
        before = len(applied)
        policy(np.zeros((32, 32, 3), np.uint8), randomness)
        per_image.append(names_of(policy.groups, applied[before:]))
    assert all(
        len({g for g, _ in found}) == len(found) <= n for found in per_image
    )  # no group twice
    expected = images * p * n / 3
    for group in ops.GROUPS:
        counts = Counter(name for found in per_image for g, name in found if g == group)
        members = [op.name for op in ops.OPS if op.group == group]
        assert (
            abs(sum(counts.values()) - expected)
            <= 3.3 * math.sqrt(images * (p * n / 3) * (1 - p * n / 3)) + 1e-9
        )
        assert chisquare([counts[m] for m in members]).pvalue > 0.001
    sizes = Counter(len(found) for found in per_image)
    binomial = [math.comb(n, k) * p**k * (1 - p) ** (n - k) * images for k in range(n + 1)]
    assert all(abs(sizes[k] - b) <= 4 * math.sqrt(max(b, 1)) for k, b in enumerate(binomial))
    firsts = Counter(found[0][0] for found in per_image if len(found) == n)
    assert chisquare([firsts[g] for g in ops.GROUPS]).pvalue > 0.001  # groups come in random order


def test_magnitude_0_or_probability_0_leaves_the_picture_as_it_is(jpeg):
    off_, zero_m, zero_p = (
        TrainTransform(override(PLAIN, {"crop_scale": (0.3, 0.9), **extra}), 1)
        for extra in (
            {},
            {"randaugment_n": 3, "randaugment_m": 0.0, "randaugment_p": 1.0},
            {"randaugment_n": 3, "randaugment_m": 9.0, "randaugment_p": 0.0},
        )
    )
    for i in range(20):
        expected = off_(jpeg, 0, i)
        assert np.array_equal(zero_m(jpeg, 0, i), expected) and np.array_equal(
            zero_p(jpeg, 0, i), expected
        )


def test_the_change_grows_with_n_m_and_p(jpeg):
    """The mean change from the picture without RandAugment grows with each of the three, fractions
    of a magnitude included."""
    plain = TrainTransform(PLAIN, 1)(jpeg, 0, 0).astype(int)

    def change(n, m, p):
        transform = TrainTransform(
            override(PLAIN, {"randaugment_n": n, "randaugment_m": m, "randaugment_p": p}), 1
        )
        return np.mean([abs(transform(jpeg, 0, i) - plain).mean() for i in range(60)])

    by_m = [change(2, m, 1.0) for m in (1, 3, 6, 6.5, 10)]
    by_n = [change(n, 5.0, 1.0) for n in (1, 2, 3)]
    by_p = [change(2, 5.0, p) for p in (0.1, 0.3, 1.0)]
    for changes in (by_m, by_n, by_p):
        assert changes == sorted(changes) and changes[0] > 0 and changes[-1] > 1.25 * changes[0]


def test_only_the_chosen_ops_are_applied(applied):
    cfg = config.Augment(
        randaugment_n=2,
        randaugment_m=5,
        randaugment_p=1.0,
        randaugment_ops=("rotate", "shear_x", "equalize"),
    )
    policy = build(cfg)
    for k in range(50):
        policy(np.zeros((8, 8, 3), np.uint8), Randomness(k))
    assert len(applied) == 100 and len(set(map(id, applied))) == 3


def test_unknown_ops_and_too_few_groups_are_refused():
    with pytest.raises(ConfigError, match=r"no op rotation\. Did you mean rotate\?"):
        check(config.Augment(randaugment_n=1, randaugment_ops=("rotation",)))
    with pytest.raises(ConfigError, match="only 1 group"):
        TrainTransform(
            config.Augment(randaugment_n=2, randaugment_m=5, randaugment_ops=("rotate", "zoom")), 1
        )
    check(config.Augment())


def test_trivialaugment_is_uniform_over_ops_and_levels(monkeypatch):
    drawn = []
    monkeypatch.setattr(ops.Op, "at", lambda self, strength, size: (self.name, strength))
    monkeypatch.setattr(
        "ftlib.data.policy.apply",
        lambda transform, image, randomness: drawn.append(transform) or image,
    )
    policy, randomness, images = TrivialAugment(ops.OPS, 32), Randomness(4), 24_000
    for _ in range(images):
        policy(np.zeros((1, 1, 3), np.uint8), randomness)
    names, levels = Counter(n for n, _ in drawn), Counter(round(s * 30) for _, s in drawn)
    assert (
        chisquare([*names.values(), images - len(drawn)]).pvalue > 0.001
    )  # the identity is one of the choices
    assert set(names) == {op.name for op in ops.OPS}
    assert sorted(levels) == list(range(31)) and chisquare(list(levels.values())).pvalue > 0.001
