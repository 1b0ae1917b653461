"""Fine-tuning in one call: choose the length, probe, train from the probe's classifier."""

from __future__ import annotations

from ftlib.config import Run
from ftlib.data import sampler
from ftlib.data.shards import open_dataset
from ftlib.launch.launch import launch
from ftlib.launch.outcome import Outcome
from ftlib.launch.probe_run import probed
from ftlib.settings import override

STEPS = 300
"""Optimizer steps that the number of epochs is chosen for."""
FEWEST_EPOCHS, MOST_EPOCHS = 3, 20


def fine_tune(run: Run, *, steps: int = STEPS, probe: bool = True, quiet: bool = False) -> Outcome:
    """Train `run` for about `steps` optimizer steps, starting from its linear probe.

    Args:
        steps: the number of epochs is chosen for them; 0 keeps `train.epochs`.
        probe: start with the classifier of a linear probe, which is launched where it is missing.
        quiet: print nothing but problems.

    Raises what `launch` raises.
    """
    if steps:
        run = with_steps(run, steps, quiet=quiet)
    if probe:
        run = probed(run, quiet=quiet)
    return launch(run, quiet=quiet)


def with_steps(run: Run, steps: int, *, quiet: bool = False) -> Run:
    """`run` with as many epochs as take about `steps` optimizer steps, and says so."""
    rows, _ = sampler.run_rows(open_dataset(run.data).split("train").labels, run.data)
    epochs = epochs_for(len(rows), run.train.batch_size, steps)
    if not quiet:
        each = sampler.steps_per_epoch(len(rows), run.train.batch_size)
        print(
            f"{len(rows):,} training pictures, {each:,} optimizer steps an epoch: {epochs} epochs "
            f"({MOST_EPOCHS} at most), {epochs * each:,} steps"
        )
    return override(run, {"train.epochs": epochs})


def epochs_for(images: int, batch_size: int, steps: int) -> int:
    """Epochs of `images` that take about `steps` optimizer steps, from 3 to 20."""
    each = max(1, sampler.steps_per_epoch(images, batch_size))
    return min(max(round(steps / each), FEWEST_EPOCHS), MOST_EPOCHS)
