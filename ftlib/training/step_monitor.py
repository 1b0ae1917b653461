"""When the training loop waits for the device, and what it learns then."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepReport:
    """What a step's sums say, once they are on the host."""

    loss: float
    """Sum of the loss over the step's images."""
    correct: float
    images: float
    checkpoint_requests: int
    """Workers that asked for a checkpoint; 2 or more ask for one at once."""
    stop_requested: bool
    bad_steps: list[int]
    """Steps since the last report whose loss or gradient was not finite."""


class StepMonitor:
    """Collects what each step leaves on the device, so that the host waits only at log points."""

    def __init__(self, every: int, steps_per_epoch: int) -> None:
        """`every`: steps between two reports. An epoch's last step is always reported."""
        self.every, self.steps_per_epoch = every, steps_per_epoch
        self._finite: list[Tensor] = []

    def is_due(self, step: int) -> bool:
        """Whether the host waits after step number `step` (from 0)."""
        done = step + 1
        return done % self.every == 0 or done % self.steps_per_epoch == 0

    def record(self, finite: Tensor) -> None:
        """Keep a step's bool[] on the device until the next report."""
        self._finite.append(finite)

    def report(self, steps_done: int, step_sums: Tensor) -> StepReport:
        """Wait for the device. `step_sums`: the newest step's, in the order of STEP_SUMS."""
        loss, correct, images, checkpoints, stops = step_sums.tolist()
        first = steps_done - len(self._finite)
        flags = torch.stack(self._finite).tolist()
        self._finite.clear()
        bad = [first + i for i, ok in enumerate(flags) if not ok]
        return StepReport(
            loss=loss,
            correct=correct,
            images=images,
            checkpoint_requests=int(checkpoints),
            stop_requested=bool(stops),
            bad_steps=bad,
        )
