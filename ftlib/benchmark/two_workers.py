"""What each of torchrun's workers (two in the benchmark) does: DistributedDataParallel and ftlib's
loop by turns, in the same process group.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m ftlib.benchmark.two_workers
OUT.json SETTINGS_AS_JSON
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ftlib.benchmark.training import BenchmarkSettings, describe, device, loops, training


def main(out: str, settings: BenchmarkSettings) -> None:
    workers = int(os.environ["WORLD_SIZE"])
    backend = "nccl" if torch.cuda.device_count() >= workers else "gloo"
    if backend == "nccl":  # else each of them talks over the first GPU
        torch.cuda.set_device(device())
    dist.init_process_group(backend, device_id=device() if backend == "nccl" else None)
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    ours = training(settings, rank=rank, world=world)
    run_ours, run_plain = loops(
        settings, ours, lambda model: DistributedDataParallel(model, gradient_as_bucket_view=True)
    )
    cases: dict[str, Callable[[int], int]] = {
        "ftlib, two workers": run_ours,
        "torchrun DDP, two workers": run_plain,
    }
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for run in cases.values():
        run(2)
    for n in range(settings.rounds):
        for name in cases if n % 2 == 0 else reversed(cases):
            dist.barrier()
            cpu, began = time.process_time(), time.perf_counter()
            cases[name](settings.steps)
            dist.barrier()
            taken = time.process_time() - cpu, time.perf_counter() - began
            costs[name].append((taken[0] / settings.steps, taken[1] / settings.steps))
    if rank == 0:
        Path(out).write_text(
            json.dumps(
                {"costs": costs, "work": describe(settings, ours.dtype), "backend": backend}
            ),
            "utf-8",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], BenchmarkSettings(**json.loads(sys.argv[2])))
