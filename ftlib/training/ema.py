"""Exponential moving average of the weights (Polyak and Juditsky 1992; as in Tarvainen and
Valpola 2017)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """A copy of the model that follows it: average <- d * average + (1 - d) * current, once per
    optimizer step.

    Floating-point buffers (BatchNorm's running statistics) are averaged with the same d, since they
    must suit the averaged weights; whole-number buffers (num_batches_tracked) and the constants
    among them are copied.

    d = min(decay, (1 + t) / (10 + t)) after t updates, so that a short run is not stuck near its
    initial weights: the average spans about the last tenth of the run until `decay` takes over (at
    t = 90 for 0.9, t = 8,990 for 0.999). `warmup=False` gives d = decay.

    Give it the bare model, not one wrapped in DDP or torch.compile, already on its device and in
    its memory format.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema_decay = {decay}: must be at least 0 and below 1")
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        """The averaged model, in eval mode, without gradients."""

    def current_decay(self) -> float:
        """d of the next update."""
        return (
            min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        )

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the model's present weights.

        A few kernels over all tensors at once, without waiting for the device.
        """
        averages, currents = _tensors(self.module), _tensors(model)
        if len(averages) != len(currents):
            raise ValueError("the model is not the one that the average was made from")
        moving = [(a, c) for a, c in zip(averages, currents) if a.is_floating_point()]
        fixed = [(a, c) for a, c in zip(averages, currents) if not a.is_floating_point()]
        torch._foreach_lerp_(
            [a for a, _ in moving], [c for _, c in moving], 1.0 - self.current_decay()
        )
        if fixed:
            torch._foreach_copy_([a for a, _ in fixed], [c for _, c in fixed])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers: loads with weights_only=True and restores bit for bit."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.updates = int(state["updates"])


def _tensors(model: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers())]
