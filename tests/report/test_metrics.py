"""Scores against scikit-learn and torchmetrics; intervals against their definition: how often
they cover the truth."""

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from ftlib.report import metrics as M


def made(n=700, classes=9, seed=0, skill=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += skill
    return logits, labels


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_agrees_with_scikit_learn_and_torchmetrics(k):
    logits, labels = made()
    ours = M.hits(logits, labels, k).mean()
    assert ours == pytest.approx(sk.top_k_accuracy_score(labels, logits, k=k))
    theirs = tm.multiclass_accuracy(
        torch.tensor(logits), torch.tensor(labels), num_classes=9, top_k=k, average="micro"
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_equal_logits_earn_no_credit():
    assert M.hits(np.zeros((4, 4)), np.arange(4), 1).tolist() == [True, False, False, False]
    assert M.hits(np.zeros((4, 4)), np.arange(4), 2).tolist() == [True, True, False, False]
    assert M.hits(np.zeros((4, 4)), np.arange(4), 5).all()


def test_top_1_is_argmax():
    logits = np.random.default_rng(1).integers(0, 3, (500, 6)).astype(float)  # many ties
    labels = np.random.default_rng(2).integers(0, 6, 500)
    assert (M.hits(logits, labels, 1) == (logits.argmax(axis=1) == labels)).all()


def test_nll_agrees_with_scikit_learn_and_survives_huge_logits():
    logits, labels = made()
    assert M.nll(logits, labels).mean() == pytest.approx(sk.log_loss(labels, M.softmax(logits)))
    assert np.isfinite(M.nll(logits * 1e4, labels)).all()
    np.testing.assert_allclose(
        M.softmax(logits), torch.softmax(torch.tensor(logits).double(), 1).numpy(), rtol=1e-12
    )


def test_per_class_and_confusion_agree_with_scikit_learn():
    logits, labels = made(skill=0.3)
    labels[labels == 4] = 5  # a class without images
    logits[:, 2] = -99  # a class that is never predicted
    predicted = logits.argmax(axis=1)
    matrix = M.confusion(predicted, labels, 9)
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(labels, predicted, labels=range(9)))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(9), zero_division=0
    )
    ours = M.per_class(matrix)
    for a, b in (
        (ours.precision, precision),
        (ours.recall, recall),
        (ours.f1, f1),
        (ours.support, support),
    ):
        np.testing.assert_allclose(a, b)


def test_reliability_bins_agree_with_scikit_learn():
    logits, labels = made(n=1502)  # no edge falls on an image, where rounding would decide
    confidence, right = M.softmax(logits).max(axis=1), M.hits(logits, labels)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15, strategy="quantile")
    ours = M.reliability(confidence, right)
    np.testing.assert_allclose(ours.accuracy, accuracy)
    np.testing.assert_allclose(ours.confidence, mean)
    assert ours.count.sum() == 1502 and ours.count.min() >= 100


def test_ece_agrees_with_torchmetrics_where_equal_mass_and_equal_width_bins_coincide():
    rng = np.random.default_rng(3)
    confidence = (np.arange(1500) + 0.5) / 1500  # evenly spread: quantiles are widths
    right = rng.random(1500) < confidence**2
    theirs = tm.binary_calibration_error(
        torch.tensor(confidence), torch.tensor(right.astype(int)), n_bins=15, norm="l1"
    )
    assert M.reliability(confidence, right).error == pytest.approx(float(theirs), abs=2e-4)


@given(st.integers(1, 60), st.integers(2, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_scores_do_not_depend_on_the_order_of_images(n, classes, seed):
    rng = np.random.default_rng(seed)
    logits, labels = (
        rng.integers(-2, 3, (n, classes)).astype(np.float32),
        rng.integers(0, classes, n),
    )
    order = rng.permutation(n)
    a, b = M.scores(logits, labels), M.scores(logits[order], labels[order])
    for name, score in a.items():
        assert score.value == pytest.approx(b[name].value, abs=1e-9)
        assert score.low <= score.value <= score.high


def test_confused_pairs_are_the_biggest_off_diagonal_cells():
    matrix = np.array([[50, 3, 0], [7, 40, 0], [0, 0, 9]])
    assert M.confused_pairs(matrix, 5) == [(1, 0, 7), (0, 1, 3)]
    assert M.most_confused_classes(matrix, 2).tolist() == [0, 1]
    assert matrix[0, 0] == 50


def test_the_interval_of_top_1_covers_the_truth_in_about_95_of_100_worlds():
    rng = np.random.default_rng(5)
    covered = 0
    for world in range(200):
        right = rng.random(300) < 0.8
        drawn = M.bootstrap(300, lambda w, r=right: w @ r[:, None].astype(float), seed=world)
        found = M.share(right, drawn[:, 0])
        covered += found.low <= 80 <= found.high
    assert 180 <= covered <= 199


def test_the_interval_agrees_with_scipys_bootstrap():
    from scipy.stats import bootstrap

    logits, labels = made(n=400)
    losses = M.nll(logits, labels)
    theirs = bootstrap(
        (losses,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    ours = M.scores(logits, labels)["nll"]
    assert ours.low == pytest.approx(theirs.low, abs=0.02) and ours.high == pytest.approx(
        theirs.high, abs=0.02
    )


@pytest.mark.parametrize("classes, said", [(5, False), (6, True)])
def test_top5_is_left_out_by_the_number_of_classes_alone(classes, said):
    labels = np.arange(60) % classes
    found = M.TestSplit(60, M.scores(np.eye(classes)[labels] * 9, labels))
    assert ("top5" in found.scores) is ("top-5" in str(found)) is said
    assert ("test/top5" in found.metrics) is said
    assert M.TestSplit.from_dict(found.to_dict()) == found


def test_all_right_is_not_certainty():
    logits = np.eye(5)[np.arange(100) % 5] * 9
    found = M.scores(logits, np.arange(100) % 5)["top1"]
    assert found.value == found.high == 100 and found.low == pytest.approx(
        96.38, abs=0.01
    )  # Clopper-Pearson, n = 100
    assert M.scores(-logits, np.arange(100) % 5)["top1"].high == pytest.approx(3.62, abs=0.01)


def test_the_interval_of_a_perfectly_calibrated_models_ece_contains_its_value():
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(2000, 5)) * 2
    labels = np.array([rng.choice(5, p=p) for p in M.softmax(logits)])
    found = M.scores(logits, labels)["ece"]
    assert found.low <= found.value <= found.high and found.value < 0.04


@pytest.mark.parametrize(
    ("logits", "labels", "says"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), "one row of logits per label"),
        (np.zeros((0, 2)), np.zeros(0, int), "the split is empty"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), "the model has 2 classes"),
        (np.array([[np.nan, 0], [0, 0]]), np.array([0, 1]), "1 of 2 predictions are NaN"),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused(logits, labels, says):
    with pytest.raises(M.ScoreError, match=says):
        M.scores(logits, labels)
