"""A prepared set of tiny pictures and a run on it that takes a second, here or as a job."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import pytest

from ftlib.config import SGD, Augment, Cosine, Data, Model, Run, Track, Train


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Path of a prepared set of 16 px pictures whose left or right half is bright.

    Two classes with 24 training and 8 validation pictures each.
    """
    from ftlib.preparation.prepare import prepare

    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for side in ("left", "right"):
            folder = root / "shapes" / split / side
            folder.mkdir(parents=True)
            for i in range(count):
                image = draw.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                half = slice(0, 8) if side == "left" else slice(8, 16)
                image[:, half] += 150
                cv2.imwrite(str(folder / f"{i:02d}.jpg"), image)
    out = root / "prepared"
    prepare(str(root / "shapes"), str(out), engine="local", progress=False)
    return str(out)


@pytest.fixture(scope="session")
def shapes_with_test(shapes, tmp_path_factory):
    """`shapes` with a `test` split: its validation pictures, a third of them with wrong labels."""
    from ftlib.data.shards import Dataset
    from ftlib.preparation.prepare import prepare

    root = tmp_path_factory.mktemp("with-test")
    known = Dataset.open(shapes)
    for split, source in (("train", "train"), ("val", "val"), ("test", "val")):
        part = known.split(source)
        for row, label in enumerate(part.labels):
            wrong = split == "test" and row % 3 == 0
            folder = root / "pictures" / split / known.classes[1 - label if wrong else label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{row}.jpg").write_bytes(part.image(row))
    prepare(root / "pictures", str(root / "set"), engine="local", progress=False)
    return str(root / "set")


@pytest.fixture
def tiny(shapes, home):
    """A small network for three epochs of two steps; a second in all."""
    return Run(
        stage="phase1",
        data=Data(path=shapes, loader_workers=0),
        augment=Augment(size=16, crop_scale=(0.9, 1.0), flip=0.0),
        model=Model(arch="shufflenet_v2_x0_5"),
        optimizer=SGD(lr=0.05),
        schedule=Cosine(min_lr=0.0),
        train=Train(epochs=3, batch_size=32, microbatch_size=16, log_every=1),
        track=Track(system_metrics=False, log_model=False),
    )


@pytest.fixture
def free_port():
    """Gives TCP ports that nothing listens on."""

    def give():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return give


SETTINGS = [
    "--model.arch",
    "shufflenet_v2_x0_5",
    "--augment.size",
    "16",
    "--augment.crop-scale",
    "0.9",
    "1",
    "--data.subset",
    "1",
    "--data.loader-workers",
    "0",
    "--optimizer",
    "sgd",
    "--train.batch-size",
    "32",
    "--train.microbatch-size",
    "16",
    "--gates.val-top1",
    "1",
    "--track.no-system-metrics",
    "--track.no-log-model",
    "--train.log-every",
    "1",
]


class Jobs:
    """jobs/*.py on the tiny pictures, as processes in an environment of their own."""

    root = Path(__file__).parents[2]
    ray = str(Path(sys.executable).with_name("ray"))
    token = "0123456789abcdef0123456789abcdef"
    settings = SETTINGS

    def __init__(self, shapes, home):
        self.shapes, self.home = shapes, home

    def environment(self, **more):
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PYTEST_"))
        }
        return {**kept, "FTLIB_HOME": str(self.home), "OMP_NUM_THREADS": "1", **more}

    @contextlib.contextmanager
    def started(self, *flags, job="phase1", cwd="/", env=None, start_new_session=False):
        """The job as a process whose `log()` is what it has printed; killed at the end."""
        log = self.home / f"log-{time.monotonic_ns()}"
        with open(log, "w") as out:
            process = subprocess.Popen(
                [
                    sys.executable,
                    str(self.root / "jobs" / f"{job}.py"),
                    "--data.path",
                    self.shapes,
                    *SETTINGS,
                    *flags,
                ],
                cwd=cwd,
                env=env or self.environment(),
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=start_new_session,
            )
            process.log = log.read_text
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def until(self, condition, process, seconds=240):
        """What `condition()` returns once that is true, while the process lives."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert process.poll() is None, process.log()
            assert time.monotonic() < deadline, process.log()
            time.sleep(0.1)
        return found


@pytest.fixture
def jobs(shapes, home):
    return Jobs(shapes, home)


class Family:
    """The processes of a Ray cluster: only they have its folder in their command lines."""

    def __init__(self, folder):
        self.folder = str(folder)

    def processes(self):
        return [
            p
            for p in psutil.process_iter(["cmdline"])
            if any(self.folder in word for word in p.info["cmdline"] or [])
        ]

    def end(self):
        family = self.processes()
        for parent in list(family):
            with contextlib.suppress(psutil.Error):
                family += parent.children(recursive=True)
        for p in family:
            with contextlib.suppress(psutil.Error):
                p.kill()


@pytest.fixture
def family():
    return Family
