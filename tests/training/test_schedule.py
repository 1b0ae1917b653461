"""Schedules against torch's, step by step over whole runs."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from ftlib import config
from ftlib.settings import ConfigError
from ftlib.training import schedule
from ftlib.training.schedule import PlateauState, learning_rate, plateau_update

LR = 3e-3


def ours(cfg, total, per_epoch, lr=LR):
    return [learning_rate(cfg, lr, t, total, per_epoch) for t in range(total)]


def torchs(make, total, lr=LR, every=1):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    scheduler = make(optimizer)
    rates = []
    for t in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (t + 1) % every == 0 and t + 1 < total:
            scheduler.step()
    return rates


def sequential(optimizer, first, second, milestone):
    with (
        warnings.catch_warnings()
    ):  # torch's own SequentialLR calls step(epoch), which torch deprecates
        warnings.simplefilter("ignore")
        return lr_scheduler.SequentialLR(
            optimizer, [first(optimizer), second(optimizer)], [milestone]
        )


def quietly(run):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


@pytest.mark.parametrize(
    "total,up", [(300, 0.3), (1000, 0.25), (7, 0.5), (50, 0.9), (3, 0.3), (2, 0.1)]
)
def test_one_cycle_is_torchs(total, up):
    cfg = config.OneCycle(up=up)
    theirs = torchs(
        lambda o: lr_scheduler.OneCycleLR(
            o, max_lr=3 * LR, total_steps=total, pct_start=up, div_factor=5, final_div_factor=1000
        ),
        total,
    )
    assert ours(cfg, total, 10) == pytest.approx(theirs, rel=1e-9, abs=1e-15)


def test_one_cycle_of_phase_1_starts_peaks_and_ends_where_it_says():
    rates = ours(config.OneCycle(peak=3, up=0.3, div=5, final_div=1000), 1000, 100, lr=1e-3)
    assert (
        rates[0] == pytest.approx(3e-3 / 5)
        and max(rates) == pytest.approx(3e-3) == pytest.approx(rates[299])
        and rates[-1] == pytest.approx(3e-3 / 5 / 1000)
    )


@pytest.mark.parametrize("total", [1, 2, 3])
def test_one_cycle_of_a_few_steps_stays_within_its_bounds(total):
    for up in (0.01, 1 / 3, 0.5, 0.99):
        assert all(
            LR * 3 / 5000 * (1 - 1e-9) <= r <= 3 * LR * (1 + 1e-9)
            for r in ours(config.OneCycle(up=up), total, 1)
        )


def test_cosine_is_torchs():
    theirs = torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=500, eta_min=1e-6), 500)
    assert ours(config.Cosine(), 500, 10) == pytest.approx(theirs, rel=1e-6)
    assert learning_rate(config.Cosine(), LR, 500, 500, 10) == pytest.approx(1e-6)


@pytest.mark.parametrize("epochs", [0.5, 3.0])
def test_warm_up_then_cosine_is_torchs_sequence(epochs):
    warmup = int(epochs * 20)
    theirs = quietly(
        lambda: torchs(
            lambda o: sequential(
                o,
                lambda o: lr_scheduler.LinearLR(
                    o, start_factor=1 / (warmup + 1), total_iters=warmup
                ),
                lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=400 - warmup, eta_min=1e-6),
                warmup,
            ),
            400,
        )
    )
    rates = ours(config.Cosine(warmup_epochs=epochs), 400, 20)
    assert rates == pytest.approx(theirs, rel=1e-6)
    assert rates[warmup] == LR and 0 < rates[0] == LR / (warmup + 1)


def test_step_is_torchs_stepped_once_per_epoch():
    theirs = torchs(lambda o: lr_scheduler.StepLR(o, step_size=3, gamma=0.2), 200, every=20)
    assert ours(config.Step(every_epochs=3, gamma=0.2), 200, 20) == pytest.approx(theirs, rel=1e-12)


def test_constant_after_a_warm_up_is_torchs_linear():
    theirs = torchs(lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 41, total_iters=40), 100)
    assert ours(config.Constant(warmup_epochs=2), 100, 20) == pytest.approx(theirs, rel=1e-12)
    assert ours(config.Constant(), 100, 20) == [LR] * 100


def test_warm_up_and_drops_multiply():
    rates = ours(config.Step(every_epochs=2, gamma=0.5, warmup_epochs=1), 60, 10)
    assert (
        rates[:10] == pytest.approx([LR * (t + 1) / 11 for t in range(10)])
        and rates[10:20] == [LR] * 10
        and rates[-1] == LR * 0.25
    )


@given(
    st.lists(st.one_of(st.floats(0, 100), st.just(50.0)), min_size=1, max_size=60),
    st.integers(0, 4),
    st.sampled_from([0.1, 0.5]),
)
def test_plateau_is_torchs_over_any_course_of_scores(scores, patience, factor):
    cfg = config.Plateau(factor=factor, patience=patience, min_lr=1e-5)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=factor, patience=patience, threshold=0, min_lr=1e-5, eps=0
    )
    state = PlateauState()
    for score in scores:
        assert learning_rate(cfg, LR, 0, 1, 1, state) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )
        theirs.step(score)
        state = plateau_update(cfg, state, score)
        assert state.bad_epochs == theirs.num_bad_epochs and state.best == theirs.best


def test_a_score_that_is_not_a_number_is_no_rise():
    state = plateau_update(config.Plateau(), PlateauState(), math.nan)
    assert (
        state == PlateauState(bad_epochs=1)
        and plateau_update(config.Plateau(), state, 3.0).best == 3.0
    )


def test_without_a_state_plateau_is_the_base_rate():
    assert ours(config.Plateau(), 5, 1) == [LR] * 5


@given(
    st.sampled_from(
        [
            config.Cosine(),
            config.Cosine(warmup_epochs=1),
            config.OneCycle(),
            config.Step(warmup_epochs=0.5),
            config.Constant(),
            config.Plateau(),
        ]
    ),
    st.integers(1, 40),
    st.integers(2, 20),
)
def test_every_rate_of_every_run_is_finite_and_positive(cfg, per_epoch, epochs):
    rates = ours(cfg, per_epoch * epochs, per_epoch)
    top = LR * (cfg.peak if isinstance(cfg, config.OneCycle) else 1)
    assert all(0 < r <= top * (1 + 1e-12) for r in rates)


def test_the_state_is_plain_numbers_that_weights_only_loads(tmp_path):
    state = plateau_update(
        config.Plateau(patience=0), plateau_update(config.Plateau(), PlateauState(), 61.25), 60.0
    )
    torch.save({"plateau": vars(state)}, tmp_path / "s.pt")
    loaded = torch.load(tmp_path / "s.pt", weights_only=True)
    assert PlateauState(**loaded["plateau"]) == state


def test_a_floor_above_the_base_rate_is_refused_with_the_remedy():
    run = config.Run(schedule=config.Cosine(min_lr=1e-6))
    with pytest.raises(ConfigError, match=r"schedule.min_lr.*optimizer.lr"):
        config.Run(optimizer=config.AdamW(lr=1e-7), schedule=copy.copy(run.schedule))


def test_an_unknown_schedule_is_a_programmers_error():
    with pytest.raises(AssertionError):
        schedule.learning_rate(object(), LR, 0, 1, 1)
