"""A contact sheet of what a recipe does to the pictures: what the network sees, Mixup and CutMix, every op at every strength.

    python jobs/preview.py phase2                              # PHASE2 on its data set
    python jobs/preview.py phase2 --data.path digits --augment.randaugment-m 5
    python jobs/preview.py my-recipe.json --step 1200 --out sheet.png

The first argument is a recipe: the name of a job, or a .json file (as --show prints it); all settings of a recipe can be given as flags, as for
the phases themselves. What comes out: one PNG. What it costs: some seconds of one core, no GPU.
"""

from __future__ import annotations

import argparse

from ftlib import recipes
from ftlib.cli import job, parse


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/preview.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of the phases work too: `python jobs/phase2.py --help` lists them.",
    )
    parser.add_argument("recipe", help="a job such as phase2, or a recipe in a .json file")
    parser.add_argument(
        "--step",
        type=int,
        default=0,
        metavar="S",
        help="the step that is shown as the network sees it, from 0 (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        metavar="PNG",
        default="",
        help="where the sheet goes (default: preview-STAGE-DATASET.png here)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = options()
    arguments, flags = parser.parse_known_args(argv)
    if arguments.step < 0:
        parser.error("--step must not be negative")
    run = parse(recipes.load(arguments.recipe), flags)

    from ftlib.data.shards import Dataset
    from ftlib.paths import data_path
    from ftlib.report.contact_sheet import contact_sheet

    dataset = Dataset.open(data_path(run.data.path))
    out = contact_sheet(
        dataset, run, arguments.out or f"preview-{run.stage}-{dataset.name}.png", arguments.step
    )
    print(f"{out}: {run.stage} on {dataset.name}")


if __name__ == "__main__":
    job(main)
