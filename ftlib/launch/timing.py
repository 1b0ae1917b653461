"""Run training steps only to time them, for `jobs/estimate.py` and `jobs/benchmark.py`."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from ftlib.data import sampler
from ftlib.data.loader import Batch
from ftlib.training.loop import Training


def constant_batches(training: Training, step: int = 0) -> Iterator[Batch]:
    """Endless batches that fit the plan from `step` on, all with the same random pixels.

    Training on them never waits for a loader.
    """
    run, context, train = training.run, training.context, training.run.train
    side = run.augment.size
    images = torch.randint(
        0,
        256,
        (train.microbatch_size + 1, side, side, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    if context.device.type == "cuda":
        images = images.pin_memory()
    labels = context.dataset.split("train").labels
    while True:
        for mb in sampler.owned(
            sampler.step_plan(
                run.seed, step, training.rows, train.batch_size, train.microbatch_size
            ),
            context.rank,
            context.world,
        ):
            yield Batch(
                step=mb.step,
                epoch=mb.epoch,
                index=mb.index,
                images_in_step=mb.images_in_step,
                rows=torch.from_numpy(mb.rows.copy()),
                labels=torch.from_numpy(labels[mb.rows].copy()),
                images=images[: len(mb.rows)],
            )
        step += 1


def run_steps(training: Training, batches: Iterator[Batch], count: int) -> int:
    """Run `count` steps as training does, waiting for the device at its log points.

    Returns the number of images trained on.
    """
    images = 0
    for _ in range(count):
        training.update_frozen(training.state.step // training.steps_per_epoch)
        ask = training.monitor.is_due(training.state.step)
        training.train_step(batches, ask)
        training.state.step += 1
        if ask:
            training.sync_and_log()
        within = (
            (training.state.step - 1) % training.steps_per_epoch * training.run.train.batch_size
        )
        images += min(training.run.train.batch_size, len(training.rows) - within)
    return images


def synchronize(device: torch.device) -> float:
    """Wait for the device. Returns `time.perf_counter()`, for differences."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
