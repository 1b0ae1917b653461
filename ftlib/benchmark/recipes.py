"""Recipes beside other ways to train: the same pictures, model, size, epochs and seeds for all.

Every training is a process of its own. The score is top-1 on the validation pictures after the last
epoch, so that no epoch is chosen by it. Differences are paired by seed, with Student's t interval.
A training that is finished is kept, and the same command goes on with the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from ftlib import recipes
from ftlib.benchmark.loader import prepared
from ftlib.benchmark.measure import BenchmarkError, Cost, Goal, Part, last_line, ratios
from ftlib.benchmark.one_recipe import Loop
from ftlib.config import Gates, Run, Track
from ftlib.data.shards import Dataset
from ftlib.launch.cluster import ROOT
from ftlib.preparation.options import PrepareOptions
from ftlib.settings import override, to_json

Say = Callable[[str], None]
TIMM, TORCHVISION, PLAIN = "timm's train.py", "torchvision's reference", "a plain loop"


@dataclass(frozen=True)
class RecipesPlan:
    """What is trained: each of `recipes`, and the peers."""

    recipes: Sequence[str]
    """As `ftlib.recipes.load` takes them; the others are compared with the first too."""
    arch: str
    """A torchvision classifier that timm has under the same name."""
    size: int
    """Side of the input in pixels."""
    epochs: int
    seeds: int
    timm: str = ""
    """timm's train.py; it is not part of its package."""
    timm_lr: float = 3e-3
    """timm's learning rate."""


@dataclass(frozen=True)
class Training:
    """One finished training."""

    curve: list[float]
    """Validation top-1 in percent after each epoch."""
    cpu: float
    """Seconds of CPU of the whole process."""
    wall: float


@dataclass(frozen=True)
class Cell:
    """One training to do."""

    way: str
    seed: int
    key: str
    """Digest of all that it computes, and the name of its file."""
    train: Callable[[Path], list[float]]
    """Trains in a scratch folder; the curve."""


def benchmark(plan: RecipesPlan, source: Path, folder: Path, say: Say) -> Part:
    """Train every way with every seed; what is in `folder` already is not trained again."""
    dataset = prepared(source, folder / "prepared", PrepareOptions(), val_fraction=0.2)
    pictures = as_folders(dataset, folder / "pictures")
    found: dict[str, list[Training]] = {}
    missing: dict[str, str] = {}
    for seed in range(plan.seeds):
        for cell in cells(plan, dataset, pictures, seed):
            if cell.way in missing:
                continue
            try:
                done = finished(cell, folder, say)
            except BenchmarkError as error:
                missing[cell.way] = str(error)
                found.pop(cell.way, None)  # pairs need all seeds
                continue
            found.setdefault(cell.way, []).append(done)
            say(f"{cell.way}, seed {seed}: {done.curve[-1]:.1f} %, {done.cpu:.0f} CPU seconds")
    if not plan.timm:
        missing[TIMM] = "give its file with --timm PATH/train.py (github.com/huggingface/"
        missing[TIMM] += "pytorch-image-models has it; the package does not)"
    return report(plan, dataset, found, missing)


def as_folders(dataset: Dataset, folder: Path) -> Path:
    """The set's pictures in class folders below train/ and val/, the bytes that ftlib reads."""
    if folder.is_dir():
        return folder
    making = folder.with_name(f".{folder.name}-{os.getpid()}")
    for name in ("train", "val"):
        split = dataset.split(name)
        for row, label in enumerate(split.labels):
            into = making / name / f"{label:04d}"
            into.mkdir(parents=True, exist_ok=True)
            (into / f"{row:07d}.jpg").write_bytes(split.image(row))
    making.rename(folder)
    return folder


def cells(plan: RecipesPlan, dataset: Dataset, pictures: Path, seed: int) -> list[Cell]:
    """All ways with one seed; `ftlib_run` and `peers` say with which settings."""
    found = []
    for name in plan.recipes:
        run = ftlib_run(name, plan, dataset, seed)
        found.append(_cell(f"ftlib {name}", seed, dataset, "ftlib", to_json(run)))
    for name, loop in peers(plan, pictures, seed).items():
        found.append(_cell(name, seed, dataset, "loop", json.dumps(asdict(loop))))
    if plan.timm:
        words = timm_arguments(plan, len(dataset.classes), seed)
        key = _digest(TIMM, dataset.digest, *words)

        def train(scratch: Path) -> list[float]:
            return by_timm(Path(plan.timm), pictures, words, scratch)

        found.append(Cell(TIMM, seed, key, train))
    return found


def _cell(name: str, seed: int, dataset: Dataset, way: str, settings: str) -> Cell:
    """A training by `ftlib.benchmark.one_recipe`."""

    def train(scratch: Path) -> list[float]:
        (scratch / "settings.json").write_text(settings, "utf-8")
        module = ["-m", "ftlib.benchmark.one_recipe", way, str(scratch / "settings.json")]
        return json.loads(_run([*module, str(scratch)]).splitlines()[-1])

    plain = {k: v for k, v in json.loads(settings).items() if k not in ("pictures", "data")}
    return Cell(name, seed, _digest(name, dataset.digest, json.dumps(plain)), train)


def ftlib_run(name: str, plan: RecipesPlan, dataset: Dataset, seed: int) -> Run:
    """The recipe at the bench's scale, on all pictures and without gates. An evaluation size of its
    own keeps its ratio to the training size."""
    run = recipes.load(name)
    scored = round(run.evaluate.size * plan.size / run.augment.size)
    run = override(
        run,
        {
            "seed": seed,
            "data.path": dataset.path,
            "data.subset": 1.0,
            "data.loader_workers": 0,
            "augment.size": plan.size,
            "evaluate.size": scored,
            "model.arch": plan.arch,
            "train.epochs": plan.epochs,
        },
    )
    track = Track(log_model=False, system_metrics=False)
    return dataclasses.replace(run, gates=Gates(), track=track)


