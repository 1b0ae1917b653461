"""Holds the tests of compare.py and stored_predictions.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ftlib.tune import compare
from ftlib.tune.compare import FinishedRun
from ftlib.tune.stored_predictions import ComparisonError, predictions, stored_predictions

RNG = np.random.default_rng(0)
BASE = RNG.random(2000) < 0.6


def better(correct, gain, seed=1):
    rng = np.random.default_rng(seed)
    return correct | (rng.random(len(correct)) < gain)


def test_a_better_run_is_found_and_its_settings_shown(finished, tmp_path):
    runs = [
        FinishedRun.read(finished("a", BASE)),
        FinishedRun.read(finished("b", better(BASE, 0.1), changes={"mix.mixup_alpha": 0.4})),
    ]
    found = compare.compare(runs)
    d = found.differences[0]
    assert d.points == pytest.approx(100 * (runs[1].predictions.correct.mean() - BASE.mean()))
    assert d.low > 0 and found.rows()[0][2]
    assert dict(found.settings) == {"mix.mixup_alpha": [0.0, 0.4]}
    assert "better" in found.sentences()[1] and any("one run each" in c for c in found.cautions)
    text = compare.text(found)
    assert "mix.mixup_alpha" in text and "points" in text
    files = compare.write(found, tmp_path / "page")
    assert {f.name for f in files} == {"index.html", "curves.png", "differences.png"}


def test_equal_runs_are_not_told_apart(finished):
    flipped = BASE ^ (np.random.default_rng(3).random(2000) < 0.02)
    found = compare.compare(
        [
            FinishedRun.read(finished("a", BASE)),
            FinishedRun.read(finished("b", flipped, changes={"model.dropout": 0.1})),
        ]
    )
    assert "no significant difference" in found.sentences()[1]


def test_seeds_are_grouped_and_paired(finished):
    runs = [FinishedRun.read(finished(f"a{s}", better(BASE, 0.02, s), seed=s)) for s in (1, 2, 3)]
    runs += [
        FinishedRun.read(
            finished(f"b{s}", better(BASE, 0.08, 10 + s), seed=s, changes={"model.dropout": 0.1})
        )
        for s in (3, 2, 1)
    ]
    found = compare.compare(runs)
    assert [g.name for g in found.groups] == ["a1 x3", "b3 x3"] and found.groups[1].seeds == (
        1,
        2,
        3,
    )
    assert found.differences[0].seeds == 3 and not found.cautions


def test_what_cannot_be_compared_is_refused_and_what_is_unfair_is_said(finished):
    a = FinishedRun.read(finished("a", BASE))
    with pytest.raises(ComparisonError, match="different data.*Evaluate both on one data set"):
        compare.compare(
            [
                a,
                FinishedRun.read(
                    finished("b", BASE, digest="e" * 64, changes={"model.dropout": 0.1})
                ),
            ]
        )
    other = FinishedRun.read(
        finished("c", BASE, changes={"train.epochs": 9}, init={"sha256": "1234567890", "uri": "x"})
    )
    reasons = compare.unfair([a, other])
    assert any("budget (train.epochs is 9 against 3)" in r for r in reasons) and any(
        "other starting weights" in r for r in reasons
    )
    with pytest.raises(ComparisonError, match="other starting weights(.|\n)*train.epochs"):
        compare.require_fair([a, other])
    assert len([c for c in compare.compare([a, other]).cautions if "other" in c]) >= 2
    with pytest.raises(ComparisonError, match="different validation images"):
        compare.compare(
            [
                a,
                FinishedRun.read(
                    finished("d", BASE, changes={"model.dropout": 0.1}, rows=np.arange(2000) + 5)
                ),
            ]
        )
    with pytest.raises(ComparisonError, match="same settings"):
        compare.compare([a, FinishedRun.read(finished("e", BASE, seed=7))])
    with pytest.raises(ComparisonError, match="at least two runs"):
        compare.compare([a])


def test_unfinished_and_missing_runs(finished, tmp_path):
    with pytest.raises(ComparisonError, match="not finished"):
        FinishedRun.read(finished("a", BASE, status="running"))
    with pytest.raises(ComparisonError, match="there is no run"):
        FinishedRun.read(str(tmp_path / "nothing"))
    with pytest.raises(ComparisonError, match="no finished run"):
        predictions(str(tmp_path / "nothing"))


def test_predictions_of_a_tuning_split_do_not_count_as_validation(finished, tmp_path):
    folder = Path(finished("a", BASE, changes={"data.tuning_fraction": 0.1}))
    best = folder / "best" / "step-00000003"
    best.mkdir(parents=True)
    (folder / "predictions.npz").rename(best / "predictions.npz")
    found = dict(np.load(best / "predictions.npz"))
    np.savez(
        best / "predictions.npz",
        rows=found["rows"],
        labels=found["labels"],
        correct=found["correct"],
    )
    assert stored_predictions(str(folder)) is None
    other = Path(finished("b", np.ones(2000, bool)))
    best = other / "best" / "step-00000003"
    best.mkdir(parents=True)
    np.savez(
        best / "predictions.npz",
        rows=found["rows"],
        labels=found["labels"],
        logits=np.eye(10)[found["labels"]],
    )
    (other / "predictions.npz").unlink()
    assert stored_predictions(str(other)).correct.all()
    (best / "predictions.npz").write_bytes((best / "predictions.npz").read_bytes()[:-500])
    assert stored_predictions(str(other)) is None, "a damaged file is made again"


def test_predictions_of_other_weights_are_made_again(finished, tmp_path):
    folder = Path(finished("a", BASE))
    best = folder / "best" / "step-00000003"
    best.mkdir(parents=True)

    def weights(sha256):
        manifest = {"files": {"model.safetensors": {"sha256": sha256}}}
        (best / "manifest.json").write_text(json.dumps(manifest))

    weights("one")
    known = dict(np.load(folder / "predictions.npz"))
    np.savez(folder / "predictions.npz", **known, weights="one")
    assert stored_predictions(str(folder)) is not None
    weights("two")
    assert stored_predictions(str(folder)) is None


def test_predictions_must_have_the_score_that_the_run_reports(finished, monkeypatch):
    folder = finished("a", BASE)
    wrong = ~BASE
    np.savez(Path(folder) / "predictions.npz", **_arrays(wrong))
    assert stored_predictions(folder) is None
    other = SimpleNamespace(**_arrays(wrong), logits=np.zeros((len(BASE), 10)))
    monkeypatch.setattr("ftlib.tune.stored_predictions._predict", lambda run_dir: other)
    with pytest.raises(ComparisonError, match="reports .* best model has"):
        predictions(folder)
    right = SimpleNamespace(**_arrays(BASE), logits=np.zeros((len(BASE), 10)))
    monkeypatch.setattr("ftlib.tune.stored_predictions._predict", lambda run_dir: right)
    assert predictions(folder).top1 == pytest.approx(100 * BASE.mean())


def _arrays(correct):
    rows = np.arange(len(correct))
    return {"rows": rows, "labels": rows % 10, "correct": correct}
