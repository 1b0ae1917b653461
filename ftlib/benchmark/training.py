"""What ftlib's training costs beside a plain loop: steps, two workers, checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch.nn import functional as F

from ftlib.benchmark.measure import (
    BenchmarkError,
    Case,
    Cost,
    Goal,
    Part,
    Ratio,
    by_turns,
    last_line,
    spread,
    timed,
)
from ftlib.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    AdamW,
    Augment,
    Checkpoint,
    CrossEntropy,
    Data,
    Model,
    Run,
    Train,
)
from ftlib.launch.cluster import ROOT
from ftlib.launch.timing import constant_batches, run_steps, synchronize
from ftlib.training import checkpoint
from ftlib.training.evaluate import autocast
from ftlib.training.loop import Training, WorkerContext

Say = Callable[[str], None]
CLASSES = 100
IMAGES = 12_800


@dataclass(frozen=True)
class BenchmarkSettings:
    """The work that both sides do."""

    arch: str = "resnet18"
    size: int = 64
    batch: int = 32
    """Images per step and worker."""
    steps: int = 8
    """Per case and round."""
    rounds: int = 5


class Pictures:
    """As much of a data set as training on made-up pixels needs: labels."""

    name, digest, rules = "made-up", "0" * 64, None
    classes = tuple(f"class{i}" for i in range(CLASSES))

    def __init__(self) -> None:
        self.labels = np.arange(IMAGES, dtype=np.int64) % CLASSES

    def __len__(self) -> int:
        return IMAGES

    def split(self, _: str) -> Pictures:
        return self


def device() -> torch.device:
    """This process's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def training(
    s: BenchmarkSettings, run_dir: str = "", rank: int = 0, world: int = 1, **choices: Any
) -> Training:
    """ftlib's loop on made-up pixels: a batch of `s.batch` images per worker, one microbatch each.

    `choices`: further settings of train.
    """
    run = Run(
        data=Data(path="made-up"),
        augment=Augment(size=s.size),
        model=Model(arch=s.arch),
        loss=CrossEntropy(label_smoothing=0.1),
        optimizer=AdamW(lr=1e-4, weight_decay=1e-4),
        train=Train(epochs=10_000, batch_size=s.batch * world, microbatch_size=s.batch, **choices),
        checkpoint=Checkpoint(every_seconds=0),
    )
    pictures: Any = Pictures()
    context = WorkerContext(run, pictures, run_dir=run_dir, device=device(), rank=rank, world=world)
    return Training(context)


