"""A chaos soak: train the same small run with kill -9 at random moments until it gets through, and compare with an undisturbed run.

    make soak KILLS=30 SEED=0

Every life draws its number of workers (1 or 2, strictly elastic), and is killed at a random time after its start: while starting, restoring,
stepping, writing a checkpoint, scoring. The end must be bit-identical: weights, weight average, optimizer, metrics history.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "training"), str(HERE.parent)]

from test_workers import Workers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng = random.Random(asked.seed)
    changes = {
        "cluster.strict_elastic": True,
        "checkpoint.every_steps": 2,
        "train.epochs": max(2, asked.kills // 3),
    }
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        truth = Workers(Path(folder, "undisturbed"), changes=changes).finish()
        print(
            f"undisturbed: {time.monotonic() - started:.1f} s, {changes['train.epochs'] * 7} steps, state {truth['digest'][:16]}",
            flush=True,
        )
        kills, finished_early = 0, 0
        while kills < asked.kills:
            world = rng.choice((1, 2))
            workers = Workers(Path(folder, "soak"), world, changes)
            if rng.random() < 0.8:
                workers.wait_for(1)
            time.sleep(rng.expovariate(1 / 0.8))
            if not workers.processes[0].is_alive():
                finished_early += 1
                break
            workers.kill()
            kills += 1
            last = [
                line for line in workers.lines.read_text().splitlines() if line.startswith("step")
            ]
            print(
                f"kill {kills:2d} of {asked.kills}: {world} worker(s), {last[-1] if last else 'before its first step'}",
                flush=True,
            )
        result = Workers(Path(folder, "soak"), changes=changes).finish()
    same = result["digest"] == truth["digest"]
    history = [
        {
            k: v
            for k, v in row.items()
            if k.startswith(("train/loss", "train/top1", "val/loss", "val/top"))
        }
        for row in result["history"]
    ]
    expected = [
        {
            k: v
            for k, v in row.items()
            if k.startswith(("train/loss", "train/top1", "val/loss", "val/top"))
        }
        for row in truth["history"]
    ]
    print(
        json.dumps(
            {
                "kills": kills,
                "seed": asked.seed,
                "identical_state": same,
                "identical_history": history == expected,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    sys.exit(0 if same and history == expected else 1)


if __name__ == "__main__":
    main()
