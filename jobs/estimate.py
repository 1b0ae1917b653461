"""Estimate what a recipe takes: check everything, then time a few of its steps on this machine.

    python jobs/estimate.py phase2                          # checks, time, memory, the bottleneck
    python jobs/estimate.py phase2 --machine g5.xlarge      # and its cost, on such a machine
    python jobs/estimate.py recipe.json --data.path pets --checks-only

RECIPE is phase1, phase2, phase3, sample-phase1 and so on, or a .json file; all of a recipe's
settings are flags. Exit code: 1 if a check fails. It takes about --seconds, and some for starting.
The steps run in a scratch folder; nothing of the run is touched.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ftlib import recipes
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import NotNegative, Positive
from ftlib.flags import Metavar, Position

if TYPE_CHECKING:
    from ftlib.launch.estimate import Price


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    recipe: Annotated[str, Position]
    """A job such as phase2, or a recipe in a .json file."""
    seconds: Annotated[Positive, Metavar("SECONDS")] = 40.0
    """Time for measuring; more is more exact."""
    checks_only: bool = False
    """Check everything, time nothing."""
    machine: Annotated[str, Metavar("NAME")] = ""
    """Price it as this machine: g5.xlarge and so on. A wrong name lists them."""
    price: Annotated[NotNegative, Metavar("USD")] = 0.0
    """Price of a machine like this one per hour."""


def main(argv: Sequence[str] | None = None) -> int:
    asked, run = options_and_recipe(
        Options, __doc__, lambda asked: recipes.load(asked.recipe), argv
    )
    from ftlib.launch import checklist, estimate

    price = chosen_price(asked)
    with reporting(asked) as result:
        ready = checklist.check(run)
        for line in ready.checks:
            print(line, flush=True)
        result.update(checks=[vars(check) for check in ready.checks], estimate=None)
        if ready.ok and not asked.checks_only:
            assert ready.prepared is not None and ready.placement is not None
            found = estimate.measure(ready.prepared, ready.placement, asked.seconds, show_progress)
            show_progress("")
            result["estimate"] = found.to_dict()
            run = ready.prepared.run
            print(estimate.text(found, run, ready.placement, price, asked.machine))
        if not ready.ok:
            print("A launch would fail: see the lines that begin with fail.", file=sys.stderr)
    return 0 if ready.ok else 1


def chosen_price(asked: Options) -> "Price | None":
    """The price of --machine or --price. Raises ConfigError for an unknown machine."""
    from ftlib.launch import estimate

    if asked.machine:
        return estimate.price_of(asked.machine)
    if asked.price > 0:
        return estimate.Price(asked.price, 0, "this machine")
    return None


def show_progress(words: str) -> None:
    """Show what is timed, on a terminal; no words clear the line."""
    if sys.stderr.isatty():
        line = f"\r\033[Ktiming: {words}" if words else "\r\033[K"
        print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    job(main)