def peers(plan: RecipesPlan, pictures: Path, seed: int) -> dict[str, Loop]:
    """torchvision's references/classification at its defaults: SGD, 0.1 for a batch of 8 x 32
    (here 32, so an eighth of the rate), decay 1e-4, a tenth of the rate after each third of the
    epochs. The plain loop: AdamW and a cosine."""

    def loop(**settings: Any) -> Loop:
        return Loop(str(pictures), plan.arch, plan.size, plan.epochs, seed, **settings)

    return {
        TORCHVISION: loop(
            batch=32, optimizer="sgd", lr=0.1 / 8, weight_decay=1e-4, schedule="step"
        ),
        PLAIN: loop(batch=128, optimizer="adamw", lr=1e-3, weight_decay=0.05, schedule="cosine"),
    }


def timm_arguments(plan: RecipesPlan, classes: int, seed: int) -> list[str]:
    """Of train.py: its defaults (crop of 8 to 100 %, color jitter 0.4, smoothing 0.1), with AdamW
    and one epoch of warm-up (of 5)."""
    text = (
        f"--model {plan.arch} --num-classes {classes} --img-size {plan.size} -b 128 "
        f"--epochs {plan.epochs} --opt adamw --lr {plan.timm_lr:g} --weight-decay 0.05 "
        f"--warmup-epochs {min(1, plan.epochs - 1)} --cooldown-epochs 0 --seed {seed} "
        "--workers 1 --device cpu --checkpoint-hist 1"
    )
    return text.split()


def by_timm(script: Path, pictures: Path, words: list[str], scratch: Path) -> list[float]:
    """Top-1 by epoch, from the summary.csv that train.py writes."""
    where = ["--data-dir", str(pictures), "--output", str(scratch), "--experiment", "timm"]
    _run([str(script), *where, *words])
    lines = (scratch / "timm" / "summary.csv").read_text("utf-8").splitlines()
    column = lines[0].split(",").index("eval_top1")
    return [float(line.split(",")[column]) for line in lines[1:]]


def _run(words: list[str]) -> str:
    """What a Python process prints. Raises BenchmarkError with its last line if it fails."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchmarkError(f"{words[0]} ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def finished(cell: Cell, folder: Path, say: Say) -> Training:
    """The training, from its file or by doing it now."""
    file = folder / "trainings" / f"{cell.key}.json"
    if file.is_file():
        return Training(**json.loads(file.read_text("utf-8"))["found"])
    say(f"{cell.way}, seed {cell.seed}")
    scratch = folder / "scratch" / f"{cell.key}-{os.getpid()}"
    scratch.mkdir(parents=True)
    before, began = _children(), time.perf_counter()
    curve = cell.train(scratch)
    found = Training(curve, _children() - before, time.perf_counter() - began)
    file.parent.mkdir(exist_ok=True)
    text = json.dumps({"way": cell.way, "seed": cell.seed, "found": asdict(found)})
    part = file.with_suffix(".part")
    part.write_text(text, "utf-8")
    part.rename(file)
    return found


def _children() -> float:
    """CPU seconds of all processes that were started here and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# --- what it says -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """Points of top-1 by which one way is better than another, paired by seed."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % interval; NaN for a single seed."""
    p: float
    """Two-sided, of a paired t test; NaN for a single seed."""

    def __str__(self) -> str:
        if math.isnan(self.p):
            return f"{self.mean:+.2f} points, one seed"
        return f"{self.mean:+.2f} points [{self.low:+.2f}, {self.high:+.2f}], p = {self.p:.2g}"


def paired_gain(ours: Sequence[float], theirs: Sequence[float]) -> Gain:
    """`ours` minus `theirs`, which have the same seeds in the same order."""
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, n = statistics.mean(gains), len(gains)
    if n < 2:
        return Gain(mean, math.nan, math.nan, math.nan)
    error = statistics.stdev(gains) / n**0.5
    half = float(stats.t.ppf(0.975, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Gain(mean, mean - half, mean + half, p)


def report(
    plan: RecipesPlan,
    dataset: Dataset,
    found: dict[str, list[Training]],
    missing: dict[str, str],
) -> Part:
    """Costs per training, the ratio of CPU time to each other way, and the scores as notes."""
    costs = {way: [Cost(t.cpu, t.wall) for t in done] for way, done in found.items()}
    curves = {way: [t.curve for t in done] for way, done in found.items()}
    last = {way: [curve[-1] for curve in each] for way, each in curves.items()}
    ours = next(iter(found), "")
    others = [way for way in found if way != ours]
    notes = [
        f"{plan.arch}, {plan.size} px, {plan.epochs} epochs from scratch of "
        f"{len(dataset.split('train')):,} images, {len(dataset.split('val')):,} scored; "
        f"{plan.seeds} seeds. top-1 % after the last epoch:"
    ]
    notes += [
        f"{way}: {statistics.mean(each):.2f} ({' '.join(f'{v:.1f}' for v in each)})"
        for way, each in last.items()
    ]
    notes += [f"{ours} minus {way}: {paired_gain(last[ours], last[way])}" for way in others]
    notes += [f"{way}: not measured: {why}" for way, why in missing.items()]
    goals = [Goal(ours, way, "cpu") for way in others]
    return Part("Recipes", "training", costs, ratios(costs, goals), notes=notes, curves=curves)
