"""Measuring by turns: every case once per round, and ratios within a round.

A shared machine runs at another speed every few seconds. What is compared is therefore measured
right after each other, over several rounds, in the CPU time of all processes that take part as well
as in wall time; the ratio of a round is what counts, and its spread over the rounds says how far it
can be trusted.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import psutil

from ftlib.cpus import available_cpus

QUIET_SECONDS = 0.2
"""Loader processes that used no CPU for this long, twice, have nothing left to do."""
QUIET_CPU = 0.015
"""Seconds of CPU within `QUIET_SECONDS` that count as none; the kernel counts in hundredths."""

Quantity = Literal["cpu", "wall"]


class BenchmarkError(ValueError):
    """A benchmark that cannot be run as it was asked for; the message says what to do."""


def last_line(output: str) -> str:
    """Where a failed process says why."""
    return (output.strip().splitlines() or ["no message"])[-1]


def spread(values: Sequence[float]) -> str:
    """Median, smallest and largest, in words."""
    return f"{statistics.median(values):.2f} [{min(values):.2f}..{max(values):.2f}]"


@dataclass(frozen=True)
class Cost:
    """What one unit (an image, a step, a start) took."""

    cpu: float
    """Seconds of CPU, user and system, of this process and all below it."""
    wall: float
    """Seconds."""
    processes: int = 1
    """Processes that took part."""


@dataclass(frozen=True)
class Case:
    """One way of doing the work."""

    name: str
    run: Callable[[], Cost]


@dataclass(frozen=True)
class Goal:
    """Two cases to compare, and what their ratio should reach."""

    ours: str
    peer: str
    of: Quantity
    at_most: float | None = None
    """Largest ratio ours / peer; None compares without a goal."""


@dataclass(frozen=True)
class Ratio:
    """ours / peer, round by round."""

    ours: str
    peer: str
    of: Quantity
    rounds: tuple[float, ...]
    goal: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def met(self) -> bool | None:
        """None where there is no goal."""
        return None if self.goal is None else self.median <= self.goal


@dataclass(frozen=True)
class Part:
    """One table of a report."""

    title: str
    unit: str
    """What a cost is per: image, step, start."""
    costs: dict[str, list[Cost]]
    ratios: list[Ratio]
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    """Way -> validation top-1 in percent by epoch, of each seed."""

    def to_dict(self) -> dict[str, Any]:
        cases = [
            {
                "name": name,
                "cpu_ms": [round(1000 * c.cpu, 4) for c in costs],
                "wall_ms": [round(1000 * c.wall, 4) for c in costs],
            }
            for name, costs in self.costs.items()
        ]
        ratios = [
            {
                **asdict(r),
                "median": r.median,
                "low": min(r.rounds),
                "high": max(r.rounds),
                "met": r.met,
            }
            for r in self.ratios
        ]
        return {
            "title": self.title,
            "unit": self.unit,
            "cases": cases,
            "ratios": ratios,
            "notes": self.notes,
            "curves": self.curves,
        }


def by_turns(
    title: str,
    unit: str,
    cases: Sequence[Case],
    *,
    goals: Sequence[Goal],
    rounds: int,
    say: Callable[[str], None],
    notes: Sequence[str] = (),
    turns: int = 1,
) -> Part:
    """Run every case `turns` times per round, alternating the order, and form the ratios.

    A round counts with the medians of its turns. Goals whose cases are missing are left out.

    Args:
        goals: the ratios to form.
        say: is told each cost as it is measured.
        notes: lines below the table.
    """
    costs: dict[str, list[Cost]] = {case.name: [] for case in cases}
    for n in range(rounds):
        taken: dict[str, list[Cost]] = {case.name: [] for case in cases}
        for turn in range(n * turns, (n + 1) * turns):
            for case in cases if turn % 2 == 0 else reversed(cases):
                each = taken[case.name]
                each.append(case.run())
                if len(each) < turns:
                    continue
                cost = Cost(
                    statistics.median(c.cpu for c in each),
                    statistics.median(c.wall for c in each),
                    max(c.processes for c in each),
                )
                costs[case.name].append(cost)
                say(
                    f"{title}, round {n + 1}/{rounds}: {case.name}  {1000 * cost.cpu:.3g} ms CPU, "
                    f"{1000 * cost.wall:.3g} ms per {unit}"
                )
    return Part(title, unit, costs, ratios(costs, goals), list(notes))


def ratios(costs: dict[str, list[Cost]], goals: Sequence[Goal]) -> list[Ratio]:
    """The ratio of each goal in each round, where both of its cases were measured."""
    return [
        Ratio(
            g.ours,
            g.peer,
            g.of,
            tuple(
                getattr(a, g.of) / max(getattr(b, g.of), 1e-12)
                for a, b in zip(costs[g.ours], costs[g.peer])
            ),
            g.at_most,
        )
        for g in goals
        if costs.get(g.ours) and costs.get(g.peer)
    ]


# --- CPU time of several processes ---


class ProcessTree:
    """This process and all that are below it now. Processes that start later count once they
    have ended and were waited for."""

    def __init__(self) -> None:
        me = psutil.Process()
        self.processes = [me, *me.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds of user and system time since each of them began, those of children that ended
        included."""
        total = 0.0
        for process in self.processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own = (
                time.process_time() if process.pid == os.getpid() else times.user + times.system
            )  # the system counts others' in hundredths of a second
            total += own + times.children_user + times.children_system
        return total

    def settle(self, patience: float = 20.0) -> None:
        """Wait until nothing works any more: the loaders' queues are full."""
        end, quiet, before = time.monotonic() + patience, 0, self.cpu()
        while quiet < 2 and time.monotonic() < end:
            time.sleep(QUIET_SECONDS)
            now = self.cpu()
            quiet = quiet + 1 if now - before <= QUIET_CPU else 0
            before = now


