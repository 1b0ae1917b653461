"""The range test on problems whose answer is known beforehand.

Modules: lr_finder, lr_figure.
"""

import numpy as np
import pytest

from ftlib.config import Adam, Augment, Data, Model, OneCycle, Run, Train
from ftlib.training import lr_finder as L


def curve(fall_at, low=1e-6, high=10.0, n=200, minimum_at=1.0, noise=0.0):
    """A loss that falls as a logistic function of log(rate), steepest at `fall_at`, and rises
    quadratically beyond `minimum_at`."""
    rates = np.geomspace(low, high, n)
    losses = (
        1
        - 0.05 * np.log(rates)
        + 2 / (1 + np.exp(2.5 * np.log(rates / fall_at)))
        + 3 * np.maximum(0, np.log(rates / minimum_at)) ** 2
    )
    return L.Curve(rates, losses + noise * np.random.default_rng(0).normal(size=n))


@pytest.mark.parametrize("fall_at", [1e-4, 3e-3, 5e-2])
def test_finds_where_the_loss_falls_fastest_and_where_it_is_lowest(fall_at):
    found = L.read(curve(fall_at))
    assert found.steepest == pytest.approx(fall_at, rel=0.1)
    assert 0.4 < found.minimum < 1.4
    assert found.suggestion == pytest.approx(min(fall_at, found.minimum / 3), rel=0.1)


def test_noise_does_not_decide():
    assert L.read(curve(3e-3, noise=0.05)).steepest == pytest.approx(3e-3, rel=1.0)


def test_gradient_descent_on_a_parabola_breaks_at_two_over_its_curvature():
    """w <- w - rate * c * w: the loss shrinks while rate < 2 / c, fastest at 1 / c, and diverges
    above (known since Polyak 1964)."""
    c, w = 50.0, 1.0

    def step(rate):
        nonlocal w
        loss = 0.5 * c * w * w + 1e-3
        w -= rate * c * w
        return loss

    found = L.range_test(step, 1e-5, 10, 300)
    reading = L.read(found)
    lowest = found.rates[int(found.losses.argmin())]
    assert 0.2 / c < lowest < 2.2 / c
    assert 2 / c < found.rates[-1] < 20 / c, (
        "it ends soon after the loss has diverged, and not before it can"
    )
    assert reading.steepest < 1 / c and reading.suggestion <= reading.minimum / 3
    # The steepest place is where the product of (1 - rate * c)^2 so far falls fastest: computed
    # here without the finder.
    shrink = np.cumprod(np.concatenate([[1], (1 - found.rates[:-1] * c) ** 2]))
    analytic = found.rates[int(np.gradient(shrink, np.log(found.rates)).argmin())]
    assert reading.steepest == pytest.approx(analytic, rel=0.25)


def test_a_loss_that_is_not_finite_ends_it():
    losses = iter([2.0] * 30 + [float("nan")] * 5)
    assert len(L.range_test(lambda rate: next(losses), 1e-6, 1, 35).losses) == 30


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (L.Curve(np.geomspace(1e-6, 1, 100), np.ones(100)), "never fell"),
        (L.Curve(np.geomspace(1e-6, 1, 100), np.linspace(1, 3, 100)), "never fell"),
        (L.Curve(np.geomspace(1e-6, 1, 5), np.ones(5)), "diverged after 5 steps"),
    ],
)
def test_a_curve_without_an_answer_is_refused(made, says):
    with pytest.raises(L.RangeTestError, match=says):
        L.read(made)


@pytest.mark.parametrize("values", [(1, 1e-3, 100), (0, 1, 100), (1e-6, 1, 3)])
def test_impossible_ranges_are_refused(values):
    with pytest.raises(L.RangeTestError):
        L.range_test(lambda rate: 1.0, *values)


def test_the_suggestion_is_what_the_schedule_reaches():
    reading = L.Reading(steepest=6.04e-3, minimum=1.0)
    assert L.applied(Run(optimizer=Adam()), reading).optimizer == Adam(lr=6.0e-3)
    one_cycle = L.applied(Run(optimizer=Adam(), schedule=OneCycle(peak=3.0)), reading)
    assert one_cycle.optimizer.lr == pytest.approx(2.0e-3) and one_cycle.schedule == OneCycle(
        peak=3.0
    )


def test_on_a_real_recipe_it_touches_nothing(tmp_path):
    from tests.deploy import made

    data = made.dataset(tmp_path, train=16, val=2)
    run = Run(
        name="r",
        data=Data(path=data.path),
        augment=Augment(size=32, crop_scale=(0.8, 1.0), color_jitter_p=0),
        model=Model(arch="resnet18"),
        optimizer=Adam(lr=1e-3),
        train=Train(epochs=1, batch_size=16, microbatch_size=8, precision="fp32"),
    )
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with L.recipe_step(run, data, steps=24) as step:
        found = L.range_test(step, 1e-6, 1e3, 24)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert found.losses[0] == pytest.approx(np.log(3), abs=0.6)
    assert found.losses.min() < found.losses[0] * 0.97
