"""Estimate a run from a few of its own steps: time, device-hours, cost, memory, and the bottleneck.

The training loop itself runs the recipe's steps in this process, on this machine. Of the run's own
only its data and starting weights are read; what is written goes to a scratch folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import psutil
import torch

from ftlib.config import Run
from ftlib.data import sampler
from ftlib.data.loader import PREFETCH, Batch, train_batches
from ftlib.launch import cluster, timing
from ftlib.launch.cluster_cost import Workload
from ftlib.launch.prepared_run import PreparedRun
from ftlib.launch.prices import Price
from ftlib.launch.progress import duration, duration_short
from ftlib.launch.worker import processes_and_threads
from ftlib.settings import override
from ftlib.text import percent, wrapped
from ftlib.training import checkpoint, scoring
from ftlib.training.initial_weights import keeps_classifier
from ftlib.training.loop import OutOfMemoryError, Training, WorkerContext

WARM_UP = 2
"""Steps before the clock starts: memory is allocated, kernels are chosen, the queue fills."""
LEAST_STEPS = 4
SHARES = {"whole": 0.45, "device": 0.2, "loader": 0.2, "evaluation": 0.15}
"""Shares of the measuring time."""


# --- measuring ---


@dataclass(frozen=True)
class CostEstimate:
    """What was measured, and what follows for the whole run.

    Seconds and bytes; images per second are those of all workers together.
    """

    steps_per_epoch: int
    epochs: int
    evaluations: int
    workers: int
    step_s: float
    """One step with loading and training side by side."""
    device_step_s: float
    """A step without loading."""
    loader_step_s: float
    """Loading a step's images without training."""
    checkpoint_s: float
    """Training time that a checkpoint costs."""
    evaluation_s: float
    images_per_step: float
    steps_timed: int
    spread: float
    """Standard error of the mean of `step_s`, relative."""
    memory: dict[str, int] = field(default_factory=dict)
    """Peak bytes: device (on a GPU), process, loaders."""
    largest_microbatch: int | None = None
    gradient_bytes: int = 0
    """Bytes that the workers sum in every step."""

    @property
    def epoch_s(self) -> float:
        """Training for an epoch, as the run's train/epoch_s."""
        return self.steps_per_epoch * self.step_s + self.checkpoint_s

    @property
    def total_s(self) -> float:
        """All epochs and evaluations, without start-up and the report at the end."""
        return self.epochs * self.epoch_s + self.evaluations * (
            self.evaluation_s + self.checkpoint_s
        )

    @property
    def device_hours(self) -> float:
        return self.workers * self.total_s / 3600

    @property
    def bound(self) -> Literal["loader", "device"]:
        """Which of the two, alone, takes longer."""
        return "loader" if self.loader_step_s > self.device_step_s else "device"

    def rate(self, seconds: float) -> float:
        """Images per second over all workers, from the seconds of a step."""
        return self.images_per_step / max(seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self),
            "epoch_s": self.epoch_s,
            "total_s": self.total_s,
            "device_hours": self.device_hours,
            "bound": self.bound,
            "images_per_s": {
                "whole": self.rate(self.step_s),
                "device": self.rate(self.device_step_s),
                "loader": self.rate(self.loader_step_s),
            },
        }


def measure(
    prepared: PreparedRun,
    placement: cluster.Placement,
    seconds: float = 40.0,
    say: Callable[[str], None] = lambda text: None,
) -> CostEstimate:
    """Time the run's own steps here for about `seconds`.

    A run of several workers is timed as one of them: its share of each batch, without the traffic
    between them. Raises OutOfMemoryError (with the setting to change) where a microbatch does not
    fit.
    """
    run, dataset = prepared.run, prepared.dataset
    workers = placement.high
    mine = _as_one_worker(run, workers)
    device = torch.device("cuda" if placement.gpus and torch.cuda.is_available() else "cpu")
    processes, threads = processes_and_threads(run, dataset, placement.cpus)
    with (
        tempfile.TemporaryDirectory(prefix="ftlib-estimate-") as scratch,
        _threads(threads),
    ):
        say("building the model")
        training = Training(
            WorkerContext(
                mine, dataset, scratch, device, source=prepared.source, loader_workers=processes
            )
        )
        training.update_frozen(0)
        memory: dict[str, int] = {}
        say("a few steps with everything")
        whole, spread, timed_steps = _whole(training, processes, seconds * SHARES["whole"], memory)
        say("steps without loading")
        alone = timing.constant_batches(training, training.state.step)
        device_step, _, _ = _time_steps(training, alone, seconds * SHARES["device"], warm_up=1)
        say("loading without steps")
        loader_step = _loading(training, processes, seconds * SHARES["loader"])
        say("a checkpoint and an evaluation")
        saving = _saving(training, scratch)
        evaluation = _evaluation(training, workers, processes, seconds * SHARES["evaluation"])
        memory |= _memory(device)
        largest = _largest_microbatch(training) if device.type == "cuda" else None
    per_epoch = sampler.steps_per_epoch(len(training.rows), run.train.batch_size)
    # The last step of an epoch may be a short one.
    full_steps = len(training.rows) / run.train.batch_size / per_epoch
    return CostEstimate(
        steps_per_epoch=per_epoch,
        epochs=run.train.epochs,
        evaluations=_evaluations(run, prepared),
        workers=workers,
        step_s=whole * full_steps,
        device_step_s=device_step * full_steps,
        loader_step_s=loader_step * full_steps,
        checkpoint_s=saving,
        evaluation_s=evaluation,
        images_per_step=len(training.rows) / per_epoch,
        steps_timed=timed_steps,
        spread=spread,
        memory=memory,
        largest_microbatch=largest,
        gradient_bytes=training.buffer.flat.nbytes if training.buffer is not None else 0,
    )


