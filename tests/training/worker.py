"""One worker of a test's run, as a process of its own.

Its lines go to a file: each step, and at the end the hash of the final state.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

BASE = {
    "model.arch": "mobilenet_v3_small",
    "model.dropout": 0.1,
    "augment.size": 32,
    "augment.randaugment_n": 2,
    "augment.randaugment_m": 9,
    "mix.mixup_alpha": 0.2,
    "mix.cutmix_alpha": 1.0,
    "train.batch_size": 16,
    "train.microbatch_size": 4,
    "train.epochs": 2,
    "train.ema_decay": 0.9,
    "optimizer.lr": 3e-3,
    "train.log_every": 1,
    "checkpoint.every_seconds": 0,
    "evaluate.batch_size": 16,
    "train.precision": "fp32",
    "data.loader_workers": 0,
}
"""A run of 2 epochs of 7 steps (100 images, the last step of 4), small enough for seconds."""


def digest(state):
    """sha256 over every tensor and number of a training state, clocks left out."""
    sha = hashlib.sha256()

    def add(value):
        import torch

        if isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for k in sorted(value, key=str):
                if k not in (
                    "train/images_per_s",
                    "train/epoch_s",
                    "time_ms",
                    "val/seconds",
                    "points",
                ):
                    sha.update(str(k).encode())
                    add(value[k])
        elif isinstance(value, list | tuple):
            for v in value:
                add(v)
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()


def final(run_dir):
    from ftlib.training import checkpoint

    return checkpoint.latest(f"{run_dir}/checkpoints")[1]


def main(spec):
    """Run one worker as `spec` says; started by multiprocessing, killed by tests."""
    import torch
    import torch.distributed as dist
    from conftest import MemoryDataset

    from ftlib.config import Run
    from ftlib.settings import override
    from ftlib.training.loop import InterruptedTrainingError, WorkerContext, train

    if spec.get("faults"):
        import faults

        faults.install(spec["faults"])
    torch.set_num_threads(1)
    device = torch.device(spec.get("device", "cpu"))
    if device.type == "cuda":  # the order of sums on a GPU is settled by these alone
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
    rank, world = spec.get("rank", 0), spec.get("world", 1)
    with open(spec["lines"], "a", buffering=1) as lines:
        if world > 1:
            dist.init_process_group(
                "gloo", init_method=f"file://{spec['rendezvous']}", rank=rank, world_size=world
            )
        job = WorkerContext(
            override(Run(), {**BASE, **spec.get("changes", {})}),
            MemoryDataset(100, 37),
            spec["dir"],
            device,
            rank=rank,
            world=world,
            progress=lambda values: print("step", int(values["step"]), file=lines),
        )
        try:
            out = train(job)
        except InterruptedTrainingError:
            print("interrupted", file=lines)
            return
        if rank == 0:
            print(
                "RESULT",
                json.dumps(
                    {
                        "digest": digest(final(spec["dir"])),
                        "history": out["history"],
                        "metrics": out["metrics"],
                    }
                ),
                file=lines,
            )
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
