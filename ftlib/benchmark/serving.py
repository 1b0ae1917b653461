"""What serving costs over the packaged model alone, and what hostile clients cost the others.

Server and clients run in processes of their own on this machine; the server's CPU time is that of
its whole process tree, and clients' time is not in it. Hostile clients send TIFFs of 40,000
pages, PNGs of 49 megapixels and truncated JPEGs as fast as they are answered, a byte a second, or
nothing at all over 400 open connections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from ftlib.benchmark.http_load import photo
from ftlib.benchmark.measure import BenchmarkError, Cost, Part, Ratio, timed

SECONDS = 6.0
"""Length of each load."""
PHOTOS = 96
"""Pictures that the packaged model classifies alone."""
MANY, FEW = 32, 8
"""Clients for the cost of serving, and beside hostile ones."""
HOSTILE = {"pages": 2, "large": 4, "truncated": 2, "slow": 8, "idle": 400}
SECONDS_TO_START = 120.0

ALONE = "packaged model alone"
BUSY = f"server, {MANY} clients"
QUIET = f"server, {FEW} clients"
ATTACKS = {
    **{f"{FEW} clients beside {kind}": {kind: count} for kind, count in HOSTILE.items()},
    f"{FEW} clients beside all of these": HOSTILE,
}
"""Loads of as many good clients beside each kind of hostile ones, and beside all."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Load:
    """What the good clients of one load have seen."""

    cost: Cost
    """Per answered request: CPU seconds of the server tree, and seconds of the clock."""
    median: float
    p99: float
    """Seconds from sending a picture to the answer's end."""
    statuses: dict[str, dict[str, int]]
    """Answers by kind of client and status."""


