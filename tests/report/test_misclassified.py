"""Which mistakes a report shows, and its figures."""

import io

import numpy as np
import pytest
from PIL import Image

from ftlib.report import misclassified
from ftlib.report.metrics import reliability


def test_the_worst_are_the_most_confident_mistakes():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    assert misclassified.worst(probabilities, np.array([1, 0, 1, 1]), 5).tolist() == [0, 1, 3]
    assert misclassified.worst(probabilities, np.array([0, 1, 1, 0]), 5).tolist() == []


def test_examples_of_a_pair_come_surest_first():
    probabilities = np.array([[0.1, 0.9], [0.4, 0.6], [0.8, 0.2], [0.3, 0.7]])
    predicted, labels = probabilities.argmax(1), np.array([0, 0, 0, 1])
    found = misclassified.examples(predicted, labels, probabilities[:, 1], true=0, said=1, limit=4)
    assert found.tolist() == [0, 1]


@pytest.mark.parametrize("classes", [3, 60])
def test_figures_are_pictures_of_a_readable_size(classes):
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 9, (classes, classes))
    image = Image.open(
        io.BytesIO(
            misclassified.confusion_figure(matrix, [f"class number {i}" for i in range(classes)])
        )
    )
    assert 400 <= image.width <= 1700 and 400 <= image.height <= 1700
    confidence = rng.random(300)
    right = rng.random(300) < confidence
    drawn = reliability(confidence, right)
    assert (
        Image.open(
            io.BytesIO(misclassified.calibration_figure(drawn, drawn, confidence, right))
        ).width
        > 900
    )
    tile = ("a title", [np.zeros((32, 32, 3), np.uint8)] * 3)
    assert Image.open(io.BytesIO(misclassified.sheet([tile] * 5, ("a", "b", "c")))).height > 300


def test_a_dollar_in_a_class_name_is_no_mathematics():
    names = ["$1_^x$", "$10_$20", "a\x1bb"]
    drawn = misclassified.confusion_figure(np.eye(3, dtype=np.int64), names)
    assert Image.open(io.BytesIO(drawn)).width > 400
    tile = ("$1_^x$ predicted as $10_$20", [np.zeros((32, 32, 3), np.uint8)] * 3)
    assert Image.open(io.BytesIO(misclassified.sheet([tile], ("a", "b", "c")))).width > 100
