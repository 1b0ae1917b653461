"""Whether promoting a sweep's best trials is worth its cost, how many seeds it needs, and how long
it takes.

The best of many single runs is partly luck. Two runs of top-1 accuracy p disagree on about 1 - p of
the images (half of their errors are shared), so the difference of two single runs has a standard
error of sqrt((1 - p) / n) on n images. The best of k equal trials would lead by the expected
maximum of k such draws. What a gain exceeds that by is what a promotion can hope to confirm.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, replace
from statistics import NormalDist

from ftlib.launch.progress import duration
from ftlib.paths import home, job_command
from ftlib.tune.trial_store import Trial, TrialStore

MOST_CANDIDATES = 3
MOST_SEEDS = 12
"""A gain that needs more seeds than this is not worth a promotion."""
FEWEST_SEEDS = 3
ALPHA, POWER = 0.05, 0.8


@dataclass(frozen=True)
class PromotionPlan:
    """What a promotion would cost and what it could show."""

    worth: bool
    reason: str
    """One or two sentences."""
    gain: float = 0.0
    """Lead of the best trial over the recipe on the tuning split, in points of top-1."""
    luck: float = 0.0
    """Lead that the best of as many equal trials would have by chance, in points."""
    top: int = 0
    """Candidates to confirm."""
    seeds: int = 0
    """Seeds that show what is left of the gain with a power of 80 %."""
    seconds: float = 0.0
    """Training time of all runs, as long as those of the sweep ran at once."""
    sweep: str = ""
    """How a command names the sweep."""

    @property
    def runs(self) -> int:
        return (self.top + 1) * self.seeds

    @property
    def command(self) -> str:
        """The command that promotes; empty where it is not worth its cost."""
        if not self.worth:
            return ""
        return job_command("promote", f"{self.sweep} --top {self.top} --seeds {self.seeds}")

    @property
    def cost(self) -> str:
        """Such as `16 runs, about 0:40:00`."""
        return f"{self.runs} runs, about {duration(self.seconds)}"


def plan_promotion(store: TrialStore) -> PromotionPlan:
    """Judge the completed trials of a sweep."""
    completed = [
        t for t in store.trials.values() if t.outcome == "completed" and t.score is not None
    ]
    own = next((t for t in completed if t.number == 0), None)
    others = sorted((t for t in completed if t.number), key=lambda t: -_score(t))
    if own is None:
        return PromotionPlan(
            False, "The recipe's own trial has not finished, so nothing can be said."
        )
    if not others or _score(others[0]) <= _score(own):
        reason = "There is nothing to confirm."
        return PromotionPlan(False, reason)
    images = store.about.get("tuning", {}).get("images", 0)
    if not images:
        return _as_always(store, others, _score(others[0]) - _score(own))
    error = 1 - _score(own) / 100
    gain = _score(others[0]) - _score(own)
    single = 100 * math.sqrt(max(error, 1 / images) / images) / math.sqrt(2)
    # Trials that were stopped early have been chances too.
    scored = sum(t.score is not None and t.outcome != "failed" for t in store.trials.values()) - 1
    luck = single * expected_maximum(scored)
    by_chance = (
        f"The best trial leads the recipe by {gain:.2f} points. By chance alone the best of "
        f"{scored} equal trials would lead by about {luck:.2f} on {images:,} images"
    )
    left = gain - luck
    if left <= 0:
        more = "Not worth a promotion yet: run more trials, or longer ones"
        return PromotionPlan(False, f"{by_chance}. {more}.", gain, luck)
    top = sum(_score(t) - _score(own) > luck for t in others[:MOST_CANDIDATES])
    seeds = seeds_needed(left, error, store.about.get("val_images", images), top)
    plan = PromotionPlan(
        worth=seeds <= MOST_SEEDS,
        reason=f"{by_chance}.",
        gain=gain,
        luck=luck,
        top=top,
        seeds=seeds,
        seconds=_seconds(store, (top + 1) * seeds),
        sweep=_words(store),
    )
    if plan.worth:
        return plan
    reason = (
        f"{by_chance}. To confirm the rest would take {seeds} seeds ({plan.cost}): first run more "
        "trials, or longer ones."
    )
    return replace(plan, reason=reason)


def _words(store: TrialStore) -> str:
    root = store.uri.rpartition("/")[0]
    elsewhere = "" if root == str(home() / "runs") else f" --storage {shlex.quote(root)}"
    return f"{shlex.quote(store.name)}{elsewhere}"


def _as_always(store: TrialStore, others: list[Trial], gain: float) -> PromotionPlan:
    """For sweeps of an earlier version, which did not record how many images they score on."""
    top, seeds = min(MOST_CANDIDATES, len(others)), 5
    reason = f"The best trial leads the recipe by {gain:.2f} points in a single run."
    seconds = _seconds(store, (top + 1) * seeds)
    return PromotionPlan(
        True, reason, gain, top=top, seeds=seeds, seconds=seconds, sweep=_words(store)
    )


def expected_maximum(k: int) -> float:
    """Of k independent standard normal draws, to within 0.03 (Blom 1958)."""
    return 0.0 if k < 2 else NormalDist().inv_cdf((k - 0.375) / (k + 0.25))


def seeds_needed(gain: float, error: float, images: int, candidates: int) -> int:
    """Seeds that a promotion needs to find a true `gain` (points) with a power of 80 %.

    error: 1 - top-1 of the recipe. images: of the validation set. candidates: number of one-sided
    tests that Holm's correction covers. Two seeds are added for Student's t.
    """
    normal = NormalDist()
    single = 100 * math.sqrt(max(error, 1 / images) / images)
    z = normal.inv_cdf(1 - ALPHA / candidates) + normal.inv_cdf(POWER)
    return max(math.ceil((z * single / gain) ** 2) + 2, FEWEST_SEEDS)


def _seconds(store: TrialStore, runs: int) -> float:
    """Time of `runs` full-length runs, as many at once as in the sweep."""
    done = [t for t in store.trials.values() if t.outcome == "completed" and t.epoch]
    if not done:
        return 0.0
    epochs = store.about["recipe"]["train"]["epochs"]
    longest = [t.result.get("wall_seconds", t.seconds) * epochs / t.epoch for t in done]
    slots = max(int(store.about.get("slots", 1)), 1)
    return math.ceil(runs / slots) * sum(longest) / len(longest)


def _score(trial: Trial) -> float:
    assert trial.score is not None
    return trial.score
