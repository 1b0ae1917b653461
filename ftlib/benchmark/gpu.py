"""What a GPU must show: training end to end beside batches that lie on the device already, model
FLOPs utilization, cores that the loader needs, what a checkpoint costs, the longest waits.

It runs on a CPU too, in a small form. MIG and the card's clocks are left as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ftlib.benchmark import loader
from ftlib.benchmark.measure import BenchmarkError, Case, Goal, Part, by_turns, last_line, timed
from ftlib.benchmark.recipes import as_folders
from ftlib.benchmark.training import (
    BenchmarkSettings,
    Say,
    checkpoints,
    describe,
    device,
)
from ftlib.config import Checkpoint, Data, Model, Run, Train
from ftlib.data.loader import Batch
from ftlib.data.shards import Dataset
from ftlib.launch.timing import constant_batches, run_steps, synchronize
from ftlib.paths import jobs_folder
from ftlib.preparation.options import PrepareOptions
from ftlib.text import percent
from ftlib.track.store import first_line
from ftlib.training.loop import Training
from ftlib.training.worker_context import WorkerContext

BUDGET_SECONDS = 270.0
"""Of all pieces together; what did not fit is said."""
PIECE_SECONDS = 80.0
"""Of a single piece, so that one that hangs leaves time for the others."""
PICTURES = 256
"""Generated photos, where no folder is given."""
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s in bf16 without sparsity, from NVIDIA's data sheets of the SXM cards."""
A100_RATE = 2470
"""Images/s of ResNet-50, mixed precision: NVIDIA DeepLearningExamples, one A100 of 80 GB."""
END_TO_END, ON_DEVICE = "ftlib end to end", "ftlib, batches on the device"
LONGEST = 10
TIMM_RATE = re.compile(r"\(\s*[\d.]+s,\s*([\d.]+)/s\)")
"""The running mean in a line of timm's train.py."""


@dataclass(frozen=True)
class GpuPlan:
    step: BenchmarkSettings
    """Model, side of the input, images per step, steps and rounds."""
    workers: int
    """Loader processes."""
    max_side: int
    """Longer side of the prepared pictures in pixels."""
    source: Path | None = None
    timm: str = ""
    """timm's train.py."""


class OutOfTimeError(BenchmarkError):
    """A piece was ended because its time was over."""


class Repeated(WorkerContext):
    """Epochs of many steps from few pictures: rows come again and again."""

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray, str]:
        count = len(self.dataset.split("train"))
        return np.resize(np.arange(count), 1000 * self.run.train.batch_size), np.arange(0), "val"


def benchmark(plan: GpuPlan, scratch: Path, say: Say) -> list[Part]:
    """A table of steps with all that follows from it as notes, and one of checkpoints."""
    ends = time.monotonic() + BUDGET_SECONDS
    scratch.mkdir(parents=True, exist_ok=True)
    folder = loader.pictures_of(plan.source, scratch, PICTURES)
    say(f"preparing {folder}")
    rules = PrepareOptions(max_side=plan.max_side, quality=loader.QUALITY)
    dataset = loader.prepared(folder, scratch / "prepared", rules, val_fraction=0.1)
    trainings = [_training(plan, dataset, str(scratch / name)) for name in ("a", "b")]
    with contextlib.closing(trainings[0].batches()) as batches:
        with limited("end to end", BUDGET_SECONDS / 2):
            part = _end_to_end(plan, trainings, batches, say)
        seconds = statistics.median(cost.wall for cost in part.costs[ON_DEVICE])
        pieces: dict[str, Callable[[], list[str]]] = {
            "utilization": lambda: _utilization(plan, trainings[1], plan.step.batch / seconds),
            "waits": lambda: _longest_waits(trainings[0], batches),
        }
        notes = [line for name, piece in pieces.items() for line in _try(name, piece, ends, say)]
    later: dict[str, Callable[[], list[str]]] = {
        "loader": lambda: _loader(plan, dataset, plan.step.batch / seconds),
        "timm": lambda: _timm(plan, dataset, scratch / "timm", plan.step.batch / seconds),
    }
    tables: list[Part] = []

    def kept() -> list[str]:
        tables.append(checkpoints(replace(plan.step, rounds=2), scratch / "checkpoints", say))
        return []

    later["checkpoints"] = kept
    later["sweep"] = lambda: _sweep(plan, dataset, scratch / "sweep")
    notes += [line for name, piece in later.items() for line in _try(name, piece, ends, say)]
    return [replace(part, notes=[*part.notes, *notes]), *tables]


