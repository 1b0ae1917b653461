"""Replay any step of a run: its images, augmentation, mixing and loss, exactly.

The images need nothing but the run's settings and data. The loss also needs the weights before the
step: training starts from the newest checkpoint at or before it, in a scratch folder, and the same
steps give the same weights. The run itself is not touched.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ftlib import storage
from ftlib.config import Run
from ftlib.data import rng
from ftlib.data.loader import Batch
from ftlib.data.shards import Dataset
from ftlib.report.contact_sheet import (
    COLUMNS,
    NAMES,
    Row,
    Section,
    Tile,
    draw_sheet,
    mixed,
    seen_by_the_network,
    targets_text,
)
from ftlib.storage import join
from ftlib.training import checkpoint, loop
from ftlib.training.data_parallel import GradientBuffer
from ftlib.training.evaluate import autocast
from ftlib.training.initial_weights import InitialWeights


@dataclass
class Replay:
    """One replayed step."""

    step: int
    """From 0."""
    rows: dict[int, list[int]] = field(default_factory=dict)
    """Microbatch -> rows of the train split."""
    losses: dict[int, list[float]] = field(default_factory=dict)
    """Microbatch -> loss of each image; empty when only the images were asked for."""
    start: int | None = None
    """Step of the checkpoint that training started from; None for the run's beginning, or where the
    loss was not asked for."""

    @property
    def loss(self) -> float:
        """The step's mean loss, as the run logged it."""
        values = [x for k in sorted(self.losses) for x in self.losses[k]]
        return sum(values) / max(len(values), 1)


def replay(
    run: Run,
    dataset: Dataset,
    run_dir: str,
    step: int,
    source: InitialWeights | None,
    with_loss: bool = True,
    device: torch.device | None = None,
) -> Replay:
    """Replay `step` (from 0) of the run. Raises ValueError when the run has no such step."""
    with tempfile.TemporaryDirectory() as scratch:
        job = loop.WorkerContext(
            run, dataset, scratch, device=device or torch.device("cpu"), source=source
        )
        training = _OneStep(job, step)
        if not 0 <= step < training.total:
            raise ValueError(
                f"--step {step}: the run has the steps 0 to {training.total - 1} "
                f"({training.steps_per_epoch} in each of its {run.train.epochs} epochs)"
            )
        found = Replay(step)
        for batch, _ in seen_by_the_network(dataset, run, step):
            found.rows[batch.index] = batch.rows.tolist()
        if with_loss:
            found.start = _bring_checkpoint(run_dir, scratch, step)
            try:
                training.fit()
            except _StepReachedError:
                found.losses = training.seen
        return found


def _bring_checkpoint(run_dir: str, scratch: str, step: int) -> int | None:
    """Copy the newest intact checkpoint at or before `step`, and return its step."""
    uri = join(run_dir, "checkpoints")
    for known in checkpoint.steps(uri):
        if known <= step:
            try:
                files, _ = storage.read_folder(join(uri, checkpoint.step_name(known)))
            except storage.DamagedError:
                continue
            storage.write_folder(
                join(scratch, "checkpoints", checkpoint.step_name(known)), files, {"step": known}
            )
            return known
    return None


class _StepReachedError(Exception):
    """Ends the training: the wanted step is done."""


class _OneStep(loop.Training):
    """Trains up to the wanted step, keeps the loss of each of its images, and stops."""

    def __init__(self, job: loop.WorkerContext, wanted: int) -> None:
        super().__init__(job)
        self.wanted = wanted
        self.seen: dict[int, list[float]] = {}

    def microbatch(self, batch: Batch, buffer: GradientBuffer) -> None:
        if batch.step > self.wanted:
            raise _StepReachedError
        if batch.step == self.wanted:
            self.keep(batch)
            buffer.stats.copy_(buffer.base)
        super().microbatch(batch, buffer)

    def reconcile_best(self) -> None:
        """The scratch folder holds no best model, and none is wanted."""

    def finish_epoch(self) -> None:
        if self.state.step > self.wanted:
            raise _StepReachedError
        super().finish_epoch()

    @torch.no_grad()
    def keep(self, batch: Batch) -> None:
        """Run the forward pass of training and keep the loss of each image."""
        run, device = self.run, self.context.device
        loop.seed_device(rng.key(rng.DROPOUT, run.seed, batch.step, batch.index), device)
        images, targets = self.inputs(batch)
        with autocast(self.dtype, device):
            logits = self.forward(images)
        self.seen[batch.index] = self.criterion(logits, targets).tolist()


def sheet(run: Run, dataset: Dataset, found: Replay, path: str | Path) -> Path:
    """Draw the step as a contact sheet at `path` (.png).

    It shows every image as the network saw it, with its soft target and loss; the highest loss is
    framed.
    """
    rows = []
    split = dataset.split("train")
    worst = max((x for values in found.losses.values() for x in values), default=None)
    for batch, plan in seen_by_the_network(dataset, run, found.step):
        images, targets = mixed(batch, plan, run, len(dataset.classes))
        values = found.losses.get(batch.index, [])
        tiles = []
        for i, (image, target) in enumerate(zip(images, targets)):
            file = Path(split.path(int(batch.rows[i]))).name
            lines = [
                targets_text(target, dataset.classes, run),
                f"loss {values[i]:.2f}" if values else file,
            ]
            caption = "\n".join(line for line in lines if line)
            tiles.append(Tile(image, caption, marked=bool(values) and values[i] == worst))
        note = "not mixed" if plan is None else f"{NAMES[plan.kind]}, λ {plan.lam:.2f}"
        if values:
            note += f"\nmean loss {sum(values) / len(values):.4f}"
        rows.append(Row(f"microbatch {batch.index}", note, tiles[:COLUMNS]))
        for start in range(COLUMNS, len(tiles), COLUMNS):
            rows.append(Row("", "", tiles[start : start + COLUMNS]))
    lead = f"step {found.step}, epoch {batch.epoch + 1}"
    lead += f" · loss {found.loss:.6f}" if found.losses else ""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(
        f"{run.name or run.stage} on {dataset.name}",
        lead,
        [
            Section(
                "What the network saw",
                "images after augmentation and mixing, their targets and losses",
                rows,
            )
        ],
    ).save(path)
    return path