def plain_step(
    s: BenchmarkSettings,
    dtype: torch.dtype,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda m: m,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One step of the loop that everybody writes: the same model, precision, loss, clipping and
    fused optimizer, and nothing else."""
    on = device()
    torch.manual_seed(0)
    model = wrap(
        torchvision.models.get_model(s.arch, num_classes=CLASSES).to(
            on, memory_format=torch.channels_last
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)
    mean, std = (
        torch.tensor(v, device=on).view(1, 3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images, labels = images.to(on, non_blocking=True), labels.to(on, non_blocking=True)
        optimizer.zero_grad(set_to_none=True)
        with autocast(dtype, on):
            logits = model((images.permute(0, 3, 1, 2).float() - mean) / std)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def loops(
    s: BenchmarkSettings,
    ours: Training,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] = lambda m: m,
) -> tuple[Callable[[int], int], Callable[[int], int]]:
    """(ftlib's, plain): each makes so many steps on the same pixels and returns their number;
    the device has finished when they return."""
    batches, plain = constant_batches(ours), plain_step(s, ours.dtype, wrap)
    first = next(constant_batches(ours))

    def run_ours(count: int) -> int:
        run_steps(ours, batches, count)
        synchronize(ours.context.device)
        return count

    def run_plain(count: int) -> int:
        for _ in range(count):
            loss = plain(first.images, first.labels)
        loss.item()
        synchronize(ours.context.device)
        return count

    return run_ours, run_plain


def describe(s: BenchmarkSettings, dtype: torch.dtype) -> str:
    """The work in words, for the note below a table."""
    where = "the GPU" if device().type == "cuda" else "the CPU"
    return (
        f"{s.arch}, {s.size} px, batches of {s.batch}, {str(dtype).removeprefix('torch.')}, "
        f"{s.steps} steps per case and round, on {where}"
    )


def step(s: BenchmarkSettings, scratch: Path, say: Say) -> Part:
    """A training step beside a plain PyTorch loop's.

    On a CPU they take turns step by step, and a round counts with the medians of its steps: the
    machine's speed changes faster than a round is long. On a GPU a turn is all steps of a round,
    since waiting after each step would empty the GPU's queue.
    """
    ours = training(s)
    run_ours, run_plain = loops(s, ours)
    run_ours(2), run_plain(2)
    turns = 1 if ours.context.device.type == "cuda" else s.steps
    cases = [
        Case(name, partial(timed, partial(run, s.steps // turns)))
        for name, run in (("ftlib step", run_ours), ("plain PyTorch step", run_plain))
    ]
    return by_turns(
        "Training step",
        "step",
        cases,
        goals=[Goal("ftlib step", "plain PyTorch step", "wall", 1.01)],
        rounds=s.rounds,
        say=say,
        notes=[describe(s, ours.dtype)],
        turns=turns,
    )


def scaling(s: BenchmarkSettings, scratch: Path, say: Say) -> Part:
    """Two workers beside torchrun's DistributedDataParallel, in the very same processes."""
    out = scratch / "scaling.json"
    say("Two workers: torchrun starts them")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["-m", "ftlib.benchmark.two_workers", str(out), json.dumps(asdict(s))]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *script],
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode or not out.exists():
        raise BenchmarkError(f"torchrun could not run two workers: {last_line(done.stderr)}")
    found = json.loads(out.read_text("utf-8"))
    costs = {name: [Cost(*pair) for pair in pairs] for name, pairs in found["costs"].items()}
    ours, peer = "ftlib, two workers", "torchrun DDP, two workers"
    # The workers wait for each other in every step, so the ratio of images/s is the inverse of the
    # ratio of seconds.
    seconds = tuple(a.wall / b.wall for a, b in zip(costs[ours], costs[peer]))
    ratio = Ratio(ours, peer, "wall", seconds, 1 / 0.98)
    rates = ", ".join(
        f"{name} {2 * s.batch / statistics.median(c.wall for c in cost):.1f} images/s"
        for name, cost in costs.items()
    )
    return Part(
        "Two workers",
        "step",
        costs,
        [ratio],
        [f"{found['work']}; {found['backend']}; per worker", rates],
    )


def checkpoints(s: BenchmarkSettings, scratch: Path, say: Say) -> Part:
    """Steps with a checkpoint written beside them, and without."""
    ours = training(s, str(scratch / "run"))
    run_ours, _ = loops(s, ours)
    run_ours(2)
    with contextlib.closing(checkpoint.CheckpointWriter(str(scratch / "run"), 2, 1)) as writer:
        ours.writer = writer

        def with_checkpoint() -> int:
            ours.save(wait=False)
            run_ours(s.steps)
            writer.wait()  # where all cores are busy, what writing took from the steps counts too
            return s.steps

        with_checkpoint()
        cases = [
            Case("ftlib with a checkpoint", lambda: timed(with_checkpoint)),
            Case("ftlib without", lambda: timed(lambda: run_ours(s.steps))),
        ]
        part = by_turns("Checkpoints", "step", cases, goals=[], rounds=s.rounds, say=say)
    extra = [
        s.steps * (a.wall - b.wall)
        for a, b in zip(part.costs["ftlib with a checkpoint"], part.costs["ftlib without"])
    ]
    usual = Ratio(
        "a minute with its checkpoint",
        "a minute without",
        "wall",
        tuple(1 + e / 60 for e in extra),
        1.01,
    )
    size = sum(f.stat().st_size for f in (scratch / "run").rglob("*") if f.is_file()) / 1e6
    note = (
        f"a checkpoint (of {size / 2:.0f} MB) takes {spread(extra)} s in all; by default there is "
        "one a minute and one at each epoch's end"
    )
    return Part(part.title, part.unit, part.costs, [usual], [describe(s, ours.dtype), note])


MEASURES: dict[str, Callable[[BenchmarkSettings, Path, Say], Part]] = {
    "step": step,
    "scaling": scaling,
    "checkpoint": checkpoints,
}
