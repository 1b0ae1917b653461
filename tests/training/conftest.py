"""A prepared set in memory, for tests of the loop."""

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits


class MemorySplit:
    def __init__(self, images, labels):
        self.images, self.labels = images, np.asarray(labels, np.int64)

    def __len__(self):
        return len(self.labels)

    def labels_of(self, rows):
        return self.labels[rows]

    def image(self, row):
        return self.images[row]

    def path(self, row):
        return f"picture-{row}.jpg"


class MemoryDataset:
    """The part of ftlib.data.shards.Dataset that training uses, over scikit-learn's digits as
    JPEGs."""

    name, digest, rules = "digits", "0" * 64, None

    def __init__(self, train, val, classes=10, side=16):
        x, y = load_digits(return_X_y=True)
        keep = np.flatnonzero(y < classes)
        jpegs = [
            cv2.imencode(
                ".jpg",
                cv2.resize(
                    np.repeat((x[i].reshape(8, 8, 1) * 15.9).astype(np.uint8), 3, 2), (side, side)
                ),
            )[1].tobytes()
            for i in keep[: train + val]
        ]
        labels = y[keep]
        self.classes = tuple(str(c) for c in range(classes))
        self._splits = {
            "train": MemorySplit(jpegs[:train], labels[:train]),
            "val": MemorySplit(jpegs[train:], labels[train : train + val]),
        }

    def split(self, name):
        return self._splits[name]


@pytest.fixture(scope="session")
def digits():
    """100 training and 37 validation pictures of 10 classes."""
    return MemoryDataset(100, 37)
