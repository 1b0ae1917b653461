"""Search a space of settings around a recipe: Ray Tune with ASHA and Optuna, tracked in MLflow.

    python jobs/sweep.py --recipe phase2 --space regularisation --trials 32
    python jobs/sweep.py --recipe sample-phase2 --space quick --trials 8       # a few minutes on two cores
    ray job submit --working-dir . -- python jobs/sweep.py --recipe phase2 --space regularisation --trials 32

Trial 0 is the recipe itself. Trials are scored on a tenth of the training images (--tuning-fraction); the validation set stays unseen until jobs/promote.py.
The same command goes on with a sweep that was stopped or killed, and with a higher --trials it goes on further. Out comes a parent run in MLflow with a child per
trial, and below $FTLIB_HOME/runs/SWEEP/report a page, its figures and best.json, the winner as a recipe.
"""

import argparse
import os


def main() -> None:
    from ftlib import recipes
    from ftlib.paths import spaces_folder

    spaces = ", ".join(sorted(p.stem for p in spaces_folder().glob("[!_]*.py")))
    parser = argparse.ArgumentParser(
        prog="python jobs/sweep.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        required=True,
        help=f"{', '.join(recipes.available())}, or a path to a recipe in JSON",
    )
    parser.add_argument(
        "--space", required=True, help=f"{spaces}, or a path to a .py file with SPACE"
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=32,
        metavar="N",
        help="trials in all, the recipe's own and those of earlier starts included (default 32)",
    )
    parser.add_argument(
        "--name",
        default="",
        help="the sweep's name (default SPACE-RECIPE); the same name and settings go on with it",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=0,
        metavar="N",
        help="length of a trial (default: the recipe's); promotion uses the recipe's",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="PATH=VALUE",
        help="change the recipe, for all trials and the promotion: --set mix.off_epochs=2 (may be repeated)",
    )
    parser.add_argument(
        "--search",
        choices=["tpe", "random", "grid"],
        default="tpe",
        help="tpe learns from the trials (default)",
    )
    parser.add_argument(
        "--grid-points",
        type=int,
        default=3,
        metavar="N",
        help="values per continuous setting in a grid (default 3)",
    )
    parser.add_argument(
        "--no-early-stopping", action="store_true", help="run every trial to its end"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=0,
        metavar="N",
        help="epochs before a trial may be stopped early (default: a ninth of its length)",
    )
    parser.add_argument(
        "--reduction",
        type=float,
        default=3,
        metavar="X",
        help="at each rung one in X trials goes on (default 3)",
    )
    parser.add_argument(
        "--tuning-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help="part of the training images that scores the trials (default 0.1)",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="trials at once (default: as many as the cluster holds; four on CPUs)",
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="run trials that failed in an earlier start again",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the search (default 0); the trials keep the recipe's seed",
    )
    asked = parser.parse_args()
    os.environ.setdefault(
        "RAY_LOG_TO_DRIVER", "0"
    )  # what trials print goes to Ray's log files, not through the table; must be set before ray is imported

    recipe = recipes.load(asked.recipe, asked.settings)
    from ftlib.tune import spaces as space_files
    from ftlib.tune.sweep import Sweep, sweep

    result = sweep(
        Sweep(
            recipe=recipe,
            recipe_name=asked.recipe,
            space=space_files.load(asked.space),
            name=asked.name,
            trials=asked.trials,
            search=asked.search,
            seed=asked.seed,
            epochs=asked.epochs,
            tuning_fraction=asked.tuning_fraction,
            early_stopping=not asked.no_early_stopping,
            grace=asked.grace,
            reduction=asked.reduction,
            grid_points=asked.grid_points,
            parallel=asked.parallel,
            retry_failed=asked.retry_failed,
        )
    )
    if not result.finished:
        raise SystemExit(130)
    if result.best is None:
        raise SystemExit(1)


if __name__ == "__main__":
    from ftlib.cli import job

    job(main)
