"""How many trials run at once, and what each of them gets."""

from __future__ import annotations

from dataclasses import dataclass

from ftlib.config import Run
from ftlib.launch.cluster import Capacity, Node, placement

CPU_TRIALS = 4
"""Trials at once on CPUs, unless it is said otherwise: more would learn less from each other, and each would take longer."""
HEAD = {"node:__internal_head__": 0.001}
"""Where the driver of a trial with its own workers runs: on the head node, which is no spot machine, without taking a CPU from the workers."""


@dataclass(frozen=True)
class TrialResources:
    slots: int
    """Trials at once."""
    each: dict[str, float]
    """CPU and GPU of each worker."""
    local: bool
    """One worker per trial, in the trial's own process."""

    @property
    def resources(self) -> dict[str, float]:
        """What Tune reserves for a trial."""
        return dict(self.each) if self.local else dict(HEAD)


def room(run: Run, capacity: Capacity, trials: int, parallel: int = 0) -> TrialResources:
    """Room for `trials` trials of `run`; `parallel` limits how many run at once (0: as many as fit, four on CPUs).

    Raises LaunchError when not even one fits, saying what is missing.
    """
    one = placement(run.cluster, capacity)
    workers, nodes = one.high, capacity.reachable
    if capacity.unknown:
        slots = min(parallel or CPU_TRIALS, trials)
        return TrialResources(slots, _each(one.gpus, one.cpus), workers == 1)
    cpus = run.cluster.cpus_per_worker or 1
    most = _fit(nodes, one.gpus, cpus) // workers
    slots = max(1, min(most, parallel or (most if one.gpus else CPU_TRIALS), trials))
    if not run.cluster.cpus_per_worker:
        while _fit(nodes, one.gpus, cpus + 1) // workers >= slots:
            cpus += 1
    return TrialResources(slots, _each(one.gpus, cpus), workers == 1)


def _each(gpus: float, cpus: int) -> dict[str, float]:
    return {k: v for k, v in {"CPU": float(cpus), "GPU": gpus}.items() if v}


def _fit(nodes: tuple[Node, ...], gpus: float, cpus: int) -> int:
    return sum(
        int(min(n.cpus // cpus, (n.gpus + 1e-9) // gpus if gpus else n.cpus // cpus)) for n in nodes
    )
