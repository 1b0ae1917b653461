"""Draw what a recipe does to the pictures: the network's input, Mixup and CutMix, and every op.

    python jobs/preview.py phase2                       # PHASE2 on its data set
    python jobs/preview.py phase2 --data.path digits --augment.randaugment-m 5
    python jobs/preview.py my-recipe.json --step 1200 --out sheet.png

RECIPE is the name of a job, or a .json file (as --show prints it); all of a recipe's settings are
flags. It writes one picture, and takes some seconds of one core and no GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib import recipes
from ftlib.checks import check_data
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import Count
from ftlib.flags import Metavar, Position
from ftlib.gc_pause import lasting_imports


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    recipe: Annotated[str, Position]
    """A job such as phase2, or a recipe in a .json file."""
    step: Count = 0
    """The step whose images are shown as the network sees them, from 0."""
    out: Annotated[str, Metavar("FILE")] = ""
    """Where the sheet goes. By default preview-STAGE-DATASET.webp here; .png keeps every
    pixel, in 15 times the bytes."""


def main(argv: Sequence[str] | None = None) -> None:
    asked, run = options_and_recipe(
        Options, __doc__, lambda asked: recipes.load(asked.recipe), argv
    )
    check_data(run.data.path)
    with lasting_imports():
        from ftlib.data.shards import open_dataset
        from ftlib.report.contact_sheet import contact_sheet

    with reporting(asked) as result:
        dataset = open_dataset(run.data)
        file = asked.out or f"preview-{run.stage}-{dataset.name}.webp"
        out = contact_sheet(dataset, run, file, asked.step)
        print(f"{out}: {run.stage} on {dataset.name}")
        result.update(sheet=out, stage=run.stage, data=dataset.name, step=asked.step)


if __name__ == "__main__":
    job(main)
