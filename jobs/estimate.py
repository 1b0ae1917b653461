"""What a recipe will take: everything checked, then a few of its own steps timed on this machine.

    python jobs/estimate.py phase2                                  # checks, time, memory, which of loader and device is the bound
    python jobs/estimate.py phase2 --machine g5.xlarge              # and what it costs there, if this is such a machine
    python jobs/estimate.py my-recipe.json --data.path pets --checks-only

The first word is a recipe: phase1, phase2, phase3, sample-phase1 and so on, or a .json file. All its flags work here. Exit code 1 if a check fails.
What it costs: about --seconds and some for starting. Nothing of the run's own is touched: the steps run in a scratch folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
from ftlib import recipes
from ftlib.cli import job, parse


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/estimate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of the phases work too: `python jobs/phase2.py --help` lists them.",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a job such as phase2, or a recipe in a .json file"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=40.0,
        metavar="S",
        help="time for measuring (default: %(default)g); more is more exact",
    )
    parser.add_argument("--checks-only", action="store_true", help="check everything, time nothing")
    parser.add_argument(
        "--machine",
        default="",
        metavar="NAME",
        help="price it as this machine (g5.xlarge, ...; a wrong name lists them)",
    )
    parser.add_argument(
        "--price",
        type=float,
        default=0.0,
        metavar="USD",
        help="price of a machine like this per hour",
    )
    parser.add_argument("--json", metavar="FILE", help="write checks and estimate there")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments, flags = options().parse_known_args(argv)
    run = parse(recipes.load(arguments.recipe), flags)
    from ftlib.launch import checklist, estimate

    price = (
        estimate.price_of(arguments.machine)
        if arguments.machine
        else estimate.Price(arguments.price, 0, "this machine")
        if arguments.price > 0
        else None
    )
    ready = checklist.check(run)
    for line in ready.checks:
        print(line, flush=True)
    found = None
    if ready.ok and not arguments.checks_only:
        assert ready.prepared is not None and ready.placement is not None
        live = sys.stderr.isatty()

        def say(words: str) -> None:
            if live:
                print(
                    f"\r\033[Ktiming: {words}",
                    end="" if words else "\r\033[K",
                    file=sys.stderr,
                    flush=True,
                )

        found = estimate.measure(ready.prepared, ready.placement, arguments.seconds, say)
        say("")
        print(estimate.text(found, ready.prepared.run, ready.placement, price, arguments.machine))
    if arguments.json:
        Path(arguments.json).write_text(
            json.dumps(
                {
                    "checks": [vars(c) for c in ready.checks],
                    "estimate": found.to_dict() if found else None,
                },
                indent=1,
            ),
            "utf-8",
        )
    if not ready.ok:
        print("A launch would fail: see the lines that begin with fail.", file=sys.stderr)
    return 0 if ready.ok else 1


if __name__ == "__main__":
    job(lambda: sys.exit(main()))