def _try(name: str, piece: Callable[[], list[str]], ends: float, say: Say) -> list[str]:
    """What a piece says, or why it says nothing: the GPU may not be there a second time."""
    seconds = min(PIECE_SECONDS, ends - time.monotonic())
    if seconds <= 0:
        return [f"{name}: left out, {BUDGET_SECONDS:.0f} s were over"]
    say(name)
    try:
        with limited(name, seconds):
            return piece()
    except OutOfTimeError as error:
        return [str(error)]
    except Exception as error:
        return [f"{name}: failed, {type(error).__name__}: {first_line(error)}"]


@contextlib.contextmanager
def limited(name: str, seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError within the block when `seconds` are over. For the main thread."""

    def end(number: int, frame: object) -> None:
        raise OutOfTimeError(f"{name}: did not fit into {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _training(plan: GpuPlan, dataset: Dataset, run_dir: str) -> Training:
    s = plan.step
    run = Run(
        data=Data(path=dataset.path),
        augment=loader.sized(loader.PHASE2, s.size),
        model=Model(arch=s.arch),
        train=Train(epochs=1000, batch_size=s.batch, microbatch_size=s.batch),
        checkpoint=Checkpoint(every_seconds=0),
    )
    context = Repeated(run, dataset, run_dir, device=device(), loader_workers=plan.workers)
    return Training(context)


def _on_device(of: Training) -> Iterator[Batch]:
    """Batches whose pixels and labels lie on the device: nothing to load, nothing to copy."""
    pixels: torch.Tensor | None = None
    for batch in constant_batches(of):
        pixels = batch.images.to(of.context.device) if pixels is None else pixels
        yield replace(batch, images=pixels, labels=batch.labels.to(of.context.device))


def _end_to_end(
    plan: GpuPlan, trainings: list[Training], batches: Iterator[Batch], say: Say
) -> Part:
    loading, alone = trainings
    on_device = _on_device(alone)

    def steps(of: Training, source: Iterator[Batch]) -> int:
        run_steps(of, source, plan.step.steps)
        synchronize(of.context.device)
        return plan.step.steps

    cases = {END_TO_END: (loading, batches), ON_DEVICE: (alone, on_device)}
    for of, source in cases.values():
        run_steps(of, source, 2)
    found = by_turns(
        "End to end",
        "step",
        [Case(name, partial(timed, partial(steps, *case))) for name, case in cases.items()],
        goals=[Goal(END_TO_END, ON_DEVICE, "wall", 1 / 0.95)],
        rounds=plan.step.rounds,
        say=say,
        notes=[f"{describe(plan.step, alone.dtype)}, {plan.workers} loader processes"],
    )
    rates = ", ".join(
        f"{name} {plan.step.batch / statistics.median(c.wall for c in costs):,.1f} images/s"
        for name, costs in found.costs.items()
    )
    peer = f"NVIDIA's ResNet-50 on an A100: {A100_RATE:,} images/s"
    return replace(found, notes=[*found.notes, f"{rates} ({peer})"])


def _utilization(plan: GpuPlan, of: Training, rate: float) -> list[str]:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B), of forward and backward."""
    with FlopCounterMode(display=False) as counter:
        run_steps(of, _from(of), 1)
    each = counter.get_total_flops() / plan.step.batch
    said = f"{each / 1e9:.2f} GFLOP per image, {each * rate / 1e12:.3g} TFLOP/s"
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for name, flops in PEAK.items() if name in card), 0.0)
    if peak:
        return [f"{said}: MFU {percent(each * rate / peak, 1)} of {card}'s {peak / 1e12:.0f}"]
    return [f"{said}; no MFU: the peak of {card or 'a CPU'} is not known here"]


def _from(of: Training) -> Iterator[Batch]:
    """Batches from the training's present step on."""
    return constant_batches(of, of.state.step)


def _loader(plan: GpuPlan, dataset: Dataset, rate: float) -> list[str]:
    case = loader.ours(
        "ftlib",
        dataset,
        loader.sized(loader.PHASE2, plan.step.size),
        batch=plan.step.batch,
        workers=plan.workers,
        images=4 * plan.step.batch,
    )
    cpu = case.run().cpu
    cores = cpu * rate
    return [f"loader: {1000 * cpu:.2f} CPU ms per image: {cores:.1f} cores feed this device"]


