"""What a run reports while it trains: points and rows for tracking, progress for the screen, texts
for its errors."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch

from ftlib.clock import now_ms
from ftlib.data import sampler
from ftlib.data.fetch_ahead import shard_blocks
from ftlib.settings import to_dict
from ftlib.training.state import TrainState
from ftlib.training.worker_context import WorkerContext
from ftlib.training.worst_images import Losses, sheet


class RunLog:
    """Reports of one worker's training; only rank 0 sends any."""

    def __init__(
        self,
        context: WorkerContext,
        state: TrainState,
        rows: np.ndarray,
        split: str,
        steps_per_epoch: int,
    ) -> None:
        self.context, self.run, self.state = context, context.run, state
        self.rows, self.split, self.steps_per_epoch = rows, split, steps_per_epoch
        self.total = steps_per_epoch * context.run.train.epochs
        self.start()

    def start(self) -> None:
        """Measure time and speed from here."""
        self.mark, self.mark_step = time.monotonic(), self.state.step

    def rate(self) -> float:
        """Images per second since the epoch or the restart began, over all workers."""
        seconds = max(time.monotonic() - self.mark, 1e-9)
        done = self.state.step - self.mark_step
        return round(done * len(self.rows) / self.steps_per_epoch / seconds, 2)

    def send_point(self, values: dict[str, float], step: int) -> None:
        """A point within an epoch.

        It is kept in the state until the epoch ends, so that a restart sends it again, unchanged.
        """
        at = now_ms()
        self.state.points.append([at, step, values])
        self.track(values, step, at)

    def send_row(self, row: dict[str, float], epoch: int) -> None:
        """A finished epoch's row, with the time it was made at, and the best score so far."""
        values = {k: v for k, v in row.items() if k not in ("epoch", "time_ms")}
        name = f"{self.split}/top1"
        if name in row:
            scored = [r[name] for r in self.state.history if name in r and r["epoch"] <= epoch]
            values[f"{self.split}/best_top1"] = max([row[name], *scored])
        self.track(values, epoch, int(row["time_ms"]))

    def send_worst(self, losses: Losses, epoch: int) -> None:
        """The worst mistakes of an epoch, of the images that this worker scored."""
        if self.context.tracking is None:
            return
        dataset = self.context.dataset
        split = dataset.split("train" if self.split == "tuning" else self.split)
        if (page := sheet(losses, split, dataset.classes, self.run)) is not None:
            self.context.tracking.image(page, "worst", epoch)

    def track(self, values: dict[str, float], step: int, at: int) -> None:
        if self.context.rank == 0 and self.context.tracking is not None:
            self.context.tracking.metrics(
                {k: v for k, v in values.items() if math.isfinite(v)}, step, at
            )

    def show_progress(
        self, loss: float, correct: float, images: float, rate: float, lr: float
    ) -> None:
        """Progress for the screen: sums over the last step's or the epoch's images."""
        if self.context.rank:
            return
        left = (
            (self.total - self.state.step) * len(self.rows) / self.steps_per_epoch / max(rate, 1e-9)
        )
        values = {
            "epoch": (self.state.step - 1) // self.steps_per_epoch + 1,
            "epochs": self.run.train.epochs,
            "step": self.state.step,
            "steps": self.total,
            "loss": loss / max(images, 1),
            "top1": 100 * correct / max(images, 1),
            "lr": lr,
            "images_per_s": rate,
            "seconds_left": left,
        }
        scored = [row for row in self.state.history if f"{self.split}/top1" in row]
        if scored:
            values |= {"val_top1": scored[-1][f"{self.split}/top1"], "best": self.state.best}
        self.context.progress(values)

    def latest_metrics(self) -> dict[str, float]:
        """The newest epoch's row and the best score so far: finite floats only."""
        row = self.state.history[-1] if self.state.history else {"epoch": 0.0}
        best = (
            {f"best/{self.split}_top1": self.state.best, "best/epoch": float(self.state.best_epoch)}
            if self.state.best_epoch
            else {}
        )
        return {k: float(v) for k, v in {**row, **best}.items() if math.isfinite(v)}

    def final_metrics(self) -> dict[str, float]:
        """`best/*`: the scores of the epoch whose weights are kept; `final/*`: the last epoch's."""
        state = self.state
        if not state.history or not state.best_epoch:
            return {}
        best = next(row for row in state.history if row["epoch"] == state.best_epoch)
        out = {
            f"best/{self.split}_{name}": best[f"{self.split}/{name}"]
            for name in ("top1", "top5", "loss")
            if f"{self.split}/{name}" in best
        } | {"best/epoch": best["epoch"], "best/gap": best["train/gap"]}
        return out | {
            "final/train_top1": state.history[-1]["train/top1"],
            "final/gap": state.history[-1].get("train/gap", best["train/gap"]),
            "final/epoch": state.history[-1]["epoch"],
        }

    def about(self, epoch: int, scores: dict[str, float]) -> dict[str, Any]:
        """model.json: what a reader of the best weights needs to know."""
        return describe_model(
            self.context,
            epoch=epoch,
            step=self.state.step,
            scores=scores,
            ema=self.state.ema is not None,
        )

    def nonfinite_message(self, bad: list[int]) -> str:
        """For too many steps that were not finite; `bad` are the latest."""
        step = bad[0]
        train = self.context.dataset.split("train")
        plan = sampler.step_plan(
            self.run.seed,
            step,
            self.rows,
            self.run.train.batch_size,
            self.run.train.microbatch_size,
            blocks=shard_blocks(train, self.rows, self.run.data.cache_limit),
        )
        names = [train.path(int(row)) for m in plan for row in m.rows[:2]][:8]
        return (
            f"the loss or its gradient was not finite in {self.state.nonfinite} steps (at most "
            f"{self.run.train.max_nonfinite} are skipped), the latest being step {step} (epoch "
            f"{step // self.steps_per_epoch + 1}) on images such as {', '.join(names)}. Lower "
            "optimizer.lr, set train.clip_norm, or use train.precision fp32"
        )

    def out_of_memory_message(self, images: int, dtype: torch.dtype) -> str:
        """For a microbatch of `images` that does not fit into memory."""
        run = self.run
        peak = ""
        if self.context.device.type == "cuda":
            used, size = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
            peak = f" (peak {used / 2**30:.1f} of {size / 2**30:.1f} GiB)"
        half = max(images // 2, 1)
        return (
            f"out of memory at step {self.state.step} with a microbatch of {images} images of "
            f"{run.augment.size} px in {str(dtype).removeprefix('torch.')}{peak}. "
            f"Set --train.microbatch-size to {half} (the batch of {run.train.batch_size} stays; "
            f"BatchNorm then sees {half} images, so it is another run), "
            "or use --train.precision bf16 or a smaller --augment.size"
        )


def describe_model(
    context: WorkerContext, *, epoch: int, step: int, scores: dict[str, float], ema: bool
) -> dict[str, Any]:
    """The contents of model.json: what a reader of some weights needs to know.

    ema: whether the weights are an exponential moving average.
    """
    run, data = context.run, context.dataset
    return {
        "arch": run.model.arch,
        "model": to_dict(run.model),
        "classes": list(data.classes),
        "size": run.eval_size,
        "crop": run.evaluate.crop,
        "interpolation": run.evaluate.interpolation,
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "epoch": epoch,
        "step": step,
        "scores": scores,
        "data": {
            "name": data.name,
            "digest": data.digest,
            "rules": data.rules,
        },
        "run": context.run_dir.rstrip("/").rsplit("/", 1)[-1],
        "stage": run.stage,
        "ema": ema,
    }
