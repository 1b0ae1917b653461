"""The story of training, top to bottom.

`train(job)` runs on every worker. What a step computes is a function of the run, the step and the state before it, never of the
worker, the clock or how often the run was restarted: order from (seed, epoch), augmentation from (seed, epoch, image), mixing and
dropout from (seed, step, microbatch). Between log points nothing waits for a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ftlib.config import Plateau, Run
from ftlib.data import rng, sampler
from ftlib.data.loader import Batch, eval_batches, train_batches
from ftlib.storage import join
from ftlib.training import checkpoint, initial_weights, losses, mixing, optim, schedule
from ftlib.training import model as models
from ftlib.training.data_parallel import GradientBuffer
from ftlib.training.evaluate import Counts, autocast, count, normalise, percent
from ftlib.training.memory import keep_freed_memory
from ftlib.training.run_log import RunLog, now_ms
from ftlib.training.state import TrainState
from ftlib.training.worker_context import (
    DivergedError,
    InterruptedTrainingError,
    OutOfMemoryError,
    WorkerContext,
)

log = logging.getLogger("ftlib.training")


def train(job: WorkerContext) -> dict[str, Any]:
    """Train to the end from the newest checkpoint, or from the start. Returns {"metrics": best/* and final scores, "history": rows}."""
    return Training(job).go()


class Training:
    """One worker's training: set up once, then `go`."""

    def __init__(self, job: WorkerContext) -> None:
        run = job.run
        if job.device.type == "cpu":
            keep_freed_memory()
        self.job, self.run = job, run
        self.writer: checkpoint.CheckpointWriter | None = None
        self.classes = len(job.dataset.classes)
        self.rows, self.scored_rows, self.split = job.rows
        self.steps_per_epoch = sampler.steps_per_epoch(len(self.rows), run.train.batch_size)
        self.total = self.steps_per_epoch * run.train.epochs
        self.dtype = precision(run, job.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(rng.INIT, run.seed) % 2**63)
            model = initial_weights.start(run, job.dataset.classes, job.source)
        if run.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.model = model.to(job.device)
        self.state = TrainState.create(
            run, self.model, job.device, fp16=self.dtype == torch.float16
        )
        self.frozen: bool | None = None
        self.buffer: GradientBuffer | None = None
        self.parts, self.fits, self.stopping = 1, False, False
        self.forward = torch.compile(self.model) if run.train.compile else self.model
        counts = torch.from_numpy(
            np.bincount(job.dataset.split("train").labels[self.rows], minlength=self.classes)
        )
        balanced = (
            losses.balanced_weights(counts).to(job.device)
            if run.loss.class_weights == "balanced"
            else None
        )
        self.criterion = losses.build(run.loss, balanced)
        self.record = RunLog(job, self.state, self.rows, self.split, self.steps_per_epoch)
        self.last_save = time.monotonic()
        self.finite: list[Tensor] = []
        self.reading = 1 if job.device.type == "cpu" else run.train.log_every

    # --- the run ------------------------------------------------------------------------------------------------------------------

    def go(self) -> dict[str, Any]:
        job, run, state = self.job, self.run, self.state
        with contextlib.ExitStack() as stack:
            if job.rank == 0:
                self.writer = checkpoint.CheckpointWriter(
                    job.run_dir, run.checkpoint.keep_last, run.checkpoint.keep_best
                )
                stack.callback(self.writer.close)
            self.restore()
            if state.step == 0 and job.source is not None and not run.model.reset_head:
                # What the starting weights are worth here, so that the gain can be told from the start.
                self.record.point(
                    {f"start/{k}": v for k, v in self.score().metrics(self.split).items()}, step=0
                )
            batches = stack.enter_context(
                contextlib.closing(
                    train_batches(
                        job.dataset,
                        self.rows,
                        run,
                        job.rank,
                        job.world,
                        state.step,
                        self.total,
                        job.loader_workers,
                    )
                )
            )
            self.record.start()
            while state.step < self.total and not self.exhausted():
                self.freeze_for(state.step // self.steps_per_epoch)
                read = (state.step + 1) % self.reading == 0 or (
                    state.step + 1
                ) % self.steps_per_epoch == 0
                self.train_step(batches, ask=read)
                state.step += 1
                if read:
                    self.read()
                if state.step % self.steps_per_epoch == 0:
                    self.finish_epoch()
                if self.stopping and state.step < self.total:
                    self.leave()
            if self.writer is not None:
                self.writer.wait()
        return {
            "metrics": self.record.final_metrics(),
            "history": state.history,
            "split": self.split,
            "step": state.step,
        }

    def train_step(self, batches: Iterator[Batch], ask: bool) -> None:
        """One optimizer step over this worker's microbatches of the global batch."""
        run, state, buffer = self.run, self.state, self.buffer
        assert buffer is not None
        plan = sampler.step_plan(
            run.seed, state.step, self.rows, run.train.batch_size, run.train.microbatch_size
        )
        own = sampler.owned(plan, self.job.rank, self.job.world)
        buffer.begin()
        taken: list[
            Batch
        ] = []  # of a step that may have to start over; no other keeps the loader's memory
        i = 0
        while i < len(own):
            batch = taken[i] if i < len(taken) else next(batches)
            assert (batch.step, batch.k) == (own[i].step, own[i].k), (
                "the loader is out of step with the plan"
            )
            if i == len(taken) and not self.fits:
                taken.append(batch)
            # Sums leave early only once a step has shown that it fits: what has left cannot be taken back.
            buffer.before(own[i].k, last=i == len(own) - 1 and self.fits)
            try:
                self.microbatch(batch, buffer)
            except torch.OutOfMemoryError as error:
                self.halve(len(batch.rows), error)
                buffer.begin()
                i = 0
                continue
            buffer.after(own[i].k)
            i += 1
        self.fits = True
        if ask:
            self.raise_requests(buffer)
        buffer.reduce(len(plan))

        norm = torch.linalg.vector_norm(buffer.grads) / state.scale.scale
        finite = torch.isfinite(norm) & torch.isfinite(buffer.tallies[0])
        # Clipping, as torch.nn.utils.clip_grad_norm_ does it, and the loss scale in one pass over the gradients.
        if run.train.clip_norm:
            buffer.grads.mul_(
                (run.train.clip_norm / (norm + 1e-6)).clamp(max=1.0) / state.scale.scale
            )
        elif state.scale.enabled:
            buffer.grads.div_(state.scale.scale)
        optim.set_lr(state.optimizer, self.learning_rate(state.step))
        optim.step_if_finite(state.optimizer, finite)
        buffer.commit_statistics(finite)
        state.scale.update(finite)
        if state.ema is not None:
            state.ema.update(self.model)
        state.sums += torch.where(finite, buffer.tallies[:3].double(), 0.0)
        # An fp16 gradient that overflows is the loss scale's business; a loss that is not finite is not.
        self.finite.append(torch.isfinite(buffer.tallies[0]) if state.scale.enabled else finite)

    def microbatch(self, batch: Batch, buffer: GradientBuffer) -> None:
        """Forward and backward of one microbatch; its share of the step's mean loss goes into the gradients."""
        run, device = self.run, self.job.device
        seed_device(rng.key(rng.DROPOUT, run.seed, batch.step, batch.k), device)
        everything = (*self.inputs(batch), batch.labels.to(device, non_blocking=True))
        for images, targets, labels in zip(
            *(tensor.chunk(self.parts) for tensor in everything), strict=True
        ):
            with autocast(self.dtype, device):
                logits = self.forward(images)
            loss = self.criterion(logits, targets).sum()
            (loss * (self.state.scale.scale / batch.images_in_step)).backward()
            with torch.no_grad():
                hits = (logits.argmax(1) == labels).sum()
                buffer.tallies[:3] += torch.stack(
                    [
                        loss.detach().float(),
                        hits.float(),
                        torch.full_like(loss, float(len(labels)), dtype=torch.float32),
                    ]
                )

    def halve(self, images: int, error: torch.OutOfMemoryError) -> None:
        """After running out of memory: microbatches go through the network in twice as many parts, or OutOfMemory where that would be another run."""
        if self.fits or 2 * self.parts > images or not models.images_are_apart(self.model):
            raise OutOfMemoryError(self.record.too_large(images, self.dtype)) from error
        self.parts *= 2
        log.warning(
            "out of memory with %d images of %d px at once: microbatches go through the network in %d parts from here on, which changes nothing but speed",
            -(-images * 2 // self.parts),
            self.run.augment.size,
            self.parts,
        )
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network gets: float32 images [b, 3, S, S] and soft targets [b, C], mixed, on the device."""
        run, device = self.run, self.job.device
        images = normalise(batch.images.to(device, non_blocking=True), run.data.mean, run.data.std)
        targets = losses.soft_targets(
            batch.labels.to(device, non_blocking=True), self.classes, run.loss.label_smoothing
        )
        if batch.epoch >= run.train.epochs - run.mix.off_epochs:
            return images, targets
        plan = mixing.draw(
            run.mix,
            rng.key(rng.MIX, run.seed, batch.step, batch.k),
            len(batch.labels),
            images.shape[2],
            images.shape[3],
        )
        return mixing.apply(plan, images, targets)

    # --- once in a while ----------------------------------------------------------------------------------------------------------

    def raise_requests(self, buffer: GradientBuffer) -> None:
        """Requests travel with the step's sum, so that all workers learn of them at the same step."""
        notice = self.job.notice()
        due = (
            self.job.rank == 0
            and self.run.checkpoint.every_seconds
            and time.monotonic() - self.last_save > self.run.checkpoint.every_seconds
        )
        if due or notice == "checkpoint":
            buffer.tallies[3] += 1
        if notice == "stop":
            buffer.tallies[4] += 1

    def read(self) -> None:
        """Wait for the device: check for NaN, show and log progress, write a checkpoint if one is due."""
        state, run = self.state, self.run
        assert self.buffer is not None
        loss, correct, images, wanted, stop = self.buffer.tallies.tolist()
        bad = [
            state.step - len(self.finite) + i
            for i, ok in enumerate(torch.stack(self.finite).tolist())
            if not ok
        ]
        self.finite.clear()
        state.nonfinite += len(bad)
        if state.nonfinite > run.train.max_nonfinite:
            raise DivergedError(self.record.describe(bad))
        at_edge = state.step % self.steps_per_epoch == 0
        if state.step % run.train.log_every == 0 or at_edge:
            rate = self.record.rate()
            self.record.point(
                {
                    "step/loss": round(loss / max(images, 1), 6),
                    "step/lr": self.learning_rate(state.step - 1),
                    "step/images_per_s": rate,
                },
                state.step,
            )
            self.record.show(loss, correct, images, rate, self.learning_rate(state.step - 1))
        every = run.checkpoint.every_steps
        if not at_edge and (wanted or stop or (every and state.step % every == 0)):
            self.save(wait=wanted > 1)
        self.stopping = bool(stop)

    def leave(self) -> None:
        """End before the end, on request. What this step was worth has been handed to the writer; here it is waited for."""
        if self.writer is not None:
            self.writer.wait()
        self.job.report(self.record.latest_metrics(), self.checkpoint_uri())
        raise InterruptedTrainingError(
            f"stopped at step {self.state.step} of {self.total} on request, with a checkpoint; the same command goes on from there"
        )

    def finish_epoch(self) -> None:
        """Score, remember the best, write a checkpoint, report."""
        state, run = self.state, self.run
        epoch = state.step // self.steps_per_epoch
        loss, correct, images = state.sums.tolist()
        seconds = time.monotonic() - self.record.mark
        row = {
            "epoch": float(epoch),
            "train/loss": round(loss / max(images, 1), 6),
            "train/top1": percent(correct, max(images, 1)),
            "train/lr": self.learning_rate(state.step - 1),
            "train/images_per_s": self.record.rate(),
            "train/epoch_s": round(seconds, 3),
        }
        state.sums.zero_()
        if epoch % run.evaluate.every_epochs == 0 or epoch == run.train.epochs:
            started = time.monotonic()
            scores = self.score().metrics(self.split)
            row |= scores | {
                "train/gap": round(row["train/top1"] - scores[f"{self.split}/top1"], 4),
                f"{self.split}/seconds": round(time.monotonic() - started, 3),
            }
            self.remember(epoch, scores)
        row["time_ms"] = float(now_ms())
        state.history.append(row)
        self.save(wait=False)
        # After the checkpoint's tensors are taken: a restart from it sends this very point again, with this very time.
        self.record.send(row, epoch)
        state.points.clear()
        self.record.show(loss, correct, images, row["train/images_per_s"], row["train/lr"])
        self.job.report(self.record.latest_metrics(), self.checkpoint_uri())
        self.record.start()

    def remember(self, epoch: int, scores: dict[str, float]) -> None:
        """Keep the weights if they are the best so far; let the plateau schedule see the score."""
        state, run = self.state, self.run
        top1 = scores[f"{self.split}/top1"]
        if isinstance(run.schedule, Plateau):
            state.plateau = schedule.plateau_update(
                run.schedule, state.plateau or schedule.PlateauState(), top1
            )
        if top1 > state.best:
            state.best, state.best_epoch, state.best_step = top1, epoch, state.step
            if self.writer is not None:
                state.settle()
                self.writer.save_best(
                    state.step, state.scored_model.state_dict(), self.record.about(epoch, scores)
                )

    def save(self, wait: bool) -> None:
        self.last_save = time.monotonic()
        if self.writer is not None:
            self.writer.save(self.state.step, self.state.state_dict())
            if wait:
                self.writer.wait()

    def restore(self) -> None:
        """Take up the newest checkpoint that verifies; all workers the same one."""
        uri = join(self.job.run_dir, "checkpoints")
        only = None
        if self.job.world > 1:
            mine = checkpoint.latest(uri) if self.job.rank == 0 else None
            chosen = [mine[0] if mine else -1]
            dist.broadcast_object_list(chosen, src=0)
            only = chosen[0]
        found = checkpoint.latest(uri, only) if only != -1 else None
        if found is None:
            if only not in (None, -1):
                raise RuntimeError(
                    f"worker {self.job.rank} cannot read checkpoint {only} below {uri}, which rank 0 can. Is checkpoint.storage shared by all nodes?"
                )
            return
        self.state.load_state_dict(found[1])
        for at, step, values in self.state.points:
            self.record.track(values, step, at)
        if self.state.history and self.state.step % self.steps_per_epoch == 0:
            row = self.state.history[-1]
            self.record.send(row, int(row["epoch"]))
            self.state.points.clear()

    def freeze_for(self, epoch: int) -> None:
        """Freeze or free the backbone as model.freeze_epochs says; the step buffer holds the trainable parameters only."""
        limit = self.run.model.freeze_epochs
        frozen = limit == -1 or epoch < limit
        if frozen == self.frozen and self.buffer is not None:
            return
        if self.buffer is not None:
            self.buffer.release()
        self.model.train()
        models.freeze_backbone(self.model, frozen)
        self.buffer = GradientBuffer(
            self.model, self.job.rank, self.job.world, self.run.cluster.strict_elastic
        )
        self.frozen = frozen

    # --- small answers ------------------------------------------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        return schedule.learning_rate(
            self.run.schedule,
            self.run.optimizer.lr,
            step,
            self.total,
            self.steps_per_epoch,
            self.state.plateau,
        )

    def exhausted(self) -> bool:
        """Early stopping: no new best score for train.early_stopping epochs."""
        patience, state = self.run.train.early_stopping, self.state
        epoch, inside = divmod(state.step, self.steps_per_epoch)
        return bool(
            patience and not inside and state.best_epoch and epoch - state.best_epoch >= patience
        )

    def score(self) -> Counts:
        """Evaluate on this worker's slice of the scored rows; exact sums over all workers."""
        job, run = self.job, self.run
        rows = self.scored_rows[job.rank :: job.world]
        split = job.dataset.split("train" if self.split == "tuning" else "val")
        with contextlib.closing(
            eval_batches(
                split,
                rows,
                run.eval_size,
                run.evaluate.crop,
                run.evaluate.batch_size,
                job.loader_workers,
            )
        ) as batches:
            counts = count(
                self.state.scored_model,
                batches,
                self.classes,
                job.device,
                run.data.mean,
                run.data.std,
                self.dtype,
                job.world,
            )
        if self.frozen is not None:
            models.freeze_backbone(
                self.model, self.frozen
            )  # evaluating switched the frozen BatchNorm back to training
        return counts

    def checkpoint_uri(self) -> str:
        return join(self.job.run_dir, "checkpoints", checkpoint.step_name(self.state.step))


def precision(run: Run, device: torch.device) -> torch.dtype:
    """The autocast type that train.precision means on `device`."""
    if run.train.precision != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[
            run.train.precision
        ]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    # Measured: bf16 pays on CPUs with bf16 matrix units from 128 px on, and costs below.
    return (
        torch.bfloat16
        if run.augment.size >= 128 and torch.cpu._is_amx_tile_supported()
        else torch.float32
    )


def seed_device(key: int, device: torch.device) -> None:
    """Seed the generator dropout draws from. torch.manual_seed would do too, at 0.6 ms instead of 3 microseconds."""
    generator = (
        torch.cuda.default_generators[device.index or 0]
        if device.type == "cuda"
        else torch.default_generator
    )
    generator.manual_seed(key % 2**63)