def _as_one_worker(run: Run, workers: int) -> Run:
    """The run as one of its workers sees it, with its share of each batch.

    More epochs only so that the data suffice for timing; nothing that is timed depends on their
    number. Frozen epochs are timed as others.
    """
    train = run.train
    return override(
        run,
        {
            "train.batch_size": -(-train.microbatches // workers) * train.microbatch_size,
            "train.epochs": max(train.epochs, 100_000),
            "train.max_nonfinite": 2**31,
            "checkpoint.every_seconds": 0.0,
            "checkpoint.every_steps": 0,
            "model.freeze_epochs": min(run.model.freeze_epochs, 0),
            "model.unfreeze_every": 0,
            "cluster.workers": "1",
        },
    )


def _evaluations(run: Run, prepared: PreparedRun) -> int:
    """How often the whole run scores its model, the starting weights included."""
    every, epochs = run.evaluate.every_epochs, run.train.epochs
    count = sum(epoch % every == 0 or epoch == epochs for epoch in range(1, epochs + 1))
    return count + keeps_classifier(run, prepared.source)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_steps(
    training: Training, batches: Iterator[Batch], seconds: float, warm_up: int
) -> tuple[float, float, int]:
    """(seconds per full step, relative standard error, steps timed)."""
    full = training.run.train.batch_size
    timing.run_steps(training, batches, warm_up)
    times: list[float] = []
    began = before = timing.synchronize(training.context.device)
    while len(times) < LEAST_STEPS or before - began < seconds:
        # Waiting for a GPU after every step would slow it down.
        at_once = 1 if training.context.device.type == "cpu" else 10
        images = timing.run_steps(training, batches, at_once)
        now = timing.synchronize(training.context.device)
        times.append((now - before) * full / images)
        before = now
    spread = float(np.std(times) / np.mean(times) / len(times) ** 0.5)
    return float(np.mean(times)), spread, len(times)


def _whole(
    training: Training, processes: int, seconds: float, memory: dict[str, int]
) -> tuple[float, float, int]:
    run, microbatches = training.run, training.run.train.microbatches
    # Steps whose images are loaded before the clock starts.
    ahead = -(-PREFETCH * max(processes, 1) // microbatches)
    with contextlib.closing(
        train_batches(
            training.context.dataset,
            training.rows,
            run,
            rank=0,
            world=1,
            start_step=training.state.step,
            stop_step=training.total,
            workers=processes,
        )
    ) as batches:
        found = _time_steps(training, batches, seconds, WARM_UP + ahead)
        memory["loaders"] = _loaders_memory()
    return found


def _loading(training: Training, processes: int, seconds: float) -> float:
    """Seconds to load a full step's images when nothing else is done."""
    run = training.run
    images, ahead = 0, PREFETCH * max(processes, 1) + 1
    with contextlib.closing(
        train_batches(
            training.context.dataset,
            training.rows,
            run,
            rank=0,
            world=1,
            start_step=0,
            stop_step=training.total,
            workers=processes,
        )
    ) as batches:
        for _ in itertools.islice(batches, ahead):
            pass  # by then the processes are at work, and the queue is empty
        began = now = time.perf_counter()
        while now - began < seconds or images < run.train.batch_size:
            images += len(next(batches).labels)
            now = time.perf_counter()
    return (now - began) / images * run.train.batch_size


def _saving(training: Training, scratch: str) -> float:
    """Training time that a checkpoint costs, in seconds.

    That is the copy and, where training runs on the CPU, the cores' time for writing it. Waiting
    for the disk costs nothing.
    """
    with contextlib.closing(checkpoint.CheckpointWriter(scratch, 2, 1)) as writer:
        training.writer = writer
        began = time.perf_counter()
        training.save(wait=False)
        stalled, cpu = time.perf_counter() - began, time.process_time()
        writer.wait()
        training.writer = None
    if training.context.device.type != "cpu":
        return stalled
    return stalled + (time.process_time() - cpu) / torch.get_num_threads()


def _evaluation(training: Training, workers: int, processes: int, seconds: float) -> float:
    """Seconds to score one worker's part of the scored images, measured on a sample of them."""
    job, run = training.context, training.run
    mine = training.scored_rows[::workers]

    def score(rows: np.ndarray) -> float:
        began = timing.synchronize(job.device)
        scoring.score(
            job, training.state.scored_model, rows, dtype=training.dtype, loader_workers=processes
        )
        return timing.synchronize(job.device) - began

    size = min(len(mine), run.evaluate.batch_size)
    score(mine[:size])  # memory and kernels
    took = score(mine[:size])
    if size == len(mine):
        return took
    more = min(len(mine), max(2 * size, int(size * seconds / max(took, 1e-3))))
    longer = score(mine[:more])
    each = max(longer - took, 0.0) / (more - size)  # what starting the loader costs is in both
    return longer + each * (len(mine) - more)


def _memory(device: torch.device) -> dict[str, int]:
    found = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return found | (
        {"device": torch.cuda.max_memory_reserved(device)} if device.type == "cuda" else {}
    )


def _loaders_memory() -> int:
    """Bytes that only the loader processes use."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total


def largest(fits: Callable[[int], bool], start: int, limit: int) -> int:
    """The largest n up to `limit` that fits, to within a sixteenth; 0 where not even 1 does.

    `fits` must be monotone.
    """
    good, n = 0, max(1, start)
    while n <= limit and fits(n):
        good, n = n, 2 * n
    bad = min(n, limit + 1)
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _largest_microbatch(training: Training, limit: int = 4096) -> int:
    """The largest microbatch that fits, found with random pixels and the optimizer's state."""
    device, side = training.context.device, training.run.augment.size

    def fits(n: int) -> bool:
        try:
            images = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8)
            labels = torch.zeros(n, dtype=torch.int64)
            assert training.buffer is not None
            training.buffer.zero()
            batch = Batch(
                step=0,
                epoch=0,
                index=0,
                images_in_step=n,
                rows=labels,
                labels=labels,
                images=images,
            )
            training.microbatch(batch, training.buffer)
            torch.cuda.synchronize(device)
        except (torch.cuda.OutOfMemoryError, OutOfMemoryError):
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    return largest(fits, training.run.train.microbatch_size, limit)


def workload(found: CostEstimate, run: Run) -> Workload:
    """What the cost on a cluster follows from. A worker was timed with its share of each batch."""
    mine = -(-run.train.microbatches // found.workers)
    return Workload(
        microbatches=run.train.microbatches,
        microbatch_s=found.step_s / mine,
        gradient_bytes=found.gradient_bytes,
        steps_per_epoch=found.steps_per_epoch,
        checkpoint_s=found.checkpoint_s,
        strict=run.cluster.strict_elastic,
    )


# --- text ---


def machines(placement: cluster.Placement, workers: int, price: Price) -> int:
    """How many machines of that kind the run needs."""
    if not (price.gpus and placement.gpus):
        return 1
    return max(1, -(-int(np.ceil(workers * placement.gpus)) // price.gpus))


def text(
    found: CostEstimate,
    run: Run,
    placement: cluster.Placement,
    price: Price | None = None,
    machine: str = "",
) -> str:
    """What was found, for a person."""
    bottleneck = {
        "loader": "reserve more CPUs (cluster.cpus_per_worker), or prepare the pictures smaller "
        "(jobs/prepare.py --max-side)",
        "device": "more CPUs would not help",
    }[found.bound]
    workers = f"{found.workers} worker{'s' if found.workers != 1 else ''}"
    lines = [
        "",
        f"time            {duration(found.total_s)} for {found.epochs} epochs: "
        f"{duration_short(found.epoch_s)} an epoch and "
        f"{duration_short(found.evaluation_s)} an evaluation ({found.evaluations} of them)",
        f"device-hours    {found.device_hours:.3g} ({workers})",
        f"images/s        {found.rate(found.step_s):,.0f} together, "
        f"{found.rate(found.device_step_s):,.0f} device alone, "
        f"{found.rate(found.loader_step_s):,.0f} loader alone",
        f"bound           the {found.bound}: {bottleneck}",
        f"peak memory     {_memory_text(found.memory)}",
    ]
    if found.largest_microbatch is not None:
        lines.append(
            f"microbatch      {found.largest_microbatch} is the largest that fits (the recipe has "
            f"{run.train.microbatch_size}; another one is another run)"
        )
    if price is not None:
        count = machines(placement, found.workers, price)
        cost = count * price.usd_per_hour * found.total_s / 3600
        lines.append(
            f"cost            {cost:,.2f} USD: {count} x {machine or price.what} at "
            f"{price.usd_per_hour:g} USD/h, if this machine is like it"
        )
    indent = " " * 16
    lines.append(
        f"{indent}from {found.steps_timed} timed steps (standard error "
        f"{percent(found.spread)}); start-up and the report at the end come on top"
    )
    if found.workers > 1:
        lines.append(f"{indent}timed as one of the workers, without the traffic between them")
    return "\n".join(wrapped(line, indent) for line in lines)


def _memory_text(memory: dict[str, int]) -> str:
    where = {
        "device": "on the GPU",
        "process": "in the training process",
        "loaders": "in the loader's processes",
    }
    return ", ".join(
        f"{memory[k] / 1e9:.2g} GB {text}" for k, text in where.items() if memory.get(k)
    )