class ServedModel:
    """A server process and its tree."""

    def __init__(self, process: psutil.Process, port: int, ready_seconds: float) -> None:
        self.process, self.port, self.ready_seconds = process, port, ready_seconds

    def tree(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds, those of children that have ended included."""
        times = self.process.cpu_times()
        living = sum(sum(p.cpu_times()[:2]) for p in self.tree())
        return living + times.children_user + times.children_system

    def memory(self) -> float:
        """Megabytes."""
        return sum(p.memory_info().rss for p in self.tree()) / 1e6

    def load(self, seconds: float = SECONDS, **clients: int) -> Load:
        """Let these clients work for so long. Raises BenchmarkError where nothing is answered."""
        command = [sys.executable, "-m", "ftlib.benchmark.http_load", str(self.port), str(seconds)]
        before = self.cpu()
        done = subprocess.run(
            command, input=json.dumps(clients), capture_output=True, text=True, check=True
        )
        cpu = self.cpu() - before
        found = json.loads(done.stdout)
        taken = sorted(found["good"]["seconds"])
        if not taken or set(found["good"]["statuses"]) != {"200"}:
            raise BenchmarkError(f"good clients were answered {found['good']['statuses']}")
        return Load(
            Cost(cpu / len(taken), seconds / len(taken)),
            taken[len(taken) // 2],
            taken[int(len(taken) * 0.99)],
            {kind: seen["statuses"] for kind, seen in found.items()},
        )


@contextmanager
def served(package: Path, log: Path) -> Iterator[ServedModel]:
    """A server of the package; it ends with the block."""
    started = time.perf_counter()
    with log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "ftlib.deploy.http_server", str(package), "0"],
            stderr=errors,
            stdout=subprocess.DEVNULL,
        )
    try:
        while "serving at http" not in (said := log.read_text()):
            if child.poll() is not None or time.perf_counter() - started > SECONDS_TO_START:
                raise BenchmarkError(f"the server did not start: {said.strip()[-500:]}")
            time.sleep(0.05)
        port = int(said.partition("serving at http://127.0.0.1:")[2].split()[0])
        ready = time.perf_counter() - started
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/about") as about:
            about.read()  # it waits for what is loaded after the start
        yield ServedModel(psutil.Process(child.pid), port, ready)
    finally:
        child.terminate()
        child.wait(30)


def make_package(folder: Path, arch: str, size: int, classes: int = 10) -> Path:
    """A package of a model that was never trained."""
    from ftlib.config import Augment, Model, Run
    from ftlib.packaging.package import package
    from ftlib.training import models

    run = Run(name="served", model=Model(arch=arch), augment=Augment(size=size))
    names = [f"class {i}" for i in range(classes)]
    return package(
        models.build(run.model, classes).eval(),
        run,
        classes=names,
        scores={},
        temperature=1.0,
        out=folder / "model",
    )


def benchmark(scratch: Path, *, arch: str, size: int, rounds: int, say: Say) -> Part:
    """Every load once per round, and the ratios that have goals."""
    import torch

    from ftlib.packaging.package import load

    scratch.mkdir(parents=True, exist_ok=True)
    package = make_package(scratch, arch, size)
    alone = load(str(package))
    pictures = [photo(i) for i in range(PHOTOS)]
    costs: dict[str, list[Cost]] = {ALONE: [], BUSY: [], QUIET: []}
    busy: list[Load] = []
    pairs: dict[str, list[tuple[Load, Load]]] = {name: [] for name in ATTACKS}
    threads = torch.get_num_threads()
    with served(package, scratch / "server.log") as server:
        server.load(2, good=MANY)  # a warm-up
        first_memory = server.memory()
        for n in range(rounds):
            torch.set_num_threads(1)
            costs[ALONE].append(timed(lambda: len(alone.predict(pictures))))
            torch.set_num_threads(threads)
            busy.append(server.load(good=MANY))
            costs[BUSY].append(busy[-1].cost)
            for name, hostile in ATTACKS.items():
                quiet, beside = server.load(good=FEW), server.load(good=FEW, **hostile)
                pairs[name].append((quiet, beside))
                costs[QUIET].append(quiet.cost)
                costs.setdefault(name, []).append(beside.cost)
                say(f"serving, round {n + 1}/{rounds}: {name}")
        notes = [
            f"ready after {server.ready_seconds:.1f} s, of which importing torch takes "
            f"{importing_torch():.1f} s",
            f"memory {first_memory:,.0f} MB after the warm-up, {server.memory():,.0f} MB at the "
            "end",
            f"answers {name}: {json.dumps(pairs[name][-1][1].statuses)}",
            f"{BUSY}: median {1e3 * busy[-1].median:.0f} ms, p99 {1e3 * busy[-1].p99:.0f} ms",
        ]
    return Part(f"Serving {arch} at {size} px", "picture", costs, ratios(costs, busy, pairs), notes)


def ratios(
    costs: dict[str, list[Cost]],
    busy: Sequence[Load],
    pairs: Mapping[str, Sequence[tuple[Load, Load]]],
) -> list[Ratio]:
    """What has a goal: CPU over the model alone, the tail, and both beside hostile clients, over
    the quiet load just before."""
    cpu = tuple(load.cost.cpu / alone.cpu for load, alone in zip(busy, costs[ALONE]))
    tail = tuple(load.p99 / load.median for load in busy)
    found = [
        Ratio(BUSY, ALONE, "cpu", cpu, 1.6),
        Ratio(f"p99 of {MANY} clients", "their median", "wall", tail, 2.0),
    ]
    for name, loads in pairs.items():
        wall = tuple(beside.cost.wall / quiet.cost.wall for quiet, beside in loads)
        p99 = tuple(beside.p99 / quiet.p99 for quiet, beside in loads)
        found.append(Ratio(name, QUIET, "wall", wall, 1.25))
        found.append(Ratio(f"p99 {name}", "p99 without", "wall", p99, 3.0))
    return found


def importing_torch() -> float:
    """Seconds of a process that imports torch and ends."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env=dict(os.environ))
    return time.perf_counter() - started
