"""Losses on soft targets: one meaning under label smoothing, Mixup and CutMix alike.

Every loss takes logits [b, C] and targets [b, C] (each row sums to 1) and gives one value per image
[b]; the training loop sums them and divides by the number of images in the step. Values are
computed in float32 whatever the autocast type (float64 stays).

Every one is affine in the target as defined here, so the loss of a mixed target is the same mix of
the two targets' losses. That is not so of variants elsewhere: BCE with a target threshold (timm),
or focal loss whose focusing factor sees the mixed target (torchvision's sigmoid_focal_loss).

Class weights w [C] weigh the terms of the sum over classes, as in torch.nn.CrossEntropyLoss on
probabilities. Note that torch's reduction="mean" with class indices also divides by the sum of the
weights in the batch; here nothing is divided, since an image's share in the step must not depend on
what else is in its batch (`balanced_weights` has mean 1 over the training images).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import assert_never

from ftlib import config

PerImageLoss = Callable[[Tensor, Tensor], Tensor]


def soft_targets(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """int64[b] -> float32[b, C]: one-hot, with the share `smoothing` spread evenly over all C
    classes (Szegedy et al. 2016, eq. 7)."""
    # Not F.one_hot, which reads the labels' values to check them (on a CPU).
    hot = torch.zeros(len(labels), classes, device=labels.device).scatter_(1, labels[:, None], 1.0)
    return hot.mul_(1.0 - smoothing).add_(smoothing / classes)


def balanced_weights(counts: Tensor | np.ndarray | Sequence[int]) -> Tensor:
    """Images per class [C] -> float32[C]: N / (C * count), whose mean over the N images is 1
    (King and Zeng 2001)."""
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if counts.ndim != 1 or counts.numel() == 0 or bool((counts < 1).any()):
        empty = [int(i) for i in torch.nonzero(counts.flatten() < 1).flatten()[:5]]
        raise ValueError(
            "loss.class_weights = balanced: every class needs a training image, and the classes "
            f"number {empty} have none. Set loss.class_weights to none"
        )
    return (counts.sum() / (len(counts) * counts)).to(torch.float32)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _weighed(terms: Tensor, weights: Tensor | None) -> Tensor:
    return terms if weights is None else terms * weights.to(terms)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """- sum_c w_c t_c log softmax(z)_c."""
    return nll(F.log_softmax(_wide(logits), dim=1), targets, weights)


def nll(log_probabilities: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """- sum_c w_c t_c lp_c, of log-probabilities [b, C] as torch.nn.NLLLoss takes them."""
    lp = _wide(log_probabilities)
    return -_weighed(lp * targets.to(lp), weights).sum(1)


def bce(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """sum_c w_c BCEWithLogits(z_c, t_c): one against all, summed over classes, so that its
    gradient is about as large as cross-entropy's whatever C is (Wightman et al. 2021, section
    4.1). torch's mean over classes is this divided by C."""
    z = _wide(logits)
    return _weighed(
        F.binary_cross_entropy_with_logits(z, targets.to(z), reduction="none"), weights
    ).sum(1)


def focal(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float = 1.0,
) -> Tensor:
    """- alpha sum_c w_c t_c (1 - p_c)^gamma log p_c with p = softmax(z): Lin et al. 2017, eq. 5,
    over soft targets. gamma = 0 is alpha times cross-entropy."""
    lp = F.log_softmax(_wide(logits), dim=1)
    # 1 - p, exact for p near 1. The floor keeps the power's derivative finite where p rounds to 1
    # (0^(gamma - 1) for gamma < 1).
    miss = (-torch.expm1(lp)).clamp_min(1e-12)
    return -alpha * _weighed(lp * targets.to(lp) * miss**gamma, weights).sum(1)


def build(cfg: config.Loss, class_weights: Tensor | None = None) -> PerImageLoss:
    """The loss that `cfg` names.

    `class_weights` float32[C], on the logits' device, exactly where cfg asks for them.
    """
    if (cfg.class_weights == "balanced") != (class_weights is not None):
        given = "not given" if class_weights is None else "given"
        raise ValueError(f"loss.class_weights = {cfg.class_weights}: class weights were {given}")
    w = class_weights
    match cfg:
        case config.CrossEntropy():
            return lambda logits, targets: cross_entropy(logits, targets, w)
        case config.NLL():
            return lambda logits, targets: nll(F.log_softmax(_wide(logits), dim=1), targets, w)
        case config.BCE():
            return lambda logits, targets: bce(logits, targets, w)
        case config.Focal():
            return lambda logits, targets: focal(
                logits, targets, w, gamma=cfg.gamma, alpha=cfg.alpha
            )
    assert_never(cfg)
