"""Score a data set on pretrained features, in minutes: the first number about your own pictures.

    python jobs/probe.py pets                    # EfficientNet-Lite0 with ImageNet weights
    python jobs/probe.py pets --model.arch timm/convnext_atto --augment.size 288
    python jobs/probe.py pets --model.init-from hf-hub:ORG/NAME --model.arch timm/NAME

DATA is a prepared data set. The features of all pictures are computed once and kept; a logistic
regression on them, with the penalty chosen on a tuning split of the training pictures, is scored on
the validation pictures. What comes out is a run like any other: a report, a packaged model, a page
in MLflow, and the classifier that jobs/finetune.py starts with.
It takes one pass over the pictures, without gradients.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib import recipes
from ftlib.checks import check_recipe
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import Run
from ftlib.flags import Position
from ftlib.gc_pause import lasting_imports
from ftlib.paths import job_command
from ftlib.settings import override


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    data: Annotated[str, Position]
    """A prepared data set: a name below $FTLIB_HOME/data, a folder or an address."""


def recipe_for(asked: Options) -> Run:
    """The fine-tuning recipe on the data set; a probe reads its model, data and picture size."""
    return override(recipes.load("finetune"), {"data.path": asked.data})


def main(argv: Sequence[str] | None = None) -> None:
    asked, run = options_and_recipe(Options, __doc__, recipe_for, argv)
    check_recipe(run)
    with lasting_imports():
        from ftlib.launch.probe_run import launch_probe  # imports torch

    with reporting(asked) as result:
        outcome = launch_probe(run, quiet=asked.quiet)
        result.update(vars(outcome))
        print(f"\nNext: {job_command('finetune', f'--data.path {shlex.quote(asked.data)}')}")


if __name__ == "__main__":
    job(main)