def _longest_waits(of: Training, batches: Iterator[Batch]) -> list[str]:
    """The longest times in which the device had nothing to do, and what the host did then."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as found:
        run_steps(of, batches, 4)
        synchronize(of.context.device)
    events = list(found.events() or [])
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    # An annotation lies on the device as one long event over its kernels and the gaps in it.
    work = [e for e in events if e.device_type == kind and not (cuda and e.is_user_annotation)]
    waits = gaps([e for e in work if e.cpu_parent is None])
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    return [
        f"wait of {wait / 1000:.2f} ms before {after.name[:60]}: {during(host, start, wait)}"
        for wait, start, after in waits
    ]


def gaps(events: list[Any]) -> list[tuple[float, float, Any]]:
    """(microseconds, start, event after it) of the LONGEST longest times without any event."""
    found, busy_until = [], None
    for event in sorted(events, key=lambda e: e.time_range.start):
        start = event.time_range.start
        if busy_until is not None and start > busy_until:
            found.append((start - busy_until, busy_until, event))
        busy_until = max(busy_until or start, event.time_range.end)
    return sorted(found, key=lambda gap: -gap[0])[:LONGEST]


def during(host: list[Any], start: float, length: float) -> str:
    """Name of the host's operation that covers most of a gap."""

    def overlap(event: Any) -> float:
        inside = min(event.time_range.end, start + length) - max(event.time_range.start, start)
        return float(inside)

    longest = max(host, key=overlap, default=None)
    if longest is None or overlap(longest) <= 0:
        return "Python, or waiting for the loader"
    return f"{percent(overlap(longest) / length)} of it in {longest.name[:60]}"


def _timm(plan: GpuPlan, dataset: Dataset, scratch: Path, ours: float) -> list[str]:
    """timm's train.py on the very same prepared pictures, repeated to an epoch of many steps."""
    if not plan.timm:
        return ["timm's train.py: not measured; give its file with --timm PATH/train.py"]
    scratch.mkdir()
    pictures = as_folders(dataset, scratch / "pictures")
    for file in sorted((pictures / "train").rglob("*.jpg")):
        for copy in range(-(-plan.step.steps * plan.step.batch // len(dataset.split("train")))):
            file.with_name(f"{file.stem}-{copy}.jpg").symlink_to(file)
    words = (
        f"--model {plan.step.arch} --num-classes {len(dataset.classes)} -b {plan.step.batch} "
        f"--img-size {plan.step.size} --epochs 1 --aa rand-m9-mstd0.5 --channels-last "
        f"--workers {plan.workers} --device {device().type} --log-interval 1 --cooldown-epochs 0"
    ).split()
    if torch.cuda.is_available():
        words += ["--amp", "--amp-dtype", "bfloat16"]
    where = ["--data-dir", str(pictures), "--output", str(scratch)]
    command = [sys.executable, plan.timm, *where, *words]
    rates = TIMM_RATE.findall(_output(command))
    if not rates:
        raise BenchmarkError(f"{plan.timm} printed no images/s")
    rate = float(rates[-1])
    return [f"timm's train.py: {rate:,.1f} images/s; ftlib {ours / rate:.2f} times (goal 1.3)"]


def _sweep(plan: GpuPlan, dataset: Dataset, home: Path) -> list[str]:
    """Four short trials at once, a quarter of the GPU each."""
    home.mkdir()
    words = (
        f"--recipe from-scratch-short --space quick --trials 4 --parallel 4 --epochs 2 "
        f"--data.path {dataset.path} --model.arch {plan.step.arch} --augment.size {plan.step.size} "
        f"--train.batch-size 16 --train.microbatch-size 16 --cluster.cpus-per-worker 1 "
        f"--cluster.gpus-per-worker {0.25 if torch.cuda.is_available() else 0} "
        f"--json {home / 'found.json'}"
    ).split()
    _output([sys.executable, str(jobs_folder() / "sweep.py"), *words], FTLIB_HOME=str(home))
    found = json.loads((home / "found.json").read_text())
    return [f"sweep: {found['trials']} trials at once in {found['seconds']:.0f} s, Ray included"]


def _output(command: list[str], **environment: str) -> str:
    """What a command prints; it is ended when the piece's time is over. Raises BenchmarkError."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            printed = process.communicate()[0]
        except OutOfTimeError:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            raise
    if process.returncode:
        raise BenchmarkError(
            f"{Path(command[1]).name} ended with {process.returncode}: {last_line(printed)}"
        )
    return printed
