"""The whole of a training job such as jobs/phase2.py: its flags, quick checks, the launch."""

from __future__ import annotations

from collections.abc import Sequence

from ftlib.checks import check_cluster, check_recipe
from ftlib.cli import ResultOptions, options_and_recipe, reporting
from ftlib.config import Run
from ftlib.gc_pause import lasting_imports, lasting_objects


def train_job(recipe: Run, about: str | None, argv: Sequence[str] | None = None) -> None:
    """Train `recipe` with the changes of the command line, or go on with it.

    `about` is the job's docstring. Raises what `launch` raises.
    """
    asked, run = options_and_recipe(
        ResultOptions, about or "", lambda _: recipe, argv, shown=recipe
    )
    check_recipe(run)
    check_cluster(run)
    with lasting_imports():
        from ftlib.launch.launch import launch  # imports torch and ray

    with reporting(asked) as result, lasting_objects():  # the process ends with them
        result.update(vars(launch(run, quiet=asked.quiet)))
