"""Scoring a model: exact on any number of workers, and predictions with their row numbers.

Every worker takes an explicit slice of the rows; counts are summed. No image is scored twice and
none is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ftlib.data.loader import Batch
from ftlib.training.worst_images import Losses


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [b, H, W, 3] -> float32 [b, 3, H, W], (pixel / 255 - mean) / std per channel, in
    channels-last memory order."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std)], device=images.device)
    return torch.addcmul(shift, images.to(torch.float32), scale).permute(0, 3, 1, 2)


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast to `dtype`; none for float32."""
    return torch.autocast(
        device.type,
        dtype=dtype if dtype != torch.float32 else torch.bfloat16,
        enabled=dtype != torch.float32,
    )


@dataclass(frozen=True)
class Counts:
    """What an evaluation counted, over all images it saw."""

    loss: float
    """Sum of the negative log-likelihood (nats), whatever the run trains with, so that runs
    compare."""
    top1: int
    top5: int
    images: int
    class_top1: np.ndarray
    """int64 [C]: correct first answers per true class."""
    class_images: np.ndarray
    """int64 [C]: images per true class."""
    sample_losses: np.ndarray
    """float64: losses of those of the `sample` that this worker scored, in their order."""

    def metrics(self, split: str) -> dict[str, float]:
        """`val/loss`, `val/top1`, `val/top5`: mean nats, percent. Five classes or fewer have no
        top-5: it is always 100."""
        n = max(self.images, 1)
        top5 = {f"{split}/top5": percent(self.top5, n)} if len(self.class_images) > 5 else {}
        return {
            f"{split}/loss": round(self.loss / n, 6),
            f"{split}/top1": percent(self.top1, n),
            **top5,
        }


def percent(part: float, whole: float) -> float:
    """Rounded to 4 digits after the point: charts and tables show it as it is."""
    return round(100.0 * part / whole, 4)


@torch.no_grad()
def count(
    model: nn.Module,
    batches: Iterable[Batch],
    classes: int,
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    world: int = 1,
    sample: np.ndarray | None = None,
    remember: Losses | None = None,
) -> Counts:
    """Score this worker's `batches` and sum over the `world` workers. top5 is top-C where there
    are fewer than five classes.

    sample: int64, the rows of which to keep each loss. `remember` gets every image's loss.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4 + 2 * classes, dtype=torch.float64, device=device)
    k = min(5, classes)
    kept = torch.from_numpy(sample if sample is not None else np.zeros(0, np.int64))
    losses = []
    for batch in batches:
        labels = batch.labels.to(device, non_blocking=True)
        with autocast(dtype, device):
            logits = model(normalize(batch.images.to(device, non_blocking=True), mean, std))
        logits = logits.float()
        nll = F.cross_entropy(logits, labels, reduction="none")
        loss = nll.double()
        # Indices, because a GPU's mask would have to be waited for.
        losses.append(loss[torch.isin(batch.rows, kept).nonzero()[:, 0].to(device)])
        if remember is not None:
            remember.add(batch.rows, labels, logits.argmax(1), nll)
        hits = logits.topk(k).indices == labels[:, None]
        first = hits[:, 0].double()
        sums[:4] += torch.stack(
            [
                loss.sum(),
                first.sum(),
                hits.sum().double(),
                torch.tensor(float(len(labels)), dtype=torch.float64, device=device),
            ]
        )
        sums[4 : 4 + classes].index_add_(0, labels, first)
        sums[4 + classes :].index_add_(0, labels, torch.ones_like(first))
    if world > 1:
        dist.all_reduce(sums)
    model.train(training)
    values = sums.cpu().numpy()
    return Counts(
        loss=float(values[0]),
        top1=int(values[1]),
        top5=int(values[2]),
        images=int(values[3]),
        class_top1=values[4 : 4 + classes].astype(np.int64),
        class_images=values[4 + classes :].astype(np.int64),
        sample_losses=torch.cat(losses).cpu().numpy() if losses else np.zeros(0),
    )


@dataclass(frozen=True)
class Predictions:
    rows: np.ndarray
    """int64 [n]: row of each image in its split."""
    labels: np.ndarray
    """int64 [n]: true classes."""
    logits: np.ndarray
    """float32 [n, C]."""

    @property
    def correct(self) -> np.ndarray:
        """bool [n]: the first answer is the label."""
        return self.logits.argmax(1) == self.labels

    def save(self, path: str) -> None:
        np.savez_compressed(
            path,
            rows=self.rows,
            labels=self.labels,
            correct=self.correct,
            logits=self.logits.astype(np.float16),
        )


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dtype: torch.dtype = torch.float32,
    flip: bool = False,
) -> Predictions:
    """Logits for every image of `batches`, in their order.

    `flip` averages the logits with those of the mirrored image.
    """
    training = model.training
    model.eval()
    rows, labels, logits = [], [], []
    for batch in batches:
        x = normalize(batch.images.to(device, non_blocking=True), mean, std)
        with autocast(dtype, device):
            out = model(x).float()
            if flip:
                out = (out + model(x.flip(-1)).float()) / 2
        rows.append(batch.rows.numpy())
        labels.append(batch.labels.numpy())
        logits.append(out.cpu().numpy())
    model.train(training)
    if not rows:
        raise ValueError("there is no image to predict")
    return Predictions(np.concatenate(rows), np.concatenate(labels), np.concatenate(logits))
