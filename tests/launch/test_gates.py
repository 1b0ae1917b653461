"""Success criteria."""

import math

import pytest

from ftlib.config import Gates, Model, Run
from ftlib.launch import gates
from ftlib.launch.errors import LaunchError

GOOD = {"best/val_top1": 70.0, "final/gap": 3.0}


def names(checked):
    return {g.name: g.passed for g in checked}


def test_none_is_set_none_is_checked():
    assert gates.check(Gates(), GOOD, 50.0) == []
    assert gates.tags([]) == {"gates": "none"}


def test_a_gap_below_zero_is_explained():
    mixed, plain = (gates.check(Gates(max_gap=10), {"final/gap": g}, None)[0] for g in (-67.8, 3.0))
    assert "-67.80 (training is scored on mixed" in str(mixed)
    assert str(plain).endswith("at most 10: 3.00")


def test_each_gate_looks_at_its_number():
    all_set = Gates(val_top1=65, max_gap=10, gain=10)
    assert names(gates.check(all_set, GOOD, 50.0)) == {
        "val_top1": True,
        "max_gap": True,
        "gain": True,
    }
    assert names(gates.check(all_set, {**GOOD, "best/val_top1": 64.9}, 50.0)) == {
        "val_top1": False,
        "max_gap": True,
        "gain": True,
    }
    assert names(gates.check(all_set, {**GOOD, "final/gap": 10.1}, 50.0)) == {
        "val_top1": True,
        "max_gap": False,
        "gain": True,
    }
    assert names(gates.check(all_set, GOOD, 60.1)) == {
        "val_top1": True,
        "max_gap": True,
        "gain": False,
    }


def test_bounds_are_included():
    assert all(g.passed for g in gates.check(Gates(val_top1=70, max_gap=3, gain=20), GOOD, 50.0))


@pytest.mark.parametrize("metrics", [{}, {"best/val_top1": math.nan, "final/gap": math.inf}])
def test_what_was_not_measured_fails(metrics):
    checked = gates.check(Gates(val_top1=1, max_gap=10, gain=0), metrics, None)
    assert len(checked) == 3 and not any(g.passed for g in checked)
    assert "not measured" in str(checked[0])


def test_a_tuning_score_stands_in_for_validation():
    assert gates.check(Gates(val_top1=50), {"best/tuning_top1": 60.0}, None)[0].passed


def test_a_failed_model_is_refused_unless_there_is_a_reason():
    result = {"gates": gates.as_json(gates.check(Gates(val_top1=80), GOOD, None))}
    run = Run(model=Model(init_from="phase1"))
    with pytest.raises(
        LaunchError, match=r"phase1-x failed its success criteria \(val_top1 wanted 80, got 70.00\)"
    ):
        gates.refuse_failed(run, "phase1-x", result)
    note = gates.refuse_failed(
        Run(model=Model(init_from="phase1"), gates=Gates(force="a trial")), "phase1-x", result
    )
    assert "because: a trial" in note
    assert (
        gates.refuse_failed(
            run, "phase1-x", {"gates": gates.as_json(gates.check(Gates(val_top1=60), GOOD, None))}
        )
        == ""
    )
    assert gates.refuse_failed(run, "some file", {}) == ""
