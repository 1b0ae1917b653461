"""Search a space of settings around a recipe: Ray Tune with ASHA and Optuna, tracked in MLflow.

    python jobs/sweep.py --recipe phase2 --space regularisation --trials 32
    python jobs/sweep.py --recipe sample-phase2 --space quick --trials 8    # minutes on two cores
    ray job submit --working-dir . -- python jobs/sweep.py --recipe phase2 --space regularisation

Trial 0 is the recipe itself; all settings of the recipe are flags. Trials are scored on training
images that no weights have seen; the validation set stays unseen until jobs/promote.py. The same
command goes on after an interruption, and with a higher --trials or --budget it goes on further. It
makes a parent run in MLflow with a child per trial and, below $FTLIB_HOME/runs/SWEEP/report, a
page, its figures and best.json, the winner as a recipe. It ends by saying whether a promotion is
worth its cost.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from ftlib import recipes
from ftlib.checks import check_cluster, check_recipe, check_space
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.flags import Common, Metavar, Repeatable
from ftlib.gc_pause import lasting_imports
from ftlib.paths import space_names
from ftlib.tune.options import SweepOptions


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions, SweepOptions):
    recipe: Annotated[str, Common, Metavar("RECIPE")]
    """phase2, sample-phase2 and so on, or a recipe in a .json file."""
    space: Annotated[str, Common, Metavar("|".join((*space_names(), "FILE.py")))]
    """A file of tune_spaces/ by its name, or a path to such a file."""
    set: Annotated[tuple[str, ...], Repeatable, Metavar("PATH=VALUE")] = ()
    """Change the recipe: --set mix.off_epochs=2 is --mix.off-epochs 2. May be repeated."""

    def __post_init__(self) -> None:
        ResultOptions.__post_init__(self)
        SweepOptions.__post_init__(self)


def main(argv: Sequence[str] | None = None) -> None:
    asked, recipe = options_and_recipe(
        Options, __doc__, lambda asked: recipes.load(asked.recipe, asked.set), argv
    )
    check_space(asked.space)
    check_recipe(recipe)
    check_cluster(recipe)
    # What trials print goes to Ray's log files. Ray reads this when it is imported.
    os.environ.setdefault("RAY_LOG_TO_DRIVER", "0")
    with lasting_imports():
        from ftlib.tune import spaces
        from ftlib.tune.sweep import Sweep, sweep

    rest = {field.name: getattr(asked, field.name) for field in fields(SweepOptions)}
    plan = Sweep(recipe, asked.recipe, spaces.load(asked.space), **rest)
    with reporting(asked) as result:
        found = sweep(plan)
        result.update(
            name=found.store.name,
            finished=found.finished,
            trials=len(found.store.trials),
            report=found.report,
            mlflow=found.mlflow_url,
            seconds=found.seconds,
        )
        if found.best is not None:
            best = found.best
            result["best"] = {"trial": best.name, "score": best.score, "values": best.values}
    if not found.finished:
        from ftlib.tune.ray_tune import exit_code

        raise SystemExit(exit_code())
    if found.best is None:
        raise SystemExit(1)


if __name__ == "__main__":
    job(main)
