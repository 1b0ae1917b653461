"""Find a learning rate: raise it over a hundred steps, and see where the loss falls and breaks.

    python jobs/find_lr.py phase1 --data.path digits      # a figure and a suggestion
    python jobs/find_lr.py phase2 --apply my_recipe.json  # and the recipe with that rate
    python jobs/find_lr.py my_recipe.json --steps 200 --high 1

RECIPE is the name of a job, or a .json file; all of a recipe's settings are flags. It takes --steps
optimizer steps on this machine, in one process. It reads the starting weights; runs and checkpoints
are not touched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from ftlib import recipes
from ftlib.checks import check_recipe
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import Positive, Run
from ftlib.flags import Metavar, Position
from ftlib.settings import Between, ConfigError, to_json
from ftlib.storage import write_file


@dataclass(frozen=True, kw_only=True)
class Options(ResultOptions):
    recipe: Annotated[str, Position]
    """A job such as phase1, or a recipe in a .json file."""
    steps: Annotated[int, Between(20, 2**31)] = 100
    """Optimizer steps."""
    low: Annotated[Positive, Metavar("RATE")] = 1e-7
    """The first rate."""
    high: Annotated[Positive, Metavar("RATE")] = 10.0
    """The last rate, if the loss lasts that long."""
    apply: Annotated[str, Metavar("FILE")] = ""
    """Write the recipe with the suggested rate to this .json file."""
    figure: Annotated[str, Metavar("FILE")] = "lr.png"
    """Where the figure goes."""

    def check(self) -> None:
        if self.low >= self.high:
            raise ConfigError(f"--low {self.low:g}: must be below --high {self.high:g}")


def main(argv: Sequence[str] | None = None) -> None:
    asked, run = options_and_recipe(
        Options, __doc__, lambda asked: recipes.load(asked.recipe), argv
    )
    check_recipe(run)
    with reporting(asked) as result:
        result.update(find(asked, run))


def find(asked: Options, run: Run) -> dict[str, object]:
    """Run the range test, print what it says and write the files."""
    import torch

    from ftlib.data.loader import loaders_for
    from ftlib.data.shards import open_dataset
    from ftlib.paths import runs_root
    from ftlib.report.lr_figure import lr_figure
    from ftlib.training import lr_finder
    from ftlib.training.initial_weights import resolve_init, with_preprocessing

    dataset = open_dataset(run.data)
    source = resolve_init(run, dataset.name, dataset.digest, dataset.classes, runs_root(run))
    run = with_preprocessing(run, source)
    workers = run.data.loader_workers
    if workers < 0:
        workers = loaders_for(asked.steps * run.train.batch_size)
    title = f"{run.model.arch} on {dataset.name}"
    device = "the GPU" if torch.cuda.is_available() else "the CPU"
    print(f"{asked.steps} steps of {title}, on {device}", flush=True)
    with lr_finder.recipe_step(run, dataset, source, asked.steps, workers=workers) as step:
        curve = lr_finder.range_test(step, asked.low, asked.high, asked.steps)
    reading = lr_finder.read(curve)
    better = lr_finder.applied(run, reading)
    figure = lr_figure(curve, reading.steepest, reading.minimum, reading.suggestion, title)
    write_file(asked.figure, figure)
    print(
        f"steepest at {reading.steepest:.2e}, minimum at {reading.minimum:.2e}: "
        f"the highest rate should be about {reading.suggestion:.1e}"
    )
    print(
        f"with {type(run.schedule).__name__} that is --optimizer.lr {better.optimizer.lr:g} "
        f"(the recipe says {run.optimizer.lr:g})"
    )
    print(f"figure: {asked.figure}")
    if asked.apply:
        write_file(asked.apply, to_json(better).encode())
        print(f"recipe: {asked.apply} (use it with --recipe {asked.apply})")
    return {
        "steepest": reading.steepest,
        "minimum": reading.minimum,
        "highest": reading.suggestion,
        "optimizer.lr": better.optimizer.lr,
        "figure": asked.figure,
        "recipe": asked.apply,
    }


if __name__ == "__main__":
    job(main)
