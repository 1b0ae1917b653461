"""Confirm a sweep's best trials on the validation set, and write the winner as a recipe.

    python jobs/promote.py regularisation-phase2 --top 3 --seeds 5
    python jobs/phase2.py --recipe recipes/regularisation-phase2.json   # what was promoted
    python jobs/promote.py regularisation-phase2 --onto phase3          # also onto phase 3

Each candidate and the unchanged recipe are trained at full length with several seeds: (top + 1) x
seeds runs. A candidate is promoted if a paired bootstrap over pictures and seeds, Holm-corrected
for the number of candidates, finds it better at the 5 % level. Otherwise the recipe stays. The same
command goes on after an interruption; --top and --seeds may be raised later.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from ftlib import recipes
from ftlib.cli import ResultOptions, job, options, reporting
from ftlib.config import AtLeastOne, Count
from ftlib.flags import Metavar, Position
from ftlib.gc_pause import lasting_imports
from ftlib.paths import absolute, home
from ftlib.settings import Between, ConfigError, nearest
from ftlib.storage import folders, join, read_file


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    sweep: Annotated[str, Position]
    """Name of the sweep."""
    top: AtLeastOne = 3
    """How many of its best trials to confirm."""
    seeds: Annotated[int, Between(2, 2**31)] = 5
    """Seeds per configuration: the recipe's own and the next ones."""
    name: str = ""
    """Name of the recipe file. By default the sweep's."""
    onto: Annotated[str, Metavar("RECIPE")] = ""
    """Write the winner's values onto this recipe too, such as phase3, as NAME-RECIPE.json."""
    out: Annotated[str, Metavar("FOLDER")] = "recipes"
    """Folder for the recipe."""
    storage: Annotated[str, Metavar("FOLDER")] = ""
    """Where the sweep is. By default $FTLIB_HOME/runs."""
    parallel: Count = 0
    """Runs at once. 0: as many as the cluster holds, four on CPUs."""


def main(argv: Sequence[str] | None = None) -> None:
    asked = options(Options, __doc__, argv)
    root = absolute(asked.storage) if asked.storage else str(home() / "runs")
    known = known_sweeps(root, asked.sweep)
    onto = (Path(asked.onto).stem, recipes.load(asked.onto)) if asked.onto else None
    # What trials print goes to Ray's log files. Ray reads this when it is imported.
    os.environ.setdefault("RAY_LOG_TO_DRIVER", "0")
    with lasting_imports():
        from ftlib.tune.promote import RecipeFiles, open_sweep, promote

    with reporting(asked) as result:
        found = promote(
            open_sweep(root, asked.sweep, known),
            top=asked.top,
            seeds=asked.seeds,
            parallel=asked.parallel,
            files=RecipeFiles(name=asked.name, folder=Path(asked.out), onto=onto),
        )
        judged = found.judgement
        result.update(
            finished=found.finished,
            sentence=judged.sentence if judged else "",
            recipe=found.recipe_file,
            report=found.report,
            mlflow=found.mlflow_url,
            candidates=[
                {
                    "trial": verdict.candidate.name,
                    "values": verdict.candidate.values,
                    "top1": verdict.top1,
                    "p": verdict.adjusted,
                    "promoted": verdict.promoted,
                    **asdict(verdict.difference),
                }
                for verdict in (judged.verdicts if judged else ())
            ],
        )
    if not found.finished:
        from ftlib.tune.ray_tune import exit_code

        raise SystemExit(exit_code())


def known_sweeps(root: str, wanted: str) -> list[str]:
    """Names of the sweeps below `root`. Raises ConfigError if `wanted` is none of them."""
    known = sorted(
        name for name in folders(root) if read_file(join(root, name, "sweep.json")) is not None
    )
    if wanted not in known:
        raise ConfigError(
            f"there is no sweep {wanted} below {root}.{nearest(wanted, known)} "
            f"Known: {', '.join(known) or 'none'}"
        )
    return known


if __name__ == "__main__":
    job(main)
