"""Scoring rows of a run, and scoring a sample of them again with the weights that were kept."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as safetensors_load
from torch import nn

from ftlib.data.loader import scored_batches
from ftlib.storage import StorageError
from ftlib.training import models
from ftlib.training.checkpoint import SAMPLE, StoredModel
from ftlib.training.evaluate import Counts, count
from ftlib.training.worker_context import WorkerContext
from ftlib.training.worst_images import Losses

SAMPLE_IMAGES = 32
"""Images that are scored again at a run's end."""
TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05, torch.float16: 0.05}
"""Largest mean difference of the sample's losses, relative to 1 + their mean. Another batch size,
another kernel or another card may round differently. Measured on a CPU with a ResNet-18 at 32 px:
0 at batch sizes of 16 to 256 and 1 or 2 threads, in float32 and in bfloat16, which differ from
each other by 0.006. Not measured on a GPU."""


def sample(rows: np.ndarray) -> np.ndarray:
    """At most SAMPLE_IMAGES of `rows`, evenly spread over them."""
    return rows[:: max(-(-len(rows) // SAMPLE_IMAGES), 1)]


def score(
    context: WorkerContext,
    model: nn.Module,
    rows: np.ndarray,
    *,
    dtype: torch.dtype,
    world: int = 1,
    loader_workers: int = 0,
    remember: Losses | None = None,
) -> Counts:
    """Evaluate `rows` of the run's scored split; exact sums over `world` workers.

    `remember` gets the loss of each of this worker's images.
    """
    run = context.run
    split = "train" if run.data.tuning_fraction else "val"
    with scored_batches(run, context.dataset.split(split), rows, workers=loader_workers) as batches:
        return count(
            model,
            batches,
            classes=len(context.dataset.classes),
            device=context.device,
            mean=run.data.mean,
            std=run.data.std,
            dtype=dtype,
            world=world,
            sample=sample(rows),
            remember=remember,
        )


def as_json(rows: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    """What `verify` compares with later: a sample's rows and their losses in nats."""
    return {"rows": rows.tolist(), "losses": losses.tolist()}


def verify(
    stored: StoredModel, context: WorkerContext, model: nn.Module, dtype: torch.dtype
) -> None:
    """Raise StorageError unless the stored weights score the sample as they did when they were
    kept. `model` is given those weights. Folders of earlier versions hold no sample.
    """
    if SAMPLE not in stored.files:
        return
    kept: dict[str, Any] = json.loads(stored.files[SAMPLE])
    models.load_state(model, safetensors_load(stored.files["model.safetensors"]))
    again = score(context, model, np.array(kept["rows"], np.int64), dtype=dtype)
    before, now = np.array(kept["losses"]), again.sample_losses
    if _agree(before, now, TOLERANCE[dtype]):
        return
    raise StorageError(
        f"{stored.folder} holds weights that do not score as its scores say: {len(before)} images "
        f"have a mean loss of {now.mean():.4f}, and had {before.mean():.4f} when epoch "
        f"{stored.about.get('epoch')} was scored. The run is not finished with them. If the "
        "memory and the disk of this machine are sound, delete that folder and give the same "
        "command again: the run keeps the best model that is left"
    )


def _agree(before: np.ndarray, now: np.ndarray, tolerance: float) -> bool:
    """Whether two lists of losses are the same but for rounding; infinities stay what they are."""
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(now)):
        return False
    difference = np.abs(now[finite] - before[finite]).sum()
    return bool(difference <= tolerance * (1 + before[finite]).sum())