def stream_cost(
    opened: Callable[[], AbstractContextManager[Iterator[int]]], images: int, ahead: int
) -> Cost:
    """Cost per image of a loader that yields its batches' sizes without end and works `ahead`
    images ahead.

    Its queue is full at the start and at the end of what is counted as CPU time, so all the work
        counted made all the images counted. The
    first `ahead` images are there already: the wall time until the `images` after them have come is
        what making `images` took.
    """
    with opened() as batches:
        next(batches)
        tree = ProcessTree()
        tree.settle()
        cpu, began = tree.cpu(), time.perf_counter()
        ready = 0
        while ready < ahead:
            ready += next(batches)
        made = 0
        while made < images:
            made += next(batches)
        wall = time.perf_counter() - began
        tree.settle()
        return Cost((tree.cpu() - cpu) / (ready + made), wall / made)


def timed(work: Callable[[], int]) -> Cost:
    """Cost per unit of `work`, which returns how many units it did, in this process."""
    cpu, began = time.process_time(), time.perf_counter()
    units = work()
    return Cost((time.process_time() - cpu) / units, (time.perf_counter() - began) / units)


# --- the machine ---


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    flags = _cpuinfo("flags").split()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": available_cpus(),
        "vector": next(
            (
                name
                for flag, name in (
                    ("amx_tile", "AVX-512 and AMX"),
                    ("avx512f", "AVX-512"),
                    ("avx2", "AVX2"),
                )
                if flag in flags
            ),
            "",
        ),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {
            name: found
            for name in (
                "torch",
                "torchvision",
                "albumentations",
                "opencv-python-headless",
                "pillow",
                "simplejpeg",
                "timm",
                "ffcv",
                "nvidia-dali-cuda120",
            )
            if (found := _version(name))
        },
    }


def sentence(about: dict[str, Any]) -> str:
    """The machine in words."""
    gpu = ", ".join(about["gpus"]) or "no GPU"
    vector = f" with {about['vector']}" if about["vector"] else ""
    return (
        f"{about['cores']} cores ({about['cpu']}{vector}), {about['memory_gb']:g} GB, {gpu}; "
        f"load {about['load']:g} at the start"
    )


def _cpuinfo(field_: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                (line.partition(":")[2].strip() for line in file if line.startswith(field_)), ""
            )
    except OSError:
        return ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
