"""What to try next: a pure function of the space, the seed and the trials so far, so that a
restarted sweep proposes what it would have proposed without the restart.

Trial 0 has the recipe's own values. Then come the space's POINTS, then the search: `tpe` (Bergstra
et al. 2011, in Optuna), `random` or `grid`.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ftlib.config import Run
from ftlib.tune import spaces
from ftlib.tune.options import Search
from ftlib.tune.spaces import Axis, Space
from ftlib.tune.trial_store import Trial

if TYPE_CHECKING:
    import optuna

STARTUP = 10
"""Random draws before TPE's model takes over (Optuna's own default)."""


def propose(
    number: int,
    space: Space,
    run: Run,
    trials: Sequence[Trial],
    search: Search = "tpe",
    seed: int = 0,
    grid_points: int = 3,
) -> Trial | None:
    """Trial `number`, or None when a grid is used up."""
    own = spaces.own_values(space, run)
    if number == 0:
        return Trial(0, own, "recipe")
    if search == "grid":
        combinations = [v for v in spaces.grid(space, grid_points) if v != own]
        return (
            Trial(number, combinations[number - 1], "grid") if number <= len(combinations) else None
        )
    if number <= len(space.points):
        return Trial(number, {**own, **space.points[number - 1]}, "point")
    if search == "random":
        rng = np.random.default_rng([seed, number])
        return Trial(number, spaces.choose(space, lambda axis: axis.draw(rng)), "random")
    return Trial(number, _tpe(number, space, trials, seed), "tpe")


def size(space: Space, run: Run, search: Search, grid_points: int) -> float:
    """How many trials there can be at most, trial 0 included."""
    if search != "grid":
        return math.inf
    own = spaces.own_values(space, run)
    return 1 + sum(v != own for v in spaces.grid(space, grid_points))


def study(
    space: Space, trials: Sequence[Trial], sampler: optuna.samplers.BaseSampler | None = None
) -> optuna.Study:
    """An Optuna study (maximising, in memory) of the trials that lie within the space."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    result = optuna.create_study(direction="maximize", sampler=sampler)
    for trial in sorted(trials, key=lambda t: t.number):
        if (known := frozen(space, trial)) is not None:
            result.add_trial(known)
    return result


def frozen(space: Space, trial: Trial) -> optuna.trial.FrozenTrial | None:
    """The trial as Optuna's. None where a value lies outside its axis, as the recipe's own may."""
    import optuna

    state = trial_state(trial)
    values = spaces.searched(space, trial.values)
    if not values or any(not space.axis(path).holds(value) for path, value in values.items()):
        return None
    return optuna.trial.create_trial(
        state=state,
        value=trial.score if state == optuna.trial.TrialState.COMPLETE else None,
        params={p: encode(v) for p, v in values.items()},
        distributions={p: distribution(space.axis(p)) for p in values},
        intermediate_values={int(p["epoch"]): p["score"] for p in trial.history},
    )


def trial_state(trial: Trial) -> optuna.trial.TrialState:
    """Its outcome in Optuna's terms; a trial without a score has failed."""
    import optuna

    states = {
        "completed": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    if trial.outcome in ("completed", "pruned") and trial.score is None:
        return optuna.trial.TrialState.FAIL
    return states.get(trial.outcome, optuna.trial.TrialState.RUNNING)


def distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    import optuna

    if axis.kind == "choice":
        return optuna.distributions.CategoricalDistribution([encode(c) for c in axis.choices])
    if axis.kind == "int":
        return optuna.distributions.IntDistribution(
            int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1)
        )
    return optuna.distributions.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def encode(value: object) -> str | bool | int | float | None:
    """Optuna takes plain values only: a list becomes its JSON."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return json.dumps(value)


def _tpe(number: int, space: Space, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # group: settings under a condition get a model of their own.
        # constant_liar: values that are running now are not proposed again.
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.default_rng([seed, number]).integers(2**31)),
            multivariate=True,
            group=True,
            constant_liar=True,
            n_startup_trials=STARTUP,
        )
    asked = study(space, trials, sampler).ask()

    def pick(axis: Axis) -> Any:
        if axis.kind == "choice":
            chosen = asked.suggest_categorical(axis.path, [encode(c) for c in axis.choices])
            return next(c for c in axis.choices if encode(c) == chosen)
        if axis.kind == "int":
            return axis.cast(
                asked.suggest_int(
                    axis.path, int(axis.low), int(axis.high), log=axis.log, step=int(axis.step or 1)
                )
            )
        return axis.cast(
            asked.suggest_float(axis.path, axis.low, axis.high, log=axis.log, step=axis.step)
        )

    return spaces.choose(space, pick)


def describe(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """`dropout 0.02, mixup_alpha 0.4`."""

    def text(path: str, value: Any) -> str:
        name = (names or {}).get(path, path.split(".")[-1])
        return f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"

    return ", ".join(text(path, value) for path, value in values.items())
