"""Checks of data, model and storage before anything expensive starts."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ftlib import storage
from ftlib.config import Run
from ftlib.data import augment, sampler
from ftlib.data.fetch_ahead import shard_blocks
from ftlib.data.shards import Dataset
from ftlib.launch.errors import LaunchError
from ftlib.launch.scale import far_outside
from ftlib.launch.source_version import check_version, source_version
from ftlib.settings import ConfigError
from ftlib.storage import StorageError, is_remote, join

NODES_SECONDS = 60.0
"""Time for all nodes together to say what they see; a process may have to start there first."""


@dataclass(frozen=True)
class RunPlan:
    """A run's size in numbers."""

    images: int
    scored: int
    steps_per_epoch: int
    steps: int
    parameters: int
    disk_bytes: int
    """What its checkpoints will need at most at one time."""
    far_outside: tuple[str, ...] = ()
    """Where it is far from what its recipe was measured on."""

    def __str__(self) -> str:
        return (
            f"{self.images:,} training images, {self.scored:,} scored; "
            f"{self.steps_per_epoch:,} steps an epoch, {self.steps:,} in all; "
            f"{self.parameters / 1e6:.1f} M parameters; "
            f"up to {self.disk_bytes / 1e9:.2g} GB of checkpoints"
        )


def check_data(run: Run, dataset: Dataset) -> tuple[int, int]:
    """(training images, scored images) after subset and tuning split.

    Raises ConfigError where the set cannot be trained on.
    """
    where = f"data.path = {run.data.path}"
    if len(dataset.classes) < 2:
        raise ConfigError(
            f"{where}: it has {len(dataset.classes)} class; a classifier needs two at least"
        )
    labels = dataset.split("train").labels
    rows, tuning = sampler.run_rows(labels, run.data)
    scored = len(tuning) if run.data.tuning_fraction else len(dataset.split("val"))
    counts = np.bincount(labels[rows], minlength=len(dataset.classes))
    if (counts == 0).any():
        empty = [dataset.classes[i] for i in np.flatnonzero(counts == 0)[:5]]
        raise ConfigError(
            f"{where}: no training images are left of {', '.join(empty)}. Raise data.subset, lower "
            "data.tuning_fraction, or prepare the set without these classes"
        )
    if not scored:
        if run.data.tuning_fraction:
            raise ConfigError(
                f"data.tuning_fraction = {run.data.tuning_fraction}: of {len(rows)} images it "
                "leaves none to score. Raise it, or data.subset"
            )
        raise ConfigError(
            f"{where}: there is nothing to score: no validation images. "
            "Prepare the set with --val-fraction 0.1, or set data.tuning_fraction"
        )
    if sampler.steps_per_epoch(len(rows), run.train.batch_size) < 1:
        raise ConfigError(
            f"data.subset = {run.data.subset}: {len(rows)} training image is too few for one step. "
            "Raise it"
        )
    shard_blocks(dataset.split("train"), rows, run.data.cache_limit)
    return len(rows), scored


def plan(run: Run, dataset: Dataset) -> RunPlan:
    """Check data, augmentation and model against each other; return the run's size.

    Raises ConfigError.
    """
    from ftlib.training import models

    images, scored = check_data(run, dataset)
    augment.check(run.augment)
    models.check(run.model, run.augment.size, run.eval_size)
    model = models.build_on_meta(run.model, len(dataset.classes), run.augment.size)
    parameters = sum(p.numel() for p in model.parameters())
    size = 4 * parameters * (run.optimizer.state_copies + bool(run.train.ema_decay))
    _check_single_images(run, model)
    steps = sampler.steps_per_epoch(images, run.train.batch_size)
    # Published weights and bare files are copied into the run's folder.
    copied = run.model.init_from.startswith(("pretrained", "imagenet", "hf-hub:", "file:"))
    models_kept = run.checkpoint.keep_best + 1 + copied
    disk = size * (run.checkpoint.keep_last + 1) + 4 * parameters * models_kept
    return RunPlan(
        images=images,
        scored=scored,
        steps_per_epoch=steps,
        steps=steps * run.train.epochs,
        parameters=parameters,
        disk_bytes=disk,
        far_outside=far_outside(run, dataset, images, steps),
    )


