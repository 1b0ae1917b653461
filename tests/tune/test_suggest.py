"""Holds the tests of suggest.py, and of the titles in train_trial.py."""

import numpy as np
import pytest
from ray import tune

from ftlib.config import Augment, Data, Mix, Model, Run, Train
from ftlib.tune import spaces, suggest
from ftlib.tune.trial_store import Trial

RUN = Run(
    data=Data(path="x"),
    augment=Augment(randaugment_n=2, randaugment_m=9),
    mix=Mix(mixup_alpha=0.2, cutmix_alpha=1.0),
    model=Model(dropout=0.02),
    train=Train(epochs=9),
)
SPACE = spaces.load("regularisation")


def run_search(space, score, n, search="tpe", seed=0, trials=()):
    trials = list(trials)
    for number in range(len(trials), n):
        trial = suggest.propose(number, space, RUN, trials, search, seed)
        trial.outcome, trial.history = "completed", [{"epoch": 1, "score": score(trial.values)}]
        trials.append(trial)
    return trials


def score(values):
    return (
        70 - 200 * abs(values["model.dropout"] - 0.05) - 10 * abs(values["mix.mixup_alpha"] - 0.7)
    )


def test_the_recipe_comes_first_then_the_points():
    first = suggest.propose(0, SPACE, RUN, [])
    assert first.origin == "recipe" and spaces.apply(RUN, first.values) == RUN
    point = suggest.propose(1, SPACE, RUN, [first])
    assert point.origin == "point" and point.values["mix.mixup_alpha"] == 0.0
    second = suggest.propose(2, SPACE, RUN, [first])
    assert second.values["model.dropout"] == 0.02, "what a point leaves out is the recipe's"


@pytest.mark.parametrize("search", ["tpe", "random"])
def test_a_restart_proposes_the_same_trials(search):
    whole = run_search(SPACE, score, 20, search)
    again = run_search(SPACE, score, 20, search, trials=whole[:13])
    assert [t.values for t in whole] == [t.values for t in again]
    assert [t.values for t in run_search(SPACE, score, 20, search, seed=1)][5:] != [
        t.values for t in whole
    ][5:]


def test_tpe_beats_random_search():
    """TPE beats random search after as many trials, in the mean over seeds."""
    best = {
        s: np.mean(
            [max(t.score for t in run_search(SPACE, score, 40, s, seed)) for seed in range(4)]
        )
        for s in ("tpe", "random")
    }
    assert best["tpe"] > best["random"]


def test_running_and_failed_trials_are_known_to_the_study():
    trials = run_search(SPACE, score, 4)
    trials[1].outcome, trials[1].history = "failed", []
    trials[2].outcome = "pruned"
    trials.append(suggest.propose(4, SPACE, RUN, trials))
    states = [t.state.name for t in suggest.study(SPACE, trials).trials]
    assert states == ["COMPLETE", "FAIL", "PRUNED", "COMPLETE", "RUNNING"]


def test_a_recipe_outside_the_space_is_tried_but_not_modelled():
    space = spaces.build("s", {"mix.mixup_alpha": tune.uniform(0.5, 1)})
    first = suggest.propose(0, space, RUN, [])
    assert first.values == {"mix.mixup_alpha": 0.2} and suggest.frozen(space, first) is None
    assert 0.5 <= suggest.propose(1, space, RUN, [first]).values["mix.mixup_alpha"] <= 1


def test_conditions_and_tuples_go_through_optuna():
    space = spaces.build(
        "s",
        {
            "augment.randaugment_n": tune.randint(0, 3),
            "augment.randaugment_m": spaces.When(
                tune.uniform(1, 10), given=lambda v: v["augment.randaugment_n"] > 0, otherwise=0.0
            ),
            "augment.crop_scale": tune.choice([(0.08, 1.0), (0.5, 1.0)]),
            "schedule": tune.choice(["Cosine", "OneCycle"]),
        },
    )
    trials = run_search(space, lambda v: v["augment.randaugment_m"], 25)
    assert all(t.values["augment.crop_scale"] in ((0.08, 1.0), (0.5, 1.0)) for t in trials[1:])
    assert all(
        (t.values["augment.randaugment_m"] == 0) == (t.values["augment.randaugment_n"] == 0)
        for t in trials
    )
    for t in trials:
        spaces.apply(RUN, t.values)


def test_a_grid_proposes_every_combination_once():
    space = spaces.build(
        "s",
        {"mix.mixup_alpha": tune.choice([0.0, 0.2, 0.4]), "model.dropout": tune.uniform(0, 0.1)},
    )
    assert suggest.size(space, RUN, "grid", 3) == 10
    values = [suggest.propose(n, space, RUN, [], "grid") for n in range(11)]
    assert values[10] is None
    assert len({repr(t.values) for t in values[:10]}) == 10


def test_titles_fit_a_narrow_column():
    from ftlib.tune.train_trial import title

    assert (
        title("t03", {"model.dropout": 0.02, "mix.mixup_alpha": 0.4, "augment.randaugment_m": 9.0})
        == "t03 do.02 mx.4 m9"
    )
    assert (
        title(
            "t03", {"optimizer.lr": 0.00031, "augment.crop_scale[0]": 0.25, "schedule": "OneCycle"}
        )
        == "t03 lr.00031 cr.25 OneCycle"
    )


def test_trial_describes_itself():
    t = Trial(3, {"model.dropout": 0.02}, "tpe")
    assert (t.name, t.label, t.score, t.epoch) == ("t03", "t03", None, 0)
    assert Trial(7, {}, "t03", seed=42).label == "t03 s42"
