"""What a worker needs to train: the run, its data and device, the callbacks through which it
reports and is told to stop, and the errors it may end with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL.Image import Image

from ftlib.config import Run
from ftlib.data import sampler
from ftlib.data.shards import Dataset, Split
from ftlib.training import initial_weights


class DivergedError(RuntimeError):
    """Too many steps with a NaN or an infinity; the message names the step and its images."""


class OutOfMemoryError(RuntimeError):
    """The device cannot hold a microbatch; the message has sizes and the setting to change."""


class InterruptedTrainingError(RuntimeError):
    """The run was asked to stop and has kept its state; the same command goes on."""


class Tracking(Protocol):
    """Where rank 0 sends its points; must neither raise nor wait."""

    def metrics(self, values: dict[str, float], step: int, at: int | None = None) -> None: ...

    def image(self, image: Image, key: str, step: int) -> None: ...


@dataclass
class WorkerContext:
    """One worker's part of a run."""

    run: Run
    dataset: Dataset
    run_dir: str
    """Folder or address of the run; checkpoints/ and best/ are written below it."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rank: int = 0
    world: int = 1
    source: initial_weights.InitialWeights | None = None
    loader_workers: int = 0
    tracking: Tracking | None = None
    report: Callable[[dict[str, float], str | None], None] = lambda metrics, checkpoint: None
    """Called on every worker after each epoch: finite floats, and the address of its checkpoint."""
    progress: Callable[[dict[str, float]], None] = lambda values: None
    """Called on rank 0 at log points: epoch, epochs, step, steps, loss, top1, lr, images_per_s,
    seconds_left, and val_top1, best once known."""
    fence: Callable[[], None] = lambda: None
    """Called on rank 0 before each write; raises when another launch has taken the run over."""
    owner: str = ""
    """Names this launch in the manifests of what it writes."""
    notice: Callable[[], str] = lambda: ""
    """Asked by all workers at the same steps: 'checkpoint' (the node is about to go), 'stop', or
    ''."""

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, str]:
        """(training rows, rows to score, name of the scored split: val or tuning)."""
        rows, tuning = sampler.run_rows(self.dataset.split("train").labels, self.run.data)
        if self.run.data.tuning_fraction:
            return rows, tuning, "tuning"
        return rows, np.arange(len(self.dataset.split("val")), dtype=np.int64), "val"

    @property
    def needed(self) -> list[tuple[Split, np.ndarray]]:
        """The splits that training reads, and their rows."""
        rows, scored, name = self.rows
        split = self.dataset.split
        return [(split("train"), rows), (split("val" if name == "val" else "train"), scored)]