def _check_single_images(run: Run, model: nn.Module) -> None:
    """Refuse microbatches of one image where a BatchNorm would see a single value per channel.

    That is BatchNorm over 1x1 pixels; torch would refuse it at the first step. Microbatches of one
    image come only from train.microbatch_size = 1: a rest is never split so far.
    """
    if run.train.microbatch_size > 1:
        return
    size = run.augment.size
    try:
        model.train()(torch.empty(1, 3, size, size, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"train.microbatch_size = 1: BatchNorm in {run.model.arch} cannot be trained on a "
            f"single image of {size} px, of which one pixel is left. Set it to 2 or more"
        ) from None
    except (RuntimeError, NotImplementedError):
        return  # an operation that has no size-only form; nothing is known then


def check_storage(run_dir: str, needed_bytes: int) -> None:
    """Write, read back and delete a small file, and look at the free space.

    Raises StorageError or LaunchError with what to do.
    """
    probe = join(run_dir, f".tmp-probe-{uuid.uuid4().hex[:8]}")
    storage.write_file(probe, b"ftlib")
    try:
        if storage.read_file(probe) != b"ftlib":
            raise StorageError(
                f"{run_dir}: a file that was just written does not read back. Check that storage, "
                "or set checkpoint.storage to another place"
            )
    finally:
        storage.delete_file(probe)
    if not is_remote(run_dir):
        free = shutil.disk_usage(run_dir).free
        if free < needed_bytes:
            raise LaunchError(
                f"{run_dir}: {free / 1e9:.2g} GB are free, but this run's checkpoints need up to "
                f"{needed_bytes / 1e9:.2g} GB. Free some space, set checkpoint.storage to another "
                "place, or lower checkpoint.keep_last or checkpoint.keep_best"
            )


def check_nodes(run_dir: str, data: str) -> None:
    """On a cluster of several nodes: refuse another ftlib, and folders that not every node sees.

    Costs nothing on one node. Raises LaunchError.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    if not others:
        return
    probe = "" if is_remote(run_dir) else join(run_dir, f".tmp-probe-{uuid.uuid4().hex[:8]}")
    if probe:
        storage.write_file(probe, b"ftlib")
    try:
        seen = _ask_nodes(others, probe, "" if is_remote(data) else data)
    finally:
        if probe:
            storage.delete_file(probe)
    for address, (version, sees_runs, sees_data) in seen.items():
        check_version(address, version, source_version())
        if not sees_runs:
            raise LaunchError(
                f"checkpoint.storage: the node {address} does not see {run_dir}, so a restart "
                "there would find no checkpoint. Set checkpoint.storage to a folder that all nodes "
                "share, or to s3://... or gs://..."
            )
        if not sees_data:
            raise LaunchError(
                f"data.path: the node {address} does not see {data}. Put the prepared data set on "
                "storage that all nodes share, or on s3://... or gs://..."
            )


def _ask_nodes(
    nodes: list[dict[str, Any]], probe: str, data: str
) -> dict[str, tuple[str, bool, bool]]:
    """(its ftlib, whether it sees `probe`, whether it sees `data`) of each node, by its address.

    All are asked at once, within NODES_SECONDS together. Raises LaunchError with those that do not
    answer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(_question())
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        options = look.options(num_cpus=0, scheduling_strategy=there)
        asked[options.remote(probe, data)] = node["NodeManagerAddress"]
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_SECONDS)
    seen, without = {}, [asked[answer] for answer in silent]
    for answer in answered:
        try:
            seen[asked[answer]] = ray.get(answer)
        except ray.exceptions.RayError:  # the node went meanwhile
            without.append(asked[answer])
    if without:
        shown = ", ".join(sorted(without)[:5]) + (", ..." if len(without) > 5 else "")
        raise LaunchError(
            f"{len(without)} of {len(asked)} other nodes did not answer within "
            f"{NODES_SECONDS:g} s: {shown}. `ray status` shows which are alive; the same command "
            "tries again"
        )
    return seen


def _question() -> Callable[[str, str], tuple[str, bool, bool]]:
    """What a node is asked. A function within one is sent as it is: the node's own may differ."""

    def look(probe: str, data: str) -> tuple[str, bool, bool]:
        try:
            from ftlib.launch.source_version import source_version

            version = source_version()
        except ImportError:
            version = "of another version"
        return version, not probe or os.path.exists(probe), not data or os.path.exists(data)

    return look
