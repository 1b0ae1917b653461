"""Holds the tests of promote.py, verdict.py and promotion_report.py."""

import contextlib
import json

import numpy as np
import pytest

from ftlib.config import Data, Mix, Run, Train
from ftlib.launch.errors import RunFailedError
from ftlib.report.html import Markup
from ftlib.settings import ConfigError, from_json, to_dict
from ftlib.storage import StorageError
from ftlib.tune import figures
from ftlib.tune import promote as promotion
from ftlib.tune.promote import RecipeFiles, candidates
from ftlib.tune.ray_tune import TrialEnd
from ftlib.tune.stored_predictions import ComparisonError
from ftlib.tune.train_trial import SweepInputs
from ftlib.tune.trial_runs import Hooks, TrialStoreWriter
from ftlib.tune.trial_store import Trial, TrialStore
from ftlib.tune.verdict import judge
from tests.columns import too_wide
from tests.failing_writes import FailingWrites, whole

RECIPE = Run(stage="phase2", data=Data(path="x"), mix=Mix(mixup_alpha=0.2), train=Train(epochs=3))
SEEDS = (42, 43, 44, 45, 46)


def sweep_store(
    root, values=(0.2, 0.4, 0.6, 0.4), scores=(50, 52, 51, 51.5), axis="mix.mixup_alpha"
):
    store = TrialStore(str(root), "s")
    store.open(
        {},
        {
            "kind": "sweep",
            "recipe": to_dict(RECIPE),
            "recipe_name": "phase2",
            "base": to_dict(RECIPE),
            "axes": [axis],
            "constants": {},
            "data": {"name": "set", "digest": "d" * 64},
            "init": {"uri": "", "sha256": ""},
            "split": "tuning",
        },
    )
    for n, (v, s) in enumerate(zip(values, scores)):
        store.add(
            Trial(
                n,
                {axis: v},
                "tpe" if n else "recipe",
                "completed",
                history=[{"epoch": 3, "score": s}],
            )
        )
    return store


def correct_images(seed, gain=0.0, images=2000):
    """Right answers of one run: what is easy for all, its seed's own luck, and a gain."""
    rng = np.random.default_rng(0)
    level = rng.normal(0, 2, images)
    own = np.random.default_rng([seed, round(abs(gain) * 1000)])
    return level + 0.5 * own.normal(size=images) + own.normal(0, 0.02) + gain > 0


def confirmations(finished, gains, **other):
    """Confirmation runs of the recipe and of a trial t01, t02 ... per gain."""
    wanted = []
    for i, seed in enumerate(SEEDS):
        for k, gain in enumerate((0.0, *gains)):
            origin = "recipe" if k == 0 else f"t{k:02d}"
            changes = {"mix.mixup_alpha": 0.2 + 0.2 * k, **other.get(origin, {})}
            folder = finished(
                f"{origin}-{seed}",
                correct_images(seed, gain),
                seed=seed,
                changes=changes,
                init=other.get("init", {}).get(origin),
            )
            wanted.append(
                Trial(
                    i * 10 + k,
                    {"mix.mixup_alpha": 0.2 + 0.2 * k},
                    origin,
                    "completed",
                    result={"run_dir": folder},
                    seed=seed,
                )
            )
    chosen = [
        Trial(k, {"mix.mixup_alpha": 0.2 + 0.2 * k}, "tpe", "completed")
        for k in range(1, len(gains) + 1)
    ]
    return wanted, chosen


def test_candidates_are_the_best_that_differ(tmp_path):
    store = sweep_store(tmp_path)
    assert [t.number for t in candidates(store, 3)] == [1, 2], (
        "trial 3 repeats trial 1, trial 0 is the recipe"
    )
    assert [t.number for t in candidates(store, 1)] == [1]
    with pytest.raises(ConfigError, match="no trial but the recipe"):
        candidates(sweep_store(tmp_path / "x", (0.2,), (50,)), 3)


def test_a_real_gain_is_promoted(finished):
    judgement = judge(*confirmations(finished, (0.01, 0.4)))
    assert judgement.winner.candidate.name == "t02" and judgement.winner.difference.seeds == 5
    assert judgement.recipe.seeds == SEEDS and len(judgement.groups) == 2
    assert not judgement.left_out
    assert judgement.sentence.startswith("mixup_alpha 0.6 (t02) gains ")
    assert "95 % interval" in judgement.sentence and judgement.sentence.endswith("promoted")


def test_without_a_gain_the_recipe_is_kept(finished):
    judgement = judge(*confirmations(finished, (0.0, 0.001)))
    assert judgement.winner is None
    assert judgement.sentence.startswith("No candidate beats the recipe; keep it")


