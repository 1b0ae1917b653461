"""`launch(run)`: train a run to its end, from its first step or from its newest checkpoint.

Everything that can be known to be wrong is refused before Ray starts. This is the driver's side;
`worker.py` is what runs beside the GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftlib.config import Run
from ftlib.gc_pause import gc_paused, gc_resumed
from ftlib.launch import summary
from ftlib.launch.active_run import LaunchOptions, RunTracker, open_run
from ftlib.launch.cluster import trains_locally
from ftlib.launch.outcome import Outcome
from ftlib.launch.prepared_run import PreparedRun, prepare_run
from ftlib.paths import local_run_folder
from ftlib.track.leftovers import deliver_run

__all__ = ["Outcome", "PreparedRun", "launch", "prepare_run"]


def launch(
    run: Run,
    *,
    local: bool | None = None,
    kind: str = "train",
    tags: Mapping[str, Any] | None = None,
    parent_run_id: str | None = None,
    tracking: RunTracker | None = None,
    on_report: Callable[[dict[str, float]], None] | None = None,
    callbacks: Sequence[Any] = (),
    quiet: bool = False,
) -> Outcome:
    """Train `run`, or resume it, or say that it is finished.

    Args:
        local: train in this process, without Ray workers. By default `run.cluster.local` decides.
        kind: MLflow tag `kind`: train, trial, comparison.
        tags: more MLflow tags.
        parent_run_id: MLflow id (or reference) of the parent run, for trials.
        tracking: an open tracking to use; by default one is opened and closed here.
        on_report: called with each epoch's metrics in local mode. What it raises ends the run as
            pruned and is raised again.
        callbacks: ray.train.UserCallback objects, on the cluster.
        quiet: print nothing but problems.

    Raises:
        ValueError: ConfigError, DataError, LaunchError, TrackingError: wrong input, and what to do
            about it.
        RunFailedError, StorageError, DivergedError: training failed for good. The MLflow run is
            ended as failed.
        StoppedError: (a SystemExit) a signal stopped it, with a checkpoint. The MLflow run is ended
            as killed; the same command resumes.
    """
    options = LaunchOptions(
        local=trains_locally(run.cluster) if local is None else local,
        kind=kind,
        tags=tags or {},
        parent_run_id=parent_run_id,
        tracking=tracking,
        on_report=on_report,
        callbacks=callbacks,
        quiet=quiet,
    )
    with gc_paused():
        prepared = prepare_run(run)
        if prepared.finished:
            outcome = prepared.finished_outcome()
            options.say(summary.already_finished(outcome))
            if tracking is None:
                journal = local_run_folder(prepared.run_dir) / "journal"
                if delivered := deliver_run(journal, run.track.uri):
                    options.say(f"  {delivered}")
            return outcome
        with open_run(prepared, options) as active:
            with gc_resumed():
                result = active.train()
            outcome = active.finish(result)
        options.say(summary.finished(outcome))
        return outcome
