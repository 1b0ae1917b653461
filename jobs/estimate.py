"""Estimate what a recipe takes: check everything, then time a few of its steps on this machine.

    python jobs/estimate.py phase2                          # checks, time, memory, the bottleneck
    python jobs/estimate.py phase2 --machine g5.xlarge      # and its cost, on such a machine
    python jobs/estimate.py phase2 --cluster cluster.yaml   # an epoch's cost by number of workers
    python jobs/estimate.py recipe.json --data.path pets --checks-only

RECIPE is phase1, phase2, phase3, sample-phase1 and so on, or a .json file; all of a recipe's
settings are flags. Exit code: 1 if a check fails. It takes about --seconds, and some for starting.
The steps run in a scratch folder; nothing of the run is touched.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ftlib import recipes
from ftlib.cli import ResultOptions, job, options_and_recipe, reporting
from ftlib.config import NotNegative, Positive, Run
from ftlib.flags import Metavar, Position, words_for
from ftlib.gc_pause import lasting_imports
from ftlib.paths import jobs_folder
from ftlib.settings import override
from ftlib.text import wrapped

if TYPE_CHECKING:
    from ftlib.launch.cluster_cost import ClusterTypes, Workload
    from ftlib.launch.prices import Price


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
    cluster: Annotated[str, Metavar("FILE")] = ""
    """Price an epoch on the node types of this cluster.yaml, and print how to submit the run."""


def main(argv: Sequence[str] | None = None) -> int:
    asked, run = options_and_recipe(
        Options, __doc__, lambda asked: recipes.load(asked.recipe), argv
    )
    with lasting_imports():
        from ftlib.launch import checklist, cluster_cost, estimate

    price = chosen_price(asked)
    node_types = cluster_cost.read_cluster(asked.cluster) if asked.cluster else None
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
            print(estimate.text(found, ready.prepared.run, ready.placement, price, asked.machine))
            if node_types is not None:
                work = estimate.workload(found, run)
                result["cluster"] = show_cluster(node_types, work, run, asked.recipe)
        if not ready.ok:
            print("A launch would fail: see the lines that begin with fail.", file=sys.stderr)
    return 0 if ready.ok else 1


def chosen_price(asked: Options) -> "Price | None":
    """The price of --machine or --price. Raises ConfigError for an unknown machine."""
    from ftlib.launch import prices

    if asked.machine:
        return prices.price_of(asked.machine)
    if asked.price > 0:
        return prices.Price(asked.price, 0, "this machine")
    return None


def show_cluster(
    node_types: "ClusterTypes", work: "Workload", run: Run, recipe: str
) -> dict[str, list[dict[str, float]]]:
    """Print an epoch's cost on each node type, and the line that submits the run there.

    Returns the costs by node type.
    """
    from ftlib.launch import cluster_cost
    from ftlib.launch.cluster import placement
    from ftlib.launch.errors import LaunchError

    result = {}
    anywhere = override(run.cluster, {"workers": f"1:{work.microbatches}"})
    for kind in node_types.workers:
        print()
        try:
            fits = placement(anywhere, cluster_cost.capacity_of(kind))
        except LaunchError as error:
            print(wrapped(f"{kind.name}: {kind.instance}: {error}"))
            continue
        costs = cluster_cost.epoch_costs(
            work, kind, node_types.head_price, gpus=fits.gpus, cpus=fits.cpus
        )
        result[kind.name] = [vars(cost) for cost in costs]
        print("\n".join(cluster_cost.table(kind, costs)))
        print(f"  {submit_line(recipe, run, cluster_cost.most_efficient_workers(costs))}")
    print(f"\n{cluster_cost.notes(node_types)}")
    return result


def submit_line(recipe: str, run: Run, workers: int) -> str:
    """The command that submits the run to a cluster, with up to so many workers unless it says."""
    name = recipe.removeprefix(recipes.SAMPLE)
    program = f"jobs/{name}.py"
    if not (jobs_folder() / f"{name}.py").is_file():  # any job takes a recipe in a file
        program = f"jobs/phase2.py --recipe {shlex.quote(name)}"
    base = recipes.load(name)
    if run.cluster.workers == base.cluster.workers:
        run = override(run, {"cluster.workers": f"1:{workers}"})
    flags = shlex.join(words_for(base, run))
    return f"ray job submit --working-dir . -- python {program} {flags}"


def show_progress(words: str) -> None:
    """Show what is timed, on a terminal; no words clear the line."""
    if sys.stderr.isatty():
        line = f"\r\033[Ktiming: {words}" if words else "\r\033[K"
        print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    job(main)
