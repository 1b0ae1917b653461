"""How many trials run at once, and what resources each of them gets."""

from __future__ import annotations

from dataclasses import dataclass

from ftlib.config import Run
from ftlib.launch.cluster import Capacity, placement, workers_that_fit

CPU_TRIALS = 4
"""Default number of parallel trials on CPUs. More of them weaken TPE, which learns from trials that
have ended, and each takes longer."""
HEAD = {"node:__internal_head__": 0.001}
"""Reserved for a trial whose workers have processes of their own: a place on the head node, which
is no spot instance, without taking a CPU from the workers."""


@dataclass(frozen=True)
class TrialResources:
    """The share of the cluster that each trial gets."""

    slots: int
    """Trials at once."""
    each: dict[str, float]
    """CPU and GPU of each worker."""
    local: bool
    """One worker per trial, in the trial's own process."""

    @property
    def reserved(self) -> dict[str, float]:
        """What Tune reserves for a trial."""
        return dict(self.each) if self.local else dict(HEAD)

    def __str__(self) -> str:
        """Such as `2 at once with 4 CPUs and 1 GPU`."""
        each = " and ".join(f"{v:g} {k}{'s' if v != 1 else ''}" for k, v in self.each.items())
        per_worker = "" if self.local else " per worker"
        return f"{self.slots} at once with {each}{per_worker}"


NOTHING_TO_RUN = TrialResources(1, {}, True)


def allocate(run: Run, capacity: Capacity, trials: int, parallel: int = 0) -> TrialResources:
    """Share `capacity` out among `trials` trials of `run`.

    parallel: limit of trials at once; 0 means as many as fit on GPUs, four on CPUs.
    Raises LaunchError when not even one trial fits, saying what is missing.
    """
    one = placement(run.cluster, capacity)
    workers, nodes = one.high, capacity.reachable
    if capacity.unknown:
        slots = min(parallel or CPU_TRIALS, trials)
        return TrialResources(slots, _each(one.gpus, one.cpus), workers == 1)
    cpus = run.cluster.cpus_per_worker or 1
    most = workers_that_fit(nodes, one.gpus, cpus) // workers
    default = most if one.gpus else CPU_TRIALS
    slots = max(1, min(most, parallel or default, trials))
    if not run.cluster.cpus_per_worker:
        while workers_that_fit(nodes, one.gpus, cpus + 1) // workers >= slots:
            cpus += 1
    return TrialResources(slots, _each(one.gpus, cpus), workers == 1)


def _each(gpus: float, cpus: int) -> dict[str, float]:
    return {k: v for k, v in {"CPU": float(cpus), "GPU": gpus}.items() if v}
