"""Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) of a microbatch: one of the two, or
neither, never both.

`draw` decides everything from a key alone, on the CPU, in numpy: so any worker that gets this
microbatch mixes it alike, and a resumed run goes on alike. `apply` and the two pure functions below
it do the arithmetic on the images' device and never wait for it.

Pairing is by a random permutation of the microbatch, so an image can meet itself. Accuracy is
counted against the image's own label (its primary target), whatever lambda is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ftlib import config

Box = tuple[int, int, int, int]
"""x1, y1, x2, y2 in pixels, the ends excluded."""


@dataclass(frozen=True, eq=False)
class MixPlan:
    """What happens to one microbatch."""

    kind: Literal["mixup", "cutmix"]
    partner: Tensor
    """int64[b] on the CPU: image i is mixed with image partner[i]."""
    lam: float
    """Share of the image itself in its target; for CutMix 1 - (pasted area / whole area), not
    the lambda that was drawn."""
    box: Box | None = None
    """CutMix: the rectangle that is pasted."""


def draw(cfg: config.Mix, key: int, batch: int, height: int, width: int) -> MixPlan | None:
    """The plan of the microbatch with this key (uint64), or None where it stays as it is.

    The draws come in a fixed order and number, so changing one setting leaves the others' draws as
    they were.
    """
    if cfg.mixup_alpha == 0 and cfg.cutmix_alpha == 0:
        return None
    rng = np.random.Generator(np.random.Philox(key))
    mixed, which, x, y = rng.random(4)
    if mixed >= cfg.p:
        return None
    partner = torch.from_numpy(rng.permutation(batch))
    share = (
        cfg.cutmix_share
        if cfg.mixup_alpha > 0 and cfg.cutmix_alpha > 0
        else float(cfg.cutmix_alpha > 0)
    )
    if which >= share:
        return MixPlan("mixup", partner, float(rng.beta(cfg.mixup_alpha, cfg.mixup_alpha)))
    box = cutmix_box(
        float(rng.beta(cfg.cutmix_alpha, cfg.cutmix_alpha)),
        int(x * width),
        int(y * height),
        height,
        width,
    )
    return MixPlan("cutmix", partner, cutmix_lam(box, height, width), box)


def cutmix_box(lam: float, x: int, y: int, height: int, width: int) -> Box:
    """The rectangle around the pixel (x, y) with sides sqrt(1 - lam) of the image's, cut off at
    the image's edge (as torchvision)."""
    half = 0.5 * math.sqrt(1.0 - lam)
    w, h = int(half * width), int(half * height)
    return max(x - w, 0), max(y - h, 0), min(x + w, width), min(y + h, height)


def cutmix_lam(box: Box, height: int, width: int) -> float:
    """Share of the image that the box leaves as it was."""
    x1, y1, x2, y2 = box
    return 1.0 - (x2 - x1) * (y2 - y1) / (width * height)


def apply(plan: MixPlan | None, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed (images, targets); the arguments stay untouched. images [b, C, H, W] float or uint8,
    targets float [b, classes]."""
    if plan is None:
        return images, targets
    partner = plan.partner.to(images.device, non_blocking=True)
    if plan.box is None:
        return mixup(images, targets, partner, plan.lam)
    return cutmix(images, targets, partner, plan.box)


def mixup(images: Tensor, targets: Tensor, partner: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """lam * image + (1 - lam) * partner, for images and targets. uint8 images come back as
    uint8, rounded to nearest."""
    if images.is_floating_point():
        mixed = _blend(images, partner, lam)
    else:
        mixed = _blend(images.to(torch.float32), partner, lam).round_().to(images.dtype)
    return mixed, _blend(targets, partner, lam)


def cutmix(images: Tensor, targets: Tensor, partner: Tensor, box: Box) -> tuple[Tensor, Tensor]:
    """The partner's pixels within `box`, the image's own around it; targets in proportion to the
    areas."""
    x1, y1, x2, y2 = box
    mixed = images.clone()
    mixed[..., y1:y2, x1:x2] = images[partner, :, y1:y2, x1:x2]
    return mixed, _blend(targets, partner, cutmix_lam(box, images.shape[-2], images.shape[-1]))


def _blend(x: Tensor, partner: Tensor, lam: float) -> Tensor:
    return (x * lam).add_(
        x[partner], alpha=1.0 - lam
    )  # x[partner] keeps channels_last, index_select would not
