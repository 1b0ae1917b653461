"""Holds the tests of report.py, importance.py and figures.py."""

import re

import numpy as np
import pytest
from ray import tune

from ftlib.config import Data, Model, Run, Train
from ftlib.settings import to_dict
from ftlib.tune import figures, report, spaces
from ftlib.tune import importance as importances
from ftlib.tune.trial_store import Trial, TrialStore

SPACE = spaces.build(
    "s",
    {
        "model.dropout": tune.uniform(0, 0.1),
        "mix.mixup_alpha": tune.quniform(0, 1, 0.1),
        "schedule": tune.choice(["Cosine", "OneCycle"]),
    },
)


def trials(n, seed=0):
    """Dropout decides; mixup and schedule do nothing. The worse half is stopped after epoch 3."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(n):
        values = spaces.choose(SPACE, lambda axis: axis.draw(rng))
        level = 60 - 300 * abs(values["model.dropout"] - 0.03) + rng.normal(0, 0.3)
        stop = number and level < 55
        history = [
            {"epoch": e, "score": level - 10 / e, "seconds": 2.0}
            for e in range(1, 4 if stop else 10)
        ]
        out.append(
            Trial(
                number,
                values,
                "tpe" if number else "recipe",
                "pruned" if stop else "completed",
                history=history,
            )
        )
    return out


@pytest.fixture
def store(tmp_path):
    made = TrialStore(str(tmp_path), "reg")
    made.open(
        {},
        {
            "kind": "sweep",
            "recipe_name": "phase2",
            "recipe": to_dict(Run(data=Data(path="x"), model=Model(), train=Train(epochs=9))),
            "base": to_dict(Run(data=Data(path="x"), model=Model(), train=Train(epochs=9))),
            "tuning": {"images": 2000, "seen": 0},
            "split": "tuning",
            "data": {"name": "set", "digest": "d" * 64},
            "init": {"uri": "", "sha256": ""},
            "seed": 0,
            "search": "tpe",
        },
    )
    for t in trials(24):
        made.add(t)
    made.add(
        Trial(
            24,
            {"model.dropout": 0.05, "mix.mixup_alpha": 0.1, "schedule": "Cosine"},
            "tpe",
            "failed",
            "out of memory: <b>CUDA</b>",
        )
    )
    return made


def test_the_setting_that_decides_is_found():
    found = importances.importance(SPACE, trials(40))
    assert next(iter(found.shares)) == "model.dropout" and found.shares["model.dropout"][0] > 0.5
    share, low, high = found.shares["model.dropout"]
    assert (
        low <= share + 0.05
        and share - 0.05 <= high
        and sum(v[0] for v in found.shares.values()) == pytest.approx(1)
    )
    assert found.at_epoch == 3, "at an epoch that all trials reached"


def test_too_few_trials_are_not_ranked():
    found = importances.importance(SPACE, trials(6))
    assert not found.shares and "too few" in found.remark
    assert "with care" in importances.importance(SPACE, trials(14)).remark


def test_settings_under_a_condition_are_named_as_not_ranked():
    space = spaces.build(
        "s",
        {
            "model.dropout": tune.uniform(0, 0.1),
            "mix.mixup_alpha": tune.uniform(0, 1),
            "mix.p": spaces.When(tune.uniform(0, 1), given=lambda v: v["mix.mixup_alpha"] > 0.5),
        },
    )
    assert "mix.p: searched under a condition" in importances.importance(space, trials(20)).remark


def test_the_page_says_what_matters_and_stands_alone(store, tmp_path):
    files = report.write_report(store, SPACE, tmp_path / "report")
    assert {f.name for f in files} == {
        "index.html",
        "importance.png",
        "slices.png",
        "curves.png",
        "best_so_far.png",
    }
    assert all(f.read_bytes()[:4] == b"\x89PNG" for f in files if f.suffix == ".png")
    page = (tmp_path / "report" / "index.html").read_text()
    best = report.best_trial(store)
    assert f"{best.score:.2f} % of the tuning split" in page and "against the recipe" in page
    assert "The validation set was not looked at" in page and "promote.py reg" in page
    assert "neither the trials nor the runs before them have seen" in page
    assert "&lt;b&gt;CUDA" in page and "<b>CUDA" not in page
    assert (
        not re.search(r'(src|href)="https?:', page.replace("xlink:href", ""))
        and "<script" not in page
    )
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "figures on one page must not share ids"
    refs = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', page))
    assert refs <= set(ids)
    stopped = [t for t in store.trials.values() if t.outcome == "pruned"]
    assert report.saved_seconds(store) == pytest.approx(len(stopped) * 6 * 2.0)


def test_figures_show_the_contest_of_the_completed_trials(store):
    trials = list(store.trials.values())
    completed = [t.score for t in trials if t.outcome == "completed"]
    floor = figures.contest_floor(trials)
    assert floor < min(completed)
    assert min(completed) - floor == pytest.approx(max(3.0, max(completed) - min(completed)))
    for trial in trials:
        if trial.outcome == "pruned":
            trial.history = [{"epoch": 1, "score": 1.0}]
    axes = figures.best_so_far(trials, "tuning").axes[0]
    assert axes.get_ylim()[0] > 1.0
    triangles = [line for line in axes.lines if line.get_marker() == "v"]
    assert len(triangles) == sum(t.outcome == "pruned" for t in trials)
    assert all(line.get_ydata()[0] == floor for line in triangles)


def test_learning_curves_of_few_epochs_are_shown_from_the_first_on():
    def trial(number, outcome, *scores):
        points = [{"epoch": e, "score": s} for e, s in enumerate(scores, start=1)]
        return Trial(number, {}, "recipe", outcome, history=points)

    own, best = trial(0, "completed", 40, 60, 61), trial(2, "completed", 20, 50, 62)
    stopped = trial(1, "pruned", 5, 6)
    axes = figures.learning_curves([own, stopped, best], best, "tuning").axes[0]
    assert 6 < axes.get_ylim()[0] < 20 and not axes.texts
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "stopped early (1 below this figure)" in labels
    long = trial(0, "completed", 10, *[90.0] * 39)  # there the first epochs would flatten the rest
    axes = figures.learning_curves([long], long, "tuning").axes[0]
    assert axes.get_ylim()[0] > 70


def test_the_note_begins_with_the_result_and_the_links(store):
    lines = report.note(store, SPACE, "http://x/view").splitlines()
    assert (
        lines[0].startswith("**Best: t")
        and "http://x/view" in lines[2]
        and "report/index.html" in lines[3]
    )


def test_a_sweep_without_a_winner_says_so(store):
    for t in store.trials.values():
        if t.number:
            t.outcome = "failed"
    assert "No trial beats the recipe" in report.headline(store, SPACE)
    assert "promote.py" not in report.note(store, SPACE, "")
    store.trials[0].outcome = "failed"
    assert report.headline(store, SPACE) == "No trial has finished."
