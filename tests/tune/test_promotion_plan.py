import numpy as np
import pytest
from scipy import stats

from ftlib.config import Data, Run, Train
from ftlib.paths import job_command
from ftlib.settings import to_dict
from ftlib.tune.promotion_plan import expected_maximum, plan_promotion, seeds_needed
from ftlib.tune.report import scored_on, warning
from ftlib.tune.trial_store import Trial, TrialStore


def sweep(root, scores, images=1000, val_images=2000, slots=2, **about):
    """A sweep whose completed trials have `scores`; the first is the recipe's. Each took 60 s."""
    recipe = to_dict(Run(data=Data(path="x"), train=Train(epochs=6)))
    store = TrialStore(str(root), "s")
    tuning = {"tuning": {"images": images, "seen": 0}, "val_images": val_images}
    store.open({}, {"kind": "sweep", "recipe": recipe, "slots": slots, **tuning, **about})
    for number, score in enumerate(scores):
        point = {"epoch": 3, "score": score, "seconds": 60.0}
        store.add(
            Trial(number, {"a": number}, "tpe" if number else "recipe", "completed", "", [point])
        )
    return store


def test_nothing_is_promoted_when_the_recipe_is_best(tmp_path):
    plan = plan_promotion(sweep(tmp_path, [80.0, 79.0, 80.0]))
    assert not plan.worth and not plan.command and "nothing to confirm" in plan.reason


def test_a_sweep_says_what_its_scores_are_worth(tmp_path):
    """Also where the recipe wins and no promotion is proposed."""
    store = sweep(tmp_path, [90.0, 88.0], images=100, split="tuning")
    assert scored_on(store) == "100 images, a standard error of 3.0 points"
    assert scored_on(store) in warning(store)


def test_a_gain_that_chance_explains_is_not_worth_a_promotion(tmp_path):
    plan = plan_promotion(sweep(tmp_path, [80.0, *[79.0] * 8, 80.5]))
    assert not plan.worth and plan.gain == pytest.approx(0.5) and plan.luck > 0.5
    assert "Not worth a promotion yet" in plan.reason


def test_trials_that_were_stopped_early_count_as_chances(tmp_path):
    few = plan_promotion(sweep(tmp_path / "a", [80.0, 85.0]))
    store = sweep(tmp_path / "b", [80.0, 85.0, *[75.0] * 20])
    for trial in store.trials.values():
        if trial.number > 1:
            trial.outcome = "pruned"
    assert few.luck == 0 < plan_promotion(store).luck


def test_a_clear_gain_is_worth_its_cost(home):
    plan = plan_promotion(sweep(home / "runs", [80.0, 85.0, 88.0, 79.0]))
    assert plan.worth and plan.top == 2 and 3 <= plan.seeds <= 12
    assert plan.command == job_command("promote", f"s --top 2 --seeds {plan.seeds}")
    runs = 3 * plan.seeds
    assert plan.runs == runs
    # A trial of 3 epochs takes 60 s, so a run of 6 takes 120 s, two at once.
    assert plan.seconds == pytest.approx(-(-runs // 2) * 120)


def test_a_gain_that_needs_too_many_seeds_is_said_to(tmp_path):
    plan = plan_promotion(sweep(tmp_path, [80.0, 82.0, 79.0], images=2000, val_images=100))
    assert not plan.worth and plan.seeds > 12 and "would take" in plan.reason


def test_a_sweep_of_an_earlier_version_gets_the_usual_promotion(tmp_path):
    store = sweep(tmp_path, [80.0, 82.0])
    del store.about["tuning"]
    plan = plan_promotion(store)
    words = f"s --storage {tmp_path} --top 1 --seeds 5"  # it is not where sweeps are looked for
    assert plan.worth and plan.command == job_command("promote", words)


def test_the_lead_by_chance_is_that_of_simulated_trials():
    """k equal trials and a recipe whose predictions share half of their errors."""
    rng = np.random.default_rng(0)
    error, images, k = 0.2, 500, 8
    leads = []
    for _ in range(400):
        hard = rng.random(images) < error / 2  # all are wrong
        single = rng.random((k + 1, images)) < (error / 2) / (1 - error / 2)
        score = 100 * (~(hard | single)).mean(axis=1)
        leads.append(score[1:].max() - score[0])
    expected = 100 * np.sqrt(error / images) / np.sqrt(2) * expected_maximum(k)
    assert np.mean(leads) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("k", [2, 5, 20, 100])
def test_the_expected_maximum_is_that_of_normal_draws(k):
    x = np.linspace(-8, 8, 20_001)
    density = k * stats.norm.pdf(x) * stats.norm.cdf(x) ** (k - 1)
    exact = np.trapezoid(x * density, x)
    assert expected_maximum(k) == pytest.approx(exact, abs=0.03)
    assert expected_maximum(1) == 0


def test_the_number_of_seeds_has_the_stated_power():
    """A t test over that many paired seeds finds the gain in about 80 % of simulations or more."""
    rng = np.random.default_rng(1)
    error, images, gain = 0.2, 1000, 1.5
    seeds = seeds_needed(gain, error, images, 1)
    single = 100 * np.sqrt(error / images)
    found = [
        stats.ttest_1samp(rng.normal(gain, single, seeds), 0, alternative="greater").pvalue < 0.05
        for _ in range(2000)
    ]
    assert 0.78 <= np.mean(found) <= 0.95
