"""Confirm the best trials of a sweep against its recipe, over several seeds and on the validation set, and write the winner as a recipe.

    python jobs/promote.py regularisation-phase2 --top 3 --seeds 5
    python jobs/phase2.py --recipe recipes/regularisation-phase2.json          # what was promoted
    python jobs/promote.py regularisation-phase2 --onto phase3                 # also: the winner's values on the recipe of phase 3

Costs (top + 1) x seeds runs of the recipe's full length. A candidate is promoted when a paired bootstrap over images and seeds, Holm-corrected for the number of candidates,
finds it better at the 5 % level; otherwise the answer is to keep the recipe. The same command goes on after a stop or a kill; --top and --seeds may be raised later.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    from ftlib import recipes
    from ftlib.paths import absolute, home

    parser = argparse.ArgumentParser(
        prog="python jobs/promote.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("sweep", help="name of the sweep")
    parser.add_argument(
        "--top",
        type=int,
        default=3,
        metavar="K",
        help="how many of its best trials to confirm (default 3)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="N",
        help="seeds per configuration, the recipe's own and the next ones (default 5)",
    )
    parser.add_argument("--name", default="", help="name of the recipe file (default: the sweep's)")
    parser.add_argument(
        "--onto",
        default="",
        metavar="RECIPE",
        help="also write the winner's values onto this recipe, such as phase3, as NAME-RECIPE.json",
    )
    parser.add_argument(
        "--out",
        default="recipes",
        metavar="FOLDER",
        help="folder for the recipe (default recipes/)",
    )
    parser.add_argument(
        "--storage", default="", help="where the sweep is kept (default $FTLIB_HOME/runs)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        metavar="N",
        help="runs at once (default: as many as the cluster holds; four on CPUs)",
    )
    asked = parser.parse_args()
    os.environ.setdefault(
        "RAY_LOG_TO_DRIVER", "0"
    )  # what trials print goes to Ray's log files, not through the table; must be set before ray is imported

    from ftlib.storage import folders, join, read_file
    from ftlib.tune.promote import RecipeFiles, open_sweep, promote

    root = absolute(asked.storage) if asked.storage else str(home() / "runs")
    known = sorted(
        name for name in folders(root) if read_file(join(root, name, "sweep.json")) is not None
    )
    onto = (Path(asked.onto).stem, recipes.load(asked.onto)) if asked.onto else None
    result = promote(
        open_sweep(root, asked.sweep, known),
        top=asked.top,
        seeds=asked.seeds,
        parallel=asked.parallel,
        files=RecipeFiles(name=asked.name, folder=Path(asked.out), onto=onto),
    )
    if not result.finished:
        raise SystemExit(130)


if __name__ == "__main__":
    from ftlib.cli import job

    job(main)
