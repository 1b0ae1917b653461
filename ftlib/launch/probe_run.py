"""A linear probe as a run: the same name, record, tracking, report and package as a training run.

Its stage is `probe`, so that `model.init_from = probe` starts a training from the probe's
classifier on the pretrained backbone.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ftlib import settings, storage
from ftlib.config import Run
from ftlib.data.loader import loaders_for
from ftlib.data.shards import Dataset
from ftlib.launch import cluster, summary
from ftlib.launch.active_run import ActiveRun, LaunchOptions, open_run
from ftlib.launch.outcome import Outcome, TrainingResult
from ftlib.launch.prepared_run import prepare_run
from ftlib.paths import home
from ftlib.training import probe
from ftlib.training.initial_weights import InitialWeights
from ftlib.training.worker_context import WorkerContext

STAGE = "probe"
ROWS_PER_TASK = 4096
"""Pictures per Ray task on a cluster."""

Floats = np.ndarray
Ints = np.ndarray


def probe_recipe(run: Run) -> Run:
    """The settings of `run` that a probe reads; the others at their defaults.

    Two recipes that differ only in how they train have one probe.
    """
    return settings.override(
        Run(),
        {
            "stage": STAGE,
            "seed": run.seed,
            "data": run.data,
            "augment.size": run.eval_size,
            "model.arch": run.model.arch,
            "model.init_from": run.model.init_from,
            "model.reset_head": run.model.reset_head,
            "model.preprocessing": run.model.preprocessing,
            "model.freeze_epochs": -1,
            "evaluate": run.evaluate,
            "train.epochs": 1,
            "checkpoint.storage": run.checkpoint.storage,
            "cluster": run.cluster,
            "track": run.track,
        },
    )


def launch_probe(run: Run, *, quiet: bool = False, brief: bool = False) -> Outcome:
    """Probe the model and data of `run` (see `probe_recipe`), or say that it is done.

    `brief`: a line is enough where it is done.

    Features are kept below $FTLIB_HOME/features. Under RAY_ADDRESS they are computed by Ray tasks.

    Raises what `ftlib.launch.launch.launch` raises.
    """
    prepared = prepare_run(probe_recipe(run))
    options = LaunchOptions(local=True, kind="probe", quiet=quiet, announce=False)
    if prepared.finished:
        outcome = prepared.finished_outcome()
        done = f"{outcome.name}: probed before.  {summary.scores(outcome)}"
        options.say(done if brief else summary.already_finished(outcome))
        return outcome
    with open_run(prepared, options) as active:
        outcome = active.finish(_probe(active, options))
    options.say(summary.finished(outcome))
    return outcome


def _probe(active: ActiveRun, options: LaunchOptions) -> TrainingResult:
    prepared = active.prepared
    device = torch.device("cuda" if torch.cuda.is_available() and active.placement.gpus else "cpu")
    context = WorkerContext(
        run=prepared.run,
        dataset=prepared.dataset,
        run_dir=prepared.run_dir,
        device=device,
        source=prepared.source,
        loader_workers=loaders_for(len(prepared.dataset.split("train"))),
        fence=active.lease.fence,
        owner=active.lease.token,
    )
    metrics, row, result = probe.probe(context, _features(context, options))
    options.say("choosing the penalty 1/C of the regression on a fifth of the training pictures")
    for number, trial in enumerate(result.trials, start=1):
        options.say(
            f"  C = {trial.c:<6g} top-1 {trial.top1:.2f} %  loss {trial.loss:.3f}"
            f"{'  (chosen)' if trial.c == result.c else ''}"
        )
        active.writer.metrics(
            {"probe/log10_c": float(np.log10(trial.c)), "probe/tuning_top1": trial.top1},
            step=number,
        )
    split = "tuning" if prepared.run.data.tuning_fraction else "val"
    return TrainingResult(
        metrics=metrics, history=[row], split=split, step=0, best_step=0, best_epoch=1
    )


def _features(
    context: WorkerContext, options: LaunchOptions
) -> Callable[[nn.Module, str, Ints], Floats]:
    """How the probe gets features: from the cache, from this machine, or from a cluster."""
    run, dataset = context.run, context.dataset
    sha256 = context.source.sha256 if context.source else f"random {run.seed}"

    def features_of(model: nn.Module, name: str, rows: Ints) -> Floats:
        split = dataset.split("train" if name == "tuning" else name)
        key = probe.cache_key(run, sha256, dataset.digest, name, rows)

        def compute() -> Floats:
            options.say(f"computing the features of {len(rows):,} {name} pictures")
            if os.environ.get("RAY_ADDRESS") and len(rows) > ROWS_PER_TASK:
                return _on_cluster(context, name, rows)
            return probe.compute_features(
                model,
                run,
                split,
                rows,
                device=context.device,
                loader_workers=context.loader_workers,
            )

        return probe.cached(home() / "features", key, compute, len(rows))

    return features_of


def _on_cluster(context: WorkerContext, name: str, rows: Ints) -> Floats:
    """Features by Ray tasks of ROWS_PER_TASK pictures each, a GPU for each where there are GPUs."""
    import ray

    cluster.connect()
    cluster.refuse_open(context.run.cluster.allow_open)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_task)
    run = settings.to_dict(context.run)
    source = context.source.to_dict() if context.source else None
    parts = [rows[start : start + ROWS_PER_TASK] for start in range(0, len(rows), ROWS_PER_TASK)]
    pending = [task.remote(run, source, context.dataset.path, name, part) for part in parts]
    return np.concatenate(ray.get(pending))


def _task(
    run_values: dict[str, object],
    source: dict[str, object] | None,
    data: str,
    name: str,
    rows: Ints,
) -> Floats:
    """One Ray task: build the model from the run's copy of the weights, compute the features."""
    run = settings.from_dict(Run, run_values)
    dataset = Dataset.open(data)
    context = WorkerContext(
        run=run,
        dataset=dataset,
        run_dir="",
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        source=InitialWeights.from_dict(source) if source else None,
    )
    split = dataset.split("train" if name == "tuning" else name)
    model = probe.first_model(context)
    return probe.compute_features(model, run, split, rows, device=context.device)


def probed(run: Run, *, quiet: bool = False) -> Run:
    """`run`, starting from the model of its probe, which is launched where it is missing.

    Mean, standard deviation, crop and interpolation are the probe's. A run that starts from random
    weights, or from a run of ftlib's own, is returned as it is.

    Raises what `launch_probe` raises.
    """
    if run.model.init_from not in ("pretrained", "imagenet") and not run.model.init_from.startswith(
        ("hf-hub:", "file:")
    ):
        return run
    outcome = launch_probe(run, quiet=quiet, brief=True)
    record = storage.read_json(storage.join(outcome.run_dir, "run.json")) or {}
    own = settings.from_dict(Run, record["run"])
    return settings.override(
        run,
        {
            "model.init_from": f"run:{outcome.name}",
            "model.reset_head": False,
            "data.mean": own.data.mean,
            "data.std": own.data.std,
            "evaluate.crop": own.evaluate.crop,
            "evaluate.interpolation": own.evaluate.interpolation,
        },
    )
