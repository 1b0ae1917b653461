"""Which setting moved the score: PED-ANOVA (Watanabe et al. 2023, in Optuna) with bootstrap
intervals, and a remark where there are too few trials to tell."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ftlib.tune.spaces import Space
from ftlib.tune.suggest import distribution, encode
from ftlib.tune.trial_store import Trial

FEWEST = 10
"""With fewer trials the ranking is noise."""
CAUTION = 20
RESAMPLES = 100


@dataclass(frozen=True)
class Importance:
    shares: dict[str, tuple[float, float, float]]
    """Path -> (share, low, high): shares that add up to 1, with the interval that holds 90 % of the
    bootstrap resamples. Empty when there are too few trials."""
    trials: int
    at_epoch: int
    """Scores were compared after this epoch, which all counted trials reached."""
    remark: str


def importance(space: Space, trials: Sequence[Trial], seed: int = 0) -> Importance:
    """Rank the settings that all trials have. Those under a condition are left out."""
    always = [a for a in space.axes if a.condition is None]
    scored = [
        t
        for t in trials
        if t.outcome in ("completed", "pruned")
        and t.history
        and all(a.path in t.values and a.holds(t.values[a.path]) for a in always)
    ]
    # All trials at an epoch that all reached say more than the few that were not stopped early,
    # which are alike by selection. Where most ran to the end, those few are no selection.
    completed = [t for t in scored if t.outcome == "completed"]
    if len(completed) >= max(FEWEST, 2 * len(scored) / 3):
        scored, at = completed, max((t.epoch for t in completed), default=0)
    else:
        at = min((t.epoch for t in scored), default=0)
    kept = [(t, score) for t in scored if (score := _score(t, at)) is not None]
    conditional = [a.path for a in space.axes if a.condition is not None]
    remark = ""
    if conditional:
        remark = f"{', '.join(conditional)}: searched under a condition, not ranked. "
    if len(kept) < FEWEST:
        few = f"{len(kept)} trials are too few to rank settings; "
        most = f"{FEWEST} are the least, {CAUTION} and more are better."
        return Importance({}, len(kept), at, remark + few + most)
    if len(always) < 2:
        return Importance({}, len(kept), at, remark + "There is only one setting to rank.")
    if len(kept) < CAUTION:
        remark += f"{len(kept)} trials: read this with care; look at the intervals."
    values = np.array([s for _, s in kept])
    point = _shares(always, [t for t, _ in kept], values)
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {a.path: [] for a in always}
    for _ in range(RESAMPLES):
        picked = rng.integers(0, len(kept), len(kept))
        if len({float(values[i]) for i in picked}) < 3:
            continue
        for path, share in _shares(always, [kept[i][0] for i in picked], values[picked]).items():
            draws[path].append(share)
    shares: dict[str, tuple[float, float, float]] = {}
    for path, share in point.items():
        low, high = np.quantile(draws[path] or [share], [0.05, 0.95])
        shares[path] = (share, float(low), float(high))
    return Importance(
        dict(sorted(shares.items(), key=lambda item: -item[1][0])), len(kept), at, remark
    )


def _score(trial: Trial, epoch: int) -> float | None:
    """Its best score up to an epoch."""
    return max((p["score"] for p in trial.history if p["epoch"] <= epoch), default=None)


def _shares(axes: Sequence, trials: Sequence[Trial], values: np.ndarray) -> dict[str, float]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    for trial, value in zip(trials, values):
        study.add_trial(
            optuna.trial.create_trial(
                value=float(value),
                params={a.path: encode(trial.values[a.path]) for a in axes},
                distributions={a.path: distribution(a) for a in axes},
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study,
            evaluator=optuna.importance.PedAnovaImportanceEvaluator(),
            params=[a.path for a in axes],
        )
    whole = sum(found.values())
    if whole <= 0:
        return {a.path: 1 / len(axes) for a in axes}
    return {a.path: float(found.get(a.path, 0.0)) / whole for a in axes}
