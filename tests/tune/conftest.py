"""Finished runs made by hand, and sweeps with fake training in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ftlib.config import Data, Model, Run, Train
from ftlib.settings import override, to_dict

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def finished(tmp_path):
    """finished(name, correct, seed=.., changes=..) makes a run's folder and returns its path.

    `correct`: bool per validation image.
    """
    labels = np.arange(2000) % 10

    def make(
        name,
        correct,
        seed=42,
        changes=None,
        digest="d" * 64,
        init=None,
        status="completed",
        rows=None,
    ):
        run = override(
            Run(name=name, seed=seed, data=Data(path="x"), model=Model(), train=Train(epochs=3)),
            changes or {},
        )
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(
            json.dumps(
                {
                    "run": to_dict(run),
                    "fingerprint": "f",
                    "data": {"name": "set", "digest": digest, "path": "x"},
                    "init": init,
                    "mlflow": None,
                }
            )
        )
        history = [
            {
                "epoch": float(e),
                "val/top1": 50.0 + e,
                "train/top1": 55.0 + e,
                "val/loss": 2.0 - e / 10,
            }
            for e in (1, 2, 3)
        ]
        (folder / "result.json").write_text(
            json.dumps(
                {
                    "status": status,
                    "metrics": {"best/val_top1": 100 * float(np.mean(correct))},
                    "history": history,
                }
            )
        )
        rows = np.arange(len(correct)) if rows is None else rows
        # Readers must not depend on the order of the rows.
        order = np.random.default_rng(0).permutation(len(correct))
        np.savez_compressed(
            folder / "predictions.npz",
            rows=rows[order],
            labels=labels[: len(correct)][order],
            correct=np.asarray(correct)[order],
            split="val",
        )
        return str(folder)

    return make


class Driver:
    """Sweeps with fake training and real Ray Tune, each in a process that can be killed."""

    def __init__(self, home: Path, scratch: Path):
        self.home, self.scratch = home, scratch
        self.count = 0

    def start(self, **plan) -> subprocess.Popen:
        self.count += 1
        environment = {
            **os.environ,
            "FTLIB_HOME": str(self.home),
            "FAKE_PLAN": json.dumps(plan),
            "FAKE_LOG": str(self.scratch / "log.txt"),
            "OMP_NUM_THREADS": "1",
            "RAY_LOG_TO_DRIVER": "0",
        }
        with open(self.scratch / f"out{self.count}.txt", "w") as out:
            return subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fake_sweep.py"))],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return (self.scratch / f"out{self.count}.txt").read_text()

    def log(self) -> list[list[str]]:
        """What trials did, in order: [event, number, epoch, pid]."""
        path = self.scratch / "log.txt"
        return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def driver(home, tmp_path):
    return Driver(home, tmp_path)
