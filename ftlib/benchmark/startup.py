"""What commands cost as whole processes: start-up, small runs, a sweep, preparation, a wrong word.

    python jobs/benchmark.py --what startup --rounds 3

Each command runs in an FTLIB_HOME of its own, and all processes below it are counted, those
included that outlive it (`process_tree`).
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ftlib.benchmark.loader import photos
from ftlib.benchmark.measure import (
    BenchmarkError,
    Case,
    Cost,
    Goal,
    Part,
    by_turns,
    last_line,
    spread,
)
from ftlib.benchmark.small_run import EPOCHS, PHOTOS
from ftlib.benchmark.training import BenchmarkSettings
from ftlib.launch.cluster import ROOT
from ftlib.paths import jobs_folder
from ftlib.preparation.prepare import prepare

ONE_STEP = """
import torch, torchvision
model = torchvision.models.resnet18(num_classes=3)
optimizer = torch.optim.Adam(model.parameters())
logits = model(torch.randn(18, 3, 16, 16))
torch.nn.functional.cross_entropy(logits, torch.zeros(18, dtype=torch.long)).backward()
optimizer.step()
"""
"""What a start costs at least: imports, a model, a step."""
FILES = 10_000
"""Pictures that are prepared."""
TRIALS = 3
BARE, STEP, WHOLE, PAIR = "bare script", "ftlib to step 1", "ftlib run", "ftlib run, two workers"
TRIAL, PLAIN = "ftlib one-worker trial", "plain Tune function"
FIRST, SEVERAL = "ftlib sweep of 1 trial", f"ftlib sweep of {TRIALS} trials in turn"
QUICK = {
    "ftlib --help": ["{jobs}/phase2.py", "--help"],
    "ftlib wrong flag": ["{jobs}/phase2.py", "--model.dropuot", "0.1"],
    "ftlib wrong path": ["{jobs}/phase2.py", "--data.path", "{here}/nowhere"],
}
"""Commands that are to answer within a second of CPU."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Commands:
    """Runs commands in `scratch`, which holds few/ and few-prepared/, many/ and home/."""

    scratch: Path

    def cost(self, arguments: Sequence[str], code: int = 0, home: str = "") -> Cost:
        """Of a Python process that ends with exit code `code`, with all below it.

        `home`: the folder's FTLIB_HOME to work in; by default an empty one.
        """
        with tempfile.TemporaryDirectory(dir=self.scratch) as empty:
            out = Path(empty) / "cost.json"
            tree = ["-m", "ftlib.benchmark.process_tree", str(out), sys.executable, *arguments]
            done = subprocess.run(
                [sys.executable, *tree],
                env=self.environment(home or empty),
                capture_output=True,
                text=True,
            )
            cost = json.loads(out.read_text("utf-8")) if out.exists() else {}
        if done.returncode != code:
            raise BenchmarkError(
                f"{' '.join(arguments)} ended with {done.returncode}: {last_line(done.stderr)}"
            )
        return Cost(**cost)

    def seconds_until(self, word: str, arguments: Sequence[str]) -> float:
        """Until a Python process prints a line with `word`; it is let work to its end."""
        began, seconds = time.perf_counter(), math.nan
        with (
            tempfile.TemporaryDirectory(dir=self.scratch) as empty,
            subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment(empty),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if word in line and math.isnan(seconds):
                    seconds = time.perf_counter() - began
        return seconds

    def environment(self, home: str) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": ROOT, "FTLIB_HOME": str(self.scratch / home)}


def startup(s: BenchmarkSettings, scratch: Path, say: Say) -> Part:
    """Every command once per round."""
    scratch.mkdir(parents=True, exist_ok=True)
    photos(scratch / "few", PHOTOS)
    few = str(scratch / "few-prepared")
    prepare(scratch / "few", few, val_fraction=0.25, engine="local", progress=False)
    small_pictures(scratch / "many", FILES)
    commands = Commands(scratch)
    recipe = f"--data.path {few} --model.arch {s.arch} --augment.size {s.size}".split()
    batches = f"--train.batch-size {s.batch} --train.microbatch-size {s.batch // 2 or 1}".split()
    run = [f"{jobs_folder()}/phase1.py", *recipe, *batches, "--train.epochs", "1"]
    commands.cost([*run, "--name", "done"], home="home")
    sweep = [f"{jobs_folder()}/sweep.py", "--recipe", "phase1", "--space", "quick", *run[1:]]
    small_run = ["-m", "ftlib.benchmark.small_run"]
    arguments = {
        BARE: ["-c", ONE_STEP],
        STEP: [*small_run, "step", *run],
        WHOLE: run,
        PAIR: [*run, "--cluster.workers", "2"],
        TRIAL: [*small_run, "ftlib", str(scratch)],
        PLAIN: [*small_run, "plain", str(scratch)],
        FIRST: [*sweep, "--trials", "1", "--parallel", "1"],
        SEVERAL: [*sweep, "--trials", str(TRIALS), "--parallel", "1"],
        "ftlib prepare, 10,000 files": [
            f"{jobs_folder()}/prepare.py",
            *("--source", str(scratch / "many"), "--out", "many", "--val-fraction", "0.1"),
        ],
    }
    cases = [Case(name, partial(commands.cost, words)) for name, words in arguments.items()]
    evaluate = [f"{jobs_folder()}/evaluate.py", "done"]
    cases.append(Case("ftlib evaluate", partial(commands.cost, evaluate, home="home")))
    for name, words in QUICK.items():
        filled = [word.format(jobs=jobs_folder(), here=scratch) for word in words]
        code = 2 if "wrong" in name else 0
        cases.append(Case(name, partial(commands.cost, filled, code)))
    goals = [
        Goal(ours, BARE, of, at_most)
        for ours, at_most in ((STEP, 1.5), (WHOLE, 2.2))
        for of in ("cpu", "wall")
    ]
    part = by_turns("Start-up", "start", cases, goals=goals, rounds=s.rounds, say=say)
    starts = [commands.seconds_until("  starts  ", arguments[FIRST]) for _ in range(s.rounds)]
    first = f"the first trial of a sweep starts after {spread(starts)} s: goal <= 8 s, "
    more = [first + _met(statistics.median(starts) <= 8), *notes(part.costs)]
    return Part(part.title, part.unit, part.costs, part.ratios, more)


def small_pictures(folder: Path, count: int) -> None:
    """`count` JPEGs of 64 x 64 pixels in ten classes below `folder`."""
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        target = folder / f"class{i % 10}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((64, 64)).save(target)


def notes(costs: dict[str, list[Cost]]) -> list[str]:
    """Goals in seconds, and the processes of each command."""
    found = []
    for name in QUICK:
        seconds = statistics.median(c.cpu for c in costs[name])
        found.append(f"{name}: goal < 1 s of CPU, {_met(seconds < 1)}")
    more = [a.wall - b.wall for a, b in zip(costs[TRIAL], costs[PLAIN])]
    found.append(
        f"a trial takes {spread(more)} s more than the plain function (resnet18, {EPOCHS} epochs "
        f"of {PHOTOS} pictures, whole processes): goal <= 3 s, {_met(statistics.median(more) <= 3)}"
    )
    each = [(b.wall - a.wall) / (TRIALS - 1) for a, b in zip(costs[FIRST], costs[SEVERAL])]
    found.append(f"each further trial of the sweep takes {spread(each)} s, its training included")
    counts = {name: max(c.processes for c in each) for name, each in costs.items()}
    found.append("processes: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
    return found


def _met(reached: bool) -> str:
    return "met" if reached else "MISSED"
