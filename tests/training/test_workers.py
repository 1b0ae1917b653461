"""Several worker processes under gloo: one curve for every number of workers, and kills that
leave no trace.

Modules: data_parallel.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import worker

from ftlib.training import checkpoint

# Workers are forked from a server that has imported torch once: seconds saved at each of many
# starts.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    ["worker", "conftest", "ftlib.training.loop", "sklearn.datasets", "pandas", "torch._dynamo"]
)


class Workers:
    """`world` worker processes of one run in `run_dir`."""

    def __init__(self, run_dir, world=1, changes=None, faults="", device="cpu"):
        run_dir.mkdir(parents=True, exist_ok=True)
        stamp = time.monotonic_ns()
        self.lines = run_dir / f"lines-{stamp}"
        self.lines.touch()
        spec = {
            "dir": str(run_dir),
            "world": world,
            "changes": changes or {},
            "faults": str(faults),
            "device": device,
            "rendezvous": str(run_dir / f"rendezvous-{stamp}"),
        }
        self.processes = [
            FORK.Process(
                target=worker.main,
                args=({**spec, "rank": r, "lines": str(self.lines) if r == 0 else os.devnull},),
            )
            for r in range(world)
        ]
        for p in self.processes:
            p.start()

    def wait_for(self, step):
        """Until rank 0 has shown `step`, or is over."""
        while self.processes[0].is_alive():
            if any(
                line.startswith("step ") and int(line.split()[1]) >= step
                for line in self.lines.read_text().splitlines()
            ):
                return
            time.sleep(0.01)

    def kill(self, *ranks):
        for r in ranks or range(len(self.processes)):
            if self.processes[r].is_alive():
                os.kill(self.processes[r].pid, signal.SIGKILL)
        for r in ranks or range(len(self.processes)):
            self.processes[r].join(60)

    def finish(self):
        for p in self.processes:
            p.join(900)
            assert p.exitcode == 0
        line = next(
            line for line in self.lines.read_text().splitlines() if line.startswith("RESULT ")
        )
        return json.loads(line[7:])


def numbers(result):
    return [
        [row[k] for k in ("train/loss", "train/top1", "val/loss", "val/top1")]
        for row in result["history"]
    ]


STRICT = {"cluster.strict_elastic": True}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return Workers(tmp_path_factory.mktemp("alone")).finish()


def test_two_workers_walk_the_curve_of_one(alone, tmp_path):
    """Plain all-reduce: rounding differs, the losses hardly. 7 steps an epoch, the last one with
    a single microbatch: a worker without work."""
    two = Workers(tmp_path, world=2).finish()
    for one_row, two_row in zip(numbers(alone), numbers(two)):
        assert one_row[0] == pytest.approx(two_row[0], rel=2e-2)
    assert [row["epoch"] for row in two["history"]] == [1, 2]


def test_strict_mode_is_bit_identical_for_one_two_and_four_workers_and_changes_between(
    alone, tmp_path
):
    two = Workers(tmp_path / "two", world=2, changes=STRICT).finish()
    assert numbers(two) == numbers(alone) and two["digest"] == alone["digest"]
    # 2 workers, killed inside epoch 1; then 4, killed inside epoch 2; then 1 to the end.
    often = {**STRICT, "checkpoint.every_steps": 1}
    for world, step in ((2, 4), (4, 9)):
        workers = Workers(tmp_path / "changing", world, often)
        workers.wait_for(step)
        workers.kill()
    assert Workers(tmp_path / "changing", changes=often).finish()["digest"] == alone["digest"]


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_kill_9_at_random_moments_leaves_no_trace(alone, tmp_path, seed):
    """Killed by the clock, wherever it happens to be (also while a checkpoint is being written),
    until it gets through."""
    rng = random.Random(seed)
    often = {"checkpoint.every_steps": 2}
    for _ in range(3):
        workers = Workers(tmp_path, changes=often)
        workers.wait_for(1)
        time.sleep(rng.uniform(0, 0.6))
        workers.kill()
    assert Workers(tmp_path, changes=often).finish()["digest"] == alone["digest"]
    assert checkpoint.steps(str(tmp_path / "checkpoints"))[0] == 14


def test_a_worker_that_dies_takes_the_other_down_and_both_resume(alone, tmp_path):
    """One of two strict workers is killed: the other fails at its next sum instead of hanging;
    restarted, they end as if nothing happened."""
    often = {**STRICT, "checkpoint.every_steps": 1}
    workers = Workers(tmp_path, 2, often)
    workers.wait_for(5)
    workers.kill(1)
    workers.processes[0].join(120)
    assert workers.processes[0].exitcode not in (0, None)
    assert Workers(tmp_path, 2, often).finish()["digest"] == alone["digest"]


TIMM = {
    "model.arch": "timm/tf_efficientnet_lite0",
    "model.drop_path": 0.2,
    "model.freeze_epochs": 1,
    "optimizer.layer_decay": 0.75,
}
"""Fine-tuning's model and rates per depth; the gradients of epoch 2 are of other parameters."""


@pytest.mark.slow
def test_a_model_of_timm_is_bit_identical_for_one_two_and_four_workers(tmp_path):
    alone = Workers(tmp_path / "alone", changes=TIMM).finish()
    plain = Workers(tmp_path / "plain", world=2, changes=TIMM).finish()
    for one_row, two_row in zip(numbers(alone), numbers(plain)):
        assert one_row[0] == pytest.approx(two_row[0], rel=2e-2)
    strict = {**TIMM, **STRICT, "checkpoint.every_steps": 1}
    two = Workers(tmp_path / "two", world=2, changes=strict).finish()
    assert numbers(two) == numbers(alone) and two["digest"] == alone["digest"]
    # 4 workers, killed inside epoch 1; then 2, killed inside epoch 2; then 4 to the end.
    for world, step in ((4, 4), (2, 9)):
        workers = Workers(tmp_path / "changing", world, strict)
        workers.wait_for(step)
        workers.kill()
    assert Workers(tmp_path / "changing", 4, strict).finish()["digest"] == alone["digest"]
