"""Losses against torch and torchvision, values and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from ftlib import config
from ftlib.training import losses

B, C = 16, 7


@pytest.fixture
def logits():
    return (3 * torch.randn(B, C, generator=torch.Generator().manual_seed(0))).requires_grad_()


@pytest.fixture
def labels():
    return torch.randint(C, (B,), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mixed():
    """Targets as mixing and smoothing leave them: rows that sum to 1."""
    return torch.rand(B, C, generator=torch.Generator().manual_seed(2)).softmax(1)


WEIGHTS = torch.linspace(0.3, 2.0, C)
ALL = [
    config.CrossEntropy(),
    config.NLL(),
    config.BCE(),
    config.Focal(),
    config.Focal(gamma=0.5, alpha=0.25),
]
ids = [f"{type(c).__name__}-{i}" for i, c in enumerate(ALL)]


def same(ours, theirs, logits):
    """Values, and the gradients of their sums."""
    torch.testing.assert_close(ours, theirs)
    (a,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
    (b,) = torch.autograd.grad(theirs.sum(), logits, retain_graph=True)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_cross_entropy_is_torchs_with_label_smoothing_and_class_weights(
    logits, labels, smoothing, weights
):
    ours = losses.cross_entropy(logits, losses.soft_targets(labels, C, smoothing), weights)
    same(
        ours,
        torch.nn.CrossEntropyLoss(weight=weights, label_smoothing=smoothing, reduction="none")(
            logits, labels
        ),
        logits,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_cross_entropy_of_mixed_targets_is_torchs(logits, mixed, weights):
    same(
        losses.cross_entropy(logits, mixed, weights),
        F.cross_entropy(logits, mixed, weight=weights, reduction="none"),
        logits,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_nll_is_torchs_nll_of_log_probabilities_and_sees_logits_only_through_log_softmax(
    logits, labels, weights
):
    ours = losses.build(
        config.NLL(class_weights="none" if weights is None else "balanced"), weights
    )(logits, losses.soft_targets(labels, C))
    same(
        ours,
        torch.nn.NLLLoss(weight=weights, reduction="none")(F.log_softmax(logits, 1), labels),
        logits,
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_bce_is_torchs_with_logits_summed_over_classes(logits, mixed, weights):
    same(
        losses.bce(logits, mixed, weights),
        torch.nn.BCEWithLogitsLoss(weight=weights, reduction="none")(logits, mixed).sum(1),
        logits,
    )


def test_focal_without_focus_is_alpha_times_cross_entropy(logits, mixed):
    same(
        losses.focal(logits, mixed, gamma=0.0, alpha=0.25),
        0.25 * F.cross_entropy(logits, mixed, reduction="none"),
        logits,
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_of_two_classes_is_torchvisions_sigmoid_focal_loss(gamma):
    """softmax([0, z]) is sigmoid(z): there the two definitions speak of the same probability."""
    z = torch.linspace(-6, 6, 25).requires_grad_()
    y = (torch.arange(25) % 2).float()
    ours = losses.focal(
        torch.stack([torch.zeros(25), z], 1), torch.stack([1 - y, y], 1), gamma=gamma
    )
    same(ours, sigmoid_focal_loss(z, y, alpha=-1, gamma=gamma), z)


def test_focal_is_equation_5_written_out(logits, labels):
    p = logits.softmax(1)[torch.arange(B), labels]
    same(
        losses.focal(logits, losses.soft_targets(labels, C), gamma=2.0, alpha=0.25),
        -0.25 * (1 - p) ** 2 * p.log(),
        logits,
    )


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_the_loss_of_a_mixed_target_is_the_mix_of_the_losses(cfg, logits, labels):
    loss, a = losses.build(cfg), losses.soft_targets(labels, C, 0.1)
    same(
        loss(logits, 0.3 * a + 0.7 * a.roll(1, 0)),
        0.3 * loss(logits, a) + 0.7 * loss(logits, a.roll(1, 0)),
        logits,
    )


def test_torchvisions_sigmoid_focal_loss_has_no_such_mix():
    """Why ours is not that one: under Mixup its focusing factor would be computed from the mixed
    target."""
    z, one = torch.tensor([2.0]), torch.ones(1)
    mix = 0.3 * sigmoid_focal_loss(z, one, alpha=-1) + 0.7 * sigmoid_focal_loss(
        z, 0 * one, alpha=-1
    )
    assert not torch.allclose(sigmoid_focal_loss(z, 0.3 * one, alpha=-1), mix, rtol=0.1)


@pytest.mark.parametrize("cfg", ALL, ids=ids)
def test_gradients_are_those_of_finite_differences(cfg):
    z = torch.randn(
        5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True
    )
    t = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).softmax(1)
    assert torch.autograd.gradcheck(lambda x: losses.build(cfg)(x, t), (z,))


@pytest.mark.parametrize("cfg", ALL, ids=ids)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(cfg, dtype, labels):
    z = (3 * torch.randn(B, C, generator=torch.Generator().manual_seed(5))).to(dtype)
    loss = losses.build(cfg)
    t = losses.soft_targets(labels, C, 0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(z, t)
    assert value.dtype == torch.float32 and value.shape == (B,)
    torch.testing.assert_close(value, loss(z.float(), t))


@pytest.mark.parametrize("cfg", ALL, ids=ids)
@pytest.mark.parametrize("size", [30.0, 300.0, 6e4])
def test_extreme_logits_give_finite_values_and_gradients(cfg, size):
    """Sure and right, sure and wrong, at sizes that fp16 reaches: probabilities of exactly 0 and
    1 in float32."""
    z = (torch.eye(C) * size).to(torch.float16).float().repeat(2, 1).requires_grad_()
    t = losses.soft_targets(torch.cat([torch.arange(C), (torch.arange(C) + 1) % C]), C, 0.1)
    value = losses.build(cfg)(z, t)
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert torch.isfinite(value).all() and torch.isfinite(grad).all() and (value >= 0).all()


def test_soft_targets_smooth_as_torch_does_and_sum_to_one(labels):
    t = losses.soft_targets(labels, C, 0.3)
    assert t.dtype == torch.float32 and t.shape == (B, C)
    torch.testing.assert_close(t.sum(1), torch.ones(B))
    torch.testing.assert_close(t[torch.arange(B), labels], torch.full((B,), 0.7 + 0.3 / C))
    assert torch.equal(losses.soft_targets(labels, C), F.one_hot(labels, C).float())


def test_balanced_weights_are_scikit_learns_and_average_one_over_the_images():
    y = np.repeat(np.arange(4), [1, 5, 20, 974])
    w = losses.balanced_weights(np.bincount(y))
    np.testing.assert_allclose(
        w.numpy(), compute_class_weight("balanced", classes=np.arange(4), y=y), rtol=1e-6
    )
    assert w[torch.from_numpy(y)].double().mean().item() == pytest.approx(1, rel=1e-6)
    assert torch.equal(losses.balanced_weights([3, 3, 3]), torch.ones(3))


def test_a_class_without_images_is_named():
    with pytest.raises(ValueError, match=r"class_weights.*\[1\].*none"):
        losses.balanced_weights([3, 0, 2])


def test_class_weights_that_were_asked_for_must_be_there_and_the_other_way_round():
    with pytest.raises(ValueError, match="not given"):
        losses.build(config.CrossEntropy(class_weights="balanced"))
    with pytest.raises(ValueError, match="given"):
        losses.build(config.CrossEntropy(), WEIGHTS)


@pytest.mark.parametrize("kind", [config.CrossEntropy, config.NLL, config.BCE, config.Focal])
def test_class_weights_reach_every_loss(kind, logits, mixed):
    value = losses.build(kind(class_weights="balanced"), WEIGHTS)(logits, mixed)
    assert not torch.allclose(value, losses.build(kind())(logits, mixed))
    torch.testing.assert_close(
        losses.build(kind(class_weights="balanced"), torch.ones(C))(logits, mixed),
        losses.build(kind())(logits, mixed),
    )
