from types import SimpleNamespace

import numpy as np
import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from ftlib.tune.asha import AsynchronousHalving
from ftlib.tune.trial_store import Trial

EPOCHS = 9


def curves(n, seed=0):
    rng = np.random.default_rng(seed)
    return [[40 + rng.normal(0, 5) + e for e in range(1, EPOCHS + 1)] for _ in range(n)]


def feed(scheduler, number, scores, start=0):
    """Report epochs until it is stopped; the epoch of the stop, or None."""
    trial = SimpleNamespace(trial_id=f"id{number}", config={"number": number})
    scheduler.on_trial_add(None, trial)
    for epoch, score in enumerate(scores[start:], start + 1):
        if (
            scheduler.on_trial_result(None, trial, {"epoch": epoch, "score": score})
            == TrialScheduler.STOP
        ):
            return epoch
    return None


def test_decisions_equal_those_of_rays_asha():
    ours = AsynchronousHalving(EPOCHS, 1, 3, protected=())
    theirs = ASHAScheduler(
        time_attr="epoch",
        metric="score",
        mode="max",
        max_t=EPOCHS + 1,
        grace_period=1,
        reduction_factor=3,
    )
    for number, scores in enumerate(curves(40)):
        expected = feed(theirs, number, scores)
        assert feed(ours, number, scores) == (None if expected == EPOCHS else expected)
    assert len(ours.stopped) > 20
    assert ours.milestones() == [1, 3, 9]


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_restart_decides_like_a_sweep_without_one(at):
    whole, scores = AsynchronousHalving(EPOCHS, 1, 3), curves(40, 1)
    decisions = [feed(whole, n, s) for n, s in enumerate(scores)]
    seen = []
    for number, (stop, score) in enumerate(zip(decisions, scores)):
        history = [{"epoch": e, "score": s} for e, s in enumerate(score[: stop or EPOCHS], 1)]
        seen.append(Trial(number, {}, "tpe", "pruned" if stop else "completed", history=history))
    restarted = AsynchronousHalving(EPOCHS, 1, 3)
    restarted.replay(seen[:at])
    assert [feed(restarted, n, s) for n, s in enumerate(scores) if n >= at] == decisions[at:]


def test_a_trial_that_goes_on_after_a_crash_is_judged_once_per_rung():
    whole, broken = AsynchronousHalving(EPOCHS, 1, 3), AsynchronousHalving(EPOCHS, 1, 3)
    scores = curves(12, 2)
    for n, s in enumerate(scores[:-1]):
        feed(whole, n, s)
        feed(broken, n, s)
    open_trial = Trial(
        11, {}, "tpe", history=[{"epoch": 1, "score": 99.0}, {"epoch": 2, "score": 99.0}]
    )
    restarted = AsynchronousHalving(EPOCHS, 1, 3)
    restarted.replay(
        [
            *(
                Trial(
                    n,
                    {},
                    "tpe",
                    "pruned",
                    history=[
                        {"epoch": e, "score": v}
                        for e, v in enumerate(s[: broken.stopped.get(n, EPOCHS)], 1)
                    ],
                )
                for n, s in enumerate(scores[:-1])
            ),
            open_trial,
        ]
    )
    assert feed(restarted, 11, [99.0] * EPOCHS, start=2) is None
    assert {m: len(r) for m, r in restarted._brackets[0]._rungs}[1] == 12


def test_the_recipes_own_trial_and_last_epochs_are_never_stopped():
    halving = AsynchronousHalving(EPOCHS, 1, 3)
    for number in range(1, 10):
        feed(halving, number, [60.0 + number] * EPOCHS)
    assert feed(halving, 0, [1.0] * EPOCHS) is None
    short = AsynchronousHalving(1, 1, 3)
    assert [feed(short, n, [50.0 - n]) for n in range(5)] == [None] * 5


def test_a_trials_outcome_is_no_score():
    halving = AsynchronousHalving(EPOCHS)
    trial = SimpleNamespace(trial_id="x", config={"number": 3})
    halving.on_trial_add(None, trial)
    assert (
        halving.on_trial_result(None, trial, {"ended": True, "outcome": "failed"})
        == TrialScheduler.CONTINUE
    )
    halving.on_trial_complete(None, trial, {})
    halving.on_trial_remove(None, trial)
