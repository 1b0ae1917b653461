"""Judges a promotion: each candidate against the recipe, over the same seeds and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ftlib.launch.errors import RunFailedError
from ftlib.tune.compare import FinishedRun, RunGroup, require_fair, require_same_images
from ftlib.tune.statistics import Difference, holm, paired_difference
from ftlib.tune.suggest import describe
from ftlib.tune.trial_store import Trial

ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """One candidate against the recipe."""

    candidate: Trial
    difference: Difference
    adjusted: float
    """One-sided p-value after Holm's correction."""
    top1: float
    """Mean validation top-1 over the seeds, percent."""

    @property
    def promoted(self) -> bool:
        return self.adjusted < ALPHA and self.difference.points > 0

    def __str__(self) -> str:
        """A line for the terminal."""
        d = self.difference
        return (
            f"{self.candidate.name}  {self.top1:.2f} %  {d.points:+.2f} points "
            f"(95 % interval {d.low:+.2f} to {d.high:+.2f})  p = {self.adjusted:.3g}  "
            f"{describe(self.candidate.values)}"
        )


@dataclass(frozen=True)
class Judgement:
    """The outcome of all comparisons of a promotion."""

    verdicts: tuple[Verdict, ...]
    """Best first."""
    recipe: RunGroup
    """The recipe's own runs."""
    groups: tuple[RunGroup, ...]
    """The candidates' runs."""
    left_out: tuple[str, ...]
    """Candidates that could not be compared, and why."""

    @property
    def winner(self) -> Verdict | None:
        """The best candidate that beats the recipe; None where none does."""
        return next((v for v in self.verdicts if v.promoted), None)

    @property
    def sentence(self) -> str:
        """The result in one plain sentence, without a full stop."""
        if (winner := self.winner) is not None:
            d = winner.difference
            return (
                f"{describe(winner.candidate.values)} ({winner.candidate.name}) gains "
                f"{d.points:.2f} points, 95 % interval {d.low:.2f} to {d.high:.2f}, "
                f"p = {winner.adjusted:.2g}: promoted"
            )
        if not self.verdicts:
            return "No candidate could be compared; keep the recipe"
        best = self.verdicts[0]
        d = best.difference
        return (
            f"No candidate beats the recipe; keep it. The best, {best.candidate.name}, differs by "
            f"{d.points:+.2f} points (95 % interval {d.low:+.2f} to {d.high:+.2f}, "
            f"p = {best.adjusted:.2g})"
        )


def judge(runs: Sequence[Trial], candidates: Sequence[Trial]) -> Judgement:
    """Compare the confirmation runs of each candidate with those of the recipe.

    Raises ComparisonError for runs that cannot be compared, RunFailedError when a run of the recipe
    failed. A candidate with a failed run is left out.
    """
    groups: dict[str, RunGroup] = {}
    left_out: list[str] = []
    for origin in ("recipe", *(t.name for t in candidates)):
        members = sorted((t for t in runs if t.origin == origin), key=lambda t: t.seed or 0)
        failed = next((t for t in members if t.outcome != "completed"), None)
        if failed is None:
            finished = tuple(FinishedRun.read(t.result["run_dir"], t.label) for t in members)
            groups[origin] = RunGroup(origin, finished)
        elif origin == "recipe":
            raise RunFailedError(
                f"the recipe's own run of seed {failed.seed} failed ({failed.reason}): "
                "there is nothing to compare with. The same command tries it again"
            )
        else:
            left_out.append(f"{origin}: its run of seed {failed.seed} failed ({failed.reason})")
    all_runs = [run for group in groups.values() for run in group.runs]
    require_fair(all_runs)
    require_same_images(all_runs)
    recipe = groups.pop("recipe")
    compared = [t for t in candidates if t.name in groups]
    differences = [
        paired_difference(groups[t.name].correct(recipe.seeds), recipe.correct(recipe.seeds))
        for t in compared
    ]
    adjusted = holm([d.p_better for d in differences])
    verdicts = [
        Verdict(t, d, p, groups[t.name].mean_top1)
        for t, d, p in zip(compared, differences, adjusted)
    ]
    verdicts.sort(key=lambda v: -v.difference.points)
    return Judgement(tuple(verdicts), recipe, tuple(groups.values()), tuple(left_out))
