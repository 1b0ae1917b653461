import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from ftlib.tune.statistics import holm, paired_difference, standard_error


def simulate(rng, seeds, images, spread=0.0, gains=(0.0, 0.0)):
    """Correctness of several recipes: bool[seeds, images] for each of `gains` (in logits).

    An image has a difficulty, a run a random level (`spread`), and each prediction some noise.
    """
    difficulty = rng.normal(0, 2, images)
    out = []
    for gain in gains:
        luck = rng.normal(0, spread, seeds)
        out.append(
            1.2 + gain + luck[:, None] - difficulty + 0.6 * rng.logistic(size=(seeds, images)) > 0
        )
    return out


def test_one_seed_agrees_with_scipys_bootstrap_and_with_mcnemar():
    rng = np.random.default_rng(0)
    a, b = simulate(rng, 1, 2000, gains=(0.15, 0.0))
    ours = paired_difference(a, b)
    d = 100.0 * (a[0].astype(float) - b[0])
    theirs = stats.bootstrap(
        (d,), np.mean, n_resamples=20_000, method="basic", rng=np.random.default_rng(1)
    )
    assert ours.points == pytest.approx(d.mean())
    assert (ours.low, ours.high) == pytest.approx(
        (theirs.confidence_interval.low, theirs.confidence_interval.high), abs=0.12
    )
    assert ours.se_images == pytest.approx(theirs.standard_error, rel=0.03)
    table = [[0, int((a & ~b).sum())], [int((~a & b).sum()), 0]]
    assert ours.p_different == pytest.approx(
        mcnemar(table, exact=False, correction=False).pvalue, abs=0.01
    )
    assert np.isnan(ours.se_seeds)


def test_where_only_seeds_vary_the_interval_is_students_t():
    rng = np.random.default_rng(3)
    for _ in range(5):
        effect = rng.normal(0.01, 0.01, 6)
        a = np.zeros((6, 100_000), bool)
        b = np.zeros_like(a)
        # Nearly the same images for all seeds, so that images contribute next to nothing.
        for s, e in enumerate(effect):
            half = 50_000 + round(50_000 * e)
            a[s, :half] = True
            b[s, :50_000] = True
        of_seed = a.mean(1) - b.mean(1)
        ours = paired_difference(a, b, replicates=40_000)
        theirs = stats.ttest_1samp(of_seed, 0)
        assert ours.se_seeds == pytest.approx(100 * stats.sem(of_seed))
        assert ours.p_different == pytest.approx(theirs.pvalue, abs=0.05)
        interval = theirs.confidence_interval()
        assert (ours.low, ours.high) == pytest.approx(
            (100 * interval.low, 100 * interval.high),
            abs=0.35 * 100 * (interval.high - interval.low) / 2,
        )


@pytest.mark.parametrize(
    ("seeds", "spread"), [(5, 0.0), (5, 0.06), (5, 0.3), (3, 0.06), (10, 0.06)]
)
def test_false_positives_and_coverage_are_as_stated(seeds, spread):
    """False positives at the 5 % level, and coverage of the 95 % interval, in simulations."""
    rng = np.random.default_rng(seeds)
    found = [
        paired_difference(*simulate(rng, seeds, 400, spread), replicates=999, seed=i)
        for i in range(500)
    ]
    false_positives = np.mean([d.p_better < 0.05 for d in found])
    covered = np.mean([d.low <= 0 <= d.high for d in found])
    assert false_positives <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 500)
    assert covered >= 0.95 - 2.6 * np.sqrt(0.05 * 0.95 / 500)


def test_a_plain_bootstrap_of_few_seeds_finds_too_much():
    """Why the seeds' part is widened: a plain bootstrap rejects a true null too often."""
    rng = np.random.default_rng(1)
    plain = []
    for _ in range(400):
        a, b = simulate(rng, 3, 400, 0.3)
        of_seed = a.mean(1) - b.mean(1)
        plain.append(np.mean(of_seed[rng.integers(0, 3, (500, 3))].mean(1) <= 0) < 0.05)
    assert np.mean(plain) > 0.09


def test_holm_keeps_the_family_at_five_percent_and_has_power():
    rng = np.random.default_rng(7)
    wrong, right = 0, 0
    for i in range(250):
        own, *others = simulate(rng, 5, 400, 0.05, gains=(0, 0, 0, 0))
        wrong += (
            min(holm([paired_difference(o, own, replicates=999, seed=i).p_better for o in others]))
            < 0.05
        )
        own, *others = simulate(rng, 5, 2000, 0.05, gains=(0, 0.3, 0, 0))
        right += (
            holm([paired_difference(o, own, replicates=999, seed=i).p_better for o in others])[0]
            < 0.05
        )
    assert wrong / 250 <= 0.05 + 2.6 * np.sqrt(0.05 * 0.95 / 250)
    assert right / 250 > 0.9


def test_holm_is_statsmodels():
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 20):
        p = rng.uniform(0, 0.2, n)
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([]) == []


def test_power_comes_from_pairing():
    """A gain that unpaired intervals miss shows when predictions are paired by image."""
    rng = np.random.default_rng(5)
    a, b = simulate(rng, 5, 5000, 0.0, gains=(0.1, 0.0))
    d = paired_difference(a, b)
    unpaired = 100 * np.sqrt(a.mean() * (1 - a.mean()) / 5000 + b.mean() * (1 - b.mean()) / 5000)
    assert d.p_better < 0.01
    assert d.se_images < unpaired / 2


def test_the_difference_is_deterministic_and_antisymmetric():
    a, b = simulate(np.random.default_rng(2), 4, 300, 0.1, gains=(0.2, 0))
    assert paired_difference(a, b) == paired_difference(a, b)
    forth, back = paired_difference(a, b), paired_difference(b, a)
    assert forth.points == -back.points
    assert forth.p_better + back.p_better == pytest.approx(1, abs=0.02)


def test_equal_predictions_have_no_difference():
    a = np.random.default_rng(0).random((3, 50)) > 0.4
    d = paired_difference(a, a)
    assert (d.points, d.low, d.high) == (0, 0, 0)
    assert d.p_better == 1 and d.p_different == 1


def test_shapes_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="same seeds and the same images"):
        paired_difference(np.ones((2, 10)), np.ones((3, 10)))
    with pytest.raises(ValueError, match="cannot pair"):
        paired_difference(np.ones((0, 10)), np.ones((0, 10)))


def test_the_standard_error_of_a_score_is_that_of_a_binomial():
    assert standard_error(90, 150) == pytest.approx(100 * stats.binom(150, 0.9).std() / 150)
    assert standard_error(100, 50) == pytest.approx(standard_error(98, 50))
