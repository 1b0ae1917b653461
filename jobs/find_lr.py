"""Find a learning rate: raise it over a hundred steps of a recipe and see where the loss falls fastest and where it breaks.

    python jobs/find_lr.py phase1 --data.path digits               # a figure and a suggestion
    python jobs/find_lr.py phase2 --apply my_recipe.json           # and the recipe with that rate, for --recipe
    python jobs/find_lr.py my_recipe.json --steps 200 --high 1

The first word is a recipe: the name of a job, or a .json file. Its flags all work here (`python jobs/phase1.py --help`). What it costs:
--steps optimizer steps on this machine, in one process. Runs and checkpoints are neither read (but the weights to start from) nor written.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ftlib import recipes
from ftlib.cli import job, parse
from ftlib.settings import to_json


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/find_lr.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a job such as phase1, or a recipe in a .json file"
    )
    parser.add_argument(
        "--steps", type=int, default=100, metavar="N", help="optimizer steps (default: %(default)s)"
    )
    parser.add_argument(
        "--low", type=float, default=1e-7, metavar="RATE", help="first rate (default: %(default)g)"
    )
    parser.add_argument(
        "--high",
        type=float,
        default=10.0,
        metavar="RATE",
        help="last rate, if the loss lasts that long (default: %(default)g)",
    )
    parser.add_argument(
        "--apply",
        metavar="FILE",
        help="write the recipe with the suggested rate to this .json file",
    )
    parser.add_argument(
        "--figure",
        metavar="FILE",
        default="lr.png",
        help="where the figure goes (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments, rest = options().parse_known_args(argv)
    run = parse(recipes.load(arguments.recipe), rest, about=__doc__)

    import torch

    from ftlib.data.shards import Dataset
    from ftlib.paths import data_path, runs_root
    from ftlib.report.lr_figure import lr_figure
    from ftlib.training import lr_finder
    from ftlib.training.initial_weights import resolve_init, with_preprocessing

    dataset = Dataset.open(data_path(run.data.path))
    source = resolve_init(run, dataset.name, dataset.digest, dataset.classes, runs_root(run))
    run = with_preprocessing(run, source)
    workers = (
        run.data.loader_workers
        if run.data.loader_workers >= 0
        else max((os.cpu_count() or 1) - 1, 0)
    )
    print(
        f"{arguments.steps} steps of {run.model.arch} on {dataset.name}, on {'the GPU' if torch.cuda.is_available() else 'the CPU'}",
        flush=True,
    )
    with lr_finder.recipe_step(run, dataset, source, arguments.steps, workers=workers) as step:
        curve = lr_finder.range_test(step, arguments.low, arguments.high, arguments.steps)
    reading = lr_finder.read(curve)
    better = lr_finder.applied(run, reading)
    Path(arguments.figure).write_bytes(
        lr_figure(
            curve,
            reading.steepest,
            reading.minimum,
            reading.suggestion,
            f"{run.model.arch} on {dataset.name}",
        )
    )
    kind = type(run.schedule).__name__
    print(
        f"steepest at {reading.steepest:.2e}, minimum at {reading.minimum:.2e}: the highest rate should be about {reading.suggestion:.1e}"
    )
    print(
        f"with {kind} that is --optimizer.lr {better.optimizer.lr:g} (the recipe says {run.optimizer.lr:g})"
    )
    print(f"figure: {arguments.figure}")
    if arguments.apply:
        Path(arguments.apply).write_text(to_json(better), "utf-8")
        print(f"recipe: {arguments.apply} (use it with --recipe {arguments.apply})")


if __name__ == "__main__":
    job(main)