def test_a_worse_candidate_is_never_promoted(finished):
    assert judge(*confirmations(finished, (-0.5,))).winner is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"t01": {"train.epochs": 9}}, "another budget .train.epochs is 9 against 3"),
        ({"init": {"t01": {"sha256": "abc", "uri": "u"}}}, "other starting weights"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(finished, other, message):
    with pytest.raises(ComparisonError, match=message):
        judge(*confirmations(finished, (0.4,), **other))


def test_a_failed_candidate_is_left_out_and_a_failed_recipe_ends_it(finished):
    wanted, chosen = confirmations(finished, (0.4, 0.4))
    next(t for t in wanted if t.origin == "t01").outcome = "failed"
    judgement = judge(wanted, chosen)
    assert [v.candidate.name for v in judgement.verdicts] == ["t02"]
    assert judgement.left_out[0].startswith("t01: its run of seed 42 failed")
    wanted[0].outcome = "failed"
    with pytest.raises(RunFailedError, match="the recipe's own run of seed 42 failed"):
        judge(wanted, chosen)


class FakeTracking:
    """Stands in for MLflow: remembers how its one run ended."""

    def __init__(self):
        self.ended, self.tags_, self.run_id, self.reference = [], {}, "r", "r"
        self.url = self.opened_by = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def start_run(self, name, **_):
        self.name = name
        return self

    def writer_of(self, name):
        return self

    def handle(self):
        return None

    def writer(self):
        return self

    def tags(self, values):
        self.tags_.update(values)

    def finish(self, outcome, note=None):
        self.ended.append((outcome, note))

    def end_orphan(self, *_):
        return None

    def metrics(self, values, step):
        self.values = values

    def artifact(self, *_):
        return None

    params = artifact

    def artifact_link(self, path):
        return f"#/{path}"


@pytest.fixture
def promote(monkeypatch, finished, tmp_path):
    """promote(store, gain=..): the whole job but for Ray, MLflow and training."""
    from ftlib.tune.resources import TrialResources

    ran = []

    def run_trials(opened, next_trial, train, **_):
        group = opened.group
        while (trial := next_trial()) is not None:
            ran.append(trial.label)
            run = group.recipe_of(trial)
            assert run.data.tuning_fraction == 0
            assert run.seed == trial.seed and run.train.epochs == 3
            gain = 0.0 if trial.origin == "recipe" else gain_of_run[0]
            folder = finished(
                f"{trial.label}-{len(ran)}".replace(" ", "-"),
                correct_images(trial.seed, gain),
                seed=trial.seed,
                changes={"mix.mixup_alpha": run.mix.mixup_alpha},
            )
            TrialStoreWriter(group.store).ended(
                trial, TrialEnd("completed", "", {"run_dir": folder})
            )
        return True

    gain_of_run = [0.4]
    tracking = FakeTracking()
    monkeypatch.setattr(promotion, "run_trials", run_trials)
    monkeypatch.setattr(promotion, "connect", lambda *a: TrialResources(2, {"CPU": 1.0}, True))

    def go(store, gain=0.4, onto=None, seen_in_val=0, recipes=tmp_path / "recipes", **more):
        def check(run):
            labels, seen = np.arange(100) % 10, np.zeros(100, bool)
            return SweepInputs("set", "d" * 64, labels, seen, seen_in_val=seen_in_val)

        gain_of_run[0] = gain
        result = promotion.promote(
            store,
            hooks=Hooks(check, open_tracking=lambda *a, **k: tracking),
            files=RecipeFiles(folder=recipes, onto=onto),
            **more,
        )
        return result, list(ran), tracking

    return go


def test_the_whole_promotion_writes_a_recipe_that_can_be_run(promote, tmp_path, capsys):
    result, ran, tracking = promote(
        sweep_store(tmp_path / "runs2"),
        top=1,
        seeds=4,
        onto=("phase3", Run(stage="phase3", train=Train(epochs=60))),
    )
    assert len(ran) == 8 and ran[:2] == ["recipe s42", "t01 s42"], "seed by seed"
    assert result.winner.candidate.name == "t01"
    recipe = from_json(Run, (tmp_path / "recipes" / "s.json").read_text())
    assert (
        recipe.promoted_from == "s/t01"
        and recipe.mix.mixup_alpha == 0.4
        and recipe.seed == RECIPE.seed
        and recipe.name == ""
    )
    third = from_json(Run, (tmp_path / "recipes" / "s-phase3.json").read_text())
    assert third.train.epochs == 60 and third.mix.mixup_alpha == 0.4
    assert (
        tracking.ended[-1][0] == "completed"
        and "promoted" in tracking.ended[-1][1]
        and "[Report](#/report/index.html)" in tracking.ended[-1][1]
        and "\n- t01, " in tracking.ended[-1][1]
        and tracking.tags_["winner"]
    )
    table = json.loads(
        (tmp_path / "runs2" / "s" / "promotion" / "report" / "comparison.json").read_text()
    )
    assert table["data"][0][0] == "recipe" and len(table["data"]) == 2
    said = capsys.readouterr().out
    assert "promoted" in said and not too_wide(said)
    assert f"phase2.py --recipe {tmp_path / 'recipes' / 's.json'}" in said


def test_only_missing_runs_are_trained_and_seeds_may_be_raised(promote, tmp_path):
    store = sweep_store(tmp_path / "runs2")
    promote(store, top=1, seeds=2)
    _, ran, _ = promote(store, top=1, seeds=2)
    assert len(ran) == 4, "nothing is run again"
    result, ran, _ = promote(store, top=2, seeds=3)
    assert len(ran) == 9
    assert len(result.judgement.verdicts) == 2
    assert result.judgement.verdicts[0].difference.seeds == 3


def test_no_winner_writes_no_recipe(promote, tmp_path):
    result, _, tracking = promote(sweep_store(tmp_path / "runs2"), gain=0.0, top=1, seeds=3)
    assert (
        result.winner is None
        and not (tmp_path / "recipes").exists()
        and "keep it" in tracking.ended[-1][1]
        and tracking.tags_["winner"] == "recipe"
    )


@pytest.mark.parametrize("copy_is", ["as written", "edited", "elsewhere"])
def test_a_recipe_is_withdrawn_when_more_seeds_unmake_its_promotion(
    promote, tmp_path, capsys, copy_is
):
    store = sweep_store(tmp_path / "runs2")
    promote(store, top=1, seeds=3)
    copy = tmp_path / "recipes" / "s.json"
    if copy_is == "edited":
        copy.write_text(copy.read_text().replace('"seed": 42', '"seed": 43'))
    elif copy_is == "elsewhere":
        copy.rename(tmp_path / "s.json")
    result, _, _ = promote(store, gain=-0.4, top=1, seeds=9)
    assert result.winner is None
    assert not (tmp_path / "runs2" / "s" / "promotion" / "report" / "s.json").exists()
    assert copy.exists() == (copy_is == "edited")
    said = {
        "as written": "is deleted",
        "edited": "was edited since and is left",
        "elsewhere": "is not here: delete the copy where it was written",
    }
    assert f"{copy} {said[copy_is]}" in capsys.readouterr().out


def test_impossible_requests_are_refused(promote, tmp_path):
    with pytest.raises(ConfigError, match="two seeds"):
        promote(sweep_store(tmp_path / "a"), top=1, seeds=1)
    with pytest.raises(
        ComparisonError, match=r"another budget or start.*train.epochs is 9 against 3.*--set"
    ):
        promote(
            sweep_store(tmp_path / "b", values=(3, 9), scores=(1, 2), axis="train.epochs"),
            top=1,
            seeds=2,
        )
    with pytest.raises(ConfigError, match=r"no sweep quikc.*Did you mean quick\?"):
        promotion.open_sweep(str(tmp_path), "quikc", ["quick"])


def test_other_data_or_weights_than_the_sweeps_are_refused(promote, tmp_path):
    store = sweep_store(tmp_path / "a")
    store.save_about(data={"name": "set", "digest": "e" * 64})
    with pytest.raises(ComparisonError, match="used other data"):
        promote(store, top=1, seeds=2)


def test_validation_images_that_the_starting_weights_have_seen_are_refused(promote, tmp_path):
    with pytest.raises(ComparisonError, match="of the validation images, .* have seen 7"):
        promote(sweep_store(tmp_path / "a"), top=1, seeds=2, seen_in_val=7)


@pytest.mark.parametrize(
    "length", [1, pytest.param(5, marks=pytest.mark.slow)], ids=["once", "for a while"]
)
def test_every_write_of_a_promotion_may_fail(promote, tmp_path, monkeypatch, length):
    """Each in turn: an error, and no recipe and no page but those of the whole promotion. The same
    command then ends with the same files, and runs nothing again that had ended."""
    monkeypatch.setattr(figures, "png", lambda figure: b"a picture")  # most of the time
    monkeypatch.setattr(figures, "drawing", lambda *_: Markup("a drawing"))
    faults = FailingWrites(monkeypatch)
    runs = str(tmp_path / "runs")  # of the stand-in for training
    failing = []

    def wanted(number, path):
        if path.startswith(runs):
            return False
        failing.append(number)
        return first <= len(failing) - 1 < first + length

    def go(root):
        store = TrialStore(str(root), "s")
        if not store.read():
            store = sweep_store(root)
        failing.clear()
        faults.wanted = wanted
        try:
            return promote(store, top=1, seeds=2, recipes=root / "recipes")
        finally:
            faults.wanted = lambda *_: False

    def files(root):
        """All but what names this hour, this driver and the runs of the stand-in."""
        found = whole(root, but=("sweep.json", "trial.json", ".lock", ".lock-holder"))
        trials = sorted((root / "s" / "promotion" / "trials").glob("*/trial.json"))
        about = [json.loads(file.read_text()) for file in trials]
        return found, [(t["origin"], t["seed"], t["outcome"]) for t in about]

    first = 10**9
    _, ran, _ = go(tmp_path / "whole")
    writes, expected, before = len(failing), files(tmp_path / "whole"), len(ran)
    page, recipe = "s/promotion/report/index.html", "recipes/s.json"
    assert writes > 60 and {page, recipe} <= set(expected[0])
    for first in range(writes):
        root = tmp_path / f"{first}"
        with contextlib.suppress(StorageError):
            go(root)
        for name in (page, recipe):
            file = root / name
            assert not file.exists() or file.read_bytes() == expected[0][name], first
        first = 10**9
        _, ran, _ = go(root)
        assert files(root) == expected
        assert len(ran) - before <= 5, "at most the run whose end could not be written is repeated"
        before = len(ran)
