"""Temperature scaling against an independent optimiser and against a model whose true
temperature is known."""

import numpy as np
import pytest
import torch

from ftlib.report import calibration as C
from ftlib.report import metrics as M


def honest(n, classes=6, seed=0):
    """Logits whose softmax is the true distribution of the labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes)) * 2
    uniform = rng.random((n, 1))
    return logits, (M.softmax(logits).cumsum(axis=1) < uniform).sum(axis=1).clip(0, classes - 1)


@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_finds_the_factor_by_which_logits_were_blown_up(factor):
    logits, labels = honest(8000)
    assert C.temperature(logits * factor, labels) == pytest.approx(factor, rel=0.05)


def test_agrees_with_torchs_lbfgs():
    logits, labels = honest(3000, seed=1)
    logits *= 2.5
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, tolerance_grad=1e-12)
    x, y = torch.tensor(logits), torch.tensor(labels)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x / log_t.exp(), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert C.temperature(logits, labels) == pytest.approx(float(log_t.exp().detach()), rel=1e-3)


def test_calibration_lowers_nll_and_ece_and_keeps_every_prediction():
    logits, labels = honest(4000, seed=2)
    logits *= 3
    found = C.cross_fitted(logits, labels)
    before, after = M.scores(logits, labels), M.scores(found.scaled, labels)
    assert after["nll"].value < before["nll"].value and after["ece"].value < before["ece"].value / 3
    assert (found.scaled.argmax(axis=1) == logits.argmax(axis=1)).all() and after[
        "top1"
    ].value == before["top1"].value


def test_no_image_takes_part_in_fitting_its_own_temperature():
    logits, labels = honest(200, seed=3)
    logits *= 2
    wrong = labels.copy()
    wrong[0] = (labels[0] + 1) % 6
    a, b = C.cross_fitted(logits, labels).scaled, C.cross_fitted(logits, wrong).scaled
    np.testing.assert_array_equal(a[0], b[0])
    assert (a[1:] != b[1:]).any(axis=1).sum() == 100  # the other half moved


def test_the_tuning_split_alone_decides_when_there_is_one():
    logits, labels = honest(500, seed=4)
    tuning, tuning_labels = honest(3000, seed=5)
    found = C.held_out(logits * 2, labels, tuning * 2, tuning_labels)
    assert found.temperature == pytest.approx(2, rel=0.1)
    np.testing.assert_allclose(found.scaled, logits * 2 / found.temperature)
    assert "3,000 images of the tuning split" in found.fitted_on


def test_a_split_without_a_mistake_does_not_send_the_temperature_to_zero():
    logits = np.eye(10)[np.arange(300) % 10] * 6.0
    t = C.temperature(logits, np.arange(300) % 10)
    assert 0.3 < t < 1 and C.temperature(logits, np.arange(300)[::-1] % 10) > 1


def test_a_single_image_stays_as_it_is():
    assert C.cross_fitted(np.array([[1.0, 2.0]]), np.array([1])).temperature == 1.0
