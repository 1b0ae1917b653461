"""A prepared set of tiny pictures, and a run on it that takes a second."""

import socket

import cv2
import numpy as np
import pytest

from ftlib.config import SGD, Augment, Cosine, Data, Model, Run, Track, Train


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Path of a prepared set: 2 classes, bright left or bright right half, 24 training and 8 validation pictures each, 16 px."""
    from ftlib.data.prepare import prepare

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
    prepare(str(root / "shapes"), str(out), engine="here", progress=False)
    return str(out)


@pytest.fixture
def tiny(shapes, home):
    """A small network for three epochs of two steps; a second in all."""
    return Run(
        stage="phase1", data=Data(path=shapes, loader_workers=0), augment=Augment(size=16, crop_scale=(0.9, 1.0), flip=0.0), model=Model(arch="shufflenet_v2_x0_5"),
        optimizer=SGD(lr=0.05), schedule=Cosine(min_lr=0.0), train=Train(epochs=3, batch_size=32, microbatch_size=16, log_every=1), track=Track(system_metrics=False, log_model=False))


@pytest.fixture
def free_port():
    """Gives TCP ports that nothing listens on."""
    def give():
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            return s.getsockname()[1]

    return give
