"""Where a run is far from what its recipe was measured on: one line each, with what to change."""

from __future__ import annotations

import numpy as np

from ftlib.config import Run
from ftlib.data.shards import Dataset

FEW_STEPS = 10
"""Optimizer steps an epoch, below which the batch is too large for the images."""
FEW_IMAGES = 50
"""Images a class, below which leaving some out is worth a word."""
FAR_IMAGES = 50
"""Factor between the numbers of training images that counts as far."""
FAR_EPOCHS = 4
"""Factor between the numbers of epochs that counts as far."""


def far_outside(run: Run, dataset: Dataset, images: int, steps_per_epoch: int) -> tuple[str, ...]:
    """What to know before training `run` on `images` images; nothing if `run.measured` is empty.

    Nothing here is an error: the user may want just this.
    """
    found = _pictures(run, dataset)
    known = run.measured.images
    if known and images * FEW_STEPS < known:
        found += _batch(run, images, steps_per_epoch)
        found += _subset(run, images, len(dataset.classes))
    found += _number(run, images) + _epochs(run)
    return tuple(found)


def _pictures(run: Run, dataset: Dataset) -> list[str]:
    """Pictures that are enlarged, and crops of them that leave next to nothing."""
    if not run.measured.size:
        return []
    side = int(np.median(dataset.split("train").sizes.min(axis=1)))
    size, (smallest, largest) = run.augment.size, run.augment.crop_scale
    found = []
    if 2 * side <= min(size, run.measured.size):
        found.append(
            f"augment.size = {size}: half of the training images are at most {side} px on their "
            f"shorter side, and enlarging them shows nothing more. Set it to {side}"
        )
    left = round(min(side, size) * smallest**0.5)
    if left < 16 and min(side, size) * 2 <= run.measured.size:
        found.append(
            f"augment.crop_scale = {smallest:g} {largest:g}: of {side} px it may leave {left} px; "
            f"the recipe was measured at {run.measured.size} px. Set it to 0.35 1"
        )
    return found


def _batch(run: Run, images: int, steps_per_epoch: int) -> list[str]:
    batch = run.train.batch_size
    if steps_per_epoch >= FEW_STEPS or batch <= 8:
        return []
    # Twice as many steps as are few, with the next smaller power of two.
    most = images // (2 * FEW_STEPS)
    suits = max(8, min(batch // 2, 2 ** (most.bit_length() - 1) if most else 0))
    return [
        f"train.batch_size = {batch}: {images:,} images make {steps_per_epoch} optimizer steps an "
        f"epoch, {steps_per_epoch * run.train.epochs:,} in all. "
        f"Set it and train.microbatch_size to {suits}"
    ]


def _subset(run: Run, images: int, classes: int) -> list[str]:
    each = images // classes
    if run.data.subset >= 0.9 or each >= FEW_IMAGES:
        return []
    return [
        f"data.subset = {run.data.subset:g}: it leaves {each} images a class. "
        "Set it to 1, or to 0.9, which leaves a tenth for scoring sweeps"
    ]


def _number(run: Run, images: int) -> list[str]:
    known = run.measured.images
    if not known or known / FAR_IMAGES <= images <= known * FAR_IMAGES:
        return []
    text = f"{images:,} training images: the recipe was measured on {known:,}"
    if images < known and run.model.init_from == "scratch":
        text += ". jobs/finetune.py suits so few: it starts from published weights"
    return [text]


def _epochs(run: Run) -> list[str]:
    epochs, known = run.train.epochs, run.measured.epochs
    if not known or known / FAR_EPOCHS <= epochs <= known * FAR_EPOCHS:
        return []
    return [
        f"train.epochs = {epochs}: the recipe was measured over {known}. Other lengths suit other "
        "rates and augmentation: docs/recipes.md"
    ]
