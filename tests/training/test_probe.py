"""The linear probe: its regression against scikit-learn, its penalty, its classifier."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ftlib.config import Model
from ftlib.data import sampler
from ftlib.settings import ConfigError
from ftlib.training import models, probe


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    return features.astype(np.float32)[:600], labels.astype(np.int64)[:600]


def test_the_head_is_scikit_learns_regression_on_standardized_features(digits):
    features, labels = digits
    head = probe.fit_head(features, labels, 10, c=0.1)
    scaler = StandardScaler().fit(features)
    theirs = LogisticRegression(C=0.1, max_iter=2000).fit(scaler.transform(features), labels)
    expected = theirs.predict_proba(scaler.transform(features))
    ours = torch.softmax(torch.from_numpy(head.logits(features)), dim=1).numpy()
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_two_classes_give_two_logits_with_the_same_probabilities(digits):
    features, labels = digits
    two = labels < 2
    head = probe.fit_head(features[two], labels[two], 2, c=1.0)
    scaler = StandardScaler().fit(features[two])
    theirs = LogisticRegression(C=1.0, max_iter=2000)
    theirs.fit(scaler.transform(features[two]), labels[two])
    ours = torch.softmax(torch.from_numpy(head.logits(features[two])), dim=1)[:, 1].numpy()
    expected = theirs.predict_proba(scaler.transform(features[two]))[:, 1]
    np.testing.assert_allclose(ours, expected, atol=2e-3)


def test_a_class_without_images_is_never_predicted(digits):
    features, labels = digits
    head = probe.fit_head(features, labels, 12, c=0.1)
    assert head.logits(features).argmax(axis=1).max() < 10
    assert np.isfinite(head.logits(features)).all()


def test_the_chosen_penalty_is_the_one_with_the_least_tuning_loss(digits):
    features, labels = digits
    result = probe.fit(features, labels, 10, seed=0)
    assert [t.c for t in result.trials] == list(probe.PENALTIES)
    assert result.c == min(result.trials, key=lambda t: t.loss).c
    assert probe.accuracy(result.head.logits(features), labels) > 95


def test_images_that_the_model_was_trained_on_do_not_choose_the_penalty(digits):
    features, labels = digits
    seen = np.arange(len(labels)) % 3 > 0
    leaky = features + 100 * seen[:, None] * np.eye(features.shape[1], dtype=np.float32)[labels]
    result = probe.fit(leaky, labels, 10, seed=0, seen=seen)
    unseen = np.flatnonzero(~seen)
    tuning = sampler.tuning_split(labels, unseen, probe.TUNING_FRACTION, 0)[1]
    kept = np.setdiff1d(np.arange(len(labels)), tuning)
    head = probe.fit_head(leaky[kept], labels[kept], 10, result.c)
    chosen = next(t for t in result.trials if t.c == result.c)
    assert chosen.top1 == probe.accuracy(head.logits(leaky[tuning]), labels[tuning])


def test_a_set_too_small_for_a_tuning_split_is_fitted_all_the_same():
    features = np.eye(4, dtype=np.float32)[:2]
    result = probe.fit(features, np.array([0, 1]), 2, seed=0)
    assert result.trials == []
    assert result.head.logits(features).argmax(axis=1).tolist() == [0, 1]


def test_accuracy_is_in_percent_and_counts_the_top_k():
    logits = np.array([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]], np.float32)
    assert probe.accuracy(logits, np.array([2, 1])) == 50.0
    assert probe.accuracy(logits, np.array([2, 1]), 2) == 100.0


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v3_small", "timm/convnext_atto"])
def test_the_head_in_the_model_gives_the_probes_logits(arch):
    torch.manual_seed(0)
    model = models.build(Model(arch=arch), 3, 64).eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad(), probe.head_inputs(model) as kept:
        model(images)
    features = kept[0]
    width = models.head(model).weight.shape[1]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, width)).astype(np.float32)
    head = probe.LinearHead(weight, np.float32([0.1, 0.2, 0.3]))
    probe.put_head(model, head)
    with torch.no_grad():
        logits = model(images).numpy()
    np.testing.assert_allclose(logits, head.logits(features), rtol=1e-4, atol=1e-4)


def test_a_model_that_classifies_maps_is_refused():
    model = models.build(Model(arch="squeezenet1_1"), 3, 64).eval()
    with (
        torch.no_grad(),
        probe.head_inputs(model),
        pytest.raises(ConfigError, match="no linear probe.*--no-probe"),
    ):
        model(torch.zeros(1, 3, 64, 64))


def test_features_are_kept_and_a_damaged_file_is_computed_anew(tmp_path):
    computed = []

    def compute():
        computed.append(1)
        return np.ones((3, 2), np.float32)

    for _ in range(2):
        assert probe.cached(tmp_path, "k", compute, 3).shape == (3, 2)
    assert len(computed) == 1
    (tmp_path / "k.safetensors").write_bytes(b"damaged")
    probe.cached(tmp_path, "k", compute, 3)
    assert len(computed) == 2
