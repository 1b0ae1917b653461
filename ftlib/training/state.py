"""TrainState: everything that must survive a crash, in one place.

The position in the run is `step` alone: order, augmentation, mixing, dropout and the learning rate
are functions of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ftlib.config import Run
from ftlib.training import optim
from ftlib.training.ema import Ema
from ftlib.training.schedule import PlateauState


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16 (Micikevicius et al. 2018), on the device: halved when a
    gradient overflows, doubled after `interval` steps in a row without. As torch.amp.GradScaler,
    but it never makes the host wait. With `enabled=False` it is 1."""

    scale: Tensor
    good_steps: Tensor
    enabled: bool
    interval: int = 2000

    @classmethod
    def create(cls, enabled: bool, device: torch.device) -> LossScale:
        return cls(
            torch.tensor(65536.0 if enabled else 1.0, device=device),
            torch.tensor(0, device=device),
            enabled,
        )

    def update(self, finite: Tensor) -> None:
        if not self.enabled:
            return
        self.good_steps.copy_(torch.where(finite, self.good_steps + 1, 0))
        grow = self.good_steps >= self.interval
        self.scale.copy_(
            torch.where(finite, torch.where(grow, self.scale * 2, self.scale), self.scale / 2)
        )
        self.good_steps.copy_(torch.where(grow, 0, self.good_steps))


@dataclass
class TrainState:
    """The whole state of a run between two optimizer steps."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    scale: LossScale
    device: torch.device
    step: int = 0
    """Optimizer steps done; the next step to do."""
    sums: Tensor = None  # type: ignore[assignment]
    """float64 [3] on the device: loss, correct and images of the running epoch, over all
    workers."""
    plateau: PlateauState | None = None
    best: float = -math.inf
    """Highest score so far, in percent."""
    best_epoch: int = 0
    """Its epoch, 1-based; 0 before the first evaluation."""
    best_step: int = 0
    nonfinite: int = 0
    """Steps skipped because of a NaN or infinity."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A row per finished epoch."""
    points: list[list[Any]] = field(default_factory=list)
    """[milliseconds since 1970, step, metrics] of the running epoch, handed to tracking again
    after a restart (same time, same point)."""

    @classmethod
    def create(cls, run: Run, model: nn.Module, device: torch.device, fp16: bool) -> TrainState:
        return cls(
            model=model,
            optimizer=optim.build(run.optimizer, model, device),
            device=device,
            ema=Ema(model, run.train.ema_decay) if run.train.ema_decay else None,
            scale=LossScale.create(fp16, device),
            sums=torch.zeros(3, dtype=torch.float64, device=device),
        )

    def sync_counters(self) -> None:
        """Set BatchNorm's counters of batches seen to the step: what they hold must not depend
        on workers or restarts."""
        for module in (self.model, self.ema.module) if self.ema is not None else (self.model,):
            for buffer in module.buffers():
                if not buffer.is_floating_point():
                    buffer.fill_(self.step)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only, so that it loads with weights_only=True."""
        self.sync_counters()
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scale": [self.scale.scale, self.scale.good_steps],
            "sums": self.sums,
            "plateau": None if self.plateau is None else vars(self.plateau).copy(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_step": self.best_step,
            "nonfinite": self.nonfinite,
            "history": [dict(row) for row in self.history],
            "points": [list(p) for p in self.points],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.scale.scale.copy_(state["scale"][0])
        self.scale.good_steps.copy_(state["scale"][1])
        self.sums.copy_(state["sums"])
        self.plateau = None if state["plateau"] is None else PlateauState(**state["plateau"])
        for name in ("step", "best", "best_epoch", "best_step", "nonfinite", "history", "points"):
            setattr(self, name, state[name])

    @property
    def scored_model(self) -> nn.Module:
        """What is evaluated and kept as best: the averaged weights where there are any."""
        return self.ema.module if self.ema is not None else self.model
