"""The story of training, top to bottom.

`train(context)` runs on every worker. What a step computes is a function of the run, the step and
the state before it, never of the worker, the clock or how often the run was restarted: order from
(seed, epoch), augmentation from (seed, epoch, image), mixing and dropout from (seed, step,
microbatch). Between log points nothing waits for a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ftlib.clock import now_ms
from ftlib.config import Plateau, Run
from ftlib.data import rng, sampler
from ftlib.data.fetch_ahead import shard_blocks
from ftlib.data.loader import Batch, Batches, train_batches
from ftlib.storage import join
from ftlib.training import (
    checkpoint,
    initial_weights,
    losses,
    mixing,
    models,
    optim,
    schedule,
    scoring,
)
from ftlib.training.data_parallel import GradientBuffer
from ftlib.training.evaluate import Counts, autocast, normalize, percent
from ftlib.training.memory import keep_freed_memory
from ftlib.training.oom import MicrobatchSplitter
from ftlib.training.run_log import RunLog
from ftlib.training.state import TrainState
from ftlib.training.step_monitor import StepMonitor
from ftlib.training.worker_context import (
    DivergedError,
    InterruptedTrainingError,
    OutOfMemoryError,
    WorkerContext,
)
from ftlib.training.worst_images import Losses

log = logging.getLogger("ftlib.training")


def train(context: WorkerContext) -> dict[str, Any]:
    """Train to the end from the newest checkpoint, or from the start.

    Returns metrics (best/* and final/* scores), history (a row per epoch), split (which one was
    scored) and step (optimizer steps done).
    """
    return Training(context).fit()


class Training:
    """One worker's training: set up once, then `fit`."""

    def __init__(self, context: WorkerContext) -> None:
        run, device = context.run, context.device
        if device.type == "cpu":
            keep_freed_memory()
        self.context, self.run = context, run
        self.classes = len(context.dataset.classes)
        self.rows, self.scored_rows, self.split = context.rows
        self.own_scored_rows = self.scored_rows[context.rank :: context.world]
        train = context.dataset.split("train")
        self.blocks = shard_blocks(train, self.rows, run.data.cache_limit)
        self.steps_per_epoch = sampler.steps_per_epoch(len(self.rows), run.train.batch_size)
        self.total = self.steps_per_epoch * run.train.epochs
        self.dtype = precision(run, device)
        self.model = self._first_model()
        self.forward = torch.compile(self.model) if run.train.compile else self.model
        self.state = TrainState.create(run, self.model, device, fp16=self.dtype == torch.float16)
        self.criterion = self._criterion()
        self.trained: frozenset[str] | None = None
        self.buffer: GradientBuffer | None = None
        self.splitter = MicrobatchSplitter(self.model, run.augment.size)
        every = 1 if device.type == "cpu" else run.train.log_every
        self.monitor = StepMonitor(every, self.steps_per_epoch)
        self.writer: checkpoint.CheckpointWriter | None = None
        self.log = RunLog(context, self.state, self.rows, self.split, self.steps_per_epoch)
        self.last_save = time.monotonic()

    def _first_model(self) -> nn.Module:
        run, context = self.run, self.context
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.key(rng.INIT, run.seed) % 2**63)
            model = initial_weights.start(run, context.dataset.classes, context.source)
        if run.train.channels_last:
            model = model.to(memory_format=torch.channels_last)
        return model.to(context.device)

    def _criterion(self) -> losses.PerImageLoss:
        weights = None
        if self.run.loss.class_weights == "balanced":
            labels = self.context.dataset.split("train").labels[self.rows]
            weights = losses.balanced_weights(np.bincount(labels, minlength=self.classes))
            weights = weights.to(self.context.device)
        return losses.build(self.run.loss, weights)

    # --- the run ----------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        context, run, state = self.context, self.run, self.state
        with contextlib.ExitStack() as stack:
            if context.rank == 0:
                self.writer = checkpoint.CheckpointWriter(
                    context.run_dir,
                    run.checkpoint.keep_last,
                    run.checkpoint.keep_best,
                    fence=context.fence,
                    owner=context.owner,
                )
                stack.callback(self.writer.close)
            self.restore()
            if state.step == 0 and initial_weights.keeps_classifier(run, context.source):
                # The score to gain over.
                scores = self.score().metrics(self.split)
                self.log.send_point({f"start/{k}": v for k, v in scores.items()}, step=0)
            batches = stack.enter_context(contextlib.closing(self.batches()))
            self.log.start()
            stop = False
            while state.step < self.total and not self.should_stop_early():
                self.update_frozen(state.step // self.steps_per_epoch)
                ask = self.monitor.is_due(state.step)
                self.train_step(batches, ask)
                state.step += 1
                if ask:
                    stop = self.sync_and_log()
                if state.step % self.steps_per_epoch == 0:
                    self.finish_epoch()
                if stop and state.step < self.total:
                    self.stop_on_request()
            if self.writer is not None:
                self.writer.wait()
                if state.best_epoch:
                    step, epoch = state.best_step, state.best_epoch
                    best = checkpoint.verify_best(context.run_dir, step, epoch)
                    scoring.verify(best, context, state.scored_model, self.dtype)
        return {
            "metrics": self.log.final_metrics(),
            "history": state.history,
            "split": self.split,
            "step": state.step,
            "best_step": state.best_step,
            "best_epoch": state.best_epoch,
        }

    def batches(self) -> Batches:
        """This worker's microbatches from the present step to the end."""
        context = self.context
        return train_batches(
            context.dataset,
            self.rows,
            self.run,
            rank=context.rank,
            world=context.world,
            start_step=self.state.step,
            stop_step=self.total,
            workers=context.loader_workers,
        )

    def train_step(self, batches: Iterator[Batch], ask: bool) -> None:
        """One optimizer step over this worker's microbatches of the global batch.

        `ask`: let this step carry requests for a checkpoint or a stop to all workers.
        """
        state, buffer = self.state, self.buffer
        assert buffer is not None
        microbatches = self.accumulate(batches, buffer)
        if ask:
            self.raise_requests(buffer)
        buffer.all_reduce(microbatches)

        norm = torch.linalg.vector_norm(buffer.grads) / state.scale.scale
        finite = torch.isfinite(norm) & torch.isfinite(buffer.step_sums[0])
        clip = self.run.train.clip_norm
        # Clipping, as torch.nn.utils.clip_grad_norm_ does it, and the loss scale in one pass.
        if clip:
            buffer.grads.mul_((clip / (norm + 1e-6)).clamp(max=1.0) / state.scale.scale)
        elif state.scale.enabled:
            buffer.grads.div_(state.scale.scale)
        optim.set_lr(state.optimizer, self.learning_rate(state.step))
        optim.step_if_finite(state.optimizer, finite)
        buffer.commit_batchnorm(finite)
        state.scale.update(finite)
        if state.ema is not None:
            state.ema.update(self.model)
        state.sums += torch.where(finite, buffer.step_sums[:3].double(), 0.0)
        # An fp16 gradient that overflows is handled by the loss scale; a bad loss is not.
        loss_is_finite = torch.isfinite(buffer.step_sums[0])
        self.monitor.record(loss_is_finite if state.scale.enabled else finite)

    def accumulate(self, batches: Iterator[Batch], buffer: GradientBuffer) -> int:
        """Add the gradients of this worker's microbatches into `buffer`.

        Returns the number of microbatches in the whole step, over all workers.
        """
        run, splitter = self.run, self.splitter
        plan = sampler.step_plan(
            run.seed,
            self.state.step,
            self.rows,
            run.train.batch_size,
            run.train.microbatch_size,
            blocks=self.blocks,
        )
        own = sampler.owned(plan, self.context.rank, self.context.world)
        buffer.zero()
        # Kept only while the step may have to start over, to give the loader its memory back.
        taken: list[Batch] = []
        i = 0
        while i < len(own):
            batch = taken[i] if i < len(taken) else next(batches)
            expected = (own[i].step, own[i].index)
            assert (batch.step, batch.index) == expected, "the loader is out of step with the plan"
            if i == len(taken) and not splitter.settled:
                taken.append(batch)
            # Overlap all-reduce with backward only after one step ran without running out of
            # memory: a started all-reduce cannot be undone.
            buffer.before_forward(own[i].index, last=i == len(own) - 1 and splitter.settled)
            try:
                self.microbatch(batch, buffer)
            except torch.OutOfMemoryError as error:
                images = len(batch.rows)
                if not splitter.split(images):
                    raise OutOfMemoryError(
                        self.log.out_of_memory_message(images, self.dtype)
                    ) from error
                buffer.zero()
                i = 0
                continue
            buffer.after_backward(own[i].index)
            i += 1
        splitter.settled = True
        return len(plan)

    def microbatch(self, batch: Batch, buffer: GradientBuffer) -> None:
        """Forward and backward of one microbatch: its share of the step's mean loss is added to
        the gradients."""
        device, scale = self.context.device, self.state.scale.scale
        seed_device(rng.key(rng.DROPOUT, self.run.seed, batch.step, batch.index), device)
        images, targets = self.inputs(batch)
        labels = batch.labels.to(device, non_blocking=True)
        for x, soft, hard in self.splitter.chunks(images, targets, labels):
            with autocast(self.dtype, device):
                logits = self.forward(x)
            loss = self.criterion(logits, soft).sum()
            (loss * (scale / batch.images_in_step)).backward()
            with torch.no_grad():
                hits = (logits.argmax(1) == hard).sum().float()
                number = torch.full_like(hits, float(len(hard)))
                buffer.step_sums[:3] += torch.stack([loss.detach().float(), hits, number])

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the network gets, mixed and on the device: float32 images [b, 3, S, S] and soft
        targets [b, C]."""
        run, device = self.run, self.context.device
        images = normalize(batch.images.to(device, non_blocking=True), run.data.mean, run.data.std)
        labels = batch.labels.to(device, non_blocking=True)
        targets = losses.soft_targets(labels, self.classes, run.loss.label_smoothing)
        if batch.epoch >= run.train.epochs - run.mix.off_epochs:
            return images, targets
        key = rng.key(rng.MIX, run.seed, batch.step, batch.index)
        height, width = images.shape[2:]
        return mixing.apply(mixing.draw(run.mix, key, len(labels), height, width), images, targets)

    # --- once in a while --------------------------------------------------------------------------

    def raise_requests(self, buffer: GradientBuffer) -> None:
        """Add this worker's requests to the step's sums: all workers learn of them at once."""
        notice = self.context.notice()
        every = self.run.checkpoint.every_seconds
        late = bool(every) and time.monotonic() - self.last_save > every
        if notice == "checkpoint" or (late and self.context.rank == 0):
            buffer.step_sums[3] += 1
        if notice == "stop":
            buffer.step_sums[4] += 1

    def sync_and_log(self) -> bool:
        """Wait for the device: check for NaN, show and log progress, save if that is due.

        Returns whether a worker asked to stop.
        """
        state, run = self.state, self.run
        assert self.buffer is not None
        report = self.monitor.report(state.step, self.buffer.step_sums)
        state.nonfinite += len(report.bad_steps)
        if state.nonfinite > run.train.max_nonfinite:
            raise DivergedError(self.log.nonfinite_message(report.bad_steps))
        epoch_ends = state.step % self.steps_per_epoch == 0
        if epoch_ends or state.step % run.train.log_every == 0:
            rate, lr = self.log.rate(), self.learning_rate(state.step - 1)
            loss = round(report.loss / max(report.images, 1), 6)
            values = {"step/loss": loss, "step/lr": lr, "step/images_per_s": rate}
            self.log.send_point(values, state.step)
            self.log.show_progress(report.loss, report.correct, report.images, rate, lr)
        every = run.checkpoint.every_steps
        by_step = bool(every) and state.step % every == 0
        if not epoch_ends and (report.checkpoint_requests or report.stop_requested or by_step):
            self.save(wait=report.checkpoint_requests > 1)
        return report.stop_requested

    def stop_on_request(self) -> None:
        """End before the end. The checkpoint of this step has been handed to the writer already."""
        if self.writer is not None:
            self.writer.wait()
        self.context.report(self.log.latest_metrics(), self.checkpoint_uri())
        raise InterruptedTrainingError(
            f"stopped at step {self.state.step} of {self.total} on request, with a checkpoint; "
            "the same command goes on from there"
        )

    def finish_epoch(self) -> None:
        """Score, keep the best weights, write a checkpoint, report."""
        state, run, context = self.state, self.run, self.context
        epoch = state.step // self.steps_per_epoch
        loss, correct, images = state.sums.tolist()
        seconds = time.monotonic() - self.log.mark
        row = {
            "epoch": float(epoch),
            "train/loss": round(loss / max(images, 1), 6),
            "train/top1": percent(correct, max(images, 1)),
            "train/lr": self.learning_rate(state.step - 1),
            "train/images_per_s": self.log.rate(),
            "train/epoch_s": round(seconds, 3),
        }
        state.sums.zero_()
        if epoch % run.evaluate.every_epochs == 0 or epoch == run.train.epochs:
            started = time.monotonic()
            kept = Losses() if context.rank == 0 and run.track.log_model else None
            counts = self.score(kept)
            scores = counts.metrics(self.split)
            row |= scores | {
                "train/gap": round(row["train/top1"] - scores[f"{self.split}/top1"], 4),
                f"{self.split}/seconds": round(time.monotonic() - started, 3),
            }
            self.update_best(epoch, scores, counts)
            if kept is not None:
                self.log.send_worst(kept, epoch)
        row["time_ms"] = float(now_ms())
        state.history.append(row)
        self.save(wait=False)
        # After the checkpoint's tensors are copied: a restart from it sends this point again, with
        # the same time.
        self.log.send_row(row, epoch)
        state.points.clear()
        self.log.show_progress(loss, correct, images, row["train/images_per_s"], row["train/lr"])
        context.report(self.log.latest_metrics(), self.checkpoint_uri())
        self.log.start()

    def update_best(self, epoch: int, scores: dict[str, float], counts: Counts) -> None:
        """Keep the weights if they are the best so far; let the plateau schedule see the score."""
        state, cfg = self.state, self.run.schedule
        top1 = scores[f"{self.split}/top1"]
        if isinstance(cfg, Plateau):
            before = state.plateau or schedule.PlateauState()
            state.plateau = schedule.plateau_update(cfg, before, top1)
        if top1 <= state.best:
            return
        state.best, state.best_epoch, state.best_step = top1, epoch, state.step
        if self.writer is not None:
            state.sync_counters()
            weights = state.scored_model.state_dict()
            about = self.log.about(epoch, scores)
            rows = scoring.sample(self.own_scored_rows)
            sample = scoring.as_json(rows, counts.sample_losses)
            self.writer.save_best(state.step, weights, about, sample)

    def save(self, wait: bool) -> None:
        """Hand the state to the background writer; `wait` until it is on disk."""
        self.last_save = time.monotonic()
        if self.writer is not None:
            self.writer.save(self.state.step, self.state.state_dict())
            if wait:
                self.writer.wait()

    def restore(self) -> None:
        """Load the newest checkpoint that verifies; all workers the same one."""
        uri = join(self.context.run_dir, "checkpoints")
        only = None
        if self.context.world > 1:
            mine = checkpoint.latest(uri) if self.context.rank == 0 else None
            chosen = [mine[0] if mine else -1]
            dist.broadcast_object_list(chosen, src=0)
            only = chosen[0]
        found = checkpoint.latest(uri, only) if only != -1 else None
        if found is None:
            if only not in (None, -1):
                raise RuntimeError(
                    f"worker {self.context.rank} cannot read checkpoint {only} below {uri}, which "
                    "rank 0 can. Is checkpoint.storage shared by all nodes?"
                )
            return
        self.state.load_state_dict(found[1])
        if self.writer is not None:
            self.writer.forget_after(self.state.step)
        for at, step, values in self.state.points:
            self.log.track(values, step, at)
        if self.state.history and self.state.step % self.steps_per_epoch == 0:
            row = self.state.history[-1]
            self.log.send_row(row, int(row["epoch"]))
            self.state.points.clear()
        if self.state.best_epoch:
            self.reconcile_best()

    def reconcile_best(self) -> None:
        """After a restart: let `best/` hold what the state calls best.

        A best model whose writing failed is written again from the state, if the state is of that
        very step. Else its weights are lost, and the best model is the best of those that are left.
        """
        state = self.state
        chosen = [(state.best, state.best_epoch, state.best_step)]
        if self.writer is not None:
            best = checkpoint.read_best(self.context.run_dir, state.best_step)
            if best is None or best.about.get("epoch") != state.best_epoch:
                chosen = [self._best_left(self.writer)]
        if self.context.world > 1:
            dist.broadcast_object_list(chosen, src=0)
        state.best, state.best_epoch, state.best_step = chosen[0]

    def _best_left(self, writer: checkpoint.CheckpointWriter) -> tuple[float, int, int]:
        """(score, epoch, step) of the best model among those on disk and the present weights, which
        are written where they are it."""
        state, name = self.state, f"{self.split}/top1"
        found: list[tuple[float, int, int]] = [(-math.inf, 0, 0)]
        for step in checkpoint.steps(join(self.context.run_dir, "best")):
            stored = checkpoint.read_best(self.context.run_dir, step)
            if stored is not None and step <= state.step and name in stored.about.get("scores", {}):
                about = stored.about
                found.append((about["scores"][name], int(about["epoch"]), step))
        row = state.history[-1] if state.history else {}
        scored = state.step % self.steps_per_epoch == 0 and name in row
        if scored:
            found.append((row[name], int(row["epoch"]), state.step))
        best = max(found)
        if (state.best, state.best_epoch, state.best_step) != best:
            log.warning(
                "the best model, of epoch %d (%.2f %%), could not be written before the restart "
                "and is lost; the best one left is of epoch %d (%.2f %%)",
                state.best_epoch,
                state.best,
                best[1],
                best[0],
            )
        if scored and best[2] == state.step:
            scores = {k: v for k, v in row.items() if k in self._score_names()}
            model, rows = state.scored_model, scoring.sample(self.scored_rows)
            counts = scoring.score(self.context, model, rows, dtype=self.dtype)
            about = self.log.about(best[1], scores)
            sample = scoring.as_json(rows, counts.sample_losses)
            writer.save_best(state.step, model.state_dict(), about, sample)
        return best

    def _score_names(self) -> tuple[str, ...]:
        return tuple(f"{self.split}/{name}" for name in ("loss", "top1", "top5"))

    def update_frozen(self, epoch: int) -> None:
        """Freeze or thaw as model.freeze_epochs and model.unfreeze_every say.

        The gradient buffer holds trainable parameters only, so it is made anew at each change.
        """
        trained = models.trained_parameters(self.model, self.run.model, epoch)
        if trained == self.trained and self.buffer is not None:
            return
        if self.buffer is not None:
            self.buffer.release()
        self.model.train()
        models.freeze(self.model, trained, norm_statistics=self.run.model.freeze_norm)
        context = self.context
        self.buffer = GradientBuffer(
            self.model, context.rank, context.world, self.run.cluster.strict_elastic
        )
        self.trained = trained

    # --- small answers ----------------------------------------------------------------------------

    def learning_rate(self, step: int) -> float:
        """The base rate of step number `step` (from 0)."""
        return schedule.learning_rate(
            self.run.schedule,
            self.run.optimizer.lr,
            step,
            total_steps=self.total,
            steps_per_epoch=self.steps_per_epoch,
            plateau=self.state.plateau,
        )

    def should_stop_early(self) -> bool:
        """No new best score for train.early_stopping epochs."""
        patience, state = self.run.train.early_stopping, self.state
        epoch, inside = divmod(state.step, self.steps_per_epoch)
        if not patience or inside or not state.best_epoch:
            return False
        return epoch - state.best_epoch >= patience

    def score(self, kept: Losses | None = None) -> Counts:
        """Evaluate on this worker's slice of the scored rows; exact sums over all workers.

        `kept` remembers the losses of this worker's images.
        """
        context = self.context
        counts = scoring.score(
            context,
            self.state.scored_model,
            self.own_scored_rows,
            dtype=self.dtype,
            world=context.world,
            loader_workers=context.loader_workers,
            remember=kept,
        )
        if self.trained is not None or self.run.model.freeze_norm:
            # Evaluating switched the frozen BatchNorm back to training.
            models.freeze(self.model, self.trained, norm_statistics=self.run.model.freeze_norm)
        return counts

    def checkpoint_uri(self) -> str:
        return join(self.context.run_dir, "checkpoints", checkpoint.step_name(self.state.step))


def precision(run: Run, device: torch.device) -> torch.dtype:
    """The autocast type that train.precision means on `device`."""
    named = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if run.train.precision != "auto":
        return named[run.train.precision]
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    # Measured: bf16 pays on CPUs with bf16 matrix units from 128 px on, and costs below. Without
    # such units it slows down depthwise convolutions (docs/performance.md).
    pays = run.augment.size >= 128 and torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if pays else torch.float32


def seed_device(key: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from.

    torch.manual_seed would do too, but takes 0.6 ms instead of 3 microseconds.
    """
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    else:
        generator = torch.default_generator
    generator.manual_seed(key % 2**63)
