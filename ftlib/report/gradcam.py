"""Where a model looks: Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) for any classifier.

The layer is the deepest one whose maps are still at least 4 x 4. The last block of a ResNet, which
is the usual choice, has 7 x 7 of them at 224 px, but a single one at 32 px, which shows nothing.
The maps equal those of the grad-cam library, which the tests compare them with. Importing that
library took a second, for sklearn's clustering.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ftlib.training import models

LEAST = 4
"""Least side of the maps, in cells."""
MAP_WEIGHT = 0.65
"""Of the map's color where it is highest, so that the picture stays visible below it."""


def target_layer(model: nn.Module, images: Tensor) -> nn.Module:
    """The layer whose activations Grad-CAM weighs, found by running `images` (float[b, 3, H, W])
    through the model."""
    seen: list[tuple[int, nn.Module]] = []

    def remember(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            _, channels, height, width = output.shape
            if height == width and not (channels == height != width) and height > 1:
                seen.append((height, module))

    hooks = [
        module.register_forward_hook(remember) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad():
            model(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise ValueError(
            f"{type(model).__name__} has no layer with maps at {images.shape[-1]} px: Grad-CAM has "
            "nothing to show. Evaluate it at a larger size"
        )
    side = min((s for s, _ in seen if s >= LEAST), default=max(s for s, _ in seen))
    return [module for s, module in seen if s == side][-1]


def grad_cam(
    model: nn.Module, images: Tensor, classes: np.ndarray, layer: nn.Module | None = None
) -> np.ndarray:
    """float32[b, H, W] in 0..1: how much each place speaks for the class (int[b]) of its image.
    images: normalised float[b, 3, H, W]."""
    tokens = models.token_layer(model) if layer is None else None
    if tokens is not None:
        layer = tokens.layer
    layer = layer or target_layer(model, images)
    kept: list[Tensor] = []

    def start_here(module: nn.Module, _: object, output: Tensor) -> Tensor:
        """Gradients are needed from this layer on: it may be frozen, and those below it cost."""
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()  # the next layer may work in place

    hook = layer.register_forward_hook(start_here)
    try:
        with torch.enable_grad():
            logits = model(images)
            chosen = torch.from_numpy(classes).to(logits.device)
            scores = logits.gather(1, chosen[:, None])
            (gradient,) = torch.autograd.grad(scores.sum(), kept[-1:])
    finally:
        hook.remove()
    activation = kept[-1].detach()
    if tokens is not None:
        activation, gradient = tokens.to_maps(activation), tokens.to_maps(gradient)
    coarse = (gradient.mean(dim=(2, 3), keepdim=True) * activation).sum(dim=1).relu()
    height, width = images.shape[2:]
    maps = [cv2.resize(one, (width, height)) for one in coarse.float().cpu().numpy()]
    return np.stack([_to_unit_range(np.nan_to_num(one)) for one in maps])


def _to_unit_range(values: np.ndarray) -> np.ndarray:
    lowest = values.min()
    scaled: np.ndarray = (values - lowest) / max(values.max() - lowest, np.float32(1e-30))
    return scaled


def overlay(image: np.ndarray, cam: np.ndarray, side: int = 0) -> np.ndarray:
    """uint8[S, S, 3]: the picture (uint8[H, W, 3]) in gray, and the map over it: red, and yellow
    where it speaks most for the class. Where it says nothing, the gray picture is as it was.

    side: enlarges small pictures.
    """
    side = max(side, *image.shape[:2])
    enlarged = cv2.resize(image, (side, side), interpolation=cv2.INTER_NEAREST)
    gray = cv2.cvtColor(enlarged, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    smooth = np.clip(cv2.resize(cam, (side, side), interpolation=cv2.INTER_CUBIC), 0, 1)
    red, green, blue = np.full_like(smooth, 235), 40 + 190 * smooth**2, np.full_like(smooth, 30)
    weight = MAP_WEIGHT * smooth[..., None]
    blended = (1 - weight) * gray + weight * np.stack([red, green, blue], axis=-1)
    return np.rint(blended).astype(np.uint8)
