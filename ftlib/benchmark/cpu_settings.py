"""What threads, precision, memory order and torch.compile make of a training step on a CPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ftlib.benchmark.measure import BenchmarkError, Case, Cost, Goal, Part, by_turns, timed
from ftlib.benchmark.training import BenchmarkSettings, Say, device, training
from ftlib.cpus import available_cpus
from ftlib.launch.timing import constant_batches, run_steps

CHOICES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "fp32, channels first": {"precision": "fp32", "channels_last": False},
    "bf16, channels first": {"precision": "bf16", "channels_last": False},
    "fp32, compiled": {"precision": "fp32", "compile": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
"""Settings of train, by name."""


def cpu_settings(s: BenchmarkSettings, say: Say) -> Part:
    """ftlib's own step with each of CHOICES, on one thread and on as many as there are CPUs.

    The cases take turns step by step; the ratios are to fp32 on the same number of threads, and of
    all threads to one. Raises BenchmarkError where a GPU would be measured.
    """
    if device().type != "cpu":
        raise BenchmarkError("--what cpu: there is a GPU. Hide it with CUDA_VISIBLE_DEVICES=''")
    before = torch.get_num_threads()
    cases, goals = [], []
    counts = sorted({1, available_cpus()})
    try:
        for threads, (name, choice) in itertools.product(counts, CHOICES.items()):
            say(f"warming up: {name}, threads: {threads}")
            case = _case(s, f"{name}, threads: {threads}", threads, choice)
            case.run()
            cases.append(case)
            first = next(iter(CHOICES))
            if name != first:
                goals.append(Goal(case.name, f"{first}, threads: {threads}", "wall"))
            elif threads > 1:
                goals.append(Goal(case.name, f"{first}, threads: 1", "wall"))
        return by_turns(
            "CPU settings",
            "step",
            cases,
            goals=goals,
            rounds=s.rounds,
            say=say,
            notes=[f"{s.arch}, {s.size} px, batches of {s.batch}, {s.steps} steps a round"],
            turns=s.steps,
        )
    finally:
        torch.set_num_threads(before)


def _case(s: BenchmarkSettings, name: str, threads: int, choice: dict[str, Any]) -> Case:
    """Its model is its own: compiled code holds for one number of threads."""
    torch.set_num_threads(threads)
    ours = training(s, **choice)
    batches = constant_batches(ours)

    def run() -> Cost:
        torch.set_num_threads(threads)
        return timed(step)

    def step() -> int:
        run_steps(ours, batches, 1)
        return 1

    return Case(name, run)
